"""Random cases of the losses, judged against the dense formula in float64: `make fuzz`, or

    python tests/fuzz.py --cases 20000 --seed 0

Case i has the seed `seed + i` and draws everything from it, so `python tests/fuzz.py --cases 1 --seed S` repeats one.
The cases run in a process of their own: one that dies is reported as any other, and the run goes on.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from oracle import BFLOAT16_UNITS
from torch import Tensor

import clipfast
from clipfast import reference
from clipfast.backends import cpu
from clipfast.functional import METRIC_KS
from clipfast.problem import HALF_DTYPES, accumulation_dtype

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200, 257)
DIMS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 257)
SCALES = (0.0, -1.0, -20.0, 1.0, 1.0, 5.0, 14.3, 14.3, 100.0, 112.0)
KINDS = ("random", "trained", "matched", "opposed", "collapsed", "unnormalized", "zeros")
SECONDS = 120  # for one case, before it counts as hanging


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


def ours(case: Case, given: Inputs, upstream: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The loss, its gradients by the name of the input, and the metrics."""
    options = {**case.options, **given.ids, "normalize": case.normalize, "backend": case.backend}
    metrics: dict[str, Tensor] = {}
    # PyTorch lets no tensor that was made in inference mode into a graph.
    with surroundings(case), torch.set_grad_enabled("inference" not in case.forms):
        if case.loss == "distillation":
            loss = clipfast.distillation_loss(given.x, given.y, given.scale, *given.teacher, **options)
        elif case.loss == "siglip":
            loss = clipfast.siglip_loss(given.x, given.y, given.scale, given.bias, **options)
        elif case.metrics:
            loss, metrics = clipfast.contrastive_loss(
                given.x, given.y, given.scale, given.bias, return_metrics=True, **options
            )
        else:
            loss = clipfast.contrastive_loss(given.x, given.y, given.scale, given.bias, **options)
        by = {"x": given.x, "y": given.y, "scale": given.scale}
        if case.loss != "distillation":
            by["bias"] = given.bias
        by = {name: t for name, t in by.items() if loss.requires_grad and isinstance(t, Tensor) and t.requires_grad}
        gradients = torch.autograd.grad(loss, tuple(by.values()), upstream) if by else ()
    return loss.detach(), dict(zip(by, gradients, strict=True)), metrics


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


