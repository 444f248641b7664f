"""Random cases of the losses, judged against the dense formula in float64: `make fuzz`, or

    python tests/fuzz.py --cases 20000 --seed 0

Case i has the seed `seed + i` and draws everything from it, so `python tests/fuzz.py --cases 1 --seed S` repeats one.
The cases run in a process of their own: one that dies is reported as any other, and the run goes on.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from oracle import BFLOAT16_UNITS
from random_cases import Case, Inputs, draw, inputs, surroundings, upstream_gradient
from torch import Tensor

import clipfast
from clipfast import reference
from clipfast.calls import METRIC_KS
from clipfast.problem import HALF_DTYPES, accumulation_dtype

SECONDS = 120  # for one case, before it counts as hanging


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
    eps = torch.finfo(accumulation_dtype(promoted)).eps
    relative = 4 * eps * (largest + 2 + terms)
    if promoted == torch.float64 and case.forms == ("expanded columns", "expanded columns"):
        relative = relative + eps * largest * case.d / 4  # of the truth itself, whose logits add up equal terms
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
    """err(value) <= 2 err(PyTorch) + roundings, row by row of a matrix; inf if that reaches beyond the dtype."""
    info, value = torch.finfo(value.dtype), value.as_subclass(Tensor).double()
    dims = {"dim": 1, "keepdim": True} if exact.ndim == 2 else {}
    errors, size = ((near - exact).abs(), exact.abs()) if not dims else (
        (near - exact).abs().amax(**dims), exact.abs().amax(**dims)
    )  # fmt: skip
    bound = 2 * errors + 2 * info.eps * size + rounding + 2 * info.smallest_normal * info.eps
    infinite = (exact.abs() >= info.max * (1 - info.eps)) & (value == exact.sign() * torch.inf)
    wrong = ~((value.clamp(-info.max, info.max) - exact).abs() <= bound) & ~infinite
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
