"""What is measured: the grid of cases, most telling first, and their inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def grid(device: str) -> list[Case]:
    """All cases, most telling first: batch sizes at d = 512, then widths, scales, and float16."""
    largest = 131072 if device == "cuda" else 32768
    sizes = [n for n in (1024, 4096, 8192, 256, 2048, 16384, 512, 32768, 65536, 131072) if n <= largest]
    main = [Case(dtype, n) for n in sizes for dtype in ("float32", "bfloat16")]
    middle = 8192 if device == "cuda" else 2048
    widths = [Case(dtype, middle, d) for d in (256, 768, 1024, 1280) for dtype in ("float32", "bfloat16")]
    scales = [Case(dtype, middle, scale=100.0) for dtype in ("float32", "bfloat16", "float16")]
    halves = [Case("float16", n) for n in sizes if n <= middle]
    # The two largest sizes of the main line cost as much as all others together, so they come last.
    return main[:-4] + scales + widths + halves + main[-4:]


def inputs(case: Case, device: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless sets of leaves x [n, d], y [n, d], scale []: pairs that match as in a model under training."""
    generator = torch.Generator().manual_seed(case.n + case.d)
    dtype = DTYPES[case.dtype]
    count = min(MOST_SETS, 1 + ROTATION_BYTES // (2 * case.n * case.d * dtype.itemsize))
    sets = []
    for _ in range(count):
        x = normalize(torch.randn(case.n, case.d, generator=generator), dim=1)
        y = normalize(x + normalize(torch.randn(case.n, case.d, generator=generator), dim=1) * 2, dim=1)
        sets.append(tuple(t.to(device, dtype) for t in (x, y)))
    while True:
        for x, y in sets:
            scale = torch.tensor(case.scale, device=device)
            yield x.clone().requires_grad_(), y.clone().requires_grad_(), scale.requires_grad_()
