"""The softmax loss in one process: one block of logits, its statistics, the loss, and its gradients.

Saved between the passes are vectors over the batch, and the logits where they are few; beyond that the backward pass
recomputes them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from clipfast import cross_entropy, dispatch
from clipfast.block import POSITIVE, Block, Gradients, Statistics, Weights
from clipfast.logit_sums import Sums, add_constants, logit_sums, same_counts
from clipfast.norms import Factors, gradients_through_norms, operands
from clipfast.problem import accumulation_dtype, kept_dtype

BOTH, IMAGE_TO_TEXT, TEXT_TO_IMAGE = DIRECTIONS = ("both", "image_to_text", "text_to_image")
MEAN, NONE = REDUCTIONS = ("mean", "none")


class Options(NamedTuple):
    """What `clipfast.contrastive_loss` says of its options."""

    normalize: bool
    label_smoothing: float
    direction: str
    reduction: str
    same_id: str
    metrics: bool
    backend: str
    keep: bool = False  # the logits between the passes

    @property
    def plain(self) -> bool:
        """Whether the loss is the mean of both directions' cross-entropies and nothing else."""
        return not self.label_smoothing and self.direction == BOTH and self.reduction == MEAN

    def chosen(self, rows: Tensor, cols: Tensor) -> Tensor:  # [n], [n] -> [], or [2, n] or [n] with reduction "none"
        """The loss of both directions' losses."""
        parts = {BOTH: (rows, cols), IMAGE_TO_TEXT: (rows,), TEXT_TO_IMAGE: (cols,)}[self.direction]
        if self.reduction == NONE:
            return torch.stack(parts) if len(parts) > 1 else parts[0]
        return torch.stack(parts).mean()

    def shares(self, gradient: Tensor, n: int) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of both directions' losses, [n] or [] each; None of a direction that has none."""
        if self.reduction == MEAN:
            gradient = gradient / (2 * n if self.direction == BOTH else n)
            gradient = torch.stack((gradient, gradient)) if self.direction == BOTH else gradient
        if self.direction == BOTH:
            return gradient[0], gradient[1]
        return (gradient, None) if self.direction == IMAGE_TO_TEXT else (None, gradient)


def forward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d], m >= n
    scale: Tensor,  # []
    bias: Tensor,  # []
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    options: Options,
    factors: Factors | None = None,  # of rows that are normalized, where they are known
) -> tuple[Tensor, Statistics]:  # the loss as `Options.chosen` says, in the accumulation dtype
    with without_autocast(x.device):
        backend = dispatch.get(options.backend)
        block = make_block(backend, x, y, scale, bias, image_ids, text_ids, options, factors, keep=options.keep)
        statistics = backend.forward(block, backend.matches(block) if options.metrics else None)
        if options.plain and not block.adds_positives:
            mean = getattr(backend, "symmetric_cross_entropy", cross_entropy.symmetric_cross_entropy)
            return mean(statistics, scale.dtype), statistics
        sums: tuple[Sums | None, Sums | None] = (None, None)
        if options.label_smoothing or block.adds_positives:
            row_sums, col_sums = logit_sums(block, options.label_smoothing > 0)
            sums = row_sums, Sums(*(t[: block.n] for t in col_sums))
        losses = (
            side.losses(of_side, options.label_smoothing, block.adds_positives)
            for side, of_side in zip(cross_entropy.sides(statistics), sums, strict=True)
        )
        return options.chosen(*losses).to(scale.dtype), statistics


def forms_gradients(options: Options, ids: bool) -> bool:
    """Whether a loss whose logits may be kept has its gradients formed with it, by `symmetric`, to wait for theirs."""
    plain = options.plain and not options.metrics and not (ids and options.same_id == POSITIVE)
    return options.keep and plain and hasattr(dispatch.get(options.backend), "symmetric")


def symmetric(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d], m >= n
    scale: Tensor,  # []
    bias: Tensor | None,  # []; without one it is 0
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    options: Options,
) -> tuple[Tensor, Gradients, Tensor]:
    """The mean loss of both directions [], its gradients, in the dtype that `kept_dtype` says, and dbias []."""
    backend = dispatch.get(options.backend)
    if options.normalize:
        with without_autocast(x.device):
            block = make_block(backend, x, y, scale, bias, image_ids, text_ids, options)
    else:
        block = Block(x, y, scale, bias, row_ids=image_ids, col_ids=text_ids, same_id=options.same_id)
    return backend.symmetric(block, kept_dtype(x.dtype))  # type: ignore[no-any-return]


