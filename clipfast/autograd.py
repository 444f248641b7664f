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
from clipfast.backends.cpu import item

Function = Callable[..., tuple[Tensor, ...]]
Save = Callable[[tuple[Any, ...], tuple[Tensor, ...]], tuple[tuple[Any, ...], tuple[Any, ...]]]


def differentiable(
    name: str,
    forward: Function,
    backward: Function,
    forward_shapes: Function,
    backward_shapes: Function,
    save: Save,
    formed: bool = False,
    through: bool = True,
) -> Function:
    """The function `clipfast::name`, whose first output has a gradient and whose others have none.

    forward(*inputs) gives the outputs; save(inputs, outputs) says which tensors, and which other values, the backward
    pass needs; backward(gradient of the first output, *tensors, *values) gives the gradients of the first inputs, all
    others have none. The last input is a NamedTuple of options, in whose place the operator has its fields. The shapes
    functions do the same on tensors without data. `formed`: the gradients come with the outputs, and the backward pass
    only scales them, by None where that is by 1. Without `through`, a graph through the backward pass (create_graph)
    would not lead to the inputs, so it is refused. The operator itself is the function's attribute `operator`.
    """
    flat_forward, flat_backward = _flat(forward), _flat(backward)
    operator = torch.library.custom_op(f"clipfast::{name}", mutates_args=())(flat_forward)
    derivative = torch.library.custom_op(f"clipfast::{name}_backward", mutates_args=())(flat_backward)
    operator.register_fake(forward_shapes)
    derivative.register_fake(backward_shapes)

    by_inputs = len(derivative._opoverload._schema.returns)  # how many inputs have gradients

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.values = save(inputs, output)
        ctx.save_for_backward(*tensors)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        keep(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros for outputs that have no gradient

    def gradients(ctx: Any, function: Function, *inputs: Any) -> tuple[Tensor | None, ...]:
        if not through and torch.is_grad_enabled():
            _refuse_double_backward()
        by_first = function(*inputs)
        needs = ctx.needs_input_grad
        wanted = [g if wants else None for g, wants in zip(by_first, needs, strict=False)]
        return *wanted, *[None] * (len(needs) - by_inputs)

    def operator_backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return gradients(ctx, derivative, gradient, *ctx.saved_tensors, *ctx.values)

    operator.register_autograd(operator_backward, setup_context=setup_context)
    derivative.register_autograd(_refuse_double_backward)

    class Eager(_Function):
        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, ...]:
            return flat_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            gradient = arguments.plain("the loss's gradient", upstream)
            tensors, values = ctx.saved_tensors, _fields(ctx.values)
            if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
                return gradients(ctx, EagerBackward.apply, gradient, *tensors, *values)
            if _watched((gradient, *tensors)):
                return gradients(ctx, derivative, gradient, *tensors, *values)
            return gradients(ctx, flat_backward, None if formed and _is_one(gradient) else gradient, *tensors, *values)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
            return _one_by_one(Eager.apply, info.batch_size, in_dims, inputs)

    Eager.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]

    class Plain(torch.autograd.Function):
        """Eager, where no transform of functorch looks on: those need setup_context, which binds a signature.

        Autograd takes time for all that goes in and comes out. What has no gradient passes it by: the other inputs as
        one, the other outputs in a list.
        """

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            *first, others, outputs = inputs
            inputs = *first, *others
            results = forward(*inputs)
            outputs += results[1:]
            keep(ctx, inputs, results)
            return results[0]

        backward = Eager.backward
        jvp = _Function.jvp

    class EagerBackward(_Function):
        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, ...]:
            return flat_backward(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        backward = staticmethod(_refuse_double_backward)  # type: ignore[assignment]

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
            return _one_by_one(EagerBackward.apply, info.batch_size, in_dims, inputs)

    def apply(*inputs: Any) -> tuple[Tensor, ...]:
        if _watched(inputs[:-1]):
            return operator(*_fields(inputs))  # type: ignore[no-any-return]
        if torch._C._are_functorch_transforms_active():
            return Eager.apply(*_fields(inputs))  # type: ignore[no-any-return, no-untyped-call]
        outputs: list[Tensor] = []
        # Function.apply itself looks for functorch once more.
        plain: Any = super(torch.autograd.Function, Plain)
        loss = plain.apply(*inputs[:by_inputs], inputs[by_inputs:], outputs)
        return loss, *outputs

    apply.operator = operator  # type: ignore[attr-defined]
    return apply


def _flat(function: Function) -> Function:
    """The function with the fields of its last argument in its place, if that is a NamedTuple."""
    signature = inspect.signature(function, eval_str=True)
    *parameters, last = signature.parameters.values()
    if not hasattr(last.annotation, "_fields"):
        return function
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


def _fields(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What `_flat` makes of a function's inputs."""
    return (*inputs[:-1], *inputs[-1]) if inputs and isinstance(inputs[-1], tuple) else inputs


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
    watched = torch._C._len_torch_dispatch_stack() > 0
    if not watched and _UNWATCHED.issuperset(map(type, inputs)):
        return False
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    watched = watched or not _UNWATCHED.issuperset(map(type, tensors))
    if watched and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):  # type: ignore[no-untyped-call]
        _Function.jvp(None)
    return watched


_UNWATCHED = {Tensor, torch.nn.Parameter, type(None), bool, float, str, torch.dtype}


def _is_one(gradient: Tensor) -> bool:
    """Whether what was formed can be given away as it is: it is not looked at again, and no device is waited for."""
    return gradient.is_cpu and not _graph_is_kept() and item(gradient) == 1


_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


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
