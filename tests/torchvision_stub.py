"""torchvision on a torch it was not built for, as on the CPU build of torch, for which the package index has none."""

from __future__ import annotations

import importlib.util

import torch

# Operators that torchvision/_meta_registrations.py describes to torch, whether its compiled library was loaded or not.
OPERATORS = ("nms", "qnms")

LIBRARY: list[torch.library.Library] = []  # a definition lives as long as its library


def make_importable() -> None:
    """Let `import torchvision` succeed where only the operators of its compiled library are missing.

    Libraries that clipfast plugs into import torchvision for picture transforms wherever it is installed; their models
    and losses use none of those operators.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        LIBRARY.append(torch.library.Library("torchvision", "DEF"))
        for name in OPERATORS:
            LIBRARY[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
