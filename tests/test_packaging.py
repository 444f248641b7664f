"""The sdist, the wheel built from it, and an install without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc/tile_loop.h", "CMakeLists.txt", "LICENSE", "README.md", "clipfast/py.typed", "constraints.txt")
PROGRAM = """
import torch, clipfast
x = torch.randn(50, 8)
assert clipfast.contrastive_loss(x, x, 1.0).isfinite()
print(clipfast.backends()["cpu"])
"""


def pip(*arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_installed(target: Path) -> str:
    """The program's output with the clipfast that was installed into `target`."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'clipfast' not in repr(f) "
         f"and 'ScikitBuild' not in type(f).__name__]; sys.path.insert(0, {str(target)!r})\n{PROGRAM}"],
        cwd=target,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()  # fmt: skip


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("clipfast-*.tar.gz")
    return path


def test_sdist_is_complete(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names.issuperset(SOURCES)
    assert not any(name.startswith((".ci/", "runs/", ".venv/")) or name.endswith(".so") for name in names)


def test_wheel_from_the_sdist_has_the_compiled_backend(sdist: Path, tmp_path: Path) -> None:
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(sdist))
    (wheel,) = tmp_path.glob("clipfast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("clipfast/_cpu.") and name.endswith((".so", ".pyd")) for name in names)
    assert "clipfast/py.typed" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/")) for name in names)
    pip("install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    assert run_installed(tmp_path / "site") == "()"


def test_install_without_a_compiler_succeeds_and_says_what_is_missing(sdist: Path, tmp_path: Path) -> None:
    pip("install", "--quiet", "--no-deps", "--target", str(tmp_path), str(sdist), CXX="/nonexistent/c++")
    output = run_installed(tmp_path)
    assert "the compiled extension clipfast._cpu is missing" in output
    assert str(tmp_path) in output
