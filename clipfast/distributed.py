"""The losses over the ranks of a group: every logit once per pass in the whole job, the same result on all ranks.

Rank r has images x_r [n_r, d] and texts y_r [m_r, d], m_r >= n_r, the first n_r of which are the images' matches. It
takes its images against all texts. The rows' statistics are whole then; the columns', merged over ranks, are with the
rank whose texts they are, which has these columns' matches as well. So every rank has the losses of its own rows and
columns, as in one process, and the weights of their gradients.

With out_r what rank r's call returns and g_r its upstream gradient, gradients are those of S = sum_r <g_r, out_r>. For
reduction "mean" every out_r is the loss of the whole job, so S counts it once for each rank:

    grad_reduction   features    scale and bias
    "mean"           dS/df       dS/ds / W           averaged over ranks: the gradient of the loss
    "sum"            dS/df / W   dS/ds / W^2         added over ranks: the gradient of the loss

With reduction "none" the out_r are different rows, S is what the ranks make of them together, and gradients are dS/df
and dS/ds / W with either.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from clipfast import collectives, cross_entropy, dispatch, schemes
from clipfast.block import POSITIVE, Block, Gradients, Matches, Statistics, Weights, number_ids
from clipfast.collectives import Ranks, Shards
from clipfast.logit_sums import Sums, add_constants, logit_sums
from clipfast.norms import l2_normalize, norm_factors, through_norms
from clipfast.problem import accumulation_dtype, statistics_dtype
from clipfast.softmax import MEAN, NONE, Options, without_autocast


class Job(NamedTuple):
    """What a call's ranks have agreed on."""

    ranks: Ranks
    shards: Shards
    scheme: schemes.Scheme
    grad_reduction: str

    @property
    def rows(self) -> int:
        """N, the images of all ranks."""
        return sum(self.shards.images)


