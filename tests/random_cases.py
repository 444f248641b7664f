"""Random cases of the losses, drawn from a seed: shapes, dtypes, options, and the forms that tensors may have."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clipfast.backends import cpu
from clipfast.problem import accumulation_dtype

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200, 257)
DIMS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 257)
SCALES = (0.0, -1.0, -20.0, 1.0, 1.0, 5.0, 14.3, 14.3, 100.0, 112.0)
KINDS = ("random", "trained", "matched", "opposed", "collapsed", "unnormalized", "zeros")


@dataclass
class Case:
    """What was drawn. `options` go to clipfast and, but for `ours_only`, to the reference."""

    loss: str
    backend: str
    instruction_set: str
    n: int
    m: int
    d: int
    dtypes: tuple[torch.dtype, torch.dtype]
    kind: str
    forms: tuple[str, str]
    scale: float
    scale_form: str
    bias: float
    normalize: bool
    upstream: float
    upstream_form: str
    threads: int
    default_dtype: torch.dtype
    default_device: str
    autocast: bool
    teacher_d: int
    teacher_dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    groups: int = 0
    metrics: bool = False


def draw(seed: int) -> Case:
    r = random.Random(seed)
    loss = r.choice(("contrastive",) * 4 + ("siglip",) * 2 + ("distillation",))
    small = r.random() < 0.6
    n, extra = (r.choice(SIZES[:12] if small else SIZES) for _ in range(2))
    dtype = r.choice(DTYPES)
    dtypes = dtype, dtype if r.random() < 0.7 else r.choice(DTYPES)
    case = Case(
        loss=loss,
        backend=r.choice(("cpu", "cpu", "cpu", "torch")) if cpu.instruction_sets() else "torch",
        instruction_set="",
        n=n,
        m=n if r.random() < 0.6 else n + extra,
        d=r.choice(DIMS),
        dtypes=dtypes,
        kind=r.choice(KINDS),
        forms=(r.choice(tuple(FORMS)), r.choice(tuple(FORMS))),
        scale=r.choice(SCALES) if r.random() < 0.8 else round(r.uniform(-30, 112), 3),
        scale_form=r.choice(("number", "0-D", "[1]", "parameter", "integer", "negated")),
        bias=0.0 if r.random() < 0.5 else round(r.uniform(-12, 4), 3),
        normalize=r.random() < 0.3,
        upstream=r.choice((1.0, 1.0, 1.0, -2.5, 1e-3, 1e4, 0.0)),
        upstream_form=r.choice(("plain", "plain", "strided", "negated", "zero")),
        threads=r.choice((1, 2, 3, 5)),
        default_dtype=r.choice((torch.float32,) * 3 + (torch.float64, torch.bfloat16)),
        default_device=r.choice(("cpu",) * 3 + ("meta",)),
        autocast=r.random() < 0.1,
        teacher_d=r.choice(DIMS),
        teacher_dtype=r.choice(DTYPES),
    )
    if case.backend == "cpu":
        case.instruction_set = r.choice([name for name, here in cpu.instruction_sets().items() if here])
    if case.scale_form == "integer":
        case.scale = float(round(case.scale))
    if loss != "distillation" and r.random() < 0.4:
        case.groups = r.choice((1, 2, n, 2 * n))
        case.options["same_id"] = r.choice(("ignore", "positive"))
    if loss == "contrastive":
        case.options["label_smoothing"] = r.choice((0.0, 0.0, 0.1, 1.0))
        case.options["direction"] = r.choice(("both", "both", "image_to_text", "text_to_image"))
        case.options["reduction"] = r.choice(("mean", "mean", "none"))
        case.metrics = r.random() < 0.3
    return case


# How a matrix of numbers lies in memory. Each gives a tensor with exactly the values, which may be detached.


def _strided(values: Tensor) -> Tensor:
    base = torch.full((2 * len(values) + 1, 3 * values.shape[1] + 2), torch.nan, dtype=values.dtype, device="cpu")
    out = base[1::2, 2::3]
    return out.copy_(values)


def _sliced(values: Tensor) -> Tensor:
    base = torch.full((len(values) + 3, values.shape[1] + 5), torch.nan, dtype=values.dtype, device="cpu")
    return base[2:-1, 4:-1].copy_(values)


def _complex_part(values: Tensor) -> Tensor:
    if values.dtype not in (torch.float32, torch.float64):
        return torch._neg_view(-values)
    return torch.complex(torch.zeros_like(values), -values).conj().imag


@torch.inference_mode()
def _inference(values: Tensor) -> Tensor:
    return values.clone()


class Subclass(Tensor):
    """A tensor of a type of its own, with memory of its own."""


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "leaf": lambda values: values.clone().requires_grad_(),
    "parameter": lambda values: torch.nn.Parameter(values.clone()),
    "transposed": lambda values: values.T.contiguous().T,
    "sliced": _sliced,
    "strided": _strided,
    "flipped": lambda values: values.flip(0).contiguous().flip(0),
    "expanded rows": lambda values: values[:1].expand(len(values), -1),
    "expanded columns": lambda values: values[:, :1].expand(-1, values.shape[1]),
    "negated": lambda values: torch._neg_view(-values),
    "complex part": _complex_part,
    "zero": lambda values: torch._efficientzerotensor(values.shape, dtype=values.dtype, device="cpu"),
    "inference": _inference,
    "subclass": lambda values: values.clone().as_subclass(Subclass),
}
WITHOUT_GRADIENT = ("zero", "inference")


def values(case: Case, g: torch.Generator, d: int, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    """x [n, d] and y [m, d], related as the case's kind says."""
    x, y = (torch.randn(rows, d, generator=g, dtype=torch.float64, device="cpu") for rows in (case.n, case.m))
    if case.kind == "trained":
        y[: case.n] = x + 0.5 * y[: case.n]
    elif case.kind in ("matched", "opposed"):
        y[: case.n] = x if case.kind == "matched" else -x
    elif case.kind == "collapsed":
        x[:], y[:] = x[0].clone(), x[0].clone()
    elif case.kind == "zeros":
        x[::2], y[1::3] = 0, 0
    if case.kind == "unnormalized":
        x, y = 3 * x / d**0.5, 2 * y / d**0.5
    else:
        x, y = (torch.nn.functional.normalize(t, dim=1) for t in (x, y))
    return x.to(dtypes[0]), y.to(dtypes[1])


