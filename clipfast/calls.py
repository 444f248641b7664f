"""What the public functions have in common: checks, the ranks, the backend; and the contrastive loss's one way in."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from clipfast import arguments, dispatch, operators
from clipfast.block import SAME_IDS
from clipfast.collectives import Ranks, refusing, warn_of_a_local_loss
from clipfast.norms import l2_normalize
from clipfast.problem import IDS, RANKS, Problem, accumulation_dtype
from clipfast.projected import Projection
from clipfast.schemes import SCHEMES, GroupOptions
from clipfast.softmax import (
    BOTH,
    DIRECTIONS,
    IMAGE_TO_TEXT,
    MEAN,
    REDUCTIONS,
    TEXT_TO_IMAGE,
    Options,
    forms_gradients,
)

GRAD_REDUCTIONS = ("mean", "sum")
METRIC_KS = (1, 5, 10)


def contrastive_loss(
    images: Tensor | Projection,  # [n, d]
    texts: Tensor | Projection,  # [m, d]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    *,
    normalize: bool,
    label_smoothing: float,
    direction: str,
    reduction: str,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    same_id: str,
    return_metrics: bool,
    group: Any,
    grad_reduction: str,
    scheme: str,
    equal_shards: bool,
    keep_bytes: int | None,
    deterministic: bool | None,
    backend: str,
) -> Tensor:
    """`clipfast.contrastive_loss` of features, or of projections, whose rows are normalized."""
    ranks = ranks_of(group)
    projections: tuple[Projection, ...] = ()
    with telling(ranks, images.features if isinstance(images, Projection) else images, equal_shards):
        fewest_rows = 0 if ranks else 1
        if isinstance(images, Projection) and isinstance(texts, Projection):
            projections, images, texts = _projections(images, texts, fewest_rows)
        x, y = arguments.matched_features(images, texts, fewest_rows=fewest_rows)
        ids = arguments.ids(image_ids, text_ids, x, y)
        scale, bias, biases = scalar_of(x, "logit_scale", logit_scale), None, None
        if logit_bias is not None:
            biases = _biases_of_candidates(logit_bias, x, y)
            bias = scalar_of(x, "logit_bias", logit_bias) if biases is None else None
        inputs: tuple[Tensor | None, ...] = (x, y)
        if projections:
            inputs = tuple(t for both in zip(*projections, strict=True) for t in both)  # features, weights, biases
        keeps = ranks is None and wants_gradients(*inputs, scale, bias)
        options, allowed, at_once = _decide(
            x.shape, y.shape, x.dtype, x.device, ids[0] is not None, normalize, label_smoothing, direction, reduction,
            same_id, return_metrics, grad_reduction, scheme, deterministic, backend, keeps, keep_bytes,
            bool(projections), dispatch.environment(),
        )  # fmt: skip
    if projections and (ranks is not None or biases is not None):
        x, y = (side.plain_rows(x.dtype) for side in projections)
        projections = ()
    if biases is not None:
        of_one: dict[str, Any] = {
            "normalize": normalize, "label_smoothing": label_smoothing, "reduction": reduction, "image_ids": image_ids,
            "text_ids": text_ids, "same_id": same_id, "return_metrics": return_metrics, "group": group,
            "grad_reduction": grad_reduction, "scheme": scheme, "equal_shards": equal_shards,
            "keep_bytes": keep_bytes, "deterministic": deterministic, "backend": backend,
        }  # fmt: skip
        return _with_bias_of_candidates(x, y, logit_scale, biases, direction, **of_one)
    numbers = arguments.numbered(*ids) if ranks is None else (None, None)
    if at_once:
        return operators.symmetric_loss(x, y, scale, bias, *numbers, options)[0]
    if bias is None:
        bias = scale.new_zeros(())
    if ranks is None:
        if projections:
            wanted = (wants_gradients(t) for t in inputs[:4])
            outputs = operators.projected_contrastive_loss(
                *inputs[:4], scale, bias, *inputs[4:], *numbers, x.dtype, *wanted, options
            )
        else:
            outputs = operators.contrastive_loss(x, y, scale, bias, *numbers, options)
        loss, _, _, _, row_above, col_above, *_ = outputs
    else:
        from clipfast import distributed  # imports torch's compiler, which takes a second

        group_options = GroupOptions(ranks, grad_reduction, scheme, equal_shards)
        loss, row_above, col_above = distributed.contrastive_loss(
            x, y, scale, bias, *ids, options, group_options, allowed
        )
    if not return_metrics:
        return loss
    return loss, recalls(row_above, col_above[: len(x)], direction, ranks)  # type: ignore[return-value]


def _projections(
    images: Projection, texts: Projection, fewest_rows: int
) -> tuple[tuple[Projection, Projection], Tensor, Tensor]:
    """Both, checked, and stand-ins for their rows: no data, but their shapes, dtype and device."""
    checked = tuple(
        Projection(*arguments.projection(side, *names, fewest_rows))
        for side, names in ((images, arguments.IMAGE_NAMES), (texts, arguments.TEXT_NAMES))
    )
    features, weights, _ = zip(*checked, strict=True)
    device, dtype = features[0].device, functools.reduce(torch.promote_types, [t.dtype for t in (*features, *weights)])
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    x, y = (f.new_empty((), dtype=dtype).expand(len(f), w.shape[1]) for f, w in zip(features, weights, strict=True))
    return checked, x, y  # type: ignore[return-value]


def ranks_of(group: Any) -> Any:
    """The group that the loss is taken over, None for this process's own rows, which in a larger job is told once."""
    if group is None:
        warn_of_a_local_loss()
    return arguments.process_group(group)


