"""The Triton kernels at odd shapes in small tiles, through the interpreter where there is no GPU (traps 4-7, 14)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from oracle import SCALES, assert_three_way, error, evaluate, features, operand_rounding, ours
from torch import Tensor
from torch.nn.functional import softplus

import clipfast
from clipfast import dispatch, reference, tuning
from clipfast.block import IGNORE, POSITIVE, SAME_IDS, Block, DistillationPass, Gradients, SigmoidPass, Weights
from clipfast.norms import l2_normalize
from clipfast.problem import NEEDS, Problem

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reasons := dispatch.backends(DEVICE)["triton"]:
    pytest.skip("; ".join(reasons), allow_module_level=True)

from clipfast.kernels import launch  # noqa: E402
from clipfast.kernels.tiles import MAX_SPREAD  # noqa: E402

EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 5), (1, 40, 7), (40, 1, 16), (33, 17, 3), (75, 90, 37), (64, 96, 32), (130, 70, 50))
OFFSETS = (0, 5, -7, 31, 500, -500, 2**40, -(2**40))

# Several tiles a program and several programs, at 6 processors in the interpreter.
STATISTICS, RANKS, GRADIENT, SIGMOID, DISTILLATION = (
    tuning.Config(kernel, "test", 0, 32, 16, 16, 4, 1)
    for kernel in ("statistics", "ranks", "gradient", "sigmoid", "distillation")
)
ACCUMULATE = tuning.Config("accumulate", "test", 0, 32, 16, 16, 4, 1, block_out=16)
SMALL = (STATISTICS, RANKS, GRADIENT, ACCUMULATE, SIGMOID, DISTILLATION)
BACKWARD = {"chunks": GRADIENT, "registers": ACCUMULATE}


@dataclass
class Case:
    """A block of logits with what its backward pass is given, and the contract's results in float64."""

    x: Tensor  # [n, d]
    y: Tensor  # [m, d]
    scale: Tensor  # []
    bias: Tensor  # []
    diag_offset: int
    x_factor: Tensor | None = None  # [n]
    y_factor: Tensor | None = None  # [m]
    magnitude: float = 1.0  # of the weights
    ids: tuple[Tensor, Tensor] | None = None  # [n], [m], int32
    same_id: str = IGNORE

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        n, m = len(self.x), len(self.y)
        self.row_weight, self.col_weight, self.positive_weight = (
            (self.magnitude * torch.randn(size, generator=generator, dtype=torch.float64)).to(DEVICE)
            for size in (n, m, n)
        )
        self.wide_x = self.x.double() * self._column(self.x_factor)
        self.wide_y = self.y.double() * self._column(self.y_factor)
        self.logits = self.scale.double() * self.wide_x @ self.wide_y.T + self.bias.double()
        columns = torch.arange(m, device=DEVICE)
        self.is_positive = columns == torch.arange(n, device=DEVICE)[:, None] + self.diag_offset
        self.same = torch.zeros_like(self.is_positive)
        if self.ids is not None:
            self.same = (self.ids[0][:, None] == self.ids[1]) & ~self.is_positive
        self.excluded = self.is_positive | self.same if self.block.ignores else self.is_positive
        negatives = self.logits.masked_fill(self.excluded, -torch.inf)
        self.row_lse, self.col_lse = negatives.logsumexp(1), negatives.logsumexp(0)
        self.row_weight, self.col_weight = (
            torch.where(lse == -torch.inf, 0, weight)
            for lse, weight in ((self.row_lse, self.row_weight), (self.col_lse, self.col_weight))
        )
        self.targets: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.block.adds_positives:
            self.targets = self.row_weight.flip(0), self.col_weight.flip(0)
        self.positive = (self.logits * self.is_positive).sum(1)

    @staticmethod
    def _column(factor: Tensor | None) -> Tensor | float:
        return 1.0 if factor is None else factor.double()[:, None]

    @property
    def rounding(self) -> float:
        """Of a logit and of an exponential, relative to the exponential."""
        products = self.scale.abs() * self.x.double().norm(dim=1).max() * self.y.double().norm(dim=1).max()
        if self.x_factor is not None:
            products = self.scale.abs()
        return EPS * (2 * products.item() + self.bias.abs().item() + max(self.logits.shape) ** 0.5 + 4)

    def forward(self, **options: object) -> tuple[Tensor, ...]:
        return launch.forward(self.block, **options)

    def backward(self, **options: object) -> Gradients:
        weights = Weights(
            self.row_lse, self.row_weight, self.col_lse, self.col_weight, self.positive_weight, *self.targets
        )
        return launch.backward(self.block, weights, **options)

    @property
    def block(self) -> Block:
        ids = self.ids or (None, None)
        factors = self.x_factor, self.y_factor
        return Block(self.x, self.y, self.scale, self.bias, self.diag_offset, *factors, *ids, self.same_id)

    def parts(self) -> tuple[Tensor, Tensor]:
        """G, and the sum of the absolute values of its terms."""
        by_row = self.row_weight[:, None] * (self.logits - self.row_lse[:, None]).exp()
        by_col = self.col_weight * (self.logits - self.col_lse).exp()
        by_row, by_col = (
            torch.where(self.excluded | (weight == 0), 0, e)
            for e, weight in ((by_row, self.row_weight[:, None]), (by_col, self.col_weight))
        )
        other = torch.where(self.is_positive, self.positive_weight[:, None], 0)
        if self.targets[0] is not None and self.targets[1] is not None:
            other = other + torch.where(self.same, self.targets[0][:, None] + self.targets[1], 0)
        by_row, by_col = (torch.where(self.is_positive, 0, e) for e in (by_row, by_col))
        return by_row + by_col + other, by_row.abs() + by_col.abs() + other.abs()

    def check_forward(self, **options: object) -> None:
        row_lse, col_lse, positive, *_ = self.forward(**options)
        for got, exact in ((row_lse, self.row_lse), (col_lse, self.col_lse), (positive, self.positive)):
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, exact, rtol=0, atol=self.rounding)

    def check_backward(self, **options: object) -> None:
        got = self.backward(**options)
        assert got.dx.dtype == got.dy.dtype == self.x.dtype
        self.check_gradients(got, *self.parts())

    def check_gradients(self, got: Gradients, gradient: Tensor, size: Tensor) -> None:
        """Every element within the roundings of its own terms: of G as an operand, of a sum, and of the result."""
        dx, dy, dscale = got
        unit = self.rounding + operand_rounding(self.x.dtype, self.x.device)
        scale = self.scale.double()
        for got, g, g_size, own, other, factor in (
            (dx, gradient, size, self.wide_x, self.wide_y, self.x_factor),
            (dy, gradient.T, size.T, self.wide_y, self.wide_x, self.y_factor),
        ):
            exact, bound = scale * (g @ other), scale.abs() * (g_size @ other.abs())
            if factor is not None:
                exact = (exact - (exact * own).sum(1, keepdim=True) * own) * factor[:, None]
                bound = (bound + bound.norm(dim=1, keepdim=True) * own.abs()) * factor[:, None]
            result = torch.finfo(got.dtype)
            # Below its normal numbers a float32 or bfloat16 may be cut off; float16 has no range to waste.
            least = result.tiny * (result.eps if got.dtype == torch.float16 else 1)
            bound = unit * bound + result.eps * exact.abs() + least
            assert got.shape == exact.shape
            assert ((got.double() - exact).abs() <= bound).all(), ((got.double() - exact).abs() / bound).max()
        products = self.wide_x @ self.wide_y.T
        exact_dscale, dscale_bound = (gradient * products).sum(), self.rounding * (size * products.abs()).sum()
        assert error(dscale, exact_dscale) <= dscale_bound + EPS * exact_dscale.abs()


