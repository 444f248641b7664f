"""Blocks for the tests of the Triton kernels, small tiles for them, and the contract's results in float64.

Importing this skips the tests where Triton cannot run.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from oracle import error, features, operand_rounding
from torch import Tensor

from clipfast import dispatch, tuning
from clipfast.block import IGNORE, Block, Gradients, Weights

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reasons := dispatch.backends(DEVICE)["triton"]:
    pytest.skip("; ".join(reasons), allow_module_level=True)

from clipfast.kernels import launch  # noqa: E402

EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 5), (1, 40, 7), (40, 1, 16), (33, 17, 3), (75, 90, 37), (64, 96, 32), (130, 70, 50))
OFFSETS = (0, 5, -7, 31, 500, -500, 2**40, -(2**40))

# Several tiles a program and several programs, at 6 processors in the interpreter.
STATISTICS, RANKS, KEPT, GRADIENT, DISTILLATION = (
    tuning.Config(kernel, "test", 0, 32, 16, 16, 4, 1)
    for kernel in ("statistics", "ranks", "kept", "gradient", "distillation")
)
SIGMOID = tuning.Config("sigmoid", "test", 0, 16, 64, 16, 4, 1)  # the narrowest that it takes
ACCUMULATE = tuning.Config("accumulate", "test", 0, 32, 16, 16, 4, 1, block_out=16)
SMALL = (STATISTICS, RANKS, KEPT, GRADIENT, ACCUMULATE, SIGMOID, DISTILLATION)
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

    def backward(self, kept: Tensor | None = None, **options: object) -> Gradients:
        weights = Weights(
            self.row_lse, self.row_weight, self.col_lse, self.col_weight, self.positive_weight, *self.targets, kept
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


def with_ids(case: Case, groups: int, same_id: str) -> Case:
    generator = torch.Generator().manual_seed(groups)
    n, m = len(case.x), len(case.y)
    ids = tuple(
        torch.randint(groups, (size,), generator=generator, dtype=torch.int32).to(DEVICE) - 1 for size in (n, m)
    )
    factors = (case.x_factor, case.y_factor)
    return Case(case.x, case.y, case.scale, case.bias, case.diag_offset, *factors, ids=ids, same_id=same_id)
