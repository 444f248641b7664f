"""Build the library's reference from its docstrings into build/docs: `make docs`. A warning is an error."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from pathlib import Path

import pdoc
from pdoc import render, render_helpers

import clipfast

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "docs"
TEMPLATE = Path(__file__).parent / "template"
MODULES = ("reference", "models", "emoji", "training", "train", "info", "integrations")


def main() -> None:
    # The libraries that clipfast.integrations plugs into import torchvision.
    sys.path.append(str(ROOT / "tests"))
    importlib.import_module("torchvision_stub").make_importable()
    warnings.simplefilter("error")
    # In "n*m*d" the stars are products, not emphasis.
    render_helpers.markdown_extensions["middle-word-em"] = {"allowed": False}
    render.configure(docformat="google", template_directory=TEMPLATE, footer_text=f"clipfast {clipfast.__version__}")
    # Without the folder of backends, which would take the place of the function of that name.
    pdoc.pdoc("clipfast", *(f"clipfast.{name}" for name in MODULES), "!clipfast.backends", output_directory=FOLDER)
    for page in FOLDER.rglob("*.html"):
        unknown = set(re.findall(r"<code>[^<]*\b(clipfast\.[\w.]+)", page.read_text()))
        if unknown:
            raise SystemExit(f"{page}: no page has {', '.join(sorted(unknown))}")


if __name__ == "__main__":
    main()
