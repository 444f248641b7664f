"""What ranks agree on before they send, and how one that does not, or fails, ends the others (traps 16, 31)."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from ranks import FAIL_TIMEOUT, TIMEOUT, Failed, Ranks, call, compiled, fail, named
from shards import SCHEMES


def test_under_torch_compile(ranks: Ranks) -> None:
    """The graph breaks at one place, in every frame above it, with a reason; the values are the same."""
    for result in ranks.run(compiled, ranks=(0, 1)):
        assert not isinstance(result, Failed), result
        got, plain, breaks = result
        assert got == pytest.approx(plain, rel=1e-6)
        assert all("clipfast: ranks agree on sizes and options" in reason for reason, _ in breaks)
        assert len({place for _, place in breaks}) == 1


DISAGREEMENTS: dict[str, tuple[list[dict[str, Any]], list[tuple[int, int, int]], str]] = {
    "d": ([{}] * 3, [(3, 3, 4), (3, 3, 4), (3, 3, 5)], "d of the features: got 4 on ranks 0, 1, 5 on rank 2;"),
    "dtype": ([{}, {"dtype": torch.bfloat16}, {}], [], r"dtype .*: got torch.float32 on ranks 0, 2, torch.bfloat16"),
    "option": ([{}, {"label_smoothing": 0.1}, {}], [], "label_smoothing: got 0.0 on ranks 0, 2, 0.1 on rank 1"),
    "scheme": ([{"scheme": "ring"}, {}, {}], [], "scheme: got ring on rank 0, auto on ranks 1, 2"),
    "reduction": ([{"grad_reduction": "sum"}, {}, {}], [], "grad_reduction: got sum on rank 0"),
    "grad mode": ([{"grad": False}, {}, {}], [], r"torch.is_grad_enabled\(\): got False on rank 0"),
    "no rows": ([{}] * 3, [(0, 0, 4)] * 3, "image_features: got no rows on any rank"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_ranks_that_disagree(ranks: Ranks, case: str) -> None:
    """The same error on every rank, and the group lives on."""
    per_rank, shapes, text = DISAGREEMENTS[case]
    failures = ranks.run(call, per_rank, shapes, ranks=range(3))
    assert len({str(failure) for failure in failures}) == 1
    assert re.match(f"ValueError: {text}", str(failures[0])), failures[0]
    assert len(set(ranks.run(call, [{}] * 3, ranks=range(3)))) == 1


def test_a_rank_that_refuses_its_arguments(ranks: Ranks) -> None:
    """Its own error there, and at once an error that names the rank on the others."""
    failures = ranks.run(call, [{}, {"label_smoothing": 2.0}, {}], ranks=range(3))
    assert str(failures[1]).startswith("ValueError: label_smoothing: got 2.0")
    assert str(failures[0]) == str(failures[2])
    assert str(failures[0]).startswith("ValueError: group: rank 1 refused its arguments")
    assert len(set(ranks.run(call, [{}] * 3, ranks=range(3)))) == 1


@pytest.mark.parametrize("loss", ["ContrastiveLoss", "SigLipLoss"])
@pytest.mark.parametrize(
    ("numbers", "sizes", "text"),
    [
        ((0, 1, 1, 3), (4, 4, 4, 4), "rank: got 1; accepted is that of torch.distributed, 2"),
        ((0, 1, 2, 3), (4, 4, 5, 4), "world_size: got 5; accepted is that of torch.distributed, 4"),
    ],
)
def test_a_rank_with_a_wrong_name_ends_all_at_once(
    ranks: Ranks, numbers: tuple[int, ...], sizes: tuple[int, ...], text: str, loss: str
) -> None:
    started = time.monotonic()
    failures = ranks.run(named, loss, numbers, sizes)
    assert time.monotonic() - started < TIMEOUT / 2
    assert str(failures[2]) == f"ValueError: {text}"
    others = {str(failure) for rank, failure in enumerate(failures) if rank != 2}
    assert others == {"ValueError: group: rank 2 refused its arguments, with an error of its own; nothing was sent"}
    assert len(set(ranks.run(named, loss, range(4), [4] * 4))) == 1


def test_ranks_may_want_different_gradients(ranks: Ranks) -> None:
    """A rank whose features and scale want none meets the others in the backward pass all the same."""
    for scheme in SCHEMES:
        wants_none = {"requires_grad": False, "logit_scale": 2.0, "scheme": scheme}
        losses = ranks.run(call, [{"scheme": scheme}, wants_none, {"scheme": scheme}], ranks=range(3))
        assert len(set(losses)) == 1
        assert not isinstance(losses[0], Failed)


@pytest.mark.parametrize(("how", "scheme"), [("raise", "ring"), ("kill", "gather"), ("kill", "ring"), ("hang", "ring")])
def test_a_rank_that_fails_ends_the_others(how: str, scheme: str) -> None:
    """With an error, within the group's timeout."""
    few = Ranks(2)
    try:
        waited = few.run(fail, how, scheme)[0]
        assert not isinstance(waited, Failed), waited
        assert waited <= 2 * FAIL_TIMEOUT
    finally:
        few.kill()
