"""transformers' CLIPModel with its loss computed by clipfast: `patch()` before training, nothing else changes.

`patch` replaces one method, `CLIPModel.forward`, for every model, made before or after. Called with return_loss=True,
as in training, it computes the loss without the n*n logits: `logits_per_image` and `logits_per_text` of the output are
None, unless return_logits=True asks for them. Without return_loss it is transformers' own forward, whose logits are
what is asked for then.

With Trainer (examples/transformers_trainer.py is a whole program), whose data collator sets return_loss:

    from clipfast.integrations import transformers as clipfast_transformers

    clipfast_transformers.patch()
    Trainer(model=CLIPModel(config), data_collator=collate, ...).train()    # collate(rows)["return_loss"] is True

As in transformers, each of several processes computes the loss of its own batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clipfast.modules import ContrastiveLoss

try:
    from transformers.models.clip.modeling_clip import CLIPModel, CLIPOutput
    from transformers.utils.generic import can_return_tuple
except ImportError as error:
    raise ImportError(
        f'{error}: transformers 5 or later is needed: pip install "clipfast[transformers]"', name=error.name
    ) from error

TRANSFORMERS_FORWARD = CLIPModel.forward


def patch(**options: Any) -> None:
    """Let transformers' CLIPModel compute its loss with clipfast from now on.

    A second call changes the options and nothing else.

    Args:
        options: keyword options of `clipfast.ContrastiveLoss`, as backend or label_smoothing.

    Raises:
        TypeError: an option is unknown.
        NotImplementedError: an option is not available yet, as world_size > 1.
    """
    CLIPModel.forward = _forward(ContrastiveLoss(**options))


def unpatch() -> None:
    """Give CLIPModel its own forward back; without a patch, do nothing."""
    CLIPModel.forward = TRANSFORMERS_FORWARD


@contextmanager
def patched(**options: Any) -> Iterator[None]:
    """`patch(**options)` inside a with statement; at its end CLIPModel is as it was before, patched or not."""
    before = CLIPModel.forward
    patch(**options)
    try:
        yield
    finally:
        CLIPModel.forward = before


def _forward(contrastive_loss: ContrastiveLoss) -> Callable[..., Any]:
    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward_with_loss(
        self: Any, texts: dict[str, Any], images: dict[str, Any], return_logits: bool, **options: Any
    ) -> CLIPOutput:
        # The output's fields do not depend on the form in which a caller wants it.
        image_output = self.get_image_features(**images, return_dict=True, **options)
        text_output = self.get_text_features(**texts, return_dict=True, **options)
        image_embeds, text_embeds = (_normalized(output.pooler_output) for output in (image_output, text_output))
        if len(text_embeds) != len(image_embeds):
            raise ValueError(
                f"input_ids: got {len(text_embeds)} texts for {len(image_embeds)} images; the loss takes pairs"
            )
        scale, columns = self.logit_scale.exp(), image_embeds.to(text_embeds.device)
        logits = torch.matmul(text_embeds, columns.t()) * scale.to(text_embeds.device) if return_logits else None
        return CLIPOutput(
            loss=contrastive_loss(text_embeds, columns, scale),
            logits_per_image=None if logits is None else logits.t(),
            logits_per_text=logits,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_output,
            vision_model_output=image_output,
        )

    # Trainer reads the names of the arguments to know which columns of a data set the model takes.
    def forward(
        self: Any,
        input_ids: Tensor | None = None,  # [n, s]
        pixel_values: Tensor | None = None,  # [n, channels, h, w]
        attention_mask: Tensor | None = None,  # [n, s]
        position_ids: Tensor | None = None,  # [n, s]
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_logits: bool = False,
        **options: Any,
    ) -> CLIPOutput | tuple[Any, ...]:
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        images = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        if not return_loss:
            return TRANSFORMERS_FORWARD(self, **texts, **images, **options)
        return forward_with_loss(self, texts, images, return_logits, **options)

    return forward


def _normalized(features: Tensor) -> Tensor:  # [n, d] -> [n, d]
    """Rows of length 1, by the operations of transformers' CLIPModel, whose output they are part of."""
    return features / features.pow(2).sum(dim=-1, keepdim=True).pow(0.5)
