"""open_clip's losses computed by clipfast: `patch()` before training, nothing else changes.

`patch` replaces the forward of `ClipLoss`, `SigLipLoss` and `DistillClipLoss` in `open_clip.loss`, and leaves the
classes where they are. So it reaches every name under which they were imported, `open_clip.create_loss`, the tasks of
open_clip 4, losses that exist already, and CoCaLoss, which inherits the method. `get_logits` stays, and whoever calls
it still gets n*n logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from clipfast.functional import distillation_loss, siglip_loss
from clipfast.modules import ContrastiveLoss, Loss, SigLipLoss as SigmoidLoss

try:
    from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
except ImportError as error:
    raise ImportError(
        f'{error}: open_clip 3.3.0 or later is needed: pip install "clipfast[open-clip]"', name=error.name
    ) from error

OPEN_CLIP_FORWARDS = {loss: loss.forward for loss in (ClipLoss, SigLipLoss, DistillClipLoss)}

# What a loss was constructed with and clipfast's takes under the same names; open_clip 4 has no use_horovod.
CONSTRUCTOR = ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod")
SIGLIP_CONSTRUCTOR = ("cache_labels", "rank", "world_size", "dist_impl")

# The methods that make a loss what it is; a subclass that replaces one means another loss.
FORMULAS = {
    ClipLoss: ("get_logits", "get_ground_truth"),
    SigLipLoss: ("get_logits", "get_ground_truth", "_loss"),
    DistillClipLoss: ("get_logits", "get_ground_truth", "dist_loss"),
}


def patch(**options: Any) -> None:
    """Let open_clip's ClipLoss, CoCaLoss with it, SigLipLoss and DistillClipLoss compute with clipfast from now on.

    A second call changes the options and nothing else. A subclass with its own `get_logits`, `get_ground_truth`,
    `_loss` or `dist_loss` means another loss and keeps open_clip's forward.

    With world_size > 1 a patched loss is that of all ranks, with the gradients of one process, whatever the flags
    local_loss, gather_with_grad and dist_impl are. use_horovod raises ValueError.
    An empty batch, n = 0, raises ValueError, where open_clip's formula gives NaN. The teacher of DistillClipLoss gets
    no gradient.

    Args:
        options: keyword options of `clipfast.ContrastiveLoss`, as backend or label_smoothing, for every patched loss.
            SigLipLoss takes those that `clipfast.siglip_loss` has too, and the distill_loss of DistillClipLoss those of
            `clipfast.distillation_loss`; the others mean nothing to them.

    Raises:
        TypeError: an option is unknown, or it belongs to the constructor of a loss.
    """
    for name in {**dict.fromkeys(CONSTRUCTOR), **dict.fromkeys(SIGLIP_CONSTRUCTOR)}:
        if name in options:
            raise TypeError(f"{name}: not an option of patch; every loss keeps what it was constructed with")
    ContrastiveLoss(**options)  # refuses unknown names now, not in the first training step
    ClipLoss.forward = _clip_forward(options)
    SigLipLoss.forward = _siglip_forward(_shared(siglip_loss, options))
    DistillClipLoss.forward = _distill_forward(options, _shared(distillation_loss, options))


def unpatch() -> None:
    """Give the classes their own forward back; without a patch, do nothing."""
    for loss, forward in OPEN_CLIP_FORWARDS.items():
        loss.forward = forward


@contextmanager
def patched(**options: Any) -> Iterator[None]:
    """`patch(**options)` inside a with statement; at its end the classes are as they were before, patched or not."""
    before = {loss: loss.forward for loss in OPEN_CLIP_FORWARDS}
    patch(**options)
    try:
        yield
    finally:
        for loss, forward in before.items():
            loss.forward = forward


def _clip_forward(options: dict[str, Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        image_features: Tensor,  # [n, d]
        text_features: Tensor,  # [m, d]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        arguments = image_features, text_features, logit_scale, logit_bias, output_dict
        if _has_a_formula_of_its_own(self, ClipLoss):
            return OPEN_CLIP_FORWARDS[ClipLoss](self, *arguments)  # type: ignore[no-any-return]
        return _like(self, ContrastiveLoss, CONSTRUCTOR, options).forward(*arguments)  # type: ignore[no-any-return]

    return forward


def _siglip_forward(options: dict[str, Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        image_features: Tensor,  # [n, d]
        text_features: Tensor,  # [m, d]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        arguments = image_features, text_features, logit_scale, logit_bias, output_dict
        if _has_a_formula_of_its_own(self, SigLipLoss):
            return OPEN_CLIP_FORWARDS[SigLipLoss](self, *arguments)  # type: ignore[no-any-return]
        return _like(self, SigmoidLoss, SIGLIP_CONSTRUCTOR, options).forward(*arguments)  # type: ignore[no-any-return]

    return forward


def _distill_forward(options: dict[str, Any], distill_options: dict[str, Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        image_features: Tensor,  # [n, d]
        text_features: Tensor,  # [n, d]
        logit_scale: Tensor | float,
        dist_image_features: Tensor,  # [n, d']
        dist_text_features: Tensor,  # [n, d']
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        student = image_features, text_features, logit_scale
        teacher = dist_image_features, dist_text_features, dist_logit_scale
        if _has_a_formula_of_its_own(self, DistillClipLoss):
            return OPEN_CLIP_FORWARDS[DistillClipLoss](self, *student, *teacher, output_dict)  # type: ignore[no-any-return]
        like = _like(self, ContrastiveLoss, CONSTRUCTOR, options)
        contrastive = like.forward(*student)
        distill = distillation_loss(*student, *teacher, **distill_options | like.group_of_call(image_features))
        return {"contrastive_loss": contrastive, "distill_loss": distill} if output_dict else (contrastive, distill)

    return forward


def _like(loss: Any, ours: type[Loss], constructor: tuple[str, ...], options: dict[str, Any]) -> Any:
    """clipfast's loss, constructed as open_clip's was."""
    return ours(**{name: getattr(loss, name) for name in constructor if hasattr(loss, name)}, **options)


def _shared(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    accepted = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in accepted}


def _has_a_formula_of_its_own(loss: Any, base: type[Any]) -> bool:
    return any(getattr(type(loss), name) is not getattr(base, name) for name in FORMULAS[base])
