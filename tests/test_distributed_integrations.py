"""Other libraries' training on two processes, their own losses against clipfast's: the same parameters after steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import error
from ranks import Failed, Ranks
from training_ranks import open_clip_training, sentence_training, transformers_training


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Processes of their own: these libraries take all of the job's."""
    both = Ranks(2)
    yield both
    both.close()


def alike(two: Ranks, train: Callable[..., Any], theirs: tuple[Any, ...], ours: tuple[Any, ...]) -> None:
    """Parameters of both trainings on two ranks: alike on both, and moved."""
    both = [two.run(train, *arguments) for arguments in (theirs, ours)]
    for found in both:
        assert not any(isinstance(result, Failed) for result in found), found
        assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    (before, after), (_, got) = both[0][0], both[1][0]
    for name, value in after.items():
        assert error(got[name], value) <= 1e-9 * max(1.0, value.abs().max().item()), name
    assert any(error(after[name], before[name]) > 1e-4 for name in after)


GATHERED = ["--gather-with-grad"]


@pytest.mark.parametrize("flags", [[], ["--local-loss"], ["--gather-with-grad"]], ids=str)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_open_clip_training(two: Ranks, flags: list[str], accumulated: int) -> None:
    """Patched, with any flags, it is open_clip's with the flag that makes its gradients right."""
    pytest.importorskip("open_clip", reason="open_clip is missing; the extra `open-clip` brings it")
    accumulate = ["--accum-freq", str(accumulated)]
    alike(two, open_clip_training, ([*GATHERED, *accumulate], False), ([*flags, *accumulate], True))


@pytest.mark.parametrize("flags", [["--siglip"], ["--distill-model", "tiny", "--distill-pretrained", "none"]], ids=str)
def test_open_clip_training_with_other_losses(two: Ranks, flags: list[str]) -> None:
    pytest.importorskip("open_clip", reason="open_clip is missing; the extra `open-clip` brings it")
    alike(two, open_clip_training, ([*GATHERED, *flags], False), (flags, True))


@pytest.mark.parametrize(
    "options", [{}, {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}], ids=str
)
def test_sentence_transformers_gathers_across_devices(two: Ranks, options: dict[str, Any]) -> None:
    pytest.importorskip("sentence_transformers", reason="the extra `sentence-transformers` brings it")
    alike(two, sentence_training, (False, options), (True, options))


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_transformers_over_a_group(two: Ranks, name: str) -> None:
    """Unequal batches; transformers' own loss has all pairs on each rank."""
    pytest.importorskip("transformers", reason="transformers is missing; the extra `transformers` brings it")
    alike(two, transformers_training, (name, True), (name, False))
