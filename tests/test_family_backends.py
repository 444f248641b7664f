"""The contract of clipfast/backends/__init__.py beyond the plain softmax, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from oracle import error, features, half_operands, operand_rounding
from torch import Tensor
from torch.nn.functional import softplus

from clipfast import dispatch
from clipfast.block import IGNORE, SAME_IDS, Block, Gradients, Matches, Weights
from clipfast.problem import accumulation_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 0), (2, 3, 0), (70, 81, 0), (70, 81, 5), (70, 81, -60), (130, 40, 200), (257, 300, 0))
CPU = torch.device("cpu")


@dataclass
class Dense:
    """A block and its n*m matrices in float64."""

    block: Block

    def __post_init__(self) -> None:
        b = self.block
        self.x, self.y = b.x.double(), b.y.double()
        self.products = self.x @ self.y.T
        self.logits = b.scale.double() * self.products + b.bias.double()
        rows, cols = torch.arange(b.n)[:, None], torch.arange(b.m)
        self.own = cols == rows + b.diag_offset
        nothing = torch.zeros_like(self.own)
        equal = nothing if b.row_ids is None or b.col_ids is None else b.row_ids[:, None] == b.col_ids
        self.same = equal & ~self.own
        self.negative = ~self.own & ~self.same

    def rounding(self, backend: str) -> float:
        """Of an element of G, relative to its terms."""
        b = self.block
        eps = torch.finfo(accumulation_dtype(b.x.dtype)).eps
        size = b.scale.abs().double() * self.x.norm(dim=1).max() * self.y.norm(dim=1).max() + b.bias.abs()
        unit = eps * (2 * size.item() + max(self.logits.shape) ** 0.5 + 8) * (8 if eps < 1e-10 else 1)
        return unit + (operand_rounding(b.x.dtype, CPU) if b.x.dtype in half_operands(backend) else 0.0)

    def check(self, backend: str, got: Gradients, g: Tensor, terms: Tensor) -> None:
        """The gradients of G within the roundings of its terms, of a sum and of the result."""
        unit, scale = self.rounding(backend), self.block.scale.double()
        for value, exact, size in (
            (got.dx, scale * g @ self.y, scale.abs() * terms @ self.y.abs()),
            (got.dy, scale * g.T @ self.x, scale.abs() * terms.T @ self.x.abs()),
        ):
            result = torch.finfo(value.dtype)
            bound = unit * size + result.eps * exact.abs() + result.tiny
            assert ((value.double() - exact).abs() <= bound).all(), ((value.double() - exact).abs() / bound).max()
        exact, size = (g * self.products).sum(), (terms * self.products.abs()).sum()
        assert error(got.dscale, exact) <= unit * size + 1e-6 * exact.abs()


def make_block(n: int, m: int, offset: int, dtype: torch.dtype, kind: str = "trained", scale: float = 14.3) -> Block:
    x, y = features(kind, min(n, m), max(n, m), 40, dtype)
    x, y = (x, y) if n <= m else (y, x)
    scalars = (torch.tensor(value, dtype=accumulation_dtype(dtype)) for value in (scale, -0.5))
    return Block(x, y, *scalars, offset)


def with_ids(block: Block, groups: int, same_id: str = IGNORE) -> Block:
    """A few groups; with one group all ids are equal."""
    generator = torch.Generator().manual_seed(block.n + block.m)
    row_ids, col_ids = (
        torch.randint(groups, (size,), generator=generator, dtype=torch.int32) for size in (block.n, block.m)
    )
    return block._replace(row_ids=row_ids, col_ids=col_ids, same_id=same_id)


def make_weights(dense: Dense, block: Block) -> Weights:
    included = dense.negative if block.ignores else ~dense.own
    masked = dense.logits.masked_fill(~included, -torch.inf)
    row_weight, col_weight, positive_weight = torch.rand(block.n), torch.rand(block.m), -torch.rand(block.n)
    targets = (-torch.rand(block.n), -torch.rand(block.m)) if block.adds_positives else (None, None)
    double = tuple(
        None if t is None else t.double() / block.n for t in (row_weight, col_weight, positive_weight, *targets)
    )
    lse = [masked.logsumexp(dim) for dim in (1, 0)]
    # As the loss makes them: what has no exponential has no weight.
    weights = [torch.where(z == -torch.inf, 0, w) for z, w in zip(lse, double[:2], strict=True)]
    return Weights(lse[0], weights[0], lse[1], weights[1], *double[2:])


@pytest.mark.needs("ids")
@pytest.mark.parametrize("groups", [1, 4, 1000])
@pytest.mark.parametrize("same_id", SAME_IDS)
@pytest.mark.parametrize(("n", "m", "offset"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids(backend: str, dtype: torch.dtype, n: int, m: int, offset: int, same_id: str, groups: int) -> None:
    block = with_ids(make_block(n, m, offset, dtype), groups, same_id)
    dense, chosen = Dense(block), dispatch.get(backend)
    included = dense.negative if block.ignores else ~dense.own
    masked = dense.logits.masked_fill(~included, -torch.inf)
    statistics = chosen.forward(block)
    rounding = dense.rounding("torch")
    torch.testing.assert_close(statistics.row_lse, masked.logsumexp(1), rtol=0, atol=rounding)
    torch.testing.assert_close(statistics.col_lse, masked.logsumexp(0), rtol=0, atol=rounding)
    torch.testing.assert_close(statistics.positive, (dense.logits * dense.own).sum(1), rtol=0, atol=rounding)

    weights = make_weights(dense, block)
    by_row = torch.where(included, weights.row_weight[:, None] * (dense.logits - weights.row_lse[:, None]).exp(), 0)
    by_col = torch.where(included, weights.col_weight * (dense.logits - weights.col_lse).exp(), 0)
    by_row, by_col = by_row.nan_to_num(), by_col.nan_to_num()  # of rows without an exponential
    target = torch.zeros_like(by_row)
    if weights.row_target is not None:
        target = torch.where(dense.same, weights.row_target[:, None] + weights.col_target, 0)
    positive = torch.where(dense.own, weights.positive_weight[:, None], 0)
    for wanted in {dtype, accumulation_dtype(dtype)}:
        gradients = chosen.backward(block, weights, wanted)
        assert gradients.dx.dtype == gradients.dy.dtype == wanted
        dense.check(
            backend, gradients, by_row + by_col + target + positive, by_row + by_col + target.abs() + positive.abs()
        )


@pytest.mark.needs("ids", "ranks")
@pytest.mark.parametrize("groups", [0, 1, 20, 1000])
@pytest.mark.parametrize(("n", "m", "offset"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks(backend: str, dtype: torch.dtype, n: int, m: int, offset: int, groups: int) -> None:
    block = make_block(n, m, offset, dtype, "random")
    block = with_ids(block, groups) if groups else block
    dense, chosen = Dense(block), dispatch.get(backend)
    matches = chosen.matches(block)
    own = (dense.own | dense.same) if groups else dense.own
    best = dense.logits.masked_fill(~own, -torch.inf)
    for got, exact in ((matches.rows, best.amax(1)), (matches.cols, best.amax(0))):
        assert torch.equal(got == -torch.inf, exact == -torch.inf)
    statistics = chosen.forward(block, matches)
    tolerance = dense.rounding("torch")
    for got, exact, dim in ((statistics.row_above, best.amax(1), 1), (statistics.col_above, best.amax(0), 0)):
        assert got.dtype == torch.int32
        least, most = (
            ((dense.logits >= exact.unsqueeze(dim) + shift) & dense.negative).sum(dim)
            for shift in (tolerance, -tolerance)
        )
        assert ((least <= got) & (got <= most)).all()
    plain = chosen.forward(block)
    for got, expected in zip(statistics[:3], plain[:3], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.needs("ranks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_are_ties(backend: str, dtype: torch.dtype) -> None:
    """Every text four times and every image twice: no rounding tells the copies apart, wherever they are."""
    x, y = features("random", 150, 150, 70, dtype)
    order = torch.randperm(300) % 150
    x, y = torch.cat((x, x)), torch.cat((y, y, y[order]))
    s, b = (torch.tensor(v, dtype=accumulation_dtype(dtype)) for v in (100.0, 0.0))
    chosen, block = dispatch.get(backend), Block(x, y, s, b)
    above = chosen.forward(block, chosen.matches(block))
    ids = torch.cat((torch.arange(150), torch.arange(150), order))
    copies = (torch.arange(300)[:, None] % 150 == ids) & (torch.arange(600) != torch.arange(300)[:, None])
    logits = Dense(block).logits
    positive = logits.diagonal()[:, None]
    far = (logits > positive + 1e-3) & ~copies
    assert (above.row_above >= copies.sum(1) + far.sum(1)).all()
    assert (above.col_above[:300] >= 1).all()


@pytest.mark.needs("ranks")
def test_broken_matches_count_everything(backend: str) -> None:
    block = make_block(40, 50, 0, torch.float32)
    block.x[3] = torch.nan
    chosen = dispatch.get(backend)
    matches = chosen.matches(block)
    assert matches.rows[3].isnan()
    statistics = chosen.forward(block, matches)
    assert statistics.row_above[3] == 49
    assert statistics.col_above[3] == 39
    assert statistics.col_above[5] >= 1


@pytest.mark.needs("ids", "sigmoid")
@pytest.mark.parametrize("same_id", [None, *SAME_IDS])
@pytest.mark.parametrize(("n", "m", "offset"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid(backend: str, dtype: torch.dtype, n: int, m: int, offset: int, same_id: str | None) -> None:
    block = make_block(n, m, offset, dtype)
    block = with_ids(block, 9, same_id) if same_id else block
    dense, unit, chosen = Dense(block), 1 / 70, dispatch.get(backend)
    positive = (dense.own | dense.same) if block.adds_positives else dense.own
    sign = torch.where(positive, -1.0, 1.0).double()
    loss = softplus(sign * dense.logits, threshold=700.0)
    g = unit * sign * (sign * dense.logits).sigmoid()
    if block.ignores:
        loss, g = (torch.where(dense.same, 0, t) for t in (loss, g))
    rounding = dense.rounding("torch")
    without = chosen.sigmoid(block, unit, False, dtype)
    assert without.gradients is None
    for wanted in {dtype, accumulation_dtype(dtype)}:
        got = chosen.sigmoid(block, unit, True, wanted)
        assert ((got.row_loss - loss.sum(1)).abs() <= rounding * loss.sum(1) + 1e-30).all()
        assert torch.equal(got.row_loss, without.row_loss)
        assert got.gradients.dx.dtype == wanted
        dense.check(backend, got.gradients, g, g.abs())
        assert error(got.dbias, g.sum()) <= rounding * g.abs().sum()


@pytest.mark.needs("sigmoid")
@pytest.mark.parametrize("bias", [-40.0, -17.0, 40.0])
def test_a_small_sigmoid_keeps_its_digits(backend: str, bias: float) -> None:
    x, y = features("random", 50, 60, 24)
    block = Block(x, y, torch.tensor(10.0), torch.tensor(bias))
    dense = Dense(block)
    sign = torch.where(dense.own, -1.0, 1.0).double()
    loss, g = softplus(sign * dense.logits, threshold=700.0).sum(1), sign * (sign * dense.logits).sigmoid()
    got = dispatch.get(backend).sigmoid(block, 1.0, True, torch.float32)
    assert ((got.row_loss - loss).abs() <= 1e-5 * loss).all()
    dense.check(backend, got.gradients, g, g.abs())


@pytest.mark.needs("distillation")
@pytest.mark.parametrize(("n", "m"), [(1, 1), (70, 70), (70, 81), (257, 300)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distillation(backend: str, dtype: torch.dtype, n: int, m: int) -> None:
    nowhere = m + n
    block = make_block(n, m, 0, dtype)._replace(diag_offset=nowhere)
    x, y = features("trained", n, m, 24, dtype)
    teacher = Block(x, y, block.scale * 2, block.bias, nowhere)
    chosen, dense, of_teacher = dispatch.get(backend), Dense(block), Dense(teacher)
    both = []
    for of in (dense, of_teacher):
        row, col = (torch.full((size,), 0.5 / n, dtype=torch.float64) for size in (n, m))
        both.append(Weights(of.logits.logsumexp(1), row, of.logits.logsumexp(0), col, torch.zeros(n).double()))
    weights, teacher_weights = both
    by_row, by_col = (of_teacher.logits.softmax(dim) for dim in (1, 0))
    g = 0.5 / n * (dense.logits.softmax(1) + dense.logits.softmax(0) - by_row - by_col)
    terms = 0.5 / n * (dense.logits.softmax(1) + dense.logits.softmax(0) + by_row + by_col)
    rounding = max(dense.rounding("torch"), of_teacher.rounding("torch"))
    for gradients in (True, False):
        got = chosen.distillation(block, weights, teacher, teacher_weights, gradients, dtype)
        exact = ((by_row * dense.logits).sum(1), (by_col * dense.logits).sum(0))
        sizes = ((by_row * dense.logits.abs()).sum(1), (by_col * dense.logits.abs()).sum(0))
        for value, expected, size in zip(got[:2], exact, sizes, strict=True):
            assert ((value - expected).abs() <= rounding * (size + 1)).all()
        assert (got.gradients is not None) == gradients
        if got.gradients is not None:
            dense.check(backend, got.gradients, g, terms * rounding / dense.rounding("torch"))


@pytest.mark.needs("ids", "ranks")
def test_matches_of_a_block_merge(backend: str) -> None:
    block = with_ids(make_block(130, 157, 0, torch.float32, "random"), 30)
    chosen = dispatch.get(backend)
    whole = chosen.matches(block)
    parts = [slice(0, 60), slice(60, 130)]
    halves = [chosen.matches(block.rows(part)) for part in parts]
    merged = Matches(torch.cat([half.rows for half in halves]), torch.maximum(halves[0].cols, halves[1].cols))
    counts = [chosen.forward(block.rows(part), Matches(merged.rows[part], merged.cols)) for part in parts]
    expected = chosen.forward(block, whole)
    assert torch.equal(torch.cat([c.row_above for c in counts]), expected.row_above)
    assert torch.equal(counts[0].col_above + counts[1].col_above, expected.col_above)
