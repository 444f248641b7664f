"""The losses as functions: check the arguments, then compute."""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipfast import autograd, collectives, dispatch
from clipfast.collectives import warn_of_a_local_loss
from clipfast.problem import DTYPES, Problem, accumulation_dtype
from clipfast.schemes import SCHEMES
from clipfast.softmax import Options

GRAD_REDUCTIONS = ("mean", "sum")


def contrastive_loss(
    image_features: Tensor,  # [n, d]
    text_features: Tensor,  # [m, d]
    logit_scale: Tensor | float,  # exp(t)
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    group: Any = None,
    grad_reduction: str = "mean",
    scheme: str = "auto",
    equal_shards: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:  # 0-D
    """CLIP's symmetric cross-entropy over the batch, without ever storing the n*m logits.

    Equal to (Radford et al. 2021, arXiv:2103.00020, figure 3):

        logits = logit_scale * image_features @ text_features.T + logit_bias          # [n, m], never stored
        labels = torch.arange(n)
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.T[:n], labels)) / 2

    in value and in the gradients of all four inputs. Forward and backward together cost four n*m*d matrix products
    and O((n + m) d) memory. Logits and sums are float32 (float64 for float64 features), also under autocast.

    Args:
        image_features: [n, d], n >= 1, any strides; float32, bfloat16, float16 or float64. Row i belongs to text row i.
        text_features: [m, d], m >= n; rows from n on are extra negatives. A pair of dtypes is promoted as by torch.
        logit_scale: the factor exp(t), already exponentiated; a number or a tensor of one element. Never clamped.
        logit_bias: added to every logit; it cannot change this loss, its gradient is zero up to rounding.
        normalize: l2-normalize the rows first. Without it the features are taken as they are, of any length.
        label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy.
        image_ids: not available yet.
        text_ids: not available yet.
        group: a process group, over all of whose ranks' rows the loss is taken; None for this process's own. Ranks may
            have different numbers of rows, some of them none. Each gets the loss of the whole.
        grad_reduction: "mean" or "sum", how the data-parallel wrapper reduces gradients; no effect in one process.
        scheme: "gather" (every rank holds all texts), "ring" (texts go round; memory does not grow with the number of
            ranks) or "auto", which gathers where all texts and their gradients take no more than 4 GiB.
        equal_shards: a promise that all ranks call with the same shapes, dtypes, options and wanted gradients. They do
            not compare them then, and do not wait for the device.
        deterministic: every backend repeats bitwise, so None, True and False give the same result.
        backend: "auto" or a name from `clipfast.backends()`; a name never falls back to another backend.

    Returns:
        A 0-D tensor, float32 (float64 for float64 features). Gradients have their input's dtype and shape.

    Raises:
        TypeError, ValueError: an argument is not as stated; the text names it. Nothing has been computed by then.
        NotImplementedError: an option that is marked as not available yet.
    """
    _flag("deterministic", False if deterministic is None else deterministic)
    if grad_reduction not in GRAD_REDUCTIONS:
        raise ValueError(f"grad_reduction: got {grad_reduction!r}; accepted are 'mean' and 'sum'")
    _refuse_ids(image_ids, text_ids)
    if group is None:
        warn_of_a_local_loss()
    ranks = _Ranks(_group(group), grad_reduction, scheme, equal_shards)
    return _loss(
        image_features, text_features, logit_scale, logit_bias, normalize, label_smoothing, backend, True, ranks
    )


def image_to_text_loss(
    image_features: Tensor,  # [n, d]
    text_features: Tensor,  # [m, d]
    logit_scale: Tensor | float,  # exp(t)
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> Tensor:  # 0-D
    """One direction of `contrastive_loss`: the images choose among all texts, no text chooses.

    Equal to cross_entropy(logits, labels) with the logits and labels of `contrastive_loss`, whose arguments these are,
    at its cost and without the logits as well.
    """
    return _loss(image_features, text_features, logit_scale, logit_bias, normalize, label_smoothing, backend, False)


def _loss(
    image_features: Tensor,  # [n, d]
    text_features: Tensor,  # [m, d]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    normalize: bool,
    label_smoothing: float,
    backend: str,
    symmetric: bool,
    ranks: _Ranks | None = None,
) -> Tensor:  # 0-D
    """The loss; an error in the arguments is told to the other ranks, which wait for this one."""
    if ranks is None or ranks.group is None:
        call = _checked(
            image_features, text_features, logit_scale, logit_bias, normalize, label_smoothing, backend, symmetric
        )
        return autograd.loss(*call[:6], *call[6])[0]
    from clipfast import distributed  # imports torch's compiler, which takes a second

    device = image_features.device if isinstance(image_features, Tensor) else torch.device("cpu")
    with collectives.refusing(ranks.group, device, ranks.equal_shards):
        if ranks.scheme not in SCHEMES:
            raise ValueError(f"scheme: got {ranks.scheme!r}; accepted are 'auto', 'gather' and 'ring'")
        call = _checked(
            image_features, text_features, logit_scale, logit_bias, normalize, label_smoothing, backend, symmetric, 0
        )
    loss: Tensor = distributed.contrastive_loss(*call, **ranks._asdict())[0]
    return loss


class _Ranks(NamedTuple):
    group: torch.distributed.ProcessGroup | None
    grad_reduction: str
    scheme: str
    equal_shards: bool


def _checked(
    image_features: Tensor,  # [n, d]
    text_features: Tensor,  # [m, d]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    normalize: bool,
    label_smoothing: float,
    backend: str,
    symmetric: bool,
    fewest_rows: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None, Options]:
    x, y = matched_features(image_features, text_features, fewest_rows)
    accumulator = accumulation_dtype(x.dtype)
    scale = _scalar("logit_scale", logit_scale, accumulator, x.device)
    bias = _scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, accumulator, x.device)
    label_smoothing = _fraction("label_smoothing", label_smoothing)
    _flag("normalize", normalize)
    if not isinstance(backend, str):
        raise TypeError(f"backend: got {_name(backend)}; accepted is a name from clipfast.backends()")
    problem = Problem(max(x.shape[0], 1), max(y.shape[0], 1), x.shape[1], x.dtype, x.device)
    direction = "both" if symmetric else "image_to_text"
    options = normalize, label_smoothing, direction, "mean", "ignore", False, dispatch.select(problem, backend)
    return x, y, scale, bias, None, None, Options(*options)


def matched_features(image_features: Tensor, text_features: Tensor, fewest_rows: int = 1) -> tuple[Tensor, Tensor]:
    """Both feature matrices, checked and promoted to one dtype."""
    named = {"image_features": image_features, "text_features": text_features}
    for name, features in named.items():
        if not isinstance(features, Tensor):
            raise TypeError(f"{name}: got {_name(features)}; accepted is a torch.Tensor")
        if features.layout != torch.strided:
            raise TypeError(f"{name}: got layout {features.layout}; accepted is a dense (strided) tensor")
        if features.dtype not in DTYPES:
            raise TypeError(f"{name}: got {features.dtype}; accepted are {', '.join(map(str, DTYPES))}")
        if features.ndim != 2:
            raise ValueError(f"{name}: got shape {_shape(features)}; accepted is [rows, d]")
        if features.shape[0] < fewest_rows or features.shape[1] == 0:
            raise ValueError(f"{name}: got shape {_shape(features)}; at least one row and one column are needed")
    n, m = image_features.shape[0], text_features.shape[0]
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            f"text_features: got shape {_shape(text_features)}; its d must be that of image_features, "
            f"{_shape(image_features)}"
        )
    if m < n:
        raise ValueError(f"text_features: got {m} rows; accepted are at least the {n} rows of image_features")
    if image_features.device != text_features.device:
        raise ValueError(
            f"text_features: is on {text_features.device}; image_features is on {image_features.device}, "
            "both must be on one device"
        )
    promoted = torch.promote_types(image_features.dtype, text_features.dtype)
    return image_features.to(promoted), text_features.to(promoted)


