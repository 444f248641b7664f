"""A batch whose rows are on several ranks, and the judgement of what they return."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from oracle import error, features
from ranks import Failed, Ranks, contrastive
from torch import Tensor
from torch.nn.functional import log_softmax

from clipfast import reference
from clipfast.problem import HALF_DTYPES, accumulation_dtype

SCHEMES = ("gather", "ring")
# Images and texts of each rank.
SHARDS: dict[str, list[tuple[int, int]]] = {
    "one rank": [(6, 6)],
    "two ranks": [(5, 5), (5, 5)],
    "three ranks": [(4, 4)] * 3,
    "four ranks": [(3, 3)] * 4,
    "more texts": [(3, 5)] * 4,
    "unequal": [(5, 5), (9, 9), (2, 2)],
    "unequal texts": [(5, 5), (2, 9), (3, 4)],
    "an empty rank": [(4, 4), (0, 0), (7, 7)],
    "no images": [(4, 4), (0, 3), (7, 7)],
    "one pair": [(0, 0), (1, 1)],
}
IDS = (0, 1, 2, 3, 1, 4, 5, 1, 6, 6)  # an id's pairs are on several ranks, and in some cases on one
Formula = Callable[..., Tensor]


class Batch:
    """The rows of all ranks, and each rank's."""

    def __init__(self, sizes: list[tuple[int, int]], d: int, dtype: torch.dtype, ids: bool = False) -> None:
        self.sizes = sizes
        self.n, self.m = (sum(size) for size in zip(*sizes, strict=True))
        x, y = features("trained", self.n, self.m, d, torch.float64)
        starts = [sum(m for _, m in sizes[:rank]) for rank in range(len(sizes))]
        self.match = torch.cat([start + torch.arange(n) for start, (n, _) in zip(starts, sizes, strict=True)])
        others = [j for j in range(self.m) if j not in set(self.match.tolist())]
        self.order = torch.cat((self.match, torch.tensor(others, dtype=torch.long)))
        placed = torch.empty_like(y)
        placed[self.match], placed[others] = y[: self.n], y[self.n :]
        self.x, self.y = (1.5 * x).to(dtype), placed.to(dtype)
        self.ids: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if ids:
            text_ids = torch.tensor([7 * IDS[j % len(IDS)] - 5 for j in range(self.m)])
            self.ids = text_ids[self.match], text_ids
        self.shards = []
        rows = [n for n, _ in sizes], [m for _, m in sizes]
        for place, (x, y) in enumerate(zip(self.x.split(rows[0]), self.y.split(rows[1]), strict=True)):
            shard = {"x": x, "y": y}
            if ids:
                shard["image_ids"], shard["text_ids"] = (t.split(r)[place] for t, r in zip(self.ids, rows, strict=True))
            self.shards.append(shard)

    def losses(self, x: Tensor, y: Tensor, s: Tensor, b: Tensor, options: dict[str, Any]) -> Tensor:  # [2, n]
        if options.get("normalize"):
            x, y = reference.l2_normalize(x), reference.l2_normalize(y)
        smoothing, ignore = options.get("label_smoothing", 0.0), options.get("same_id", "ignore") == "ignore"
        logits = s * (x @ y.T) + b
        own = torch.zeros(self.n, self.m, dtype=torch.bool)
        own[torch.arange(self.n), self.match] = True
        same = torch.zeros_like(own) if self.ids[0] is None else (self.ids[0][:, None] == self.ids[1]) & ~own
        allowed, positive = (~same, own) if ignore else (torch.ones_like(own), own | same)
        losses = []
        for side in (logits, allowed, positive), tuple(t.T[self.match] for t in (logits, allowed, positive)):
            scores, allowed, positive = side
            target = (1 - smoothing) * positive.to(x.dtype) / positive.sum(1, keepdim=True)
            target = target + smoothing * allowed.to(x.dtype) / allowed.sum(1, keepdim=True)
            chances = log_softmax(scores.masked_fill(~allowed, -torch.inf), dim=1).masked_fill(~allowed, 0)
            losses.append(-(target * chances).sum(1))
        return torch.stack(losses)

    def evaluate(
        self,
        dtype: torch.dtype,
        scale: float,
        bias: float,
        options: dict[str, Any],
        upstream: Sequence[Any] | None = None,
        formula: Formula | None = None,
    ) -> dict[str, Tensor]:
        """The dense formula over the whole batch; the gradients of what the ranks make of their losses together.

        With reduction "mean" the features' are W times, and the scale's and bias's are, those of the mean over ranks.
        A formula of its own has x, y with the matched texts first, s, b and the options.
        """
        count = len(self.sizes)
        x, y = (t.to(dtype).detach().requires_grad_() for t in (self.x, self.y))
        s, b = (torch.tensor(v, dtype=accumulation_dtype(dtype), requires_grad=True) for v in (scale, bias))
        s_, b_ = (s, b) if dtype not in HALF_DTYPES else (s.to(dtype), b.to(dtype))
        if formula is None:
            losses = self.losses(x, y, s_, b_, options)
            direction = options.get("direction", "both")
            losses = {"image_to_text": losses[0], "text_to_image": losses[1]}.get(direction, losses)
        else:
            losses = formula(self, x, y[self.order], s_, b_, options)
        if options.get("reduction", "mean") == "none":
            out = losses
            gradient = torch.cat([torch.as_tensor(u) for u in upstream], dim=-1) if upstream else torch.ones_like(out)
            total = (losses * gradient).sum()
        else:
            out = losses.mean()
            total = out * (sum(upstream) if upstream else count)
        dx, dy, ds, db = torch.autograd.grad(total, (x, y, s, b), materialize_grads=True)
        return {"loss": out.detach(), "dx": dx, "dy": dy, "dscale": ds / count, "dbias": db / count}


