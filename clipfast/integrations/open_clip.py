"""open_clip's contrastive loss computed by clipfast: `patch()` before training, nothing else changes.

`patch` replaces one method, `open_clip.loss.ClipLoss.forward`, and leaves the class where it is. So it reaches every
name under which the class was imported, `open_clip.create_loss`, the tasks of open_clip 4, losses that exist already,
and CoCaLoss, which inherits the method. SigLipLoss and DistillClipLoss have a forward of their own and stay as they
are; `get_logits` stays too, and whoever calls it still gets n*n logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from clipfast.modules import ContrastiveLoss

try:
    from open_clip.loss import ClipLoss
except ImportError as error:
    raise ImportError(
        f'{error}: open_clip 3.3.0 or later is needed: pip install "clipfast[open-clip]"', name=error.name
    ) from error

OPEN_CLIP_FORWARD = ClipLoss.forward

# What a ClipLoss was constructed with and ContrastiveLoss takes under the same names; open_clip 4 has no use_horovod.
CONSTRUCTOR = ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod")


def patch(**options: Any) -> None:
    """Let open_clip's ClipLoss, and CoCaLoss with it, compute its loss with clipfast from now on.

    A second call changes the options and nothing else. A subclass with its own `get_logits` or `get_ground_truth` means
    another loss and keeps open_clip's forward.

    With world_size > 1 a patched loss is that of all ranks, with the gradients of one process, whatever the flags
    local_loss and gather_with_grad are. It raises ValueError when it is called with use_horovod, or with an empty
    batch, n = 0, where open_clip's formula gives NaN.

    Args:
        options: keyword options of `clipfast.ContrastiveLoss`, as backend or label_smoothing, for every patched loss.

    Raises:
        TypeError: an option is unknown, or it belongs to the constructor of ClipLoss.
    """
    for name in CONSTRUCTOR:
        if name in options:
            raise TypeError(f"{name}: not an option of patch; every loss keeps what it was constructed with")
    ContrastiveLoss(**options)  # refuses unknown names now, not in the first training step
    ClipLoss.forward = _forward(options)


def unpatch() -> None:
    """Give ClipLoss its own forward back; without a patch, do nothing."""
    ClipLoss.forward = OPEN_CLIP_FORWARD


@contextmanager
def patched(**options: Any) -> Iterator[None]:
    """`patch(**options)` inside a with statement; at its end ClipLoss is as it was before, patched or not."""
    before = ClipLoss.forward
    patch(**options)
    try:
        yield
    finally:
        ClipLoss.forward = before


def _forward(options: dict[str, Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        image_features: Tensor,  # [n, d]
        text_features: Tensor,  # [m, d]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        arguments = image_features, text_features, logit_scale, logit_bias, output_dict
        if _has_logits_of_its_own(type(self)):
            return OPEN_CLIP_FORWARD(self, *arguments)  # type: ignore[no-any-return]
        loss = ContrastiveLoss(**{name: getattr(self, name) for name in CONSTRUCTOR if hasattr(self, name)}, **options)
        return loss.forward(*arguments)

    return forward


def _has_logits_of_its_own(loss: type) -> bool:
    return any(getattr(loss, name) is not getattr(ClipLoss, name) for name in ("get_logits", "get_ground_truth"))
