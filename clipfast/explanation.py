"""What a loss would run on, why, and what it costs: `clipfast.explain`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clipfast import arguments, dispatch
from clipfast.block import POSITIVE, SAME_IDS
from clipfast.memory import Memory
from clipfast.problem import DISTILLATION, DTYPES, IDS, RANKS, SIGMOID, Problem

LOSSES = {"contrastive": frozenset(), "siglip": frozenset({SIGMOID}), "distillation": frozenset({DISTILLATION})}
PRODUCTS = {"contrastive": (1, 3), "siglip": (3, 0), "distillation": (6, 0)}  # forward, backward


@dataclass(frozen=True)
class Explanation:
    """What a loss would do with a problem; print it to read it.

    Bytes are bounds, P counts matrix products of n*m*d multiply-adds (2*n*m*d floating-point operations each).
    """

    problem: Problem
    chosen: str
    refused: dict[str, tuple[str, ...]]
    saved_bytes: int
    workspace_bytes: int
    gradient_bytes: int
    dense_logits_bytes: int
    forward_products: int
    backward_products: int
    keeps_logits: bool

    def __str__(self) -> str:
        p = self.problem
        wants = f", with {', '.join(sorted(p.needs))}" if p.needs else ""
        lines = [
            f"x [{p.n}, {p.d}], y [{p.m}, {p.d}], {p.dtype}, on {p.device}{wants}",
            f"backend: {self.chosen}",
            *(f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.refused.items()),
            f"saved for backward:  {_mib(self.saved_bytes)}",
            f"workspace at most:   {_mib(self.workspace_bytes)}",
            f"gradients dx, dy:    {_mib(self.gradient_bytes)}",
            f"one n*m logits copy: {_mib(self.dense_logits_bytes)} "
            f"({'kept for the backward pass, for it is small' if self.keeps_logits else 'never stored'})",
            f"products: {self.forward_products} P forward, {self.backward_products} P backward",
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
    keep_bytes: int | None = None,
    backend: str = "auto",
) -> Explanation:
    """Tell what would run for image features [n, d] and text features [m, d] (m = n if not given), and what it costs.

    Args:
        dtype: of the features, or its name, as "bfloat16".
        loss: "contrastive", "siglip" or "distillation" (from a teacher of the same d).
        same_id: "ignore" or "positive" where there are ids, else None.
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
    needs = LOSSES[loss] | ({IDS} if same_id else set()) | ({RANKS} if return_metrics else set())
    problem = Problem(n, m, d, dtype, torch.device(device), needs)
    chosen = dispatch.select(problem, arguments.backend_name(backend))
    module = dispatch.get(chosen)
    keeps = loss == "contrastive" and dispatch.keeps_logits(chosen, n, m, dtype, keep_bytes)
    memory = Memory(
        problem,
        workspace=module.workspace_bytes(problem),
        normalize=normalize,
        label_smoothing=bool(label_smoothing),
        adds_positives=same_id == POSITIVE and loss == "contrastive",
        folds_norms=module.folds_norms(dtype),
        kept=dispatch.kept_bytes(chosen, n, m, dtype) if keeps else 0,
    )
    forward_products, backward_products = PRODUCTS[loss]
    backward_products -= keeps
    return Explanation(
        problem=problem,
        chosen=chosen,
        refused=dispatch.refusals_before(chosen, problem),
        saved_bytes=memory.saved_bytes,
        workspace_bytes=memory.workspace_bytes,
        gradient_bytes=problem.input_bytes,
        dense_logits_bytes=problem.n * problem.m * 4,
        keeps_logits=keeps,
        forward_products=forward_products,
        backward_products=backward_products,
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