def block(
    n: int, m: int, d: int, dtype: torch.dtype, scale: float = 14.3, diag_offset: int = 0, kind: str = "unnormalized"
) -> Case:
    y, x = features(kind, max(n, m), max(n, m), d, dtype)
    scalars = (torch.tensor(value, device=DEVICE) for value in (scale, 0.25))
    return Case(x[:n].to(DEVICE), y[:m].to(DEVICE), *scalars, diag_offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_statistics(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    block(n, m, d, dtype).check_forward(config=STATISTICS)


@pytest.mark.parametrize("strategy", tuning.STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES[3:])
def test_gradients(n: int, m: int, d: int, dtype: torch.dtype, strategy: str) -> None:
    block(n, m, d, dtype).check_backward(config=BACKWARD[strategy], strategy=strategy)


@pytest.mark.parametrize("strategy", tuning.STRATEGIES)
@pytest.mark.parametrize(("n", "m"), [(1, 40), (40, 1)])
def test_gradients_of_one_row_or_column(n: int, m: int, strategy: str) -> None:
    """Far from its positive, for a row whose only logit is the positive has no logsumexp."""
    block(n, m, 7, torch.float32, diag_offset=100).check_backward(config=BACKWARD[strategy], strategy=strategy)


@pytest.mark.parametrize("diag_offset", OFFSETS)
def test_any_diagonal(diag_offset: int) -> None:
    case = block(75, 90, 20, torch.float32, diag_offset=diag_offset)
    case.check_forward(config=STATISTICS)
    for strategy, config in BACKWARD.items():
        case.check_backward(config=config, strategy=strategy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-32, 1.0, -14.3, 1000.0, -1000.0])
def test_scales(scale: float, dtype: torch.dtype) -> None:
    case = block(75, 90, 20, dtype, scale)
    spread = (case.logits.max() - case.logits.min()) * torch.tensor(torch.e).log2().item()
    assert abs(scale) < 1000 or spread > 2 * MAX_SPREAD.value
    case.check_forward(config=STATISTICS)
    for strategy, config in BACKWARD.items():
        case.check_backward(config=config, strategy=strategy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [14.3, -14.3, 0.0])
def test_row_factors(scale: float, dtype: torch.dtype) -> None:
    case = block(75, 90, 20, dtype, scale)
    factors = [1 / t.float().norm(dim=1) for t in (case.x, case.y)]
    case = Case(case.x, case.y, case.scale, case.bias, 5, *factors)
    case.check_forward(config=STATISTICS)
    for strategy, config in BACKWARD.items():
        case.check_backward(config=config, strategy=strategy)


def with_ids(case: Case, groups: int, same_id: str, **changes: object) -> Case:
    generator = torch.Generator().manual_seed(groups)
    n, m = len(case.x), len(case.y)
    ids = tuple(
        torch.randint(groups, (size,), generator=generator, dtype=torch.int32).to(DEVICE) - 1 for size in (n, m)
    )
    factors = (case.x_factor, case.y_factor)
    return Case(case.x, case.y, case.scale, case.bias, case.diag_offset, *factors, ids=ids, same_id=same_id)


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
    """Several tiles a program, and several chunks: the loss is the same with and without gradients."""
    case = block(75, 90, 20, dtype, scale, diag_offset=5)
    if dtype != torch.float16:
        factors = [1 / t.float().norm(dim=1) for t in (case.x, case.y)]
        case = Case(case.x, case.y, case.scale, case.bias, 5, *factors)
    case = with_ids(case, 60, same_id) if same_id else case
    positive = case.is_positive | case.same if case.block.adds_positives else case.is_positive
    sign = torch.where(positive, -1.0, 1.0).double()
    loss, gradient = softplus(sign * case.logits, threshold=700.0), sign * (sign * case.logits).sigmoid()
    if case.block.ignores:
        loss, gradient = (torch.where(case.same, 0, t) for t in (loss, gradient))
    got = launch.sigmoid(case.block, 0.25, True, torch.float32, config=SIGMOID)
    alone = launch.sigmoid(case.block, 0.25, False, torch.float32, config=SIGMOID)
    assert torch.equal(got.row_loss, alone.row_loss)
    assert ((got.row_loss - loss.sum(1)).abs() <= case.rounding * loss.sum(1)).all()
    assert error(got.dbias, 0.25 * gradient.sum()) <= case.rounding * gradient.abs().sum()
    case.check_gradients(got.gradients, 0.25 * gradient, 0.25 * gradient.abs())


def test_sigmoid_of_several_chunks() -> None:
    case = block(700, 1100, 12, torch.float32, diag_offset=-9)
    config = tuning.Config("sigmoid", "test", 0, 128, 256, 16, 4, 1)
    whole = launch.sigmoid(case.block, 1.0, True, torch.float32, config=config)
    parts = launch.sigmoid(case.block, 1.0, True, torch.float32, config=config, workspace=1)
    torch.testing.assert_close(whole.row_loss, parts.row_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.dbias, parts.dbias, rtol=1e-6, atol=1e-4)
    for a, b in zip(whole.gradients, parts.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", [(14.3, 20.0), (-14.3, 5.0), (14.3, -20.0)])
def test_distillation_in_small_tiles(scales: tuple[float, float], dtype: torch.dtype) -> None:
    """Of a teacher with another d and, where the student has it, another dtype and factors; of several chunks."""
    student, teacher = (block(75, 90, d, t, s, 500) for d, t, s in zip((20, 33), (dtype, torch.float32), scales, strict=True))
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
    for wanted in (True, False):
        got = launch.distillation(
            student.block, both[0], teacher.block, both[1], wanted, torch.float32, config=DISTILLATION
        )
        for cross, p, dim in ((got.row_cross, by_row, 1), (got.col_cross, by_col, 0)):
            exact, size = (p * student.logits).sum(dim), (p * student.logits.abs()).sum(dim)
            assert ((cross - exact).abs() <= rounding * (size + 1)).all()
        assert (got.gradients is not None) == wanted
        if got.gradients is not None:
            student.check_gradients(
                got.gradients, parts[0] - parts[1], (parts[0] + parts[1]) * (rounding / student.rounding)
            )


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


def strided(tensor: Tensor) -> Iterator[Tensor]:
    """The same values under other strides; whatever lies between them is NaN."""
    yield tensor.T.contiguous().T
    sparse = tensor.new_full((2 * len(tensor), 3 * tensor.shape[1]), float("nan"))
    sparse[::2, 1::3] = tensor
    yield sparse[::2, 1::3]
    yield tensor[:1].expand(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype) -> None:
    case = block(75, 90, 21, dtype)
    for x, y in zip(strided(case.x), strided(case.y), strict=True):
        view = Case(x, y, case.scale, case.bias, 3)
        view.check_forward(config=STATISTICS)
        for strategy, config in BACKWARD.items():
            view.check_backward(config=config, strategy=strategy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(700, 1100), (300, 1300), (1300, 300)])
def test_chunks_of_rows_and_columns(n: int, m: int, dtype: torch.dtype) -> None:
    """More than one chunk both ways, down one side, along the other; the positives cross their borders."""
    rows, cols = tuning.chunk_shape(n, m, dtype.itemsize, workspace=1)
    assert (n > rows) == (n > 512)
    assert (m > cols) == (m > 512)
    config = tuning.Config("gradient", "test", 0, 128, 256, 16, 4, 1)
    case = block(n, m, 12, dtype, diag_offset=-9)
    case.check_backward(config=config, strategy="chunks", workspace=1)


@pytest.mark.parametrize("strategy", tuning.STRATEGIES)
def test_float16_gradient_of_a_huge_batch(strategy: str) -> None:
    """Weights of 1e-10, times a softmax over 90 columns, lie far below float16's range; the gradients do not."""
    small = block(75, 90, 20, torch.float16)
    x, y = small.x / 2**11, small.y * 2**11
    case = Case(x, y, small.scale, small.bias, 0, magnitude=1e-10)
    dx = case.backward(config=BACKWARD[strategy], strategy=strategy)[0]
    gradient, _ = case.parts()
    exact = case.scale * gradient @ y.double()
    assert exact.abs().max() < 1e-4
    assert (dx.double() - exact).norm() <= 1e-2 * exact.norm()
    case.check_backward(config=BACKWARD[strategy], strategy=strategy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bitwise_equal(dtype: torch.dtype) -> None:
    case = block(75, 90, 20, dtype, diag_offset=3)
    runs = [
        case.forward(config=STATISTICS)[:3]
        + case.backward(config=GRADIENT, strategy="chunks")
        + case.backward(config=ACCUMULATE, strategy="registers")
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="strategy: got 'atomics'; accepted are 'chunks', 'registers'"):
        block(3, 4, 5, torch.float32).backward(strategy="atomics")


@pytest.fixture(params=tuning.STRATEGIES)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The public interface with small tiles and one of the strategies."""
    architecture = tuning.describe(torch.device(DEVICE)).architecture
    configs = tuple(tuning.Config(**{**vars(config), "architecture": architecture}) for config in SMALL)
    monkeypatch.setattr(tuning, "CONFIGS", configs)
    monkeypatch.setattr(launch, "backward", functools.partial(launch.backward, strategy=request.param))
    tuning.choose.cache_clear()
    yield
    tuning.choose.cache_clear()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["x", "y", "extra"])
def test_not_finite_input_comes_out_as_in_the_dense_formula(place: str, value: float) -> None:
    x, y = features("random", 70, 81, 8)
    {"x": x[41], "y": y[41], "extra": y[75]}[place][3] = value
    dense, got = evaluate(reference.contrastive_loss, x, y, 14.3), ours(x, y, 14.3, backend="triton")
    for name in ("loss", "dx", "dy", "dscale"):
        expected, actual = getattr(dense, name), getattr(got, name)
        assert torch.equal(actual.isnan(), expected.isnan()), name
        assert torch.equal(actual.isinf(), expected.isinf()), name


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_in_small_tiles(dtype: torch.dtype, scale: float) -> None:
    assert_three_way(*features("trained", 70, 81, 40, dtype), scale, label_smoothing=0.1, backend="triton")


def test_folded_norms_are_more_precise_than_a_rounded_copy() -> None:
    x, y = (t.to(DEVICE) for t in features("unnormalized", 200, 200, 64, torch.bfloat16))
    exact = reference.contrastive_loss(*(reference.l2_normalize(t.double()) for t in (x, y)), 100.0)
    folded = clipfast.contrastive_loss(x, y, 100.0, normalize=True, backend="triton")
    copied = clipfast.contrastive_loss(l2_normalize(x), l2_normalize(y), 100.0, backend="triton")
    assert error(folded, exact) <= 1e-6 * exact < error(copied, exact)


def passes_of(case: Case, needs: frozenset[str]) -> Iterator[Callable[[], Iterable[Tensor]]]:
    """Every pass that a problem with these needs may ask for, as calls that return their results."""
    backend, dtype = dispatch.get("triton"), case.x.dtype
    case = with_ids(case, 60, POSITIVE) if "ids" in needs else case
    block = case.block
    yield case.forward
    yield case.backward
    if "ids" in needs:
        yield lambda: backend.forward(replace(block, same_id=IGNORE))[:3]
    if "ranks" in needs:
        matches = backend.matches(block)
        yield lambda: backend.matches(block)
        yield lambda: backend.forward(block, matches)
    weights = Weights(case.row_lse, case.row_weight, case.col_lse, case.col_weight, case.positive_weight)
    for gradients in (True, False):
        if "sigmoid" in needs:
            yield lambda: results_of(backend.sigmoid(block, 1.0, gradients, dtype))
        if "distillation" in needs:
            yield lambda: results_of(backend.distillation(block, weights, block, weights, gradients, dtype))


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_workspace_bounds_what_is_stored_of_the_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    n, m = 1100, 1300
    case = block(n, m, 8, dtype)
    largest = 0
    gradient = launch.Pass._gradient

    def noting(self: launch.Pass, config: object, rows: slice, cols: slice, h: Tensor, *rest: Tensor) -> None:
        nonlocal largest
        largest = max(largest, h.untyped_storage().nbytes())
        gradient(self, config, rows, cols, h, *rest)

    monkeypatch.setattr(launch.Pass, "_gradient", noting)
    for workspace in (1 << 20, 1 << 30):
        largest = 0
        case.backward(workspace=workspace)
        assert 0.3 * min(workspace, n * m * dtype.itemsize) <= largest <= workspace
