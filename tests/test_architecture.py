"""Data goes one way: modules -> functional -> autograd -> dispatch -> backends -> kernels and compiled code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import clipfast

PACKAGE = Path(clipfast.__file__).parent

# Each layer may import the layers below it, never one above or beside it.
LAYERS = (
    {"problem", "reference", "_cpu"},
    {"kernels", "kernels.tiles", "block", "products"},
    {"tuning"},
    {"logit_sums", "norms", "arguments", "memory", "kernels.operands"},
    {"kernels.statistics", "kernels.gradient", "kernels.vectors", "kernels.ranks"},
    {"kernels.sigmoid", "kernels.chunks", "kernels.projection", "kernels.distillation"},
    {"kernels.launch"},
    {"backends", "backends.torch", "backends.cpu", "backends.triton"},
    {"collectives"},
    {"schemes"},
    {"dispatch", "cross_entropy", "predictions"},
    {"softmax", "autograd", "retrieval"},
    {"sigmoid", "distillation", "projected", "explanation"},
    {"distributed.job"},
    {"distributed.softmax", "distributed.sigmoid", "distributed.distillation"},
    {"distributed.retrieval"},
    {"distributed"},
    {"operators"},
    {"calls"},
    {"functional"},
    {"modules", "metrics", "cached"},
    {"prefixes"},
    {"__init__"},
    {"info"},
    # The application: the library must not import it.
    {"models.transformer", "emoji", "emoji.data", "training"},
    {"models.image", "models.text"},
    {"models.clip"},
    {"models.convert", "models.evaluation", "models.tokenizer", "models.zero_shot"},
    {"models", "emoji.encoder", "emoji.minilm", "emoji.words", "training.checkpoint", "training.job"},
    {"emoji.pictures", "training.flags", "training.logs", "training.optimization"},
    {"emoji.demo"},
    {"emoji.__main__"},
    {"training.sources", "training.folder", "training.model"},
    {"training.batches"},
    {"training.evaluation", "emoji.evaluate"},
    {"training.run"},
    {"train"},
    {
        "integrations",
        "integrations.open_clip",
        "integrations.transformers",
        "integrations.sentence_transformers",
    },
)
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}


def module_names() -> list[str]:
    return [
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def imports(module: str) -> set[str]:
    """The clipfast modules that a module imports anywhere in its text."""
    path = PACKAGE.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    names = {name.removeprefix("clipfast.") for name in found if name.startswith("clipfast.")}
    # `from clipfast.x import y` names y of module x, or module x.y; `from clipfast import Name` is the package itself.
    return {next((n for n in (name, name.rpartition(".")[0]) if n in LEVEL), "__init__") for name in names}


def test_every_module_has_its_layer() -> None:
    assert set(module_names()) <= set(LEVEL)


@pytest.mark.parametrize("module", module_names())
def test_imports_go_down(module: str) -> None:
    for imported in imports(module):
        assert LEVEL[imported] < LEVEL[module], f"{module} imports {imported}"


def test_the_reference_imports_torch_only() -> None:
    assert imports("reference") == set()