def check_common(normalize: object, grad_reduction: object, scheme: object, deterministic: object) -> None:
    """The options that all losses have."""
    arguments.flag("deterministic", False if deterministic is None else deterministic)
    arguments.choice("grad_reduction", grad_reduction, GRAD_REDUCTIONS)
    arguments.choice("scheme", scheme, SCHEMES)
    arguments.flag("normalize", normalize)


@arguments.remembered
def _decide(
    x_shape: torch.Size,
    y_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    ids: bool,
    normalize: bool,
    label_smoothing: float,
    direction: str,
    reduction: str,
    same_id: str,
    return_metrics: bool,
    grad_reduction: str,
    scheme: str,
    deterministic: bool | None,
    backend: str,
    keeps: bool,  # whether logits may be kept at all
    keep_bytes: int | None,
    projected: bool,
    environment: tuple[str | None, ...],
) -> tuple[Options, int, bool]:
    """The options, checked; how many bytes of logits may be kept; whether the gradients are formed with the loss."""
    check_common(normalize, grad_reduction, scheme, deterministic)
    arguments.choice("direction", direction, DIRECTIONS)
    arguments.choice("reduction", reduction, REDUCTIONS)
    arguments.choice("same_id", same_id, SAME_IDS)
    arguments.flag("return_metrics", return_metrics)
    arguments.bytes_or_none("keep_bytes", keep_bytes)
    label_smoothing = arguments.fraction("label_smoothing", label_smoothing)
    needs = {need for need, there in ((IDS, ids), (RANKS, return_metrics)) if there}
    backend = dispatch.select(_problem(x_shape, y_shape, dtype, device, needs), backend)
    allowed, _ = dispatch.allowed_bytes(keep_bytes, backend, dtype)
    keep = keeps and dispatch.keeps_logits(backend, x_shape[0], (y_shape[0],), dtype, allowed) > 0
    options = Options(normalize, label_smoothing, direction, reduction, same_id, return_metrics, backend, keep)
    return options, allowed, not projected and forms_gradients(options, ids)


_ALONE: AbstractContextManager[None] = nullcontext()


