"""Time all candidates on all cases within a budget, each checked before its time counts; the result is a JSON file.

Rounds are interleaved: each round times every candidate and torch's GEMM once, in rotating order, so that a slow spell
of the machine hits all alike; NumPy's GEMM comes after them. On a CPU a step of a small encoder comes before each, as
in training: else those that are made of the same operations would find their code in the caches, and others would not.
P is a candidate's median time over the median of one product [n, d] x [d, n], by the fastest of this machine's
libraries. On a CPU the rounds measure the processor's multiply-add peak too: the share of it that a candidate has is
what it multiplies, over its time. On a GPU it is the share of the product's rate.
The file is written after every case and is whole at any moment; a later run of the same commit goes on from there, one
of another commit, or of changes that no commit names, needs another file. A candidate that ends the process, or on a
GPU hangs or leaves it unusable, is named in the file: a later run goes on without it.
"""

from __future__ import annotations

import functools
import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clipfast
from benchmarks import environment, peak
from benchmarks.baselines import Candidate, Loss, candidates
from benchmarks.cases import TF32, Case, grid, inputs
from clipfast import reference

PRODUCTS = 4  # the least an exact loss without stored logits can do
MOST_ROUNDS, FEWEST_ROUNDS = 30, 3
SPINNING = 0.2  # seconds, longer than OpenBLAS's threads do it
SECONDS_PER_CANDIDATE = {"cpu": 1.5, "cuda": 0.3}  # of timed rounds, where the fewest rounds take less
PATIENCE = 90  # seconds for a candidate's first calls on a GPU, compilation included
DENSE_TRUTH_ROWS = 4096
# Relative error of the loss and, in the Frobenius norm, of the gradients, beyond which a result is called wrong.
TOLERANCE = {"float32": 1e-3, TF32: 1e-2, "bfloat16": 5e-2, "float16": 5e-2}