@torch.compiler.disable(reason="clipfast: ranks agree on sizes and options before tensors are sent")  # type: ignore[no-untyped-call, untyped-decorator]
def contrastive_loss(
    x: Tensor,  # [n, d], n >= 0
    y: Tensor,  # [m, d], m >= n
    scale: Tensor,  # []
    bias: Tensor,  # []
    image_ids: Tensor | None,  # [n], int64, as they are on all ranks
    text_ids: Tensor | None,  # [m], int64
    options: Options,
    *,
    group: torch.distributed.ProcessGroup,
    grad_reduction: str,
    scheme: str,
    equal_shards: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss as `Options.chosen` says, of the rank's own rows with reduction "none"; row_above [n], col_above [m].

    Raises:
        ValueError: the ranks disagree; the same on every rank.
    """
    alike = {**options._asdict(), "image_ids": "None" if image_ids is None else "given"}
    job = _agreed("contrastive_loss", x, y, scale, bias, alike, group, grad_reduction, scheme, equal_shards)
    inputs = x, y, scale, bias, image_ids, text_ids
    return _ContrastiveLoss.apply(*inputs, _anchor(job, scale), options, job)  # type: ignore[no-any-return, no-untyped-call]


def _agreed(
    loss: str,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    alike: dict[str, object],
    group: torch.distributed.ProcessGroup,
    grad_reduction: str,
    scheme: str,
    equal_shards: bool,
) -> Job:
    ranks = Ranks.of(group)
    wants_any = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, scale, bias))
    wants_texts = wants_any and y.requires_grad
    if equal_shards:
        shards = Shards((len(x),) * ranks.count, (len(y),) * ranks.count, wants_texts, wants_any)
    else:
        alike = {
            "loss": loss,
            "d of the features": x.shape[1],
            "dtype of the features": x.dtype,
            **alike,
            "grad_reduction": grad_reduction,
            "scheme": scheme,
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
        }
        wants = collectives.WANTS_TEXTS * wants_texts + collectives.WANTS_ANY * wants_any
        shards = collectives.agree(ranks, (len(x), len(y)), wants, alike, x.device)
    return Job(ranks, shards, schemes.make(scheme, ranks, shards, x.shape[1], x.dtype), grad_reduction)


def _anchor(job: Job, scale: Tensor) -> Tensor | None:
    """Where another rank wants gradients, the loss has a backward pass here too, for the ranks meet in it."""
    wanted = job.shards.wants_any and torch.is_grad_enabled()
    return scale.new_zeros((), requires_grad=True) if wanted else None


class _Counts(NamedTuple):
    """How many pairs of this rank's rows and columns are `same`, and how many a mean logit is taken of."""

    row_same: Tensor  # [n]
    row_all: Tensor  # [n]
    col_same: Tensor  # [m]
    col_all: Tensor  # [m]


class _ContrastiveLoss(torch.autograd.Function):
    """Saved are x, y, vectors over the rank's own rows, and what the scheme holds of all texts."""

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
            images = _Images.of(x, scale, bias, image_ids, options)
            held = _spread(job, y, text_ids, options.normalize)
            statistics, sums = _statistics(images, held, job)
            loss = _loss(statistics, sums, images.adds_positives, options, job).to(scale.dtype)
        vectors = [*statistics[:3]]
        if sums is not None:
            vectors += [count for side in sums for count in (side.same_count, side.all_count)]
        ctx.save_for_backward(x, y, scale, bias, image_ids, text_ids, *vectors, *(held if job.scheme.holds_all else ()))
        ctx.vectors, ctx.options, ctx.job = len(vectors), options, job
        above = statistics.row_above, statistics.col_above
        ctx.mark_non_differentiable(*(t for t in above if t is not None))
        return loss, *above

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, y, scale, bias, image_ids, text_ids, *saved = ctx.saved_tensors
        options, job = ctx.options, ctx.job
        vectors, held = saved[: ctx.vectors], saved[ctx.vectors :]
        statistics, counts = Statistics(*vectors[:3]), _Counts(*vectors[3:]) if vectors[3:] else None
        with without_autocast(x.device):
            images = _Images.of(x, scale, bias, image_ids, options)
            held = held or _spread(job, y, text_ids, options.normalize)
            weights, constants, dbias = _weights(statistics, counts, images.adds_positives, gradient, options, job)
            dx, dy, dscale = _gradients(images, held, weights, constants, job)
            dscale, dbias = job.ranks.sum(torch.stack((dscale, dbias))) / job.ranks.count
        of_texts = None if dy is None else _by_features(dy, y, options)
        return _by_features(dx, x, options), of_texts, dscale.to(scale.dtype), dbias.to(bias.dtype), *[None] * 5


def _by_features(gradient: Tensor, features: Tensor, options: Options) -> Tensor:  # [n, d], of the visits' rows
    if options.normalize:
        gradient = through_norms(gradient, features, norm_factors(features))
    return gradient.to(features.dtype)


class _Images(NamedTuple):
    """This rank's images, as the blocks take them."""

    x: Tensor  # [n, d]
    scale: Tensor
    bias: Tensor
    ids: Tensor | None  # [n]
    options: Options

    @classmethod
    def of(cls, x: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None, options: Options) -> _Images:
        return cls(l2_normalize(x) if options.normalize else x, scale, bias, ids, options)

    @property
    def backend(self) -> ModuleType:
        return dispatch.get(self.options.backend)

    @property
    def adds_positives(self) -> bool:
        return self.ids is not None and self.options.same_id == POSITIVE

    @property
    def needs_sums(self) -> bool:
        return self.adds_positives or self.options.label_smoothing > 0

    def block(self, offset: int, texts: Sequence[Tensor]) -> Block | None:
        """The block against some texts, None if it has no pairs."""
        y = texts[0]
        if not len(self.x) or not len(y):
            return None
        row_ids, col_ids = (None, None) if self.ids is None else number_ids(self.ids, texts[1])
        return Block(
            self.x, y, self.scale, self.bias, offset, row_ids=row_ids, col_ids=col_ids, same_id=self.options.same_id
        )

    def vector(self, value: float) -> Tensor:  # [n]
        return self.x.new_full(self.x.shape[:1], value, dtype=statistics_dtype(self.x.device))


def _spread(job: Job, y: Tensor, ids: Tensor | None, normalize: bool) -> list[Tensor]:
    """The texts as the visits take them: their features, and their ids if they have some."""
    own = [l2_normalize(y) if normalize else y, *([] if ids is None else [ids])]
    return [job.scheme.spread(t) for t in own]


def _statistics(images: _Images, held: list[Tensor], job: Job) -> tuple[Statistics, tuple[Sums, Sums] | None]:
    """Those of one process with all ranks' rows, for this rank's images and texts."""
    metrics, row_matches = images.options.metrics, images.vector(-torch.inf)
    if metrics:
        row_matches, col_matches = _matches(images, held, job)
        held = [*held, job.scheme.spread(col_matches)]
    row_lse = images.vector(-torch.inf)
    width = 1 + metrics + len(Sums._fields) * images.needs_sums
    totals = row_lse.new_zeros((len(row_lse), width))  # positive, above, sums

    def visit(offset: int, texts: Sequence[Tensor]) -> Tensor:  # [m', width]: col_lse, above, sums
        block = images.block(offset, texts)
        if block is None:
            nothing = row_lse.new_zeros((len(texts[0]), width))
            nothing[:, 0] = -torch.inf
            return nothing
        found: Statistics = images.backend.forward(block, Matches(row_matches, texts[-1]) if metrics else None)
        of_rows, of_cols = [found.positive], [found.col_lse]
        if found.row_above is not None and found.col_above is not None:
            of_rows.append(found.row_above.to(totals.dtype))
            of_cols.append(found.col_above.to(totals.dtype))
        if images.needs_sums:
            row_sums, col_sums = logit_sums(block)
            of_rows += row_sums
            of_cols += col_sums
        row_lse.copy_(torch.logaddexp(row_lse, found.row_lse))
        totals.add_(torch.stack(of_rows, dim=1))
        return torch.stack(of_cols, dim=1)

    of_cols = _columns(job, held, visit, _merge_statistics).T.contiguous()
    of_rows = totals.T.contiguous()
    above = (of_rows[1].int(), of_cols[1].int()) if metrics else (None, None)
    statistics = Statistics(row_lse, of_cols[0], of_rows[0], *above)
    sums = tuple(Sums(*t[-len(Sums._fields) :]) for t in (of_rows, of_cols)) if images.needs_sums else None
    return statistics, sums  # type: ignore[return-value]


def _matches(images: _Images, held: list[Tensor], job: Job) -> Matches:
    """The largest logit among all positives of this rank's images and texts."""
    rows = images.vector(-torch.inf)

    def visit(offset: int, texts: Sequence[Tensor]) -> Tensor:  # [m']
        block = images.block(offset, texts)
        if block is None:
            return rows.new_full((len(texts[0]),), -torch.inf)
        found: Matches = images.backend.matches(block)
        rows.copy_(torch.maximum(rows, found.rows))
        return found.cols

    return Matches(rows, _columns(job, held, visit, lambda parts: parts.amax(dim=0)))


def _columns(job: Job, held: list[Tensor], visit: schemes.Visit, merge: schemes.Merge) -> Tensor:
    columns = job.scheme.columns(held, visit, merge)
    assert columns is not None
    return columns


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
        gradient = job.ranks.sum(gradient) / (job.ranks.count if job.grad_reduction == "sum" else 1)
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
    images: _Images, held: list[Tensor], weights: Weights, constants: tuple[Tensor, Tensor] | None, job: Job
) -> tuple[Tensor, Tensor | None, Tensor]:
    """By the images [n, d], by this rank's texts [m, d] if any rank wants that, and this rank's part of dscale []."""
    dtype = accumulation_dtype(images.x.dtype)
    dx, dscale = images.x.new_zeros(images.x.shape, dtype=dtype), weights.row_lse.new_zeros(())
    # A column's weights travel as its features do.
    of_cols = [weights.col_lse, weights.col_weight]
    of_cols += [] if weights.col_target is None else [weights.col_target]
    of_cols += [] if constants is None else [constants[1]]
    held = [*held, job.scheme.spread(torch.stack(of_cols, dim=1))]

    def visit(offset: int, texts: Sequence[Tensor]) -> Tensor | None:  # [m', d]
        block = images.block(offset, texts)
        if block is None:
            return dx.new_zeros(texts[0].shape) if job.shards.wants_texts else None
        col_lse, col_weight, *others = texts[-1].T.contiguous()
        col_target = others[0] if weights.row_target is not None else None
        of_block = weights._replace(col_lse=col_lse, col_weight=col_weight, col_target=col_target)
        gradients: Gradients = images.backend.backward(block, of_block, dtype)
        if constants is not None:
            gradients = add_constants(block, constants[0], others[-1], gradients)
        dx.add_(gradients.dx)
        dscale.add_(gradients.dscale)
        return gradients.dy if job.shards.wants_texts else None

    dy = job.scheme.columns(held, visit, lambda parts: parts.sum(dim=0))
    return dx, dy, dscale
