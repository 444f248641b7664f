"""What the ranks of a call have agreed on, this rank's images, and losses whose gradients are formed with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipfast import collectives, schemes
from clipfast.block import IGNORE, Block, Gradients, number_ids
from clipfast.collectives import Ranks, Shards
from clipfast.norms import l2_normalize, norm_factors, through_norms
from clipfast.problem import accumulation_dtype, kept_dtype, statistics_dtype


class Job(NamedTuple):
    """A call of all ranks."""

    ranks: Ranks
    shards: Shards
    scheme: schemes.Scheme
    grad_reduction: str

    @property
    def rows(self) -> int:
        """N, the images of all ranks."""
        return sum(self.shards.images)

    @property
    def wants_gradients(self) -> bool:
        """Whether any rank does."""
        return self.shards.wants_any and torch.is_grad_enabled()

    def spread(self, *own: Tensor | None) -> list[Tensor]:
        """What belongs to texts, as the visits take it."""
        return [self.scheme.spread(t) for t in own if t is not None]

    def columns(self, held: list[Tensor], visit: schemes.Visit, merge: schemes.Merge) -> Tensor:
        """The scheme's `columns` of a visit that always returns something."""
        columns = self.scheme.columns(held, visit, merge)
        assert columns is not None
        return columns

    def anchor(self, scale: Tensor) -> Tensor | None:
        """Where another rank wants gradients, the loss has a backward pass here too, for the ranks meet in it."""
        return scale.new_zeros((), requires_grad=True) if self.wants_gradients else None

    def upstream(self, gradient: Tensor) -> Tensor:
        """Of all ranks' upstream gradients of the one loss, what the features' gradients are to be multiplied by."""
        return self.ranks.sum(gradient) / (self.ranks.count if self.grad_reduction == "sum" else 1)


def agreed(
    loss: str,
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scalars: Sequence[Tensor],
    alike: Mapping[str, object],
    options: schemes.GroupOptions,
) -> Job:
    """The job, if all ranks call the same loss with the same `alike`, which names at most 10 values.

    Raises:
        ValueError: the ranks disagree; the same on every rank.
    """
    group, grad_reduction, scheme, equal_shards = options
    ranks = Ranks.of(group)
    wants_any = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, *scalars))
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


class Images(NamedTuple):
    """This rank's images, as the blocks take them."""

    x: Tensor  # [n, d]
    scale: Tensor
    bias: Tensor
    ids: Tensor | None = None  # [n]
    same_id: str = IGNORE

    @property
    def dtype(self) -> torch.dtype:
        """Of sums over visits."""
        return accumulation_dtype(self.x.dtype)

    def block(self, offset: int, texts: Sequence[Tensor]) -> Block | None:  # [m', d], with ids [m'], and others
        """The block against some texts, None if it has no pairs."""
        y = texts[0]
        if not len(self.x) or not len(y):
            return None
        row_ids, col_ids = (None, None) if self.ids is None else number_ids(self.ids, texts[1])
        return Block(self.x, y, self.scale, self.bias, offset, row_ids=row_ids, col_ids=col_ids, same_id=self.same_id)

    def vector(self, value: float) -> Tensor:  # [n]
        return self.x.new_full(self.x.shape[:1], value, dtype=statistics_dtype(self.x.device))


def rows_of(features: Tensor, normalize: bool) -> Tensor:  # [n, d]
    return l2_normalize(features) if normalize else features


def by_features(gradient: Tensor, features: Tensor, normalize: bool, dtype: torch.dtype) -> Tensor:  # [n, d]
    """The gradient by the features of one by their `rows_of`."""
    if normalize:
        gradient = through_norms(gradient, features, norm_factors(features))
    return gradient.to(dtype)


def formed_loss(
    job: Job,
    inputs: Sequence[Tensor],  # x [n, d], y [m, d] and scalars []
    normalize: bool,
    compute: Callable[[bool], tuple[Tensor, Tensor, Tensor | None]],
) -> Tensor:  # []
    """A loss whose gradients are formed in the pass that forms it, and wait for the upstream gradient.

    compute(whether gradients are wanted) gives this rank's part of the loss and of its gradients by the scalars,
    float64 [1 + scalars], and the gradients by its images' and texts' rows, [n, d] and [m, d] or None.
    """
    x, y, *scalars = inputs
    wanted = job.wants_gradients
    with torch.no_grad():
        parts, dx, dy = compute(wanted)
        totals = job.ranks.sum(parts)
        loss = totals[0].to(scalars[0].dtype)
        if not wanted:
            return loss
        kept = kept_dtype(x.dtype)
        dx = by_features(dx, x, normalize, kept)
        dy = None if dy is None else by_features(dy, y, normalize, kept)
    formed = dx, dy, totals[1:] / job.ranks.count
    return _Formed.apply(job, loss, *formed, job.anchor(scalars[0]), *inputs)  # type: ignore[no-any-return, no-untyped-call]


class _Formed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        job: Job,
        loss: Tensor,  # []
        dx: Tensor,  # [n, d]
        dy: Tensor | None,  # [m, d]
        of_scalars: Tensor,  # [scalars]
        anchor: Tensor | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(dx, dy, of_scalars)
        ctx.job, ctx.dtypes = job, [t.dtype for t in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dx, dy, of_scalars = ctx.saved_tensors
        gradient = ctx.job.upstream(gradient.to(of_scalars.dtype))
        gradients = [None if g is None else g * gradient.to(g.dtype) for g in (dx, dy)] + list(of_scalars * gradient)
        by_inputs = (None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *[None] * 6, *by_inputs


class GradientSums:
    """What the visits add to this rank's gradients."""

    def __init__(self, images: Images, wants_texts: bool) -> None:
        self.dx = images.x.new_zeros(images.x.shape, dtype=images.dtype)
        self.dscale = images.vector(0).new_zeros(())
        self.wants_texts = wants_texts

    def add(self, gradients: Gradients) -> Tensor | None:  # [m', d]
        """Returns what travels on with the texts, if any rank wants it."""
        self.dx.add_(gradients.dx)
        self.dscale.add_(gradients.dscale)
        return gradients.dy if self.wants_texts else None

    def nothing(self, y: Tensor) -> Tensor | None:  # [m', d]
        """Of texts without pairs."""
        return self.dx.new_zeros(y.shape) if self.wants_texts else None


def added(parts: Tensor) -> Tensor:  # [parts, m, ...] -> [m, ...]
    return parts.sum(dim=0)
