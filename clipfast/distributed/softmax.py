"""The softmax loss over ranks: statistics in one pass over all pairs, gradients in another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from clipfast import cross_entropy, dispatch
from clipfast.block import POSITIVE, Block, Gradients, Matches, Statistics, Weights
from clipfast.distributed.job import GradientSums, Images, Job, added, agreed, by_features, rows_of
from clipfast.logit_sums import Sums, add_constants, logit_sums
from clipfast.schemes import GroupOptions
from clipfast.softmax import MEAN, NONE, Options, without_autocast


@torch.compiler.disable(reason="clipfast: ranks agree on sizes and options before tensors are sent")  # type: ignore[no-untyped-call, untyped-decorator]
def contrastive_loss(
    x: Tensor,  # [n, d], n >= 0
    y: Tensor,  # [m, d], m >= n
    scale: Tensor,  # []
    bias: Tensor,  # []
    image_ids: Tensor | None,  # [n], int64, as they are on all ranks
    text_ids: Tensor | None,  # [m], int64
    options: Options,
    group_options: GroupOptions,
    keep_bytes: int = 0,  # of this rank's logits may stay between the passes, where all fit
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss as `Options.chosen` says, of the rank's own rows with reduction "none"; row_above [n], col_above [m].

    Raises:
        ValueError: the ranks disagree; the same on every rank.
    """
    alike = {name: value for name, value in options._asdict().items() if name != "keep"}
    alike |= {"image_ids": "None" if image_ids is None else "given"}
    job = agreed("contrastive_loss", x, y, (scale, bias), alike, group_options)
    visited = (sum(job.shards.texts),) if job.scheme.holds_all else job.shards.texts
    keep = job.wants_gradients and dispatch.keeps_logits(options.backend, len(x), visited, x.dtype, keep_bytes) > 0
    options = options._replace(keep=keep)
    inputs = x, y, scale, bias, image_ids, text_ids
    return _ContrastiveLoss.apply(*inputs, job.anchor(scale), options, job)  # type: ignore[no-any-return, no-untyped-call]


class _Counts(NamedTuple):
    """How many pairs of this rank's rows and columns are `same`, and how many a mean logit is taken of."""

    row_same: Tensor  # [n]
    row_all: Tensor  # [n]
    col_same: Tensor  # [m]
    col_all: Tensor  # [m]


