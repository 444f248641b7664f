"""explain()'s bytes are bounds, and near ones, for every option (trap 27); and its arguments are checked."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from oracle import features
from torch.profiler import ProfilerActivity, profile

import clipfast
from clipfast.problem import Problem

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SLACK = 1 << 17  # of small problems: scalars, and what the allocator rounds up to


def random_options(draw: random.Random) -> dict[str, Any]:
    loss = draw.choice(("contrastive", "contrastive", "siglip", "distillation"))
    options: dict[str, Any] = {"loss": loss, "normalize": draw.random() < 0.5}
    if loss != "distillation":
        options["same_id"] = draw.choice((None, None, "ignore", "positive"))
    if loss == "contrastive":
        options |= {"label_smoothing": draw.choice((0.0, 0.1)), "return_metrics": draw.random() < 0.3}
    return options


def peak_bytes(n: int, m: int, d: int, dtype: torch.dtype, loss: str, same_id: str | None, **options: Any) -> int:
    """Of what PyTorch allocates in a forward and a backward pass, with an upstream gradient that is not 1."""
    x, y = (t.requires_grad_() for t in features("unnormalized", n, m, d, dtype))
    if same_id:
        ids = {"image_ids": torch.randint(50, (n,)), "text_ids": torch.randint(50, (m,)), "same_id": same_id}
        options |= ids
    teacher = (x.detach() * 2, y.detach() * 2, 3.0)
    compute = {
        "contrastive": lambda: clipfast.contrastive_loss(x, y, 14.3, backend="torch", **options),
        "siglip": lambda: clipfast.siglip_loss(x, y, 14.3, -10.0, backend="torch", **options),
        "distillation": lambda: clipfast.distillation_loss(x, y, 14.3, *teacher, backend="torch", **options),
    }[loss]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        value = compute()
        torch.autograd.grad(2 * (value[0] if isinstance(value, tuple) else value), (x, y))
    events = profiler.profiler.kineto_results.events()
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.parametrize("seed", range(40))
def test_bytes_are_near_bounds(seed: int) -> None:
    draw = random.Random(seed)
    n, d, dtype = draw.choice((50, 300, 1000, 2000)), draw.choice((4, 32, 128, 512, 1024)), draw.choice(DTYPES)
    m, options = n + draw.choice((0, 7, 500, 3000)), random_options(draw)
    explanation = clipfast.explain(n, d, dtype, m=m, backend="torch", **options)
    saved = explanation.saved_bytes
    if options["loss"] == "contrastive":
        saved -= Problem(n, m, d, dtype, torch.device("cpu")).input_bytes  # the features are there already
    predicted = explanation.workspace_bytes + explanation.gradient_bytes + saved
    measured = peak_bytes(n, m, d, dtype, **({"same_id": None} | options))
    assert measured <= predicted <= 1.3 * measured + SLACK, options


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0, 512), ValueError, "n: got 0; accepted is an integer from 1"),
        ((4, -1), ValueError, "d: got -1; accepted is an integer from 1"),
        ((4.0, 8), TypeError, "n: got float; accepted is an integer from 1"),
        ((True, 8), TypeError, "n: got bool; accepted"),
        ((4, 8, torch.int64), TypeError, "dtype: got torch.int64; accepted are torch.float32"),
        ((4, 8, "float8"), TypeError, "dtype: got 'float8'; accepted are"),
    ],
)
def test_explain_refuses(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        clipfast.explain(*arguments)


def test_explain_checks_its_options() -> None:
    for options, text in (
        ({"m": 3}, "m: got 3; accepted are at least n, 4"),
        ({"loss": "hinge"}, "loss: got 'hinge'; accepted are 'contrastive', 'siglip' and 'distillation'"),
        ({"same_id": "drop"}, "same_id: got 'drop'"),
        ({"backend": "fast"}, "backend: 'fast' is unknown"),
    ):
        with pytest.raises(ValueError, match=text):
            clipfast.explain(4, 8, **options)
    assert str(clipfast.explain(4, 8, "bfloat16")) == str(clipfast.explain(4, 8, torch.bfloat16))
