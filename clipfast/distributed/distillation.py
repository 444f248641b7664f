"""Distillation over ranks: the statistics of student and teacher, then a pass over all pairs of both."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from clipfast import dispatch
from clipfast.block import Block, Weights
from clipfast.distillation import Options
from clipfast.distributed.job import GradientSums, Images, Job, added, agreed, formed_loss, rows_of
from clipfast.schemes import GroupOptions
from clipfast.softmax import without_autocast


@torch.compiler.disable(reason="clipfast: ranks agree on sizes and options before tensors are sent")  # type: ignore[no-untyped-call, untyped-decorator]
def distillation_loss(
    x: Tensor,  # [n, d], n >= 0
    y: Tensor,  # [m, d], m >= n
    scale: Tensor,  # []
    teacher_x: Tensor,  # [n, d']
    teacher_y: Tensor,  # [m, d']
    teacher_scale: Tensor,  # []
    options: Options,
    group_options: GroupOptions,
) -> Tensor:  # []
    """The mean over all ranks' images and their matched texts.

    Raises:
        ValueError: the ranks disagree; the same on every rank.
    """
    alike = {**options._asdict(), "d of the teacher's features": teacher_x.shape[1]}
    job = agreed("distillation_loss", x, y, (scale,), alike, group_options)
    backend, n = dispatch.get(options.backend), len(x)

    def compute(wanted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        student, teacher = (
            Images(rows_of(features, options.normalize), factor, torch.zeros_like(factor))
            for features, factor in ((x, scale), (teacher_x, teacher_scale))
        )
        held = job.spread(*(rows_of(features, options.normalize) for features in (y, teacher_y)))
        row_lses, col_lses = _logsumexps(backend, student, teacher, held, job)
        row_weight, nothing = student.vector(1 / (2 * job.rows)), student.vector(0)
        col_weight = pad(row_weight, (0, len(y) - n))  # only a matched text chooses among the images
        of_cols = torch.cat((col_lses, col_weight[:, None]), dim=1)
        sums = GradientSums(student, wanted and job.shards.wants_texts)
        loss = (row_lses[0].sum() + col_lses[:n, 0].sum()) / (2 * job.rows)

        def visit(_: int, texts: Sequence[Tensor]) -> Tensor | None:  # [m', d]
            blocks = _blocks(student, teacher, texts)
            if blocks is None:
                return sums.nothing(texts[0])
            *lses, weight = texts[2].T.contiguous()
            of_student, of_teacher = (
                Weights(row_lse, row_weight, col_lse, weight, nothing)
                for row_lse, col_lse in zip(row_lses, lses, strict=True)
            )
            found = backend.distillation(blocks[0], of_student, blocks[1], of_teacher, wanted, student.dtype)
            loss.sub_((found.row_cross.sum() + torch.where(weight == 0, 0, found.col_cross).sum()) / (2 * job.rows))
            return None if found.gradients is None else sums.add(found.gradients)

        dy = job.scheme.columns([*held, *job.spread(of_cols)], visit, added)
        return torch.stack((loss, sums.dscale)), sums.dx, dy

    with without_autocast(x.device):
        return formed_loss(job, (x, y, scale), options.normalize, compute)


def _blocks(student: Images, teacher: Images, texts: Sequence[Tensor]) -> tuple[Block, Block] | None:
    """Of both against some texts, without positives; None if they have no pairs."""
    blocks = [images.block(len(y), [y]) for images, y in zip((student, teacher), texts[:2], strict=True)]
    return None if blocks[0] is None or blocks[1] is None else (blocks[0], blocks[1])


def _logsumexps(
    backend: ModuleType, student: Images, teacher: Images, held: list[Tensor], job: Job
) -> tuple[list[Tensor], Tensor]:  # [n] of each, [m, 2]
    """Of the rows and of the columns, of student and teacher."""
    row_lses = [student.vector(-torch.inf) for _ in range(2)]

    def visit(_: int, texts: Sequence[Tensor]) -> Tensor:  # [m', 2]
        blocks = _blocks(student, teacher, texts)
        if blocks is None:
            return row_lses[0].new_full((len(texts[0]), 2), -torch.inf)
        found = [backend.forward(block) for block in blocks]
        for row_lse, statistics in zip(row_lses, found, strict=True):
            row_lse.copy_(torch.logaddexp(row_lse, statistics.row_lse))
        return torch.stack([statistics.col_lse for statistics in found], dim=1)

    return row_lses, job.columns(held, visit, lambda parts: parts.logsumexp(dim=0))
