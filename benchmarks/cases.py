"""What is measured: the grid of cases, most telling first, and their inputs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TF32 = "tf32"  # of a case: float32, with products as torch.set_float32_matmul_precision("high") allows
# Input sets rotate so that no run finds its inputs in the cache; this much is beyond any last-level cache here.
ROTATION_BYTES = 96 << 20
MOST_SETS = 16


@dataclass(frozen=True, order=True)
class Case:
    """A batch of n pairs of width d; its loss is taken at `scale`."""

    dtype: str
    n: int
    d: int = 512
    scale: float = 14.3

    def __str__(self) -> str:
        return f"n={self.n} d={self.d} {self.dtype} scale={self.scale:g}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == TF32 else DTYPES[self.dtype]

    @property
    def precision(self) -> str:
        """Of float32's products, for torch.set_float32_matmul_precision."""
        return "high" if self.dtype == TF32 else "highest"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


FIRST = [Case("bfloat16", n, d) for n in (32768, 131072) for d in (512, 768, 1024)]  # of a GPU


def grid(device: str) -> list[Case]:
    """All cases, most telling first."""
    return gpu_grid() if device == "cuda" else cpu_grid()


def gpu_grid() -> list[Case]:
    """What a GPU is for: FIRST, then the further from bfloat16, d = 512 and the first sizes, the later."""
    dtypes, widths = ("bfloat16", "float16", TF32), (512, 1024, 768)
    sizes = (32768, 131072, 4096, 256, 65536, 16384, 1024, 8192, 2048, 512)
    steps = {
        Case(dtype, n, d): 4 * dtypes.index(dtype) + 3 * widths.index(d) + sizes.index(n)
        for dtype in dtypes
        for d in widths
        for n in sizes
    }
    others = [Case("bfloat16", 8192, d) for d in (256, 1280)] + [Case(dtype, 8192, scale=100.0) for dtype in dtypes]
    exact = [Case("float32", n) for n in (4096, 1024)]  # whose logits are kept between the passes
    return list(dict.fromkeys([*FIRST, *exact, *sorted(steps, key=lambda case: steps[case]), *others]))


def cpu_grid() -> list[Case]:
    """Batch sizes at d = 512, then widths, scales, and float16."""
    sizes = (1024, 4096, 64, 8192, 256, 2048, 16384, 512, 32768)
    main = [Case(dtype, n) for n in sizes for dtype in ("float32", "bfloat16")]
    middle = 2048
    widths = [Case(dtype, middle, d) for d in (256, 768, 1024, 1280) for dtype in ("float32", "bfloat16")]
    scales = [Case(dtype, middle, scale=100.0) for dtype in ("float32", "bfloat16", "float16")]
    halves = [Case("float16", n) for n in sizes if n <= middle]
    # The two largest sizes of the main line cost as much as all others together, so they come last.
    return main[:-4] + scales + widths + halves + main[-4:]


def inputs(case: Case, device: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless sets of leaves x [n, d], y [n, d], scale []: pairs that match as in a model under training."""
    sets = _sets(case, device)
    while True:
        for x, y in sets:
            scale = torch.tensor(case.scale, device=device)
            yield x.clone().requires_grad_(), y.clone().requires_grad_(), scale.requires_grad_()


@functools.lru_cache(maxsize=1)
def _sets(case: Case, device: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator(device).manual_seed(case.n + case.d)
    count = min(MOST_SETS, 1 + ROTATION_BYTES // (2 * case.n * case.d * case.torch_dtype.itemsize))

    def rows() -> Tensor:
        return normalize(torch.randn(case.n, case.d, generator=generator, device=device), dim=1)

    sets = []
    for _ in range(count):
        x = rows()
        y = normalize(x + rows() * 2, dim=1)
        sets.append((x.to(case.torch_dtype), y.to(case.torch_dtype)))
    return sets