def _scalar(name: str, value: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-D tensor of the given dtype on the given device, differentiable where value is."""
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name}: got a tensor of {value.dtype}; accepted is a floating-point one")
        if value.numel() != 1:
            raise ValueError(f"{name}: got shape {_shape(value)}; accepted is a single element")
        return value.reshape(()).to(device=device, dtype=dtype)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {_name(value)}; accepted is a number or a tensor of one element")
    return torch.full((), float(value), dtype=dtype, device=device)


def _fraction(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {_name(value)}; accepted is a number from 0 to 1")
    fraction = float(value)
    if not 0 <= fraction <= 1:
        raise ValueError(f"{name}: got {value}; accepted is a number from 0 to 1")
    return fraction


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {_name(value)}; accepted is True or False")


def _refuse_ids(image_ids: Tensor | None, text_ids: Tensor | None) -> None:
    for name, ids in {"image_ids": image_ids, "text_ids": text_ids}.items():
        if ids is not None:
            raise NotImplementedError(f"{name}: masking pairs by group ids is not available yet; pass None")


def _group(group: Any) -> Any:
    """The group, None if it has no other rank."""
    if group is None:
        return None
    if group == torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this process is not in it; accepted is a group that it is in, or None")
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group: got {_name(group)}; accepted is a torch.distributed.ProcessGroup or None")
    return group if torch.distributed.get_world_size(group) > 1 else None


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _name(value: object) -> str:
    return type(value).__name__
