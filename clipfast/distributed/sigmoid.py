"""The sigmoid loss over ranks: one pass over all pairs forms the loss and its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipfast import dispatch
from clipfast.distributed.job import GradientSums, Images, added, agreed, formed_loss, rows_of
from clipfast.schemes import GroupOptions
from clipfast.sigmoid import Options
from clipfast.softmax import without_autocast


@torch.compiler.disable(reason="clipfast: ranks agree on sizes and options before tensors are sent")  # type: ignore[no-untyped-call, untyped-decorator]
def siglip_loss(
    x: Tensor,  # [n, d], n >= 0
    y: Tensor,  # [m, d], m >= n
    scale: Tensor,  # []
    bias: Tensor,  # []
    image_ids: Tensor | None,  # [n], int64, as they are on all ranks
    text_ids: Tensor | None,  # [m], int64
    options: Options,
    group_options: GroupOptions,
) -> Tensor:  # []
    """The sum over all pairs of all ranks, over all ranks' images.

    Raises:
        ValueError: the ranks disagree; the same on every rank.
    """
    alike = {**options._asdict(), "image_ids": "None" if image_ids is None else "given"}
    job = agreed("siglip_loss", x, y, (scale, bias), alike, group_options)
    backend = dispatch.get(options.backend)

    def compute(wanted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        images = Images(rows_of(x, options.normalize), scale, bias, image_ids, options.same_id)
        sums, totals = GradientSums(images, wanted and job.shards.wants_texts), images.vector(0).new_zeros(2)

        def visit(offset: int, texts: Sequence[Tensor]) -> Tensor | None:  # [m', d]
            block = images.block(offset, texts)
            if block is None:
                return sums.nothing(texts[0])
            found = backend.sigmoid(block, 1 / job.rows, wanted, images.dtype)
            totals[0].add_(found.row_loss.sum() / job.rows)
            if found.gradients is None:
                return None
            totals[1].add_(found.dbias)
            return sums.add(found.gradients)

        dy = job.scheme.columns(job.spread(rows_of(y, options.normalize), text_ids), visit, added)
        return torch.stack((totals[0], sums.dscale, totals[1])), sums.dx, dy

    with without_autocast(x.device):
        return formed_loss(job, (x, y, scale, bias), options.normalize, compute)