def backward(
    gradient: Tensor,  # of the loss's shape
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    statistics: Statistics,
    options: Options,
    factors: Factors | None = None,
    dtype: torch.dtype | None = None,  # of dx and dy, the block's or its accumulation dtype; None for the block's
) -> tuple[Gradients, Tensor]:  # and dbias []
    dtype = dtype or x.dtype
    with without_autocast(x.device):
        backend = dispatch.get(options.backend)
        block = make_block(backend, x, y, scale, bias, image_ids, text_ids, options, factors)
        constants, at_once = None, getattr(backend, "symmetric_gradients", None)
        # Not rounded yet where something is to become of them.
        through = options.normalize and block.x_factor is None
        of_sums = accumulation_dtype(x.dtype) if through or options.label_smoothing else dtype
        if not options.plain or block.adds_positives:
            weights, constants, dbias = _weights(block, statistics, gradient, options)
            gradients = backend.backward(block, weights._replace(kept=statistics.kept), of_sums)
        elif at_once:
            gradients, dbias = at_once(block, statistics, gradient, of_sums)
        else:
            weights = cross_entropy.symmetric_cross_entropy_weights(statistics, gradient)
            gradients, dbias = backend.backward(block, weights._replace(kept=statistics.kept), of_sums), _total(weights)
        if constants is not None:
            gradients = add_constants(block, *constants, gradients)
        if through:
            return gradients_through_norms(gradients, x, y, dtype, factors), dbias
        return Gradients(gradients.dx.to(dtype), gradients.dy.to(dtype), gradients.dscale), dbias


def _weights(
    block: Block, statistics: Statistics, gradient: Tensor, options: Options
) -> tuple[Weights, tuple[Tensor, Tensor] | None, Tensor]:
    """The weights of G, what smoothed labels add to all of it per row [n] and per column [m], and dbias []."""
    n, m, smoothing = block.n, block.m, options.label_smoothing
    shares = options.shares(gradient.to(statistics.positive.dtype), n)
    same = same_counts(block) if block.row_ids is not None else None
    counts = (None, None) if same is None or block.ignores else (same[0], same[1][:n])
    rows, cols = (
        side.no_weights() if share is None else side.weights(share, count, smoothing)
        for side, share, count in zip(cross_entropy.sides(statistics), shares, counts, strict=True)
    )
    weights = cross_entropy.weights(statistics, rows, cols)
    dbias = _total(weights)
    if same is not None and weights.row_target is not None and weights.col_target is not None:
        dbias = dbias + (weights.row_target * same[0]).sum() + (weights.col_target * same[1]).sum()
    if not smoothing:
        return weights, None, dbias
    lses = statistics.row_lse, statistics.col_lse
    ignored = same if same is not None and block.ignores else tuple(torch.zeros_like(lse) for lse in lses)
    # A column beyond the n matched ones has no share, and may have no pair that is not ignored.
    row_constant, col_constant = (
        torch.zeros_like(lse)
        if share is None
        else pad((-smoothing * share).expand(n) / (length - count[:n]), (0, len(lse) - n))
        for lse, share, length, count in zip(lses, shares, (m, n), ignored, strict=True)
    )
    dbias = dbias + (row_constant * (m - ignored[0])).sum() + (col_constant * (n - ignored[1])).sum()
    return weights, (row_constant, col_constant), dbias


def make_block(
    backend: ModuleType,
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor | None,  # []
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    options: Options,
    factors: Factors | None = None,
    keep: bool = False,
) -> Block:
    sums_of_features = options.label_smoothing or (image_ids is not None and options.same_id == POSITIVE)
    fold = backend.folds_norms(x.dtype) and not sums_of_features
    x, y, x_factor, y_factor = operands(x, y, options.normalize, fold, factors)
    return Block(x, y, scale, bias, 0, x_factor, y_factor, image_ids, text_ids, options.same_id, keep)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast would round the logits to half precision."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _total(weights: Weights) -> Tensor:  # []
    """sum_ij G_ij, for each exp(L_ij - lse) sums to 1 over its row or column."""
    return weights.row_weight.sum() + weights.col_weight.sum() + weights.positive_weight.sum()
