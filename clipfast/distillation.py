"""Distillation in one process: a student's softmaxes against a teacher's, without either one's n*m logits."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from clipfast import dispatch
from clipfast.block import Block, DistillationPass, Gradients, Weights
from clipfast.norms import gradients_through_norms, operands
from clipfast.problem import accumulation_dtype, kept_dtype
from clipfast.softmax import without_autocast


class Options(NamedTuple):
    """What `clipfast.distillation_loss` says of its options."""

    normalize: bool
    backend: str


def forward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    teacher_x: Tensor,  # [n, d']
    teacher_y: Tensor,  # [m, d']
    teacher_scale: Tensor,  # []
    gradients: bool,
    options: Options,
) -> tuple[Tensor, Gradients | None]:  # the loss [], and its gradients by x, y and scale in `kept_dtype`
    """Statistics of both, 2 P; then one pass that recomputes both and has the crossed sums and the gradients, 4 P."""
    with without_autocast(x.device):
        backend, n = dispatch.get(options.backend), x.shape[0]
        student, of_student = _softmaxes(backend, x, y, scale, options)
        teacher, of_teacher = _softmaxes(backend, teacher_x, teacher_y, teacher_scale, options)
        dtype = accumulation_dtype(x.dtype) if options.normalize else kept_dtype(x.dtype)
        result: DistillationPass = backend.distillation(student, of_student, teacher, of_teacher, gradients, dtype)
        rows = of_student.row_lse - result.row_cross
        cols = (of_student.col_lse - result.col_cross)[:n]
        loss = ((rows.sum() + cols.sum()) / (2 * n)).to(scale.dtype)
        if result.gradients is None:
            return loss, None
        if options.normalize:
            return loss, gradients_through_norms(result.gradients, x, y, kept_dtype(x.dtype))
        return loss, result.gradients


def _softmaxes(backend: ModuleType, x: Tensor, y: Tensor, scale: Tensor, options: Options) -> tuple[Block, Weights]:
    """A block without positives, its logsumexps and the weights that the loss gives them."""
    n, m = x.shape[0], y.shape[0]
    x, y, *_ = operands(x, y, options.normalize, fold=False)
    block = Block(x, y, scale, torch.zeros_like(scale), diag_offset=m)
    statistics = backend.forward(block)
    row_weight, col_weight = (torch.full_like(lse, 1 / (2 * n)) for lse in statistics[:2])
    col_weight[n:] = 0
    return block, Weights(
        statistics.row_lse, row_weight, statistics.col_lse, col_weight, torch.zeros_like(statistics.positive)
    )
