"""The Triton kernels of the loss family in small tiles: several tiles a program, several programs, several chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest
import torch
from oracle import error
from torch import Tensor
from torch.nn.functional import softplus
from triton_case import BACKWARD, DEVICE, DISTILLATION, DTYPES, RANKS, SIGMOID, Case, block, with_ids

from clipfast import dispatch, tuning
from clipfast.block import IGNORE, POSITIVE, SAME_IDS, DistillationPass, SigmoidPass, Weights
from clipfast.kernels import distillation, launch
from clipfast.problem import NEEDS, Problem


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("same_id", SAME_IDS)
@pytest.mark.parametrize(
    ("scale", "groups"), [(14.3, 1), (14.3, 3), (-14.3, 60), (14.3, 5000), (1000.0, 60), (0.0, 60)]
)
def test_ids_in_small_tiles(scale: float, groups: int, same_id: str, dtype: torch.dtype) -> None:
    """From tiles that are all ignored to tiles without equal ids."""
    case = with_ids(block(75, 90, 20, dtype, scale, diag_offset=5), groups, same_id)
    case.check_forward(config=RANKS)
    for strategy, config in BACKWARD.items():
        case.check_backward(config=config, strategy=strategy)


@pytest.mark.parametrize("same_id", SAME_IDS)
@pytest.mark.parametrize("scale", [14.3, -14.3])
def test_ids_with_row_factors(scale: float, same_id: str) -> None:
    case = block(75, 90, 20, torch.bfloat16, scale, diag_offset=5)
    factors = [1 / t.float().norm(dim=1) for t in (case.x, case.y)]
    case = with_ids(Case(case.x, case.y, case.scale, case.bias, 5, *factors), 60, same_id)
    case.check_forward(config=RANKS)
    for strategy, config in BACKWARD.items():
        case.check_backward(config=config, strategy=strategy)


def test_a_row_far_below_its_ignored_tile() -> None:
    """Its only negatives lie 200 binary orders below what it ignores: no shift of theirs may serve it."""
    x, y = torch.zeros(40, 4), torch.zeros(40, 4)
    x[:, 0], y[:, 0] = 1.0, 1.0
    x[7, 0], y[32:, 1] = 0.0, -1.0
    x[7, 1], y[:32, 1] = 150.0, 0.0
    x[7, 0] = 30.0
    ids = torch.arange(40, dtype=torch.int32), torch.full((40,), 7, dtype=torch.int32)
    ids[1][32:] = torch.arange(100, 108)
    case = Case(x, y, torch.tensor(1.0), torch.tensor(0.0), 0, ids=ids)
    assert case.row_lse[7] < -100
    case.check_forward(config=RANKS)


@pytest.mark.parametrize("scale", [14.3, -14.3, 0.0, float("nan")])
@pytest.mark.parametrize("groups", [0, 1, 60, 5000])
@pytest.mark.parametrize("factors", [False, True])
def test_ranks_in_small_tiles(factors: bool, groups: int, scale: float) -> None:
    """Counts are those of the products that the kernel itself compares: ties included, with integers for features."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-2, 3, (size, 9), generator=generator).float().to(DEVICE) for size in (75, 90))
    one = [torch.full((size,), 0.5, device=DEVICE) for size in (75, 90)] if factors else []
    case = Case(x, y, torch.tensor(scale, device=DEVICE), torch.tensor(0.5, device=DEVICE), 5, *one)
    case = with_ids(case, groups, IGNORE) if groups else case
    own = case.is_positive | case.same
    matches = launch.matches(case.block, config=RANKS)
    got = launch.forward(case.block, matches, config=RANKS)
    best = case.logits.masked_fill(~own, -torch.inf)
    for above, dim in ((got.row_above, 1), (got.col_above, 0)):
        match = best.amax(dim).unsqueeze(dim)
        assert torch.equal(above, (~(case.logits < match) & ~own).sum(dim, dtype=torch.int32))
    if not torch.tensor(scale).isnan():
        case.check_forward(matches=matches, config=RANKS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("same_id", [None, *SAME_IDS])
@pytest.mark.parametrize("scale", [14.3, -14.3, 0.0])
def test_sigmoid_in_small_tiles(scale: float, same_id: str | None, dtype: torch.dtype) -> None:
    """Several tiles a program: negatives, positives, edges, large logits. Gradients do not change the loss."""
    case = block(75, 210, 20, dtype, scale, diag_offset=5)
    if dtype != torch.float16:
        factors = [1 / t.float().norm(dim=1) for t in (case.x, case.y)]
        case = Case(case.x, case.y, case.scale, case.bias, 5, *factors)
    case = with_ids(case, 60, same_id) if same_id else case
    positive = case.is_positive | case.same if case.block.adds_positives else case.is_positive
    sign = torch.where(positive, -1.0, 1.0).double()
    loss, gradient = softplus(sign * case.logits, threshold=700.0), sign * (sign * case.logits).sigmoid()
    if case.block.ignores:
        loss, gradient = (torch.where(case.same, 0, t) for t in (loss, gradient))
    # With itemsize 4 as where threads do not hold parts of rows.
    config = replace(SIGMOID, itemsize=dtype.itemsize)
    got = launch.sigmoid(case.block, 0.25, True, torch.float32, config=config)
    alone = launch.sigmoid(case.block, 0.25, False, torch.float32, config=config)
    assert torch.equal(got.row_loss, alone.row_loss)
    assert ((got.row_loss - loss.sum(1)).abs() <= case.rounding * loss.sum(1)).all()
    assert error(got.dbias, 0.25 * gradient.sum()) <= case.rounding * gradient.abs().sum()
    case.check_gradients(got.gradients, 0.25 * gradient, 0.25 * gradient.abs())


@pytest.mark.parametrize("same_id", [None, *SAME_IDS])
def test_sigmoid_of_several_chunks(same_id: str | None) -> None:
    case = block(700, 1100, 12, torch.float32, diag_offset=-9)
    if same_id:
        factors = [1 / t.norm(dim=1) for t in (case.x, case.y)]
        case = with_ids(Case(case.x, case.y, case.scale, case.bias, -9, *factors), 300, same_id)
    config = tuning.Config("sigmoid", "test", 0, 128, 256, 16, 4, 1)
    whole = launch.sigmoid(case.block, 1.0, True, torch.float32, config=config)
    parts = launch.sigmoid(case.block, 1.0, True, torch.float32, config=config, workspace=1)
    torch.testing.assert_close(whole.row_loss, parts.row_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.dbias, parts.dbias, rtol=1e-6, atol=1e-4)
    for a, b in zip(whole.gradients, parts.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "scales", [(14.3, 20.0), (-14.3, 5.0), (14.3, -20.0), (0.0, 20.0), (14.3, 0.0), (400.0, 700.0)]
)
def test_distillation_in_small_tiles(scales: tuple[float, float], dtype: torch.dtype) -> None:
    """Of a teacher with another d and, where the student has it, another dtype and factors; narrow tiles and others."""
    student, teacher = (
        block(75, 90, d, t, s, 500) for d, t, s in zip((20, 33), (dtype, torch.float32), scales, strict=True)
    )
    if dtype != torch.float16:
        student, teacher = (
            Case(c.x, c.y, c.scale, c.bias, 500, *(1 / t.float().norm(dim=1) for t in (c.x, c.y)))
            for c in (student, teacher)
        )
    both = [
        Weights(c.row_lse, c.row_weight.abs(), c.col_lse, c.col_weight.abs(), torch.zeros_like(c.positive))
        for c in (student, teacher)
    ]
    parts, terms = [], []
    for case, weights in zip((student, teacher), both, strict=True):
        by_row, by_col = (case.logits.softmax(dim) for dim in (1, 0))
        parts.append(weights.row_weight[:, None] * by_row + weights.col_weight * by_col)
        terms.append((by_row, by_col))
    by_row, by_col = terms[1]
    rounding = student.rounding + teacher.rounding
    # With itemsize 4 as where threads do not hold parts of rows.
    config = replace(DISTILLATION, itemsize=dtype.itemsize)
    for wanted in (True, False):
        got = launch.distillation(student.block, both[0], teacher.block, both[1], wanted, torch.float32, config=config)
        for cross, p, dim in ((got.row_cross, by_row, 1), (got.col_cross, by_col, 0)):
            exact, size = (p * student.logits).sum(dim), (p * student.logits.abs()).sum(dim)
            assert ((cross - exact).abs() <= rounding * (size + 1)).all()
        assert (got.gradients is not None) == wanted
        if got.gradients is not None:
            student.check_gradients(
                got.gradients, parts[0] - parts[1], (parts[0] + parts[1]) * (rounding / student.rounding)
            )


def unlike_models(n: int, m: int) -> tuple[Case, Case]:
    """A student of d = 12 and its teacher of d = 7, without positives."""
    student, teacher = (block(n, m, d, torch.float32, diag_offset=5000, kind="random") for d in (12, 7))
    return student, teacher


@pytest.mark.skipif(DEVICE != "cpu", reason="a compiled kernel calls nothing that could be replaced")
def test_distillation_of_usual_features_takes_the_common_path(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = unlike_models(64, 96)
    both = [Weights(c.row_lse, c.row_weight, c.col_lse, c.col_weight, c.positive) for c in (student, teacher)]
    monkeypatch.setattr(distillation, "general_tile", None)
    launch.distillation(student.block, both[0], teacher.block, both[1], True, torch.float32, config=DISTILLATION)


@pytest.mark.parametrize("of_teacher", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_distillation_hides_nothing(value: float, of_teacher: bool) -> None:
    """What is not finite in one row is so in the results where the dense formula has it."""
    cases = unlike_models(64, 96)
    cases[of_teacher].x[37, 3] = value
    logits = [case.scale.double() * case.x.double() @ case.y.double().T + case.bias.double() for case in cases]
    lses = [(z.logsumexp(1, keepdim=True), z.logsumexp(0)) for z in logits]
    weights = [
        Weights(row_lse[:, 0], case.row_weight, col_lse, case.col_weight, case.positive)
        for case, (row_lse, col_lse) in zip(cases, lses, strict=True)
    ]
    # A softmax with an infinite logit is NaN all along.
    student, teacher = (
        case.row_weight[:, None] * z.softmax(1) + case.col_weight * z.softmax(0)
        for case, z in zip(cases, logits, strict=True)
    )
    g = student - teacher
    row_cross, col_cross = ((logits[1].softmax(dim) * logits[0]).sum(dim) for dim in (1, 0))
    x, y = cases[0].x.double(), cases[0].y.double()
    got = launch.distillation(
        cases[0].block, weights[0], cases[1].block, weights[1], True, torch.float32, config=DISTILLATION
    )
    expected = row_cross, col_cross, g @ y, g.T @ x, (g * (x @ y.T)).sum()
    for actual, exact in zip((*got[:2], *got.gradients), expected, strict=True):
        assert torch.equal(actual.isnan(), exact.isnan())
        assert torch.equal(actual.isinf(), exact.isinf())


def test_distillation_of_several_chunks() -> None:
    student, teacher = (block(700, 1100, d, torch.float32, diag_offset=5000) for d in (12, 7))
    both = [Weights(c.row_lse, c.row_weight, c.col_lse, c.col_weight, c.positive) for c in (student, teacher)]
    config = tuning.Config("distillation", "test", 0, 128, 256, 16, 4, 1)
    whole, parts = (
        launch.distillation(student.block, both[0], teacher.block, both[1], True, torch.float32, config=config, **more)
        for more in ({}, {"workspace": 1})
    )
    for a, b in zip((*whole[:2], *whole.gradients), (*parts[:2], *parts.gradients), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", tuning.STRATEGIES)
def test_float32_gradients_of_halves_are_not_rounded(strategy: str, dtype: torch.dtype) -> None:
    case = block(75, 90, 20, dtype)
    half, full = (
        case.backward(dtype=wanted, config=BACKWARD[strategy], strategy=strategy) for wanted in (dtype, torch.float32)
    )
    for rounded, unrounded in zip(half[:2], full[:2], strict=True):
        assert unrounded.dtype == torch.float32
        assert not torch.equal(unrounded, unrounded.to(dtype).float())
        eps = torch.finfo(dtype).eps  # the interpreter cuts bfloat16 off
        torch.testing.assert_close(rounded.float(), unrounded, rtol=eps, atol=eps * 1e-3)


def passes_of(case: Case, needs: frozenset[str]) -> Iterator[Callable[[], Iterable[Tensor]]]:
    """Every pass that a problem with these needs may ask for, as calls that return their results."""
    backend, dtype = dispatch.get("triton"), case.x.dtype
    case = with_ids(case, 60, POSITIVE) if "ids" in needs else case
    block = case.block
    yield case.forward
    yield case.backward
    if "ids" in needs:
        yield lambda: backend.forward(block._replace(same_id=IGNORE))[:3]
    if "ranks" in needs:
        matches = backend.matches(block)
        yield lambda: backend.matches(block)
        yield lambda: backend.forward(block, matches)
    weights = Weights(case.row_lse, case.row_weight, case.col_lse, case.col_weight, case.positive_weight)
    if "sigmoid" in needs:
        yield lambda: results_of(backend.sigmoid(block, 1.0, True, dtype))
    if "distillation" in needs:
        yield lambda: results_of(backend.distillation(block, weights, block, weights, True, dtype))


def results_of(done: SigmoidPass | DistillationPass) -> list[Tensor]:
    """Those that a pass made for itself: dbias and dscale are sums of sums."""
    vectors = [done.row_loss] if isinstance(done, SigmoidPass) else list(done[:2])
    return vectors + list(done.gradients[:2] if done.gradients else ())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "d"), [(100, 140, 33), (600, 700, 8)])
@pytest.mark.parametrize("needs", [frozenset(), *({need} for need in NEEDS)], ids=str)
def test_workspace_is_as_predicted(
    n: int, m: int, d: int, dtype: torch.dtype, needs: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the two passes ask for besides their results; converting operands for the interpreter is not part of it."""
    case = block(n, m, d, dtype)
    allocated: list[int] = []

    def noting(make):  # type: ignore[no-untyped-def]
        def made(*arguments, **options):  # type: ignore[no-untyped-def]
            tensor = make(*arguments, **options)
            allocated.append(tensor.untyped_storage().nbytes())
            return tensor

        return made

    for name in ("new_empty", "new_zeros"):
        monkeypatch.setattr(Tensor, name, noting(getattr(Tensor, name)))
    peaks = []
    for run in passes_of(case, needs):
        allocated.clear()
        results = [t for t in run() if t is not None]
        peaks.append(sum(allocated) - sum(result.untyped_storage().nbytes() for result in results))
    predicted = dispatch.get("triton").workspace_bytes(Problem(n, m, d, dtype, torch.device(DEVICE), needs))
    assert max(peaks) <= predicted <= 1.1 * max(peaks) + 64 * (n + m)
