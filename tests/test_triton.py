"""The Triton kernels at odd shapes in small tiles, through the interpreter where there is no GPU (traps 4-7, 14)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from oracle import SCALES, assert_three_way, error, evaluate, features, ours
from torch import Tensor
from triton_case import (
    ACCUMULATE,
    BACKWARD,
    DEVICE,
    DTYPES,
    GRADIENT,
    OFFSETS,
    SHAPES,
    SMALL,
    STATISTICS,
    Case,
    block,
    with_ids,
)

import clipfast
from clipfast import reference, tuning
from clipfast.block import IGNORE, POSITIVE, Weights
from clipfast.kernels import chunks, launch
from clipfast.kernels.operands import Operands
from clipfast.kernels.tiles import MAX_SPREAD, merge, tl, triton
from clipfast.norms import l2_normalize


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


@triton.jit
def merge_two(sums, out):
    pair = tl.load(sums), tl.load(sums + 1)
    shift, total = merge(pair[0], pair[1], tl.load(sums + 2), tl.load(sums + 3), 1.0)
    tl.store(out, shift)
    tl.store(out + 1, total)


def test_a_shift_that_moves_far() -> None:
    """A sum is not lost for the power of two between the shifts, which is below the numbers that there are."""
    sums = torch.tensor([0.0, 2.0**60, 160.0, 2.0**-100], device=DEVICE)
    out = torch.empty(2, device=DEVICE)
    merge_two[(1,)](sums, out)
    assert out.tolist() == [160.0, 2.0**-100 + 2.0**-100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [14.3, -14.3, 0.0])
def test_row_factors(scale: float, dtype: torch.dtype) -> None:
    case = block(75, 90, 20, dtype, scale)
    factors = [1 / t.float().norm(dim=1) for t in (case.x, case.y)]
    case = Case(case.x, case.y, case.scale, case.bias, 5, *factors)
    case.check_forward(config=STATISTICS)
    for strategy, config in BACKWARD.items():
        case.check_backward(config=config, strategy=strategy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factors", [False, True])
def test_whole_tiles_through_descriptors(factors: bool, dtype: torch.dtype) -> None:
    case = block(75, 90, 32, dtype)
    vectors = [1 / t.float().norm(dim=1) for t in (case.x, case.y)] if factors else []
    case = Case(case.x, case.y, case.scale, case.bias, -3, *vectors)
    case.check_forward(config=replace(STATISTICS, tma=True))
    case.check_backward(config=replace(GRADIENT, tma=True), strategy="chunks")


@pytest.mark.parametrize("scale", [0.0, 14.3, -14.3, 1000.0])
@pytest.mark.parametrize("same_id", [None, IGNORE, POSITIVE])
def test_kept_products(same_id: str | None, scale: float) -> None:
    """The same bits of the products that the forward pass stores, whatever lies in their padding; wide tiles too."""
    config = replace(GRADIENT, itemsize=4)  # sums of tiles that are loaded are not taken by the products' threads
    plain = block(45, 70, 20, torch.float32, scale, diag_offset=3)
    factors = [1 / t.norm(dim=1) for t in (plain.x, plain.y)]
    for case in (plain, Case(plain.x, plain.y, plain.scale, plain.bias, 3, *factors)):
        case = case if same_id is None else with_ids(case, 30, same_id)
        statistics = launch.forward(case.block._replace(keep=True), config=STATISTICS)
        for got, expected in zip(statistics[:3], case.forward(config=STATISTICS)[:3], strict=True):
            assert torch.equal(got, expected)
        products = statistics.kept.view(45, -1)
        assert error(products[:, :70], case.x.double() @ case.y.double().T) <= 1e-4
        products[:, 70:] = torch.nan
        formed, taken_up, of_zeros = (
            case.backward(config=config, strategy="chunks", kept=kept)
            for kept in (None, statistics.kept, torch.zeros_like(statistics.kept))
        )
        assert all(torch.equal(got, expected) for got, expected in zip(taken_up, formed, strict=True))
        assert not torch.equal(of_zeros.dscale, formed.dscale)


def test_kept_products_of_several_chunks() -> None:
    config = tuning.Config("gradient", "test", 4, 128, 128, 16, 4, 1)
    case = block(520, 600, 16, torch.bfloat16, diag_offset=-9)
    kept = launch.forward(case.block._replace(keep=True), config=config).kept
    for descriptors in (False, True):
        formed, taken_up = (
            case.backward(config=replace(config, tma=descriptors), strategy="chunks", workspace=1, kept=of)
            for of in (None, kept)
        )
        assert all(torch.equal(got, expected) for got, expected in zip(taken_up, formed, strict=True))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 14.3, -14.3, 100.0])
def test_most_tiles_of_usual_features_are_narrow(scale: float) -> None:
    """Their shares are decided per block, before a product."""
    case = block(64, 96, 64, torch.float32, scale, kind="trained")
    weights = Weights(*(getattr(case, name) for name in Weights._fields[:5]))
    for factors in ([], [1 / t.norm(dim=1) for t in (case.x, case.y)]):
        own = case.block._replace(**dict(zip(("x_factor", "y_factor"), factors, strict=False)))
        operands = Operands.of(own.x, own.y, None)
        none = torch.empty(0)
        for swapped in (False, True):
            pass_ = launch.Pass(own, weights, none, none, chunks.Products(own, operands, torch.float32, None))
            shares, shifts, _, others = pass_._shares(GRADIENT, swapped)
            assert shares.isfinite().all()
            assert (shares != 0).all()
            least = torch.maximum(shifts[:, None, 1], others[None, :, 1])
            assert (torch.minimum(shifts[:, None, 0], others[None, :, 0]) >= least).all()


@pytest.mark.parametrize("strategy", tuning.STRATEGIES)
@pytest.mark.parametrize("direction", ["rows", "cols", "few"])
def test_weights_of_zero_and_centres_far_apart(direction: str, strategy: str) -> None:
    """One side without weights, whose every logit still counts for the other; rows 200 binary orders apart."""
    case = block(75, 90, 16, torch.float32, 30.0, diag_offset=4)
    case.x[::7] *= 8
    case = Case(case.x, case.y, case.scale, case.bias, 4)
    assert (case.row_lse.max() - case.row_lse.min()) / torch.tensor(2.0).log() > 200
    if direction != "cols":
        case.col_weight[0 if direction == "rows" else slice(0, None, 3)] = 0
        case.col_weight[:] = 0 if direction == "rows" else case.col_weight
    if direction != "rows":
        case.row_weight[:] = 0 if direction == "cols" else case.row_weight * (torch.arange(75) % 2)
    case.check_backward(config=BACKWARD[strategy], strategy=strategy)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_workspace_bounds_what_is_stored_of_the_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    n, m = 700, 900
    case = block(n, m, 8, dtype)
    largest = 0
    add_product = chunks._add_product

    def noting(total: Tensor, h: Tensor, *rest: Tensor, first: bool) -> None:
        nonlocal largest
        largest = max(largest, h.untyped_storage().nbytes())
        add_product(total, h, *rest, first=first)

    monkeypatch.setattr(chunks, "_add_product", noting)
    for workspace in (1 << 20, 1 << 30):
        largest = 0
        case.backward(workspace=workspace)
        assert 0.3 * min(workspace, n * m * dtype.itemsize) <= largest <= workspace