class _ContrastiveLoss(torch.autograd.Function):
    """Saved are x, y, vectors over the rank's own rows, what the scheme holds of all texts, and logits if few."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        anchor: Tensor | None,
        options: Options,
        job: Job,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with without_autocast(x.device):
            images = Images(rows_of(x, options.normalize), scale, bias, image_ids, options.same_id)
            held = job.spread(rows_of(y, options.normalize), text_ids)
            statistics, sums, kept = _statistics(images, held, options, job)
            loss = _loss(statistics, sums, _adds_positives(images), options, job).to(scale.dtype)
        vectors = [*statistics[:3]]
        if sums is not None:
            vectors += [count for side in sums for count in (side.same_count, side.all_count)]
        held = held if job.scheme.holds_all else []
        ctx.save_for_backward(x, y, scale, bias, image_ids, text_ids, *vectors, *held, *kept)
        ctx.vectors, ctx.held, ctx.options, ctx.job = len(vectors), len(held), options, job
        above = statistics.row_above, statistics.col_above
        ctx.mark_non_differentiable(*(t for t in above if t is not None))
        return loss, *above

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, y, scale, bias, image_ids, text_ids, *saved = ctx.saved_tensors
        options, job = ctx.options, ctx.job
        vectors, saved = saved[: ctx.vectors], saved[ctx.vectors :]
        held, kept = saved[: ctx.held], saved[ctx.held :]
        statistics, counts = Statistics(*vectors[:3]), _Counts(*vectors[3:]) if vectors[3:] else None
        with without_autocast(x.device):
            images = Images(rows_of(x, options.normalize), scale, bias, image_ids, options.same_id)
            held = held or job.spread(rows_of(y, options.normalize), text_ids)
            weights, constants, dbias = _weights(statistics, counts, _adds_positives(images), gradient, options, job)
            dx, dy, dscale = _gradients(dispatch.get(options.backend), images, held, weights, constants, kept, job)
            dscale, dbias = job.ranks.sum(torch.stack((dscale, dbias))) / job.ranks.count
            dx = by_features(dx, x, options.normalize, x.dtype)
            dy = None if dy is None else by_features(dy, y, options.normalize, y.dtype)
        return dx, dy, dscale.to(scale.dtype), dbias.to(bias.dtype), *[None] * 5


def _adds_positives(images: Images) -> bool:
    return images.ids is not None and images.same_id == POSITIVE


def _statistics(
    images: Images, held: list[Tensor], options: Options, job: Job
) -> tuple[Statistics, tuple[Sums, Sums] | None, list[Tensor]]:
    """Those of one process with all ranks' rows, for this rank's images and texts; and the logits of its visits."""
    backend, metrics, row_matches = dispatch.get(options.backend), options.metrics, images.vector(-torch.inf)
    needs_sums = _adds_positives(images) or options.label_smoothing > 0
    if metrics:
        row_matches, col_matches = all_matches(backend.matches, images, held, job)
        held = [*held, *job.spread(col_matches)]
    row_lse = images.vector(-torch.inf)
    width = 1 + metrics + len(Sums._fields) * needs_sums
    totals = row_lse.new_zeros((len(row_lse), width))  # positive, above, sums
    kept = list[Tensor]()

    def visit(offset: int, texts: Sequence[Tensor]) -> Tensor:  # [m', width]: col_lse, above, sums
        block = images.block(offset, texts)
        if block is None:
            nothing = row_lse.new_zeros((len(texts[0]), width))
            nothing[:, 0] = -torch.inf
            return nothing
        block = block._replace(keep=options.keep)
        found: Statistics = backend.forward(block, Matches(row_matches, texts[-1]) if metrics else None)
        kept.extend(t for t in (found.kept,) if t is not None)
        of_rows, of_cols = [found.positive], [found.col_lse]
        if found.row_above is not None and found.col_above is not None:
            of_rows.append(found.row_above.to(totals.dtype))
            of_cols.append(found.col_above.to(totals.dtype))
        if needs_sums:
            row_sums, col_sums = logit_sums(block, options.label_smoothing > 0)
            of_rows += row_sums
            of_cols += col_sums
        row_lse.copy_(torch.logaddexp(row_lse, found.row_lse))
        totals.add_(torch.stack(of_rows, dim=1))
        return torch.stack(of_cols, dim=1)

    of_cols = job.columns(held, visit, _merge_statistics).T.contiguous()
    of_rows = totals.T.contiguous()
    above = (of_rows[1].int(), of_cols[1].int()) if metrics else (None, None)
    statistics = Statistics(row_lse, of_cols[0], of_rows[0], *above)
    sums = tuple(Sums(*t[-len(Sums._fields) :]) for t in (of_rows, of_cols)) if needs_sums else None
    return statistics, sums, kept  # type: ignore[return-value]


def all_matches(
    matches_of: Callable[[Block], Matches], images: Images, held: list[Tensor], job: Job, matched: bool = True
) -> Matches:
    """The largest logit among all positives of this rank's images and texts; `matched`: row i has text i."""
    rows = images.vector(-torch.inf)

    def visit(offset: int, texts: Sequence[Tensor]) -> Tensor:  # [m']
        block = images.block(offset if matched else len(texts[0]), texts)
        if block is None:
            return rows.new_full((len(texts[0]),), -torch.inf)
        found = matches_of(block)
        rows.copy_(torch.maximum(rows, found.rows))
        return found.cols

    return Matches(rows, job.columns(held, visit, lambda parts: parts.amax(dim=0)))


def _merge_statistics(parts: Tensor) -> Tensor:  # [parts, m, width] -> [m, width]
    return torch.cat((parts[..., :1].logsumexp(dim=0), parts[..., 1:].sum(dim=0)), dim=1)