@dataclass
class Runner:
    """One run over a list of cases.

    Args:
        device: "cpu" or "cuda".
        path: of the result file, which is gone on with or does not exist.
        budget: seconds for the whole run; what does not fit is skipped with its reason.
        cases: what to measure, most telling first.
        only: part of a candidate's name; others are left out.

    Raises:
        FileExistsError: the file holds a result of another device, commit or version.
    """

    device: str
    path: Path
    budget: float
    cases: list[Case] = field(default_factory=list)
    only: str = ""

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.cases = self.cases or grid(self.device)
        self.candidates = [c for c in candidates(self.device) if self.only in c.name]
        self.memory = environment.memory_bytes(self.device)
        # The largest n so far of each candidate and dtype, and its seconds per n*n*d, to foresee what a case takes.
        self.pace: dict[tuple[str, str], tuple[int, float]] = {}
        self.result = environment.describe(self.device) | {"rows": []}
        if self.path.exists():
            environment.out_path(self.path, "", self.result)
            self._resume(json.loads(self.path.read_text()))

    def _resume(self, before: dict[str, Any]) -> None:
        self.result = before
        if trying := before.pop("trying", None):
            before.setdefault("ended", []).append(trying)
        for row in before["rows"]:
            if row["status"] == "ok":
                self._note_pace(row["candidate"], _case(row), row["total"]["median"])

    def _note_pace(self, name: str, case: Case, seconds: float) -> None:
        key = (name, case.dtype)
        if case.n >= self.pace.get(key, (0, 0.0))[0]:
            self.pace[key] = (case.n, seconds / (case.n**2 * case.d))

    def run(self, report: Callable[[str], None]) -> dict[str, Any]:
        """Measure what is not in the file yet; `report` gets a line for each row."""
        done = {_case(row) for row in self.result["rows"]}
        for case in self.cases:
            if case in done:
                report(f"{case}: already in {self.path.name}")
                continue
            left = self.budget - (time.monotonic() - self.started)
            if left <= 0:
                report(f"{case}: not run, the budget of {self.budget:.0f} s is spent")
                continue
            with precision(case.precision):
                rows = self._measure(case, left)
            self.result["rows"] += rows
            environment.write_whole(self.path, self.result)
            for row in rows:
                report(line(row))
        return self.result

    def _measure(self, case: Case, left: float) -> list[dict[str, Any]]:
        """The rows of one case: those that were timed, then those that were not."""
        sets = inputs(case, self.device)
        exact = None
        ready: dict[str, Loss] = {}
        slowest = 0.0
        rows: dict[str, dict[str, Any]] = {}
        for candidate in self.candidates:
            row = rows[candidate.name] = {"candidate": candidate.name, **case.as_dict(), "status": "skipped"}
            reason = candidate.reason(case, self.device, self.memory) or self._ended(candidate, case)
            if reason := reason or self._too_slow(candidate, case, left):
                row["reason"] = reason
                continue
            exact = exact or truth(case, self.device)
            with self._trying(candidate, case):
                try:
                    loss = candidate.loss()
                    checked = check(loss, candidate, case, exact, self.device)
                    if checked["status"] == "ok":
                        slowest = max(slowest, once(loss, *next(sets), self.device)[1])
                        checked["peak_bytes"] = peak_bytes(loss, *next(sets), self.device)
                        ready[candidate.name] = loss
                    row |= checked
                except (RuntimeError, ValueError, TypeError, ImportError, NotImplementedError, AssertionError) as error:
                    row["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
                    if self.device == "cuda":
                        # After an error that stays, nothing can be measured in this process: it ends here.
                        torch.cuda.synchronize()
        self._time(ready, rows, case, sets, slowest)
        return list(rows.values())

    @contextmanager
    def _trying(self, candidate: Candidate, case: Case) -> Iterator[None]:
        """While a candidate runs for the first time, the file names it; on a GPU the process ends when it hangs."""
        self.result["trying"] = [candidate.name, case.as_dict()]
        environment.write_whole(self.path, self.result)
        if self.device == "cuda":
            signal.alarm(PATIENCE)
        try:
            yield
        except KeyboardInterrupt:
            del self.result["trying"]
            environment.write_whole(self.path, self.result)
            raise
        finally:
            if self.device == "cuda":
                signal.alarm(0)
        del self.result["trying"]

    def _ended(self, candidate: Candidate, case: Case) -> str:
        """The reason, if it ended an earlier process in this dtype at no larger a batch."""
        for name, of in self.result.get("ended", ()):
            before = Case(**of)
            if (name, before.dtype) == (candidate.name, case.dtype) and before.n <= case.n:
                return f"ended the process at {before}"
        return ""

    def _too_slow(self, candidate: Candidate, case: Case, left: float) -> str:
        """The reason, if its calls (check, warm-up, fewest rounds) would take more than a fair share of the budget."""
        pace = self.pace.get((candidate.name, case.dtype), (0, 0.0))[1]
        seconds = pace * case.n**2 * case.d * (FEWEST_ROUNDS + 3)
        limit = min(left / 3, self.budget / 24)
        return f"would take {seconds:.0f} s, of {limit:.0f} s for one row" if seconds > limit else ""

    def _time(
        self,
        losses: dict[str, Loss],
        rows: dict[str, dict[str, Any]],
        case: Case,
        sets: Iterator[tuple[Tensor, Tensor, Tensor]],
        slowest: float,  # seconds
    ) -> None:
        """Fill in the times of interleaved rounds, P, and the share of the limit."""
        timed: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
        gemms: dict[str, list[float]] = {name: [] for name in products(case, self.device)}
        peaks: list[float] = []
        gemm(*next(sets), self.device)
        between = encoder_step if self.device == "cpu" else lambda: None
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(SECONDS_PER_CANDIDATE[self.device] / max(slowest, 1e-6))))
        names = list(losses)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)] if names else ():
                between()
                timed[name].append(once(losses[name], *next(sets), self.device))
            gemms["torch"].append(gemm(*next(sets), self.device))
            if self.device == "cpu" and peak.available():
                peaks.append(peak.multiply_adds_per_second(str(case.torch_dtype).removeprefix("torch.")))
        if "numpy" in gemms:
            # Apart: OpenBLAS's threads wait by spinning, and whatever comes next would lose a processor to them.
            gemms["numpy"] = [gemm(*next(sets), self.device, "numpy") for _ in range(rounds)]
            time.sleep(SPINNING)
        library = min(gemms, key=lambda name: statistics.median(gemms[name]))
        multiplies = {candidate.name: candidate.products(case, self.device) for candidate in self.candidates}
        for name, times in timed.items():
            unit = statistics.median(gemms[library])
            total = statistics.median(t for _, t in times)
            forward = statistics.median(t for t, _ in times)
            self._note_pace(name, case, total)
            rows[name] |= {
                "rounds": rounds,
                "forward": spread([t for t, _ in times]),
                "total": spread([t for _, t in times]),
                "gemm": spread(gemms[library]),
                "gemm_library": library,
                "products_forward": forward / unit,
                "products": total / unit,
                "share_of_limit": PRODUCTS * unit / total,
            }
            if peaks:
                highest = max(peaks)
                multiplied = 2 * multiplies[name] * case.n**2 * case.d
                rows[name] |= {"multiplied": multiplies[name], "peak_flops": highest}
                rows[name]["share_of_limit"] = multiplied / total / highest
            if self.device == "cuda":
                rows[name]["tflops"] = 2 * PRODUCTS * case.n**2 * case.d / total / 1e12


def encoder_step() -> None:
    """Forward and backward of a layer of a transformer."""
    layer, tokens = _encoder()
    layer(tokens).sum().backward()


@functools.cache
def _encoder() -> tuple[torch.nn.Module, Tensor]:
    layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
    return layer, torch.ones(4, 50, 512)


