"""Matrix products of halves that are summed, and returned, in float32: which devices have one."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from clipfast.problem import HALF_DTYPES


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