@dataclass
class Inputs:
    x: Tensor
    y: Tensor
    scale: Any
    bias: Any
    ids: dict[str, Tensor]
    teacher: tuple[Any, ...]


def inputs(case: Case, seed: int) -> Inputs:
    g = torch.Generator("cpu").manual_seed(seed)
    x, y = (FORMS[form](t) for form, t in zip(case.forms, values(case, g, case.d, case.dtypes), strict=True))
    x, y = (
        t if form in WITHOUT_GRADIENT or t.requires_grad else t.detach().requires_grad_(seed % 7 != i)
        for i, (form, t) in enumerate(zip(case.forms, (x, y), strict=True))
    )
    dtype = accumulation_dtype(torch.promote_types(*case.dtypes))
    scale = torch.tensor(case.scale, dtype=dtype, device="cpu")
    scale = {
        "number": lambda: case.scale,
        "0-D": lambda: scale.requires_grad_(),
        "[1]": lambda: scale[None].requires_grad_(),
        "parameter": lambda: torch.nn.Parameter(scale.float()),
        "integer": lambda: torch.tensor(round(case.scale), device="cpu"),
        "negated": lambda: torch._neg_view(-scale).detach().requires_grad_(),
    }[case.scale_form]()
    bias = torch.tensor(case.bias, dtype=dtype, device="cpu").requires_grad_()
    sizes = {"image_ids": case.n, "text_ids": case.m} if case.groups else {}
    ids = {name: torch.randint(-case.groups, case.groups, (n,), generator=g, device="cpu") for name, n in sizes.items()}
    teacher: tuple[Any, ...] = ()
    if case.loss == "distillation":
        teacher = (*values(case, g, case.teacher_d, (case.teacher_dtype, case.teacher_dtype)), 7.5)
    return Inputs(x, y, scale, bias, ids, teacher)


@contextmanager
def surroundings(case: Case) -> Iterator[None]:
    """The threads, instruction set, default dtype and device, and autocast that the case wants."""
    threads, dtype, environment = torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ)
    with ExitStack() as stack:
        if case.autocast:
            stack.enter_context(torch.autocast("cpu"))
        if case.default_device != "cpu":
            stack.enter_context(torch.device(case.default_device))
        try:
            torch.set_num_threads(case.threads)
            torch.set_default_dtype(case.default_dtype)
            if case.instruction_set:
                os.environ[cpu.ENVIRONMENT_VARIABLE] = case.instruction_set
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            os.environ.clear()
            os.environ.update(environment)


def upstream_gradient(case: Case, seed: int) -> Tensor:
    dtype = accumulation_dtype(torch.promote_types(*case.dtypes))
    if case.loss == "distillation":
        dtype = accumulation_dtype(torch.promote_types(torch.promote_types(*case.dtypes), case.teacher_dtype))
    shape: tuple[int, ...] = ()
    if case.options.get("reduction") == "none":
        shape = (2, case.n) if case.options["direction"] == "both" else (case.n,)
    g = torch.Generator("cpu").manual_seed(seed + 1)
    plain = torch.full((), case.upstream, dtype=dtype, device="cpu")
    if shape:
        plain = plain * torch.randn(shape, generator=g, dtype=dtype, device="cpu")
    if case.upstream_form == "negated":
        return torch._neg_view(-plain)
    if case.upstream_form == "zero":
        return torch._efficientzerotensor(shape, dtype=dtype, device="cpu")
    if case.upstream_form == "strided":
        return torch.stack((plain, plain * torch.nan), dim=-1)[..., 0]
    return plain
