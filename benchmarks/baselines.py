"""The candidates: clipfast's backends, the dense formulas, and other packages, each with its reason not to run a case.

A candidate is called as loss(x, y, s) with normalized leaves x [n, d], y [n, d] and the scale s, 0-D, and returns the
symmetric loss, 0-D.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import clipfast
from benchmarks.cases import DTYPES, TF32, Case
from clipfast import dispatch

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

KEPT_SIZES = (1024, 4096)


@dataclass(frozen=True)
class Candidate:
    """A way to compute the loss.

    Attributes:
        name: as the tables show it.
        loss: makes the function to time.
        package: the module it needs, if any.
        dense_copies: about how many n*n float32 matrices its forward and backward hold; 0 if linear in n.
        devices: where it runs.
        dtypes: what it takes.
        scale_gradient: whether it differentiates by the scale.
        missing: why it cannot run at all here.
        sizes: the n that it is for; empty for all.
        multiplies: how many products of n*n*d it computes, forward and backward; 0 if nobody counted.
    """

    name: str
    loss: Callable[[], Loss]
    package: str = ""
    dense_copies: float = 0
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = (*DTYPES, TF32)
    scale_gradient: bool = True
    missing: str = ""
    sizes: tuple[int, ...] = ()
    multiplies: Callable[[Case, str], float] | float = 0

    def reason(self, case: Case, device: str, memory_bytes: int) -> str:
        """Why it cannot run the case, or an empty text."""
        if self.missing:
            return self.missing
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if device not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        if case.dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)} only"
        if self.sizes and case.n not in self.sizes:
            return f"is for n = {', '.join(map(str, self.sizes))} only"
        needed = self.dense_copies * case.n**2 * 4
        if needed > 0.8 * memory_bytes:
            return f"needs about {needed / 2**30:.0f} GiB of {memory_bytes / 2**30:.0f}"
        return ""

    def products(self, case: Case, device: str) -> float:
        return self.multiplies if isinstance(self.multiplies, (int, float)) else self.multiplies(case, device)


def open_clip_formula(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """open_clip 3.3.0, ClipLoss.forward in one process: two products; the softmax in float32, as under autocast."""
    logits_per_image = s.to(x.dtype) * x @ y.T
    logits_per_text = s.to(x.dtype) * y @ x.T
    labels = torch.arange(len(x), device=x.device)
    return (cross_entropy(logits_per_image.float(), labels) + cross_entropy(logits_per_text.float(), labels)) / 2


def transformers_formula(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """transformers' clip_loss: one product, its transpose for the other direction."""
    similarity = (s.to(x.dtype) * (y @ x.T)).float()
    labels = torch.arange(len(x), device=x.device)
    return (cross_entropy(similarity, labels) + cross_entropy(similarity.T, labels)) / 2


@functools.cache
def compiled(formula: Loss) -> Loss:
    return torch.compile(formula, dynamic=True)


def torch_linear_cross_entropy() -> Loss:
    linear_cross_entropy = torch.nn.functional.linear_cross_entropy
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        labels = torch.arange(len(x), device=x.device)
        s = s.to(x.dtype)
        one, other = (linear_cross_entropy(a * s, b, labels, options=options) for a, b in ((x, y), (y, x)))
        return (one + other) / 2

    return loss


def memeff() -> Loss:
    module = import_module("memeff")

    def loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        make = module.MemoryEfficientCLIPLoss
        result: Tensor = make(temperature=1 / s.item(), normalized_inputs=True, stable=False)(x, y)
        return result

    return loss


def inf_cl() -> Loss:
    flash_loss = import_module("inf_cl").cal_flash_loss

    def loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        head_dim = math.gcd(x.shape[1], 256)
        one, other = (flash_loss(a, b, scale=s, head_dim=head_dim) for a, b in ((x, y), (y, x)))
        result: Tensor = (one + other).mean() / 2
        return result

    return loss


def cut_cross_entropy() -> Loss:
    linear_cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy

    def loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        labels = torch.arange(len(x), device=x.device)
        s = s.to(x.dtype)
        one, other = (linear_cross_entropy(a * s, b, labels, filter_eps=None) for a, b in ((x, y), (y, x)))
        result: Tensor = (one + other) / 2
        return result

    return loss


def liger() -> Loss:
    fused = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    def loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        labels = torch.arange(len(x), device=x.device)
        s = s.to(x.dtype)
        one, other = (fused(a * s, b, labels, accum_dtype=torch.float32) for a, b in ((x, y), (y, x)))
        result: Tensor = (one + other) / 2
        return result

    return loss


def chunked_gemm() -> Loss:
    loss: Loss = import_module("benchmarks.chunked_gemm").loss
    return loss


def clipfast_loss(backend: str, keep_bytes: int | None = None) -> Loss:
    return lambda x, y, s: clipfast.contrastive_loss(x, y, s, keep_bytes=keep_bytes, backend=backend)


def clipfast_products(backend: str, case: Case, device: str, keep_bytes: int | None = None) -> float:
    explanation = clipfast.explain(case.n, case.d, case.torch_dtype, device, keep_bytes=keep_bytes, backend=backend)
    return explanation.forward_products + explanation.backward_products


def candidates(device: str) -> tuple[Candidate, ...]:
    """Clipfast's backends that can run on the device, then the others."""
    ours = tuple(
        Candidate(
            f"clipfast {name}",
            functools.partial(clipfast_loss, name),
            multiplies=functools.partial(clipfast_products, name),
        )
        for name, reasons in dispatch.backends(device).items()
        if not reasons
    )
    return ours + kept_or_not(device) + OTHERS


def kept_or_not(device: str) -> tuple[Candidate, ...]:
    """The Triton kernels with the logits kept between the passes and without, where arithmetic alone has decided."""
    return tuple(
        Candidate(
            f"clipfast triton, logits {what}",
            functools.partial(clipfast_loss, "triton", keep_bytes),
            devices=("cuda",),
            sizes=KEPT_SIZES,
            multiplies=functools.partial(clipfast_products, "triton", keep_bytes=keep_bytes),
        )
        for what, keep_bytes in (("kept", 1 << 40), ("formed again", 0))
        if device == "cuda" and not dispatch.backends(device)["triton"]
    )


OTHERS = (
    Candidate("open_clip formula", lambda: open_clip_formula, dense_copies=4.5, multiplies=6),
    Candidate("transformers formula", lambda: transformers_formula, dense_copies=5, multiplies=3),
    Candidate("open_clip formula, torch.compile", lambda: compiled(open_clip_formula), dense_copies=4.5, multiplies=6),
    Candidate(
        "transformers formula, torch.compile", lambda: compiled(transformers_formula), dense_copies=5, multiplies=3
    ),
    Candidate(
        "torch linear_cross_entropy, twice",
        torch_linear_cross_entropy,
        missing="" if hasattr(torch.nn.functional, "linear_cross_entropy") else "needs torch 2.13",
        multiplies=6,
    ),
    Candidate("row chunks: GEMM + one Triton pass", chunked_gemm, "triton", devices=("cuda",)),
    Candidate("memeff", memeff, "memeff", devices=("cuda",), scale_gradient=False),
    Candidate("inf-cl, both directions", inf_cl, "inf_cl", devices=("cuda",)),
    Candidate(
        "cut-cross-entropy, twice",
        cut_cross_entropy,
        "cut_cross_entropy",
        devices=("cuda",),
        dtypes=("bfloat16", "float16"),
    ),
    Candidate("liger, twice", liger, "liger_kernel", devices=("cuda",)),
)