def telling(group: Any, image_features: object, equal_shards: bool) -> AbstractContextManager[None]:
    """An error in the arguments is told to the other ranks, which wait for this one."""
    if group is None:
        return _ALONE
    arguments.flag("equal_shards", equal_shards)
    return refusing(group, arguments.device_of(image_features), equal_shards)


def recalls(
    row_above: Tensor,  # [n]
    col_above: Tensor,  # [n]
    direction: str = BOTH,
    group: Any = None,
) -> dict[str, Tensor]:
    """Recall at METRIC_KS of the counts of what is at or above a match, over the ranks of a group."""
    counts = {IMAGE_TO_TEXT: row_above, TEXT_TO_IMAGE: col_above}
    names = counts if direction == BOTH else (direction,)
    hits = {f"{name}_R@{k}": (counts[name] < k).float().sum() for name in names for k in METRIC_KS}
    totals = torch.stack((*hits.values(), torch.full_like(next(iter(hits.values())), row_above.shape[0])))
    if group is not None:
        totals = Ranks.of(group).sum(totals)
    return dict(zip(hits, totals[:-1] / totals[-1], strict=True))


def scalar_of(x: Tensor, name: str, value: object) -> Tensor:  # []
    """A scale or a bias of the logits, as the operators take it."""
    return arguments.scalar(name, value, accumulation_dtype(x.dtype), x.device)


def problem_of(x: Tensor, y: Tensor, needs: set[str]) -> Problem:
    return _problem(x.shape, y.shape, x.dtype, x.device, needs)


def _problem(
    x_shape: torch.Size, y_shape: torch.Size, dtype: torch.dtype, device: torch.device, needs: set[str]
) -> Problem:
    (n, d), m = x_shape, y_shape[0]
    # A rank of several may have no rows.
    return Problem(n or 1, m or 1, d, dtype, device, frozenset(needs))


def wants_gradients(*inputs: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for given in inputs:
            if given is not None and given.requires_grad:
                return True
    return False


def _biases_of_candidates(logit_bias: object, x: Tensor, y: Tensor) -> Tensor | None:  # [n]
    """The bias, if it is one for each candidate, as open_clip's ClipLoss takes a tensor [n]."""
    if isinstance(logit_bias, Tensor) and x.shape[0] > 1 and logit_bias.shape == x.shape[:1] == y.shape[:1]:
        return logit_bias
    return None


def _with_bias_of_candidates(
    x: Tensor,  # [n, d]
    y: Tensor,  # [n, d]
    logit_scale: Tensor | float,
    logit_bias: Tensor,  # [n]
    direction: str,
    *,
    normalize: bool,
    **options: Any,
) -> Tensor:
    """`contrastive_loss` with a bias for each candidate: a column more of the features, for one direction at a time."""
    if direction == BOTH:
        parts: list[Any] = [
            _with_bias_of_candidates(x, y, logit_scale, logit_bias, one, normalize=normalize, **options)
            for one in (IMAGE_TO_TEXT, TEXT_TO_IMAGE)
        ]
        losses, metrics = zip(*parts, strict=True) if options["return_metrics"] else (parts, ())
        loss = torch.stack(losses)
        loss = loss.mean() if options["reduction"] == MEAN else loss
        return (loss, metrics[0] | metrics[1]) if metrics else loss  # type: ignore[return-value]
    scale = scalar_of(x, "logit_scale", logit_scale)
    if normalize:
        x, y = l2_normalize(x), l2_normalize(y)
    one, bias = scale.new_ones(len(x), 1), logit_bias.to(scale.dtype)[:, None]
    extra = (one, bias) if direction == IMAGE_TO_TEXT else (bias, one)
    x, y = (torch.cat((t, column), dim=1) for t, column in zip((scale * x, y), extra, strict=True))
    return contrastive_loss(x, y, 1.0, None, normalize=False, direction=direction, **options)
