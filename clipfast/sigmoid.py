"""The sigmoid loss in one process (SigLIP): one block of logits, the loss and its gradients formed in one pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from clipfast import dispatch
from clipfast.block import Block, Gradients, SigmoidPass
from clipfast.norms import gradients_through_norms, operands
from clipfast.problem import accumulation_dtype, kept_dtype
from clipfast.softmax import without_autocast


class Options(NamedTuple):
    """What `clipfast.siglip_loss` says of its options."""

    normalize: bool
    same_id: str
    backend: str


def forward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    gradients: bool,
    options: Options,
) -> tuple[Tensor, Gradients | None, Tensor | None]:  # the loss [], its gradients, dbias []
    """The gradients are by x and y, in the dtype that `kept_dtype` says: they wait for the backward pass."""
    with without_autocast(x.device):
        backend, n = dispatch.get(options.backend), x.shape[0]
        rows_x, rows_y, x_factor, y_factor = operands(x, y, options.normalize, backend.folds_norms(x.dtype))
        through = options.normalize and x_factor is None
        dtype = accumulation_dtype(x.dtype) if through else kept_dtype(x.dtype)
        block = Block(rows_x, rows_y, scale, bias, 0, x_factor, y_factor, image_ids, text_ids, options.same_id)
        result: SigmoidPass = backend.sigmoid(block, 1 / n, gradients, dtype)
        loss = (result.row_loss.sum() / n).to(scale.dtype)
        if result.gradients is None:
            return loss, None, None
        if through:
            return loss, gradients_through_norms(result.gradients, x, y, kept_dtype(x.dtype)), result.dbias
        return loss, result.gradients, result.dbias
