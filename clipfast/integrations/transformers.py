"""The losses of transformers' CLIPModel and SiglipModel by clipfast: `patch()` before training, nothing else changes.

`patch` replaces the forward of the classes in `MODELS`, for every model, made before or after:

    reached        CLIPModel, ChineseCLIPModel, CLIPSegModel and MetaClip2Model, with CLIP's loss, SiglipModel, with
                   SigLIP's, and subclasses that keep their forward
    not reached    AltCLIP, BLIP, GroupViT, OWL-ViT, OWLv2, TIPSv2, VisionTextDualEncoder and X-CLIP, which have CLIP's
                   loss in a forward of another form; Siglip2Model; ALIGN and FLAVA, which have another loss

What is not reached stays as transformers has it; `patch(model)` raises for a model that it does not reach.

Called with return_loss=True, as in training, a patched forward computes the loss without the n*n logits. The output has
the fields of transformers' and, as a tuple too, in their places. In `logits_per_image` and `logits_per_text` stand:

    return_logits=True     the logits, with their graph, as transformers builds them
    return_logits=False    an empty tensor, [n, 0]
    neither                in training mode an empty tensor, [n, 0]; in evaluation mode (Trainer.evaluate and predict),
                           and where return_dict=False asks for a tuple, the logits without a graph: n*n memory

Without return_loss it is transformers' own forward, whose logits are what is asked for then. The loss is float32 also
under autocast and for a model in bfloat16 or float16, where transformers' has the model's dtype; in float64, float64.

With Trainer (examples/transformers_trainer.py is a whole program), whose data collator sets return_loss:

    from clipfast.integrations import transformers as clipfast_transformers

    clipfast_transformers.patch()
    Trainer(model=CLIPModel(config), data_collator=collate, ...).train()    # collate(rows)["return_loss"] is True

As in transformers, each of several processes computes the loss of its own batch, or with
patch(group=torch.distributed.group.WORLD) that of all processes' pairs. The logits are those of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.functional import siglip_loss
from clipfast.modules import ContrastiveLoss, SigLipLoss

try:
    from transformers.utils.generic import can_return_tuple

    # Classes whose forward takes get_image_features and get_text_features, normalizes both, multiplies them by
    # exp(logit_scale) and, with SigLIP's loss, adds logit_bias; and the loss that stands for theirs.
    MODELS: dict[type[Any], type[ContrastiveLoss | SigLipLoss]] = {
        getattr(import_module(f"transformers.models.{folder}.modeling_{folder}"), name): loss
        for folder, name, loss in (
            ("clip", "CLIPModel", ContrastiveLoss),
            ("chinese_clip", "ChineseCLIPModel", ContrastiveLoss),
            ("clipseg", "CLIPSegModel", ContrastiveLoss),
            ("metaclip_2", "MetaClip2Model", ContrastiveLoss),
            ("siglip", "SiglipModel", SigLipLoss),
        )
    }
except ImportError as error:
    raise ImportError(
        f'{error}: transformers 5 or later is needed: pip install "clipfast[transformers]"', name=error.name
    ) from error

TRANSFORMERS_FORWARDS = {model: model.forward for model in MODELS}
SIGLIP_OPTIONS = {name for takes in (SigLipLoss, siglip_loss) for name in inspect.signature(takes).parameters}


def patch(model: nn.Module | None = None, **options: Any) -> None:
    """Let the classes in `MODELS` compute their loss with clipfast from now on.

    A second call changes the options and nothing else.

    Args:
        model: one that the patch must reach, without a wrapper.
        options: keyword options of `clipfast.ContrastiveLoss`, as backend or label_smoothing. SiglipModel takes those
            that `clipfast.SigLipLoss` has too; the others mean nothing to it.

    Raises:
        TypeError: the patch does not reach the model, or an option is unknown.
        ValueError: an option's value is refused.
    """
    if model is not None and type(model).forward not in {*TRANSFORMERS_FORWARDS.values(), *(m.forward for m in MODELS)}:
        reached = ", ".join(one.__name__ for one in MODELS)
        raise TypeError(f"model: the patch does not reach {type(model).__name__}; it reaches the forward of {reached}")
    of_class: dict[type[Any], Any] = {
        ContrastiveLoss: ContrastiveLoss(**options),
        SigLipLoss: SigLipLoss(**{name: value for name, value in options.items() if name in SIGLIP_OPTIONS}),
    }
    for one, loss in MODELS.items():
        one.forward = _forward(one, of_class[loss])


def unpatch() -> None:
    """Give the classes their own forward back; without a patch, do nothing."""
    for one, forward in TRANSFORMERS_FORWARDS.items():
        one.forward = forward


@contextmanager
def patched(model: nn.Module | None = None, **options: Any) -> Iterator[None]:
    """`patch(model, **options)` inside a with statement; at its end the classes are as before, patched or not."""
    before = {one: one.forward for one in MODELS}
    patch(model, **options)
    try:
        yield
    finally:
        for one, forward in before.items():
            one.forward = forward


def _forward(model: type[Any], loss: ContrastiveLoss | SigLipLoss) -> Callable[..., Any]:
    """The forward of a class in `MODELS`, of its signature and return_logits, with `loss` in place of its own."""
    own = TRANSFORMERS_FORWARDS[model]
    has_bias = isinstance(loss, SigLipLoss)
    normalized = _normalized_as_siglip if has_bias else _normalized_as_clip
    output_class = getattr(import_module(model.__module__), model.__name__.removesuffix("Model") + "Output")
    signature = inspect.signature(own)
    this, *parameters, other_options = signature.parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters}
    methods = ("get_image_features", "get_text_features")
    taken = {method: defaults.keys() & inspect.signature(getattr(model, method)).parameters for method in methods}
    shared = defaults.keys() - set().union(*taken.values())

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward_with_loss(self: Any, inputs: dict[str, Any], return_logits: bool | None, **options: Any) -> Any:
        # The output's fields do not depend on the form in which a caller wants it.
        image_output, text_output = (
            getattr(self, method)(**{name: inputs[name] for name in taken[method]}, return_dict=True, **options)
            for method in methods
        )
        image_embeds, text_embeds = (normalized(output.pooler_output) for output in (image_output, text_output))
        if len(text_embeds) != len(image_embeds):
            raise ValueError(
                f"input_ids: got {len(text_embeds)} texts for {len(image_embeds)} images; the loss takes pairs"
            )
        scale, columns = self.logit_scale.exp(), image_embeds.to(text_embeds.device)
        bias = self.logit_bias if has_bias else None
        if return_logits:
            logits = torch.matmul(text_embeds, columns.t()) * scale.to(text_embeds.device)
            logits = logits if bias is None else logits + bias.to(text_embeds.device)
        elif return_logits is None:
            with torch.no_grad():
                logits = torch.matmul(text_embeds, columns.t()).mul_(scale.to(text_embeds.device))
                logits = logits if bias is None else logits.add_(bias.to(text_embeds.device))
        else:
            logits = text_embeds.new_empty(len(text_embeds), 0)
        return output_class(
            loss=loss(text_embeds, columns, scale, bias),
            logits_per_image=logits if return_logits is False else logits.t(),
            logits_per_text=logits,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_output,
            vision_model_output=image_output,
        )

    @functools.wraps(own)
    def forward(self: Any, *arguments: Any, return_logits: bool | None = None, **options: Any) -> Any:
        given = dict(zip(defaults, arguments, strict=False))
        if len(given) < len(arguments) or given.keys() & options.keys():
            return own(self, *arguments, **options)  # raises Python's TypeError
        inputs = {**defaults, **given, **{name: options.pop(name) for name in defaults if name in options}}
        if not inputs["return_loss"]:
            return own(self, **inputs, **options)
        options |= {name: inputs[name] for name in shared - {"return_loss"}}
        wants_tuple = options.get("return_dict", self.config.return_dict) is False
        if return_logits is None and self.training and not wants_tuple:
            return_logits = False
        return forward_with_loss(self, inputs, return_logits, **options)

    # Trainer reads the names of the arguments to know which columns of a data set the model takes.
    wish = inspect.Parameter("return_logits", inspect.Parameter.KEYWORD_ONLY, default=None)
    vars(forward)["__signature__"] = signature.replace(parameters=[this, *parameters, wish, other_options])
    return forward


def _normalized_as_clip(features: Tensor) -> Tensor:  # [n, d] -> [n, d]
    """Rows of length 1, by the operations of transformers' CLIPModel, whose output they are part of."""
    return features / features.pow(2).sum(dim=-1, keepdim=True).pow(0.5)


def _normalized_as_siglip(features: Tensor) -> Tensor:  # [n, d] -> [n, d]
    """The same by those of SiglipModel."""
    length: Tensor = features.norm(p=2, dim=-1, keepdim=True)
    return features / length