def joined(results: list[dict[str, Tensor]], options: dict[str, Any]) -> dict[str, Tensor]:
    """What ranks returned as one process's; values that all must have are the same bit for bit."""
    for result in results:
        assert not isinstance(result, Failed), result
    alike = {"dscale", "dbias"} | ({"loss"} if options.get("reduction", "mean") == "mean" else set())
    for name in alike:
        assert all(torch.equal(result[name].nan_to_num(), results[0][name].nan_to_num()) for result in results), name
    return {
        name: results[0][name]
        if name in alike
        else torch.cat([r[name] for r in results], dim=-1 if name == "loss" else 0)
        for name in results[0]
    }


def assert_right(
    ranks: Ranks,
    batch: Batch,
    options: dict[str, Any],
    scale: float = 14.3,
    bias: float = -0.5,
    upstream: list[Any] | None = None,
    **how: Any,
) -> None:
    """The contrastive loss over these ranks, judged."""
    call = batch.shards, scale, bias, options, upstream or (), *how.values()
    assert list(how) == ["scheme", "grad_reduction", "equal_shards"][: len(how)]
    got = joined(ranks.run(contrastive, *call, ranks=range(len(batch.sizes))), options)
    judge(batch, got, scale, bias, options, upstream)
    if options.get("metrics"):
        assert_counts(batch, got, scale, bias)


def judge(
    batch: Batch,
    got: dict[str, Tensor],
    scale: float,
    bias: float,
    options: dict[str, Any],
    upstream: Sequence[Any] | None = None,
    formula: Formula | None = None,
    gradient_sum: float = 2.0,  # of |G| over a row or column, times the images
) -> None:
    """err(clipfast) <= 2 err(PyTorch, same dtype, one process) + the oracle's roundings."""
    dtype = batch.x.dtype
    scale = torch.tensor(scale, dtype=accumulation_dtype(dtype)).item()
    exact = batch.evaluate(torch.float64, scale, bias, options, upstream, formula)
    dense = batch.evaluate(dtype, scale, bias, options, upstream, formula)
    accumulator = accumulation_dtype(dtype)
    length = 1.0 if options.get("normalize") else max(t.double().norm(dim=1).max().item() for t in (batch.x, batch.y))
    total = (
        len(batch.sizes)
        if upstream is None
        else max(1.0, float(torch.cat([torch.as_tensor(u).flatten() for u in upstream]).abs().sum()))
    )
    if options.get("reduction") == "none":
        total *= batch.n
    total *= gradient_sum
    feature = scale * length * total / batch.n
    terms = {"loss": gradient_sum / 2, "dx": feature, "dy": feature, "dscale": length**2 * total, "dbias": total}
    for name, term in terms.items():
        value, truth = got[name], exact[name]
        assert value.dtype == (dtype if name in ("dx", "dy") else accumulator)
        rounding = 2 * torch.finfo(value.dtype).eps * truth.abs().max().item()
        rounding += torch.finfo(accumulator).eps * (scale * length**2 + abs(bias) + 2 + math.sqrt(batch.m)) * term
        bound = 2 * error(dense[name], truth) + (8 if accumulator == torch.float64 else 1) * rounding
        assert error(value, truth) <= bound, f"{name}: {error(value, truth):.3g} > {bound:.3g}"


def assert_counts(batch: Batch, got: dict[str, Tensor], scale: float, bias: float) -> None:
    logits = scale * batch.x.double() @ batch.y.double().T + bias
    own = torch.zeros_like(logits, dtype=torch.bool)
    own[torch.arange(batch.n), batch.match] = True
    same = torch.zeros_like(own) if batch.ids[0] is None else (batch.ids[0][:, None] == batch.ids[1]) & ~own
    for name, dim in (("row_above", 1), ("col_above", 0)):
        best = logits.masked_fill(~(own | same), -torch.inf).amax(dim=dim, keepdim=True)
        assert torch.equal(got[name].long(), ((logits >= best) & ~(own | same)).sum(dim=dim)), name
