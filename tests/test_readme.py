"""What the README says is what was measured."""

from __future__ import annotations

import json

import pytest

from benchmarks import memory


def test_memory_table_is_the_committed_result() -> None:
    readme = (memory.ROOT / "README.md").read_text()
    result = json.loads(memory.result_file().read_text())
    assert memory.with_table(readme, result) == readme


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"README.md: has no <!-- benchmarks:memory -->"):
        memory.with_table("# clipfast", {})


@pytest.mark.parametrize("loss", memory.LOSSES)
def test_measure(loss: str) -> None:
    """One small case: the dense formula saves its logits, clipfast its inputs."""
    n = 512
    measured = memory.measure(loss, n)
    inputs = 2 * n * memory.WIDTH * 4
    if loss == "dense":
        assert measured["saved_bytes"] > inputs + 2 * n * n * 4
    else:
        assert inputs <= measured["saved_bytes"] < 1.1 * inputs
    assert measured["peak_bytes"] > 0
