"""From a block's statistics to the losses of its rows and columns, and back to the weights of its gradient.

With z the logsumexp of a row's negatives, p its positive logit and c further positives of its own id, the row's loss
under smoothed labels is (Radford et al. 2021, arXiv:2103.00020; Khosla et al. 2020, arXiv:2004.11362, eq. 2)

    log(e^p + e^z) - (1 - s) mean of the 1 + c positives' logits - s mean of all logits

where the further positives, if there are any, are in z. All is float64 where the device has it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from clipfast.block import Statistics, Weights
from clipfast.logit_sums import Sums


class Side(NamedTuple):
    """One direction of the loss: the rows, or the columns, that choose among the others."""

    negatives: Tensor  # [n], z
    positive: Tensor  # [n], p

    def margin(self) -> Tensor:  # [n]
        """z - p.

        The cross-entropy -log(e^p / (e^p + e^z)) is softplus(z - p) and its derivative is sigmoid(z - p). In this form
        both keep their relative precision however small they get.
        """
        # A logit of +inf makes the dense formula NaN (inf - inf); 0 * inf brings that NaN back.
        infinite = 0 * (self.negatives.clamp(min=0) + self.positive.clamp(min=0))
        return self.negatives - self.positive + infinite

    def losses(self, sums: Sums | None, smoothing: float, more_positives: bool) -> Tensor:  # [n]
        loss = -logsigmoid(-self.margin())
        if sums is not None and more_positives:
            count = sums.same_count
            loss = loss + (1 - smoothing) * (count * self.positive - sums.same_sum) / (1 + count)
        if sums is not None and smoothing:
            loss = loss + smoothing * (self.positive - sums.all_sum / sums.all_count)
        return loss

    def weights(self, gradient: Tensor, same_count: Tensor | None, smoothing: float) -> SideWeights:
        """The derivatives of sum_i gradient_i losses_i, but for the mean logits of smoothed labels."""
        weight = gradient * self.margin().sigmoid()
        positive = -weight
        target = None
        if same_count is not None:
            share = gradient * (1 - smoothing) / (1 + same_count)
            positive, target = positive + share * same_count, -share
        if smoothing:
            positive = positive + smoothing * gradient
        return SideWeights(weight, positive, target)

    def no_weights(self) -> SideWeights:
        """Those of a direction that is no part of the loss, whatever its statistics are."""
        nothing = torch.zeros_like(self.positive)
        return SideWeights(nothing, nothing, None)


class SideWeights(NamedTuple):
    """What one direction adds to the weights of G."""

    weight: Tensor  # [n], of the negatives' exponentials
    positive: Tensor  # [n], of the positive
    target: Tensor | None  # [n], of each further positive


def sides(statistics: Statistics) -> tuple[Side, Side]:
    """The rows, and the columns that are their matches."""
    n = statistics.positive.shape[0]
    return Side(statistics.row_lse, statistics.positive), Side(statistics.col_lse[:n], statistics.positive)


def weights(statistics: Statistics, rows: SideWeights, cols: SideWeights) -> Weights:
    """Both directions' weights together; the columns beyond the n matched ones choose nothing."""
    n, m = statistics.positive.shape[0], statistics.col_lse.shape[0]
    extra = (0, m - n)
    targets: tuple[Tensor | None, Tensor | None] = (None, None)
    if rows.target is not None or cols.target is not None:
        row_target, col_target = (
            torch.zeros_like(statistics.positive) if side.target is None else side.target for side in (rows, cols)
        )
        targets = row_target, pad(col_target, extra)
    return Weights(
        statistics.row_lse,
        rows.weight,
        statistics.col_lse,
        pad(cols.weight, extra),
        rows.positive + cols.positive,
        *targets,
    )


def symmetric_cross_entropy(statistics: Statistics, dtype: torch.dtype) -> Tensor:  # []
    """The mean loss of both directions, without smoothing or further positives."""
    rows, cols = (side.losses(None, 0.0, False) for side in sides(statistics))
    return ((rows + cols).mean() / 2).to(dtype)


def symmetric_cross_entropy_weights(statistics: Statistics, gradient: Tensor) -> Weights:  # []
    """The derivatives of `symmetric_cross_entropy`, times `gradient`."""
    share = gradient / (2 * statistics.positive.shape[0])
    return weights(statistics, *(side.weights(share, None, 0.0) for side in sides(statistics)))
