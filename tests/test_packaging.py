"""The sdist, the wheel built from it, and an install without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
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
    """Compiled in a third of the time that -O3 takes: the other tests run what that makes."""
    quick = {"CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O1"}
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(sdist), **quick)
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
    assert f"the compiled extension clipfast._cpu is missing from {tmp_path / 'clipfast'}" in output
    assert "--no-cache-dir --force-reinstall" in output


def fake_import(folder: Path, path: str = "") -> str:
    """What is said of the cpu backend of a copy of the sources that is imported from `folder`."""
    return subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = [{str(folder)!r}, {path!r}]; "
         f"sys.path += {[entry for entry in sys.path if 'site-packages' in entry]!r}\n{PROGRAM}"],
        cwd=folder, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip


def test_a_checkout_without_extension_names_the_build_that_is_installed(tmp_path: Path) -> None:
    """Not a circular import, as Python has it."""
    checkout, installed = tmp_path / "checkout", tmp_path / "site"
    shutil.copytree(ROOT / "clipfast", checkout / "clipfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (installed / "clipfast").mkdir(parents=True)
    output = fake_import(checkout, str(installed))
    assert f"clipfast._cpu is missing from {checkout / 'clipfast'}, where clipfast was imported from" in output
    assert str(installed) not in output
    (installed / "clipfast" / f"_cpu{EXTENSION_SUFFIXES[0]}").touch()
    output = fake_import(checkout, str(installed))
    assert f"a build is installed in {installed / 'clipfast'}: start Python outside of {checkout}" in output
    assert "circular" not in output
    (checkout / "clipfast" / "_cpu.cpython-38-x86_64-linux-gnu.so").touch()
    assert "_cpu.cpython-38-x86_64-linux-gnu.so there is for another Python" in fake_import(checkout)
    broken = checkout / "clipfast" / f"_cpu{EXTENSION_SUFFIXES[0]}"
    broken.write_bytes(b"no library")
    assert f"clipfast._cpu is missing: it does not load from {broken.parent}: " in fake_import(checkout)
