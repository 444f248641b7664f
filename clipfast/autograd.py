"""The losses as differentiable PyTorch operators: visible to torch.compile, checked by opcheck, few calls at small n.

Where nothing looks at operators, the same functions run as a torch.autograd.Function, which costs half the time.
What they compute is in clipfast/softmax.py; saved for the backward pass are x, y and vectors over the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clipfast import softmax
from clipfast.block import Statistics
from clipfast.problem import statistics_dtype


def _forward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d], m >= n
    scale: Tensor,  # []
    bias: Tensor,  # []
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    normalize: bool,
    label_smoothing: float,
    direction: str,
    reduction: str,
    same_id: str,
    metrics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, which alone has a gradient, and the statistics; row_above and col_above are empty without metrics."""
    options = softmax.Options(normalize, label_smoothing, direction, reduction, same_id, metrics, backend)
    loss, statistics = softmax.forward(x, y, scale, bias, image_ids, text_ids, options)
    above = (
        x.new_empty(0, dtype=torch.int32) if t is None else t for t in (statistics.row_above, statistics.col_above)
    )
    return loss, *statistics[:3], *above  # type: ignore[return-value]


def _backward(
    gradient: Tensor,  # as the loss
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    row_lse: Tensor,  # [n]
    col_lse: Tensor,  # [m]
    positive: Tensor,  # [n]
    normalize: bool,
    label_smoothing: float,
    direction: str,
    reduction: str,
    same_id: str,
    metrics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # dx [n, d], dy [m, d], dscale [], dbias []
    options = softmax.Options(normalize, label_smoothing, direction, reduction, same_id, metrics, backend)
    statistics = Statistics(row_lse, col_lse, positive)
    gradients, dbias = softmax.backward(gradient, x, y, scale, bias, image_ids, text_ids, statistics, options)
    return *gradients, dbias.to(bias.dtype)


contrastive_loss = torch.library.custom_op("clipfast::contrastive_loss", mutates_args=())(_forward)
contrastive_loss_backward = torch.library.custom_op("clipfast::contrastive_loss_backward", mutates_args=())(_backward)


@contrastive_loss.register_fake
def _(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, image_ids: Any, text_ids: Any, *options: Any
) -> tuple[Tensor, ...]:
    n, m, chosen = x.shape[0], y.shape[0], softmax.Options(*options)
    row_lse, col_lse, positive = (x.new_empty(size, dtype=statistics_dtype(x.device)) for size in (n, m, n))
    above = (x.new_empty(size if chosen.metrics else 0, dtype=torch.int32) for size in (n, m))
    return chosen.chosen(scale.new_empty(n), scale.new_empty(n)), row_lse, col_lse, positive, *above


@contrastive_loss_backward.register_fake
def _(gradient: Tensor, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty(()), bias.new_empty(())


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:6], inputs[6:]
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(*tensors, *statistics[:3])


def _operator_backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *contrastive_loss_backward(gradient, *ctx.saved_tensors, *ctx.options), *[None] * (2 + len(ctx.options))


def _refuse_double_backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "clipfast does not support double backward: its backward pass has no derivative. Use "
        "clipfast.reference.contrastive_loss where a gradient of the gradient is needed."
    )


def _refuse_forward_mode(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "clipfast does not support forward-mode derivatives (jvp, jacfwd, linearize). Use clipfast.reference, or "
        "reverse mode."
    )


contrastive_loss.register_autograd(_operator_backward, setup_context=_save_for_backward)
contrastive_loss_backward.register_autograd(_refuse_double_backward)


class _Eager(torch.autograd.Function):
    """An operator's two functions without the operator. functorch's transforms see this: grad works, vmap loops."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _forward(*inputs)

    setup_context = staticmethod(_save_for_backward)
    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        differentiated = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        derivative = _EagerBackward.apply if differentiated else _backward
        return *derivative(gradient, *ctx.saved_tensors, *ctx.options), *[None] * (2 + len(ctx.options))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _one_by_one(_Eager.apply, info.batch_size, in_dims, inputs)


class _EagerBackward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(_refuse_double_backward)
    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _one_by_one(_EagerBackward.apply, info.batch_size, in_dims, inputs)


def _one_by_one(function: Any, count: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> Any:
    """torch.vmap's rule: a loop over the batch."""
    outputs = [
        function(*(value if dim is None else value.select(dim, i) for value, dim in zip(inputs, in_dims, strict=True)))
        for i in range(count)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)


def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """`contrastive_loss` with as little overhead as what watches the call allows.

    torch.compile, dispatch modes (fake tensors, counters of operations) and subclasses of Tensor see an operator.
    """
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or any(type(t) not in (Tensor, torch.nn.Parameter) for t in (x, y, scale, bias))
    )
    if not watched:
        return _Eager.apply(x, y, scale, bias, *options)  # type: ignore[no-any-return, no-untyped-call]
    duals = () if torch.compiler.is_compiling() else (x, y, scale, bias)
    if any(forward_ad.unpack_dual(t).tangent is not None for t in duals):  # type: ignore[no-untyped-call]
        _refuse_forward_mode(None)
    return contrastive_loss(x, y, scale, bias, *options)  # type: ignore[no-any-return]
