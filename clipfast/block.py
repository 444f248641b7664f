"""What a backend takes and gives: the four nouns of csrc/block.h, in tensors. `clipfast.backends` has the equations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipfast.problem import accumulation_dtype

IGNORE, POSITIVE = "ignore", "positive"
SAME_IDS = (IGNORE, POSITIVE)


class Block(NamedTuple):
    """One block of logits, L = scale x y^T + bias, and which of its pairs belong together.

    x and y have one dtype; scale and bias are 0-D in its accumulation dtype. The positive of row i is column
    p = i + diag_offset, if that lies inside. With ids, pairs (i, j) off that diagonal with row_ids_i = col_ids_j are
    `same`: "ignore" leaves them out, "positive" makes them further positives.
    """

    x: Tensor  # [n, d]
    y: Tensor  # [m, d]
    scale: Tensor  # []
    bias: Tensor | None  # []; None for 0, where a backend forms loss and gradients in one pass
    diag_offset: int = 0
    x_factor: Tensor | None = None  # [n]: f_i x_i is taken for x_i
    y_factor: Tensor | None = None  # [m]
    row_ids: Tensor | None = None  # [n], int32
    col_ids: Tensor | None = None  # [m], int32
    same_id: str = IGNORE
    keep: bool = False  # whether `forward` is to keep the logits, where the backend can

    @property
    def n(self) -> int:
        return self.x.shape[0]

    @property
    def m(self) -> int:
        return self.y.shape[0]

    @property
    def d(self) -> int:
        return self.x.shape[1]

    @property
    def ignores(self) -> bool:
        """Whether some pairs may be left out."""
        return self.row_ids is not None and self.same_id == IGNORE

    @property
    def adds_positives(self) -> bool:
        """Whether pairs off the diagonal may be positives."""
        return self.row_ids is not None and self.same_id == POSITIVE

    def rows(self, part: slice) -> Block:
        """The block of some of its rows."""
        x_factor, row_ids = (None if t is None else t[part] for t in (self.x_factor, self.row_ids))
        offset = self.diag_offset + part.start
        return self._replace(x=self.x[part], diag_offset=offset, x_factor=x_factor, row_ids=row_ids)


class Matches(NamedTuple):
    """The largest logit among each row's and each column's positives (p and same pairs, in either mode).

    In a unit of the backend's own that grows with the logit: they are compared and maximized, never computed with.
    -inf where the block holds none; a NaN among them wins.
    """

    rows: Tensor  # [n], float64
    cols: Tensor  # [m], float64


class Statistics(NamedTuple):
    """What a loss needs to know of a block's softmaxes, in natural-log units and `statistics_dtype`."""

    row_lse: Tensor  # [n]
    col_lse: Tensor  # [m]
    positive: Tensor  # [n]
    row_above: Tensor | None = None  # [n], int32: how many negatives are not below the row's match
    col_above: Tensor | None = None  # [m], int32
    kept: Tensor | None = None  # the logits, as the backend that formed them takes them up again; opaque to all others


class Weights(NamedTuple):
    """The weights of exponentials and positives in G; `statistics_dtype`."""

    row_lse: Tensor  # [n]
    row_weight: Tensor  # [n]
    col_lse: Tensor  # [m]
    col_weight: Tensor  # [m]
    positive_weight: Tensor  # [n]
    row_target: Tensor | None = None  # [n], of same pairs that are positives
    col_target: Tensor | None = None  # [m]
    kept: Tensor | None = None  # of `Statistics`


class Gradients(NamedTuple):
    dx: Tensor  # [n, d]
    dy: Tensor  # [m, d]
    dscale: Tensor  # []


class SigmoidPass(NamedTuple):
    row_loss: Tensor  # [n], statistics_dtype
    gradients: Gradients | None
    dbias: Tensor | None  # []


class DistillationPass(NamedTuple):
    row_cross: Tensor  # [n], statistics_dtype: the student's logits under the teacher's softmax
    col_cross: Tensor  # [m]
    gradients: Gradients | None


def number_ids(row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor]:  # [n], [m] -> [n], [m], int32
    """Ids of any integers as small ones, equal where they were equal, without waiting for a device."""
    ids, order = torch.cat((row_ids, col_ids)).sort()
    rank = torch.nn.functional.pad(ids[1:] != ids[:-1], (1, 0)).cumsum(0, dtype=torch.int32)
    numbers = torch.empty_like(rank).scatter_(0, order, rank)
    return numbers[: row_ids.shape[0]], numbers[row_ids.shape[0] :]


def gradient_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which a backend can be asked for dx and dy of features of `dtype`."""
    return dtype, accumulation_dtype(dtype)
