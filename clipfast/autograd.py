"""Losses as differentiable PyTorch operators: visible to torch.compile, checked by opcheck, few calls at small n.

`differentiable` makes one of a forward and a backward function. Where nothing looks at operators, the same two run as
a torch.autograd.Function, which costs half the time. What the losses are is in clipfast/operators.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clipfast import arguments

Save = Callable[[tuple[Any, ...], tuple[Tensor, ...]], tuple[tuple[Any, ...], tuple[Any, ...]]]


def differentiable(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    forward_shapes: Callable[..., tuple[Tensor, ...]],
    backward_shapes: Callable[..., tuple[Tensor, ...]],
    save: Save,
    formed: bool = False,
) -> Callable[..., tuple[Tensor, ...]]:
    """The function `clipfast::name`, whose first output has a gradient and whose others have none.

    forward(*inputs) gives the outputs; save(inputs, outputs) says which tensors, and which other values, the backward
    pass needs; backward(gradient of the first output, *tensors, *values) gives the gradients of the first inputs, all
    others have none. The shapes functions do the same on tensors without data. `formed`: the gradients come with the
    outputs, and the backward pass only scales them. A graph through it (create_graph) would not lead to the inputs, so
    it is refused. The operator itself is the function's attribute `operator`.
    """
    operator = torch.library.custom_op(f"clipfast::{name}", mutates_args=())(forward)
    derivative = torch.library.custom_op(f"clipfast::{name}_backward", mutates_args=())(backward)
    operator.register_fake(forward_shapes)
    derivative.register_fake(backward_shapes)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.values = save(inputs, output)
        ctx.inputs = len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros for outputs that have no gradient
        ctx.save_for_backward(*tensors)

    def gradients(ctx: Any, function: Callable[..., tuple[Tensor, ...]], gradient: Tensor) -> tuple[Tensor | None, ...]:
        if formed and torch.is_grad_enabled():
            _refuse_double_backward()
        by_inputs = function(gradient, *ctx.saved_tensors, *ctx.values)
        wanted = (g if wants else None for g, wants in zip(by_inputs, ctx.needs_input_grad, strict=False))
        return *wanted, *[None] * (ctx.inputs - len(by_inputs))

    def operator_backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return gradients(ctx, derivative, gradient)

    operator.register_autograd(operator_backward, setup_context=setup_context)
    derivative.register_autograd(_refuse_double_backward)

    class Eager(_Function):
        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, ...]:
            return forward(*inputs)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
                function = EagerBackward.apply
            else:
                function = derivative if _watched((gradient, *ctx.saved_tensors)) else backward
            return gradients(ctx, function, arguments.plain("the loss's gradient", gradient))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
            return _one_by_one(Eager.apply, info.batch_size, in_dims, inputs)

    Eager.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]

    class Plain(torch.autograd.Function):
        """Eager, where no transform of functorch looks on: those need setup_context, which binds a signature."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            outputs = forward(*inputs)
            setup_context(ctx, inputs, outputs)
            return outputs

        backward = Eager.backward
        jvp = _Function.jvp

    class EagerBackward(_Function):
        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, ...]:
            return backward(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        backward = staticmethod(_refuse_double_backward)  # type: ignore[assignment]

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
            return _one_by_one(EagerBackward.apply, info.batch_size, in_dims, inputs)

    def apply(*inputs: Any) -> tuple[Tensor, ...]:
        if not _watched(inputs):
            function = Eager if torch._C._are_functorch_transforms_active() else Plain
            return function.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]
        return operator(*inputs)  # type: ignore[no-any-return]

    apply.operator = operator  # type: ignore[attr-defined]
    return apply


def flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the fields of its last argument, a NamedTuple, in its place, as operators take options."""
    signature = inspect.signature(function, eval_str=True)
    *parameters, last = signature.parameters.values()
    defaults = last.annotation._field_defaults
    fields = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=of,
            default=defaults.get(name, inspect.Parameter.empty),
        )
        for name, of in get_type_hints(last.annotation).items()
    ]

    @functools.wraps(function)
    def flattened(*inputs: Any) -> Any:
        return function(*inputs[: len(parameters)], last.annotation(*inputs[len(parameters) :]))

    flattened.__signature__ = signature.replace(parameters=[*parameters, *fields])  # type: ignore[attr-defined]
    return flattened


class _Function(torch.autograd.Function):
    """functorch's transforms see this: grad works, vmap loops, forward mode is refused."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "clipfast does not support forward-mode derivatives (jvp, jacfwd, linearize). Use clipfast.reference, or "
            "reverse mode."
        )


def _watched(inputs: tuple[Any, ...]) -> bool:
    """Whether torch.compile, a dispatch mode (fake tensors, counters) or a subclass of Tensor looks on."""
    if torch.compiler.is_compiling():
        return True
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    watched = torch._C._len_torch_dispatch_stack() > 0
    watched = watched or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
    if watched and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):  # type: ignore[no-untyped-call]
        _Function.jvp(None)
    return watched


def _refuse_double_backward(*_: Any) -> Any:
    raise RuntimeError(
        "clipfast does not support double backward: its backward pass has no derivative. Use the same loss of "
        "clipfast.reference where a gradient of the gradient is needed."
    )


def _one_by_one(function: Any, count: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> Any:
    """torch.vmap's rule: a loop over the batch."""
    outputs = [
        function(*(value if dim is None else value.select(dim, i) for value, dim in zip(inputs, in_dims, strict=True)))
        for i in range(count)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)
