"""What a loss would run on, why, and what it costs: `clipfast.explain`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clipfast import arguments, dispatch
from clipfast.block import IGNORE, POSITIVE, SAME_IDS
from clipfast.memory import Memory
from clipfast.predictions import PRODUCTS, Prediction, predict
from clipfast.problem import DISTILLATION, DTYPES, IDS, NORMS, RANKS, SIGMOID, SYMMETRIC, Problem
from clipfast.schemes import AUTO, GATHER, SCHEMES
from clipfast.softmax import BOTH, MEAN, Options, forms_gradients

LOSSES = {"contrastive": frozenset(), "siglip": frozenset({SIGMOID}), "distillation": frozenset({DISTILLATION})}


@dataclass(frozen=True)
class Explanation:
    """What a loss would do with a problem; print it to read it.

    Bytes are bounds for contiguous features, P counts matrix products of n*m*d multiply-adds (2*n*m*d floating-point
    operations each). Over several ranks all is of each rank, the problem is the block that it visits at a time, and P
    the whole job's.
    """

    problem: Problem
    chosen: str
    refused: dict[str, tuple[str, ...]]
    saved_bytes: int
    workspace_bytes: int
    gradient_bytes: int
    dense_logits_bytes: int
    forward_products: float
    backward_products: float
    keeps_logits: bool
    keeps_because: str  # what says so, of a loss that can
    ranks: Prediction | None = None

    def __str__(self) -> str:
        p = self.problem
        wants = f", with {', '.join(sorted(p.needs))}" if p.needs else ""
        kept = "kept for the backward pass" if self.keeps_logits else "never stored"
        if self.keeps_logits and not self.backward_products:
            kept = "held while the gradients are formed with the loss"
        kept += f"; {self.keeps_because}" if self.keeps_because else ""
        lines = [
            f"x [{p.n}, {p.d}], y [{p.m}, {p.d}], {p.dtype}, on {p.device}{wants}",
            f"backend: {self.chosen}",
            *(f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.refused.items()),
            f"saved for backward:  {_mib(self.saved_bytes)}",
            f"workspace at most:   {_mib(self.workspace_bytes)}",
            f"gradients dx, dy:    {_mib(self.gradient_bytes)}",
            f"one n*m logits copy: {_mib(self.dense_logits_bytes)} ({kept})",
            f"products: {self.forward_products:g} P forward, {self.backward_products:g} P backward",
        ]
        if self.ranks is not None:
            lines += [
                f"scheme: {self.ranks.scheme} ({self.ranks.reason})",
                f"sent by each rank:   {_mib(self.ranks.forward_bytes)} forward, "
                f"{_mib(self.ranks.backward_bytes)} backward",
                f"held of others:      {_mib(self.ranks.held_bytes)}",
            ]
        return "\n".join(lines)


def explain(
    n: int,
    d: int,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    *,
    m: int | None = None,
    loss: str = "contrastive",
    normalize: bool = False,
    label_smoothing: float = 0.0,
    same_id: str | None = None,
    return_metrics: bool = False,
    world_size: int = 1,
    scheme: str = AUTO,
    equal_shards: bool = False,
    keep_bytes: int | None = None,
    backend: str = "auto",
) -> Explanation:
    """Tell what would run for image features [n, d] and text features [m, d] (m = n if not given), and what it costs.

    Args:
        dtype: of the features, or its name, as "bfloat16".
        loss: "contrastive", "siglip" or "distillation" (from a teacher of the same d).
        same_id: "ignore" or "positive" where there are ids, else None.
        world_size: the ranks of a group, each of which has n images and m texts. `Explanation.ranks` tells which scheme
            and why, and the bytes that each rank sends.
        others: see `clipfast.contrastive_loss`.

    Raises:
        TypeError, ValueError: an argument is not as stated, or the backend that was named cannot run this.
    """
    n, d = arguments.positive_integer("n", n), arguments.positive_integer("d", d)
    m = n if m is None else arguments.positive_integer("m", m)
    if m < n:
        raise ValueError(f"m: got {m}; accepted are at least n, {n}")
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in DTYPES:
        raise TypeError(f"dtype: got {dtype!r}; accepted are {', '.join(map(str, DTYPES))}")
    arguments.choice("loss", loss, tuple(LOSSES))
    arguments.flag("normalize", normalize)
    arguments.flag("return_metrics", return_metrics)
    arguments.bytes_or_none("keep_bytes", keep_bytes)
    label_smoothing = arguments.fraction("label_smoothing", label_smoothing)
    if same_id is not None:
        arguments.choice("same_id", same_id, SAME_IDS)
    arguments.choice("scheme", scheme, SCHEMES)
    arguments.flag("equal_shards", equal_shards)
    needs = LOSSES[loss] | {
        need for need, there in ((IDS, same_id), (NORMS, normalize), (RANKS, return_metrics)) if there
    }
    adds_positives = same_id == POSITIVE and loss == "contrastive"
    ranks, visited = None, m
    if arguments.positive_integer("world_size", world_size) > 1:
        ranks = predict(
            world_size, n, m, d, dtype, scheme, loss=loss, ids=bool(same_id), positives=adds_positives,
            smoothing=bool(label_smoothing), metrics=return_metrics, equal_shards=equal_shards, normalize=normalize,
        )  # fmt: skip
        visited = world_size * m if ranks.scheme == GATHER else m
    problem = Problem(n, visited, d, dtype, torch.device(device), needs)
    chosen = dispatch.select(problem, backend)
    module = dispatch.get(chosen)
    workspace = module.workspace_bytes(problem)
    columns = [m] * world_size if ranks and ranks.scheme != GATHER else [visited]
    kept, keeps_because = 0, ""
    if loss == "contrastive":
        allowed, keeps_because = dispatch.allowed_bytes(keep_bytes, chosen, dtype)
        kept = dispatch.keeps_logits(chosen, n, columns, dtype, allowed)
    if ranks and kept:
        fewer = ranks.backward_products - 1 / world_size
        ranks = ranks._replace(backward_products=fewer, saved_bytes=ranks.saved_bytes + kept)
    options = Options(normalize, label_smoothing, BOTH, MEAN, same_id or IGNORE, return_metrics, chosen, kept > 0)
    at_once = not ranks and forms_gradients(options, ids=bool(same_id))
    computed = problem._replace(needs=needs | {SYMMETRIC}) if at_once else problem
    if at_once:
        workspace, kept = module.workspace_bytes(computed), 0
    memory = Memory(
        computed,
        workspace=workspace,
        normalize=normalize,
        label_smoothing=bool(label_smoothing),
        adds_positives=adds_positives,
        folds_norms=module.folds_norms(dtype),
        kept=kept,
    )
    forward_products, backward_products = (3, 0) if at_once else PRODUCTS[loss]
    backward_products -= kept > 0
    return Explanation(
        problem=problem,
        chosen=chosen,
        refused=dispatch.refusals_before(chosen, problem),
        saved_bytes=ranks.saved_bytes if ranks else memory.saved_bytes,
        workspace_bytes=workspace + ranks.workspace_bytes if ranks else memory.workspace_bytes,
        gradient_bytes=(n + m) * d * dtype.itemsize,
        dense_logits_bytes=n * world_size * m * 4,
        keeps_logits=at_once or kept > 0,
        keeps_because=keeps_because,
        forward_products=ranks.forward_products if ranks else forward_products,
        backward_products=ranks.backward_products if ranks else backward_products,
        ranks=ranks,
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