def _loss(
    statistics: Statistics, sums: tuple[Sums, Sums] | None, adds_positives: bool, options: Options, job: Job
) -> Tensor:
    n = len(statistics.positive)
    of_sides = (None, None) if sums is None else (sums[0], Sums(*(t[:n] for t in sums[1])))
    rows, cols = (
        side.losses(of_side, options.label_smoothing, adds_positives)
        for side, of_side in zip(cross_entropy.sides(statistics), of_sides, strict=True)
    )
    if options.reduction == NONE:
        return options.chosen(rows, cols)
    means = job.ranks.sum(torch.stack((rows.sum(), cols.sum()))) / job.rows
    return options.chosen(means[:1], means[1:])


def _weights(
    statistics: Statistics,
    counts: _Counts | None,
    adds_positives: bool,
    gradient: Tensor,  # as the loss
    options: Options,
    job: Job,
) -> tuple[Weights, tuple[Tensor, Tensor] | None, Tensor]:
    """The weights of G, what smoothed labels add to all of it per row [n] and column [m], and this rank's dbias []."""
    n, smoothing = len(statistics.positive), options.label_smoothing
    gradient = gradient.to(statistics.positive.dtype)
    if options.reduction == MEAN:
        gradient = job.upstream(gradient)
    shares = options.shares(gradient, job.rows)
    same = (counts.row_same, counts.col_same[:n]) if counts is not None and adds_positives else (None, None)
    rows, cols = (
        side.no_weights() if share is None else side.weights(share, count, smoothing)
        for side, share, count in zip(cross_entropy.sides(statistics), shares, same, strict=True)
    )
    weights = cross_entropy.weights(statistics, rows, cols)
    dbias = weights.row_weight.sum() + weights.col_weight.sum() + weights.positive_weight.sum()
    if counts is None:
        return weights, None, dbias
    if weights.row_target is not None and weights.col_target is not None:
        dbias = dbias + (weights.row_target * counts.row_same).sum() + (weights.col_target * counts.col_same).sum()
    if not smoothing:
        return weights, None, dbias
    row_constant, col_constant = (
        torch.zeros_like(count) if share is None else pad((-smoothing * share).expand(n), (0, len(count) - n)) / count
        for count, share in zip((counts.row_all, counts.col_all), shares, strict=True)
    )
    dbias = dbias + (row_constant * counts.row_all).sum() + (col_constant * counts.col_all).sum()
    return weights, (row_constant, col_constant), dbias


def _gradients(
    backend: ModuleType,
    images: Images,
    held: list[Tensor],
    weights: Weights,
    constants: tuple[Tensor, Tensor] | None,
    kept: Sequence[Tensor],  # of each visit that has pairs, in their order; or none
    job: Job,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """By the images [n, d], by this rank's texts [m, d] if any rank wants that, and this rank's part of dscale []."""
    sums = GradientSums(images, job.shards.wants_texts)
    # A column's weights travel as its features do.
    of_cols = [weights.col_lse, weights.col_weight]
    of_cols += [] if weights.col_target is None else [weights.col_target]
    of_cols += [] if constants is None else [constants[1]]
    held = [*held, *job.spread(torch.stack(of_cols, dim=1))]
    logits = iter(kept)

    def visit(offset: int, texts: Sequence[Tensor]) -> Tensor | None:  # [m', d]
        block = images.block(offset, texts)
        if block is None:
            return sums.nothing(texts[0])
        col_lse, col_weight, *others = texts[-1].T.contiguous()
        col_target = others[0] if weights.row_target is not None else None
        of_block = weights._replace(
            col_lse=col_lse, col_weight=col_weight, col_target=col_target, kept=next(logits, None)
        )
        gradients: Gradients = backend.backward(block, of_block, images.dtype)
        if constants is not None:
            gradients = add_constants(block, constants[0], others[-1], gradients)
        return sums.add(gradients)

    return sums.dx, job.scheme.columns(held, visit, added), sums.dscale
