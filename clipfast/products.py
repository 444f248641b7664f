"""Matrix products: how those of float32 are taken, and where those of halves return their sums in float32."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from clipfast.problem import HALF_DTYPES


def float32_precision(device_type: str) -> str:
    """How float32 is multiplied: "highest", "high" or "medium", as torch.set_float32_matmul_precision has them.

    That sets fp32_precision of the backends, which may also have been set by itself: "tf32" is "high", "bf16" "medium".
    """
    if device_type != "cpu":
        try:  # of "medium", CUDA's backend knows "tf32" only
            return torch.get_float32_matmul_precision()
        except RuntimeError:  # PyTorch has no one answer where the backends' own were set
            pass
    backend = _CPU if device_type == "cpu" else torch.backends.cuda.matmul
    return _PRECISIONS.get(backend.fp32_precision, "highest")


_CPU = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_PRECISIONS = {"tf32": "high", "bf16": "medium"}


def returns_sums(device: torch.device) -> bool:
    """Whether the device's product of halves can return float32."""
    return _returns_sums(device.type)


@functools.cache
def _returns_sums(device_type: str) -> bool:
    key = torch._C._dispatch_key_for_device(device_type)
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", key))


def summed(a: Tensor, b: Tensor) -> Tensor:
    """A @ b in the dtype of its sums; in the operands' where the device's product of halves returns no other."""
    if a.dtype in HALF_DTYPES and returns_sums(a.device):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)