def dense(case: Case, given: Inputs, upstream: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The reference in `dtype`: the loss, its gradients, and that by the logits, G [n, m]."""
    promoted = torch.promote_types(given.x.dtype, given.y.dtype)
    if given.teacher:
        promoted = torch.promote_types(promoted, case.teacher_dtype)
    at = {name: _plain(t).to(dtype).requires_grad_() for name, t in (("x", given.x), ("y", given.y))}
    # The operators take the scale and bias in the accumulation dtype.
    for name, t in (("scale", given.scale), ("bias", given.bias)):
        number = t.item() if isinstance(t, Tensor) else t
        rounded = torch.tensor(number, dtype=accumulation_dtype(promoted), device="cpu")
        at[name] = rounded.to(dtype).requires_grad_()
    x, y, scale, bias = at.values()
    if case.normalize:
        x, y = reference.l2_normalize(x), reference.l2_normalize(y)
    logits = reference.logits(x, y, scale, 0.0 if given.teacher else bias)
    eye = torch.eye(case.m, dtype=dtype, device="cpu")  # the logits of `logits` against these are `logits`
    if given.teacher:
        teacher = [_plain(t).to(dtype) for t in given.teacher[:2]]
        if case.normalize:
            teacher = [reference.l2_normalize(t) for t in teacher]
        loss = reference.distillation_loss(logits, eye, 1.0, *teacher, given.teacher[2])
    elif case.loss == "siglip":
        loss = reference.siglip_loss(logits, eye, 1.0, 0.0, **given.ids, **case.options)
    else:
        options = {name: value for name, value in case.options.items() if name != "reduction"}
        losses = reference.contrastive_losses(logits, eye, 1.0, 0.0, **given.ids, **options)
        loss = losses.mean() if case.options["reduction"] == "mean" else losses
        loss = loss[0] if loss.ndim and len(loss) == 1 and case.options["direction"] != "both" else loss
    upstream = _plain(upstream).to(dtype)
    *gradients, by_logits = torch.autograd.grad(loss, (*at.values(), logits), upstream, allow_unused=True)
    return loss.detach(), dict(zip(at, gradients, strict=True)), by_logits


def _plain(t: Tensor) -> Tensor:
    t = t.detach().as_subclass(Tensor)
    return t.clone() if t._is_zerotensor() else t.clone().resolve_neg()


def check(case: Case, seed: int) -> None:
    """Fails unless loss, gradients and metrics are right, within the roundings of `assert_three_way` in oracle.py.

    The dense formula is here computed in the accumulation dtype also of halves, which is stricter; the roundings are
    counted with G itself, whose rows and columns a random upstream gradient makes uneven.
    """
    given, upstream = inputs(case, seed), upstream_gradient(case, seed)
    promoted = torch.promote_types(given.x.dtype, given.y.dtype)
    if given.teacher:
        promoted = torch.promote_types(promoted, case.teacher_dtype)
    loss, gradients, metrics = ours(case, given, upstream)
    exact_loss, exact, by_logits = dense(case, given, upstream, torch.float64)
    near_loss, near, _ = dense(case, given, upstream, accumulation_dtype(promoted))
    bounds = rounding(case, given, upstream, by_logits, promoted)
    assert loss.dtype == accumulation_dtype(promoted), f"loss: {loss.dtype}"
    assert loss.shape == exact_loss.shape, f"loss: {loss.shape}"
    compare("loss", loss, exact_loss, near_loss, bounds["loss"])
    for name, value in gradients.items():
        source = getattr(given, name)
        assert value.dtype == source.dtype, f"d{name}: {value.dtype}"
        assert value.shape == source.shape, f"d{name}: {value.shape}"
        compare(f"d{name}", value.reshape(exact[name].shape), exact[name], near[name], bounds[name])
    if metrics:
        check_metrics(case, given, metrics)


def rounding(
    case: Case, given: Inputs, upstream: Tensor, by_logits: Tensor, promoted: torch.dtype
) -> dict[str, Tensor]:
    """How far unavoidable roundings may move each result (oracle.assert_three_way): [n, 1] of x, [m, 1] of y, or []."""
    x, y = (_plain(t).double() for t in (given.x, given.y))
    share = _plain(upstream).double().abs().max() / (1 if upstream.ndim else case.n)
    # What cancels in G is not in its sums: a row's softmax and its target are 2 in all, or 4 with a teacher's.
    rows, cols = (by_logits.abs().sum(dim, keepdim=True) + 4 * share for dim in (1, 0))
    total = rows.sum()
    norms = [t.norm(dim=1, keepdim=True) for t in (x, y)]
    ones = torch.ones((), dtype=torch.float64, device="cpu")
    lengths = [ones if case.normalize else norm.max() for norm in norms]
    shrinks = [norm.clamp_min(1e-12).reciprocal() if case.normalize else ones for norm in norms]
    largest = abs(case.scale) * lengths[0] * lengths[1] + abs(case.bias)
    if given.teacher:
        largest_teacher = ones if case.normalize else math.prod(t.double().norm(dim=1).max() for t in given.teacher[:2])
        largest = largest + given.teacher[2] * largest_teacher
    terms = case.m / 4 if case.d == 1 or case.kind == "collapsed" else math.sqrt(case.m)
    relative = 4 * torch.finfo(accumulation_dtype(promoted)).eps * (largest + 2 + terms)
    if case.normalize and promoted in HALF_DTYPES:  # normalized rows are rounded to their dtype
        relative = relative + 2 * torch.finfo(promoted).eps * (largest + 2)
    # Units that multiply bfloat16 as it is take G rounded to it.
    multiplied = case.instruction_set in BFLOAT16_UNITS and case.dtypes == (torch.bfloat16, torch.bfloat16)
    of_features = relative + (torch.finfo(torch.bfloat16).eps / 2 if multiplied else 0)
    return {
        "loss": relative * (case.m if case.loss == "siglip" else 4),
        "x": of_features * rows * abs(case.scale) * lengths[1] * shrinks[0],
        "y": of_features * cols.T * abs(case.scale) * lengths[0] * shrinks[1],
        "scale": relative * total * lengths[0] * lengths[1],
        "bias": relative * total,
    }


def compare(name: str, value: Tensor, exact: Tensor, near: Tensor, rounding: Tensor) -> None:
    """err(value) <= 2 err(PyTorch) + roundings, row by row of a matrix; inf where the exact one is beyond the dtype."""
    info, value = torch.finfo(value.dtype), value.as_subclass(Tensor).double()
    dims = {"dim": 1, "keepdim": True} if exact.ndim == 2 else {}
    errors, size = ((near - exact).abs(), exact.abs()) if not dims else (
        (near - exact).abs().amax(**dims), exact.abs().amax(**dims)
    )  # fmt: skip
    bound = 2 * errors + 2 * info.eps * size + rounding + 2 * info.smallest_normal * info.eps
    infinite = (exact.abs() >= info.max * (1 - info.eps)) & (value == exact.sign() * torch.inf)
    wrong = ~((value - exact).abs() <= bound) & ~infinite
    if wrong.any():
        worst = torch.where(wrong, (value - exact).abs() / bound, 0).nan_to_num(torch.inf).argmax()
        got, truth, limit = (t.expand(exact.shape).flatten()[worst].item() for t in (value, exact, bound))
        raise AssertionError(f"{name}: {got:.9g}, exactly {truth:.9g}, bound {limit:.3g}; {wrong.sum()} are wrong")


def check_metrics(case: Case, given: Inputs, metrics: dict[str, Tensor]) -> None:
    """Recalls between those where every near tie is won and those where every one is lost."""
    x, y = (_plain(t).double() for t in (given.x, given.y))
    promoted = torch.promote_types(given.x.dtype, given.y.dtype)
    eps = torch.finfo(promoted if case.normalize else accumulation_dtype(promoted)).eps
    if case.normalize:
        x, y = reference.l2_normalize(x), reference.l2_normalize(y)
    logits = reference.logits(x, y, case.scale, case.bias)
    match = torch.eye(case.n, case.m, dtype=torch.bool, device="cpu")
    if given.ids:
        match |= given.ids["image_ids"][:, None] == given.ids["text_ids"]
    slack = 16 * eps * (abs(case.scale) * x.norm(dim=1).max() * y.norm(dim=1).max() + abs(case.bias) + 1)
    directions = {"image_to_text": (logits, match), "text_to_image": (logits.T[: case.n], match.T[: case.n])}
    chosen = directions if case.options["direction"] == "both" else (case.options["direction"],)
    assert set(metrics) == {f"{name}_R@{k}" for name in chosen for k in METRIC_KS}
    for name in chosen:
        scores, own = directions[name]
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        above = [((scores > best + side * slack) & ~own).sum(1) for side in (1, -1)]
        for k in METRIC_KS:
            high, low = ((count < k).double().mean().item() for count in above)
            got = metrics[f"{name}_R@{k}"].item()
            assert low - 1e-6 <= got <= high + 1e-6, f"{name}_R@{k}: {got}, exactly {low} to {high}"


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "nested, strided": lambda t: torch.nested.nested_tensor([t, t]),
    "nested, jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "complex": lambda t: t.to(torch.complex64),
    "integers": lambda t: t.long(),
    "a row": lambda t: t[0],
    "functional": torch._to_functional_tensor,
    "numbers": lambda t: t.tolist(),
}


def check_refusal(seed: int) -> str:
    """What no loss takes is refused by a ValueError or TypeError that names an argument."""
    r = random.Random(seed)
    kind, which, loss = r.choice(tuple(REFUSED)), r.choice((0, 1)), r.choice((0, 1, 2))
    features = [torch.ones(4, 3, device="cpu"), torch.ones(4, 3, device="cpu")]
    features[which] = REFUSED[kind](features[which])
    function: Any = (clipfast.contrastive_loss, clipfast.siglip_loss, clipfast.distillation_loss)[loss]
    rest = [(), (0.0,), (torch.ones(4, 2, device="cpu"), torch.ones(4, 2, device="cpu"), 1.0)][loss]
    try:
        function(*features, 1.0, *rest)
    except (TypeError, ValueError) as refusal:
        text = str(refusal)
    else:
        raise AssertionError(f"{function.__name__} takes {kind} as features {which}")
    assert ("image_features", "text_features")[which] in text, f"the error names no argument: {text}"
    return f"refused: {kind}"


def run(seed: int) -> str:
    """The case of this seed: what it was, or an exception."""
    if random.Random(seed).random() < 0.02:
        return check_refusal(seed)
    case = draw(seed)
    try:
        check(case, seed)
    except Exception as error:
        error.add_note(str(case)) if hasattr(error, "add_note") else None
        raise
    return str(case)


def reproduction(seed: int) -> str:
    return f"python tests/fuzz.py --cases 1 --seed {seed}"


def _worker(seeds: range, to_parent: Connection) -> None:
    """Runs the seeds; tells each before it runs it, and afterwards what was wrong or None."""
    for seed in seeds:
        to_parent.send((seed, None))
        try:
            text = run(seed)
            if len(seeds) == 1:
                print(text, file=sys.stderr)
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", ()))
            to_parent.send((seed, f"{type(error).__name__}: {error} {notes}"))
    to_parent.send((seeds.stop, None))


Worker = Callable[[range, Connection], None]


def faults(seeds: range, worker: Worker = _worker, seconds: float = SECONDS) -> Iterator[tuple[int, str | None]]:
    """Seeds as they are begun, and what was wrong with some; a process that dies or hangs is followed by another."""
    context = multiprocessing.get_context("spawn")
    while seeds:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=worker, args=(seeds, sender), daemon=True)
        process.start()
        sender.close()
        seed, why = seeds.start, ""
        while seed != seeds.stop and not why:
            try:
                if not receiver.poll(seconds):
                    why = f"hangs for {seconds:g} s"
                    process.kill()
                    break
                seed, fault = receiver.recv()
            except EOFError:
                process.join()
                why = f"the process died with exit code {process.exitcode}"
                break
            yield seed, fault
        process.join()
        if why:
            yield seed, why
        seeds = range(min(seed + 1, seeds.stop), seeds.stop)


def main() -> int:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next has the next (default 0)")
    options = parser.parse_args()
    seeds, wrong = range(options.seed, options.seed + options.cases), 0
    with tqdm(total=len(seeds), unit="case") as bar:
        for seed, fault in faults(seeds):
            if fault is not None:
                wrong += 1
                bar.write(f"{reproduction(seed)}   # {fault}", file=sys.stdout)
                bar.set_postfix(wrong=wrong)
            bar.update(seed - options.seed - bar.n)
    print(f"{len(seeds)} cases from seed {options.seed}: {wrong or 'none'} wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