@contextmanager
def precision(wanted: str) -> Iterator[None]:
    """With this precision of float32's products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def truth(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, dx, dy, dscale of the first input set, in float64.

    By the dense reference up to n = 4096, by clipfast's `torch` backend beyond, which the tests judge against it.
    """
    x, y, s = (t.detach().double().requires_grad_() for t in next(inputs(case, device)))
    if case.n <= DENSE_TRUTH_ROWS:
        loss = reference.contrastive_loss(x, y, s)
    else:
        loss = clipfast.contrastive_loss(x, y, s, backend="torch")
    dx, dy, dscale = torch.autograd.grad(loss, (x, y, s))
    return loss.detach(), dx, dy, dscale


def check(
    loss: Loss, candidate: Candidate, case: Case, exact: tuple[Tensor, Tensor, Tensor, Tensor], device: str
) -> dict[str, Any]:
    """The candidate's errors on the first input set, relative to the truth, and whether they are those of its dtype."""
    x, y, s = next(inputs(case, device))
    value = loss(x, y, s)
    torch.autograd.backward(value)
    got = {"loss": value, "dx": x.grad, "dy": y.grad}
    expected = dict(zip(("loss", "dx", "dy", "dscale"), exact, strict=True))
    if candidate.scale_gradient:
        got["dscale"] = s.grad
    errors: dict[str, float] = {}
    for name, tensor in got.items():
        if tensor is None:
            return {"status": "wrong", "reason": f"has no gradient {name}"}
        errors[name] = ((tensor.double() - expected[name]).norm() / expected[name].norm()).item()
    worst = max(errors, key=lambda name: errors[name])
    # Written so that a NaN is wrong.
    if not errors[worst] <= TOLERANCE[case.dtype] or any(error != error for error in errors.values()):
        return {"status": "wrong", "errors": errors, "reason": f"error of {worst}: {errors[worst]:.2g}"}
    return {"status": "ok", "errors": errors}


def once(loss: Loss, x: Tensor, y: Tensor, s: Tensor, device: str) -> tuple[float, float]:
    """Seconds of forward, and of forward and backward."""
    if device == "cuda":
        marks = _events(3)
        marks[0].record()
        value = loss(x, y, s)
        marks[1].record()
        torch.autograd.backward(value)
        marks[2].record()
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3, marks[0].elapsed_time(marks[2]) / 1e3
    begin = time.perf_counter()
    value = loss(x, y, s)
    middle = time.perf_counter()
    torch.autograd.backward(value)
    return middle - begin, time.perf_counter() - begin


def _events(count: int) -> list[Any]:
    make: Any = torch.cuda.Event
    return [make(enable_timing=True) for _ in range(count)]


def products(case: Case, device: str) -> tuple[str, ...]:
    """The libraries whose matrix product is tried."""
    return ("torch", "numpy") if device == "cpu" and case.dtype == "float32" else ("torch",)


def gemm(x: Tensor, y: Tensor, s: Tensor, device: str, library: str = "torch") -> float:
    """Seconds of the product of the same shape and dtype."""
    x, y = x.detach(), y.detach()
    if library == "numpy":
        a, b = x.numpy(), y.numpy()
        begin = time.perf_counter()
        a @ b.T
        return time.perf_counter() - begin
    if device == "cuda":
        marks = _events(2)
        marks[0].record()
        torch.mm(x, y.T)
        marks[1].record()
        torch.cuda.synchronize()
        return float(marks[0].elapsed_time(marks[1])) / 1e3
    begin = time.perf_counter()
    torch.mm(x, y.T)
    return time.perf_counter() - begin


def peak_bytes(loss: Loss, x: Tensor, y: Tensor, s: Tensor, device: str) -> int:
    """Peak extra bytes of forward and backward, gradients included."""
    memory = environment.PeakMemory(device)
    memory.start()
    torch.autograd.backward(loss(x, y, s))
    return memory.stop()


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    head = f"{_case(row)!s:<42} {row['candidate']:<36}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason']}"
    total = row["total"]
    cells = [
        f"{1e3 * row['forward']['median']:>9.2f} ms fwd",
        f"{1e3 * total['median']:>9.2f} ms fwd+bwd ({1e3 * total['min']:.2f}-{1e3 * total['max']:.2f})",
        f"{row['products']:>6.1f} P",
        f"{row['share_of_limit']:>5.0%} of the {'peak' if 'peak_flops' in row else 'limit'}",
        f"{row['peak_bytes'] / 2**20:>8.0f} MiB",
    ]
    if "tflops" in row:
        cells.append(f"{row['tflops']:.0f} TFLOP/s")
    return f"{head} {'  '.join(cells)}"


def _case(row: dict[str, Any]) -> Case:
    return Case(row["dtype"], row["n"], row["d"], row["scale"])
