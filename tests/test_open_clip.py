"""The patch of open_clip's losses, against the real package, its models and its training loop (traps 11, 18)."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import assert_three_way, error, evaluate, features
from torch import Tensor, nn

import clipfast
from clipfast import reference

open_clip = pytest.importorskip("open_clip", reason="open_clip is missing; the extra `open-clip` brings it")
integration = importlib.import_module("clipfast.integrations.open_clip")
params, distributed, train = (
    importlib.import_module(f"open_clip_train.{name}") for name in ("params", "distributed", "train")
)

CAPTIONS = ("a cat", "two dogs", "the sea", "a red car", "an old man reading", "trees", "bread and butter", "a sheep")
LOSS_FLAGS: dict[str, list[str]] = {
    "ClipLoss": ["--model", "RN50"],
    "CoCaLoss": ["--model", "coca_ViT-B-32"],
    "SigLipLoss": ["--model", "ViT-B-32", "--siglip"],
    "DistillClipLoss": ["--model", "RN50", "--distill-model", "RN50", "--distill-pretrained", "none"],
}


@pytest.fixture(autouse=True)
def _unpatch() -> Iterator[None]:
    yield
    integration.unpatch()


def arguments(*flags: str) -> Any:
    """What open_clip's training script makes of its command line."""
    args = params.parse_args([*flags, "--device", "cpu", "--precision", "fp32", "--skip-scheduler"])
    distributed.init_distributed_device(args)
    args.distill = args.distill_model is not None
    args.wandb = False
    return args


def dense_loss(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """open_clip's formula, whatever forward is installed."""
    loss: Tensor = integration.OPEN_CLIP_FORWARDS[open_clip.ClipLoss](open_clip.ClipLoss(), x, y, s, b)
    return loss


class Recorder(nn.Module):
    """A loss that keeps the features that it was given."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.seen: tuple[Tensor, ...] = ()

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool
    ) -> dict[str, Tensor]:
        self.seen = image_features.detach(), text_features.detach(), logit_scale.detach()
        losses: dict[str, Tensor] = self.loss(image_features, text_features, logit_scale, output_dict=output_dict)
        return losses


class ExactLoss(nn.Module):
    """The dense formula in float64."""

    def forward(self, x: Tensor, y: Tensor, logit_scale: Tensor, output_dict: bool) -> dict[str, Tensor]:
        return {"contrastive_loss": reference.contrastive_loss(x.double(), y.double(), logit_scale.double())}


class BatchList(list[tuple[Tensor, Tensor]]):
    """A data loader of a single batch, which tells its size as open_clip's do."""

    num_batches = 1
    num_samples = len(CAPTIONS)


@dataclass
class Step:
    seen: tuple[Tensor, ...]  # image features, text features, logit_scale
    gradients: dict[str, Tensor]


def training_step(model_name: str, loss: nn.Module | None = None) -> Step:
    """One epoch of a single batch in open_clip's own training loop, always from the same weights and data."""
    args = arguments("--model", model_name, "--batch-size", str(len(CAPTIONS)))
    torch.manual_seed(0)
    model = open_clip.create_model(model_name, output_dict=True)
    size = open_clip.get_model_config(model_name)["vision_cfg"]["image_size"]
    images, texts = torch.randn(len(CAPTIONS), 3, size, size), open_clip.get_tokenizer(model_name)(CAPTIONS)
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=BatchList([(images, texts)]))}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(open_clip.create_loss(args) if loss is None else loss)
    before = model.text_projection.detach().clone()
    train.train_one_epoch(model, data, recorder, 0, optimizer, None, None, None, args)
    assert torch.equal(model.text_projection.detach(), before.add(model.text_projection.grad, alpha=-0.1))
    return Step(recorder.seen, {name: parameter.grad for name, parameter in model.named_parameters()})


@pytest.mark.parametrize("model_name", ["RN50", "ViT-B-32"])
def test_training_step(model_name: str) -> None:
    """A step with the patch is as near to the step with a float64 loss as open_clip's own.

    err(patched) <= 2 err(open_clip) + rounding for the gradient of every parameter, in the 2-norm. The SGD update is a
    constant times it. All three steps see bitwise the same features, so the errors are the loss's, carried through the
    same encoders. The rounding is the oracle's: what eps |L| in every logit does to the gradient of the features, and
    so to whatever is linear in it.
    """
    exact = training_step(model_name, ExactLoss())
    dense = training_step(model_name)
    dense_errors = {name: distance(dense.gradients[name], gradient) for name, gradient in exact.gradients.items()}
    dense.gradients.clear()
    integration.patch()
    patched = training_step(model_name)

    for got, expected in zip(patched.seen, exact.seen, strict=True):
        assert torch.equal(got, expected)
    x, y, scale = patched.seen
    rounding = torch.finfo(torch.float32).eps * (scale.item() + 2 + math.sqrt(len(x)))
    for name, gradient in exact.gradients.items():
        term = 2 * scale.item() if name == "logit_scale" else gradient.double().norm().item()
        bound = 2 * dense_errors[name] + rounding * term
        got_error = distance(patched.gradients[name], gradient)
        assert got_error <= bound, f"{name}: {got_error:.3g} > {bound:.3g}"
    for name in clipfast.backends():
        if not clipfast.backends()[name]:
            assert_three_way(x, y, scale.item(), backend=name, formula=dense_loss)


def distance(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact.double()).norm().item()


def test_a_loss_without_horovod() -> None:
    """open_clip 4 has dropped the option, and the attribute with it."""
    loss, inputs = open_clip.ClipLoss(), (*features("trained", 9, 9, 6), 14.3)
    expected = loss(*inputs)
    del loss.use_horovod
    integration.patch()
    assert error(loss(*inputs), expected) <= 1e-6


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("kind", ["random", "trained", "unnormalized"])
def test_patched_loss_is_clipfasts(kind: str, scale: float, backend: str) -> None:
    """Bitwise, with all gradients; tests/test_accuracy.py judges those, here against open_clip's own formula."""
    x, y = features(kind, 33, 33, 20)
    assert_three_way(x, y, scale, -3.0, backend=backend, formula=dense_loss)
    expected = evaluate(lambda *inputs: clipfast.contrastive_loss(*inputs, backend=backend), x, y, scale, -3.0)
    loss = open_clip.ClipLoss()
    integration.patch(backend=backend)
    got = evaluate(loss, x, y, scale, -3.0)
    for name, value in vars(expected).items():
        assert torch.equal(getattr(got, name), value), name


def test_every_name_of_the_class_is_patched() -> None:
    integration.patch()
    for module in (open_clip, open_clip.loss, open_clip.factory):
        assert module.ClipLoss.forward is not integration.OPEN_CLIP_FORWARDS[open_clip.ClipLoss]


@pytest.mark.parametrize("class_name", LOSS_FLAGS)
def test_create_loss(class_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loss computes what it did, in the same form, without logits."""
    loss = open_clip.create_loss(arguments(*LOSS_FLAGS[class_name]))
    assert type(loss) is getattr(open_clip.loss, class_name)
    x, y = features("trained", 9, 9, 12)
    inputs = {"image_features": x, "text_features": y, "logit_scale": torch.tensor(14.3)}
    if class_name == "CoCaLoss":
        inputs |= {"logits": torch.randn(9, 7, 50), "labels": torch.randint(50, (9, 7))}
    elif class_name == "SigLipLoss":
        inputs |= {"logit_bias": torch.tensor(-10.0)}
    elif class_name == "DistillClipLoss":
        inputs |= {"dist_image_features": y, "dist_text_features": x, "dist_logit_scale": torch.tensor(20.0)}
    before, before_values = loss(**inputs, output_dict=True), loss(**inputs)
    integration.patch()
    after, after_values = loss(**inputs, output_dict=True), loss(**inputs)

    assert list(after) == list(before)
    assert type(after_values) is type(before_values)
    # SigLIP's loss is a sum over columns, and distillation's is above 1.
    for name, value in before.items():
        relative = class_name in ("SigLipLoss", "DistillClipLoss")
        bound = 1e-6 * max(1.0, value.item()) if relative else 1e-6
        assert error(after[name], value) <= (0 if name == "caption_loss" else bound)
    monkeypatch.setattr(loss, "get_logits", None)
    loss(**inputs)


def test_coca_gradients() -> None:
    """The weights of both losses act as before; without a weight there is no contrastive loss at all."""
    x, y = features("trained", 9, 9, 12)
    captions = torch.randn(9, 7, 50), torch.randint(50, (9, 7))

    def total(loss: nn.Module) -> Any:
        return lambda x, y, s, b: sum(loss(x, y, *captions, s, output_dict=True).values()) + 0 * b

    for weight in (0.5, 1.0):
        loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=weight)
        dense = evaluate(total(loss), x, y, 14.3)
        with integration.patched():
            got = evaluate(total(loss), x, y, 14.3)
        for name, value in vars(dense).items():
            assert error(getattr(got, name), value) <= 1e-5 * max(1.0, value.abs().max().item()), name
    integration.patch()
    assert open_clip.CoCaLoss(2.0, clip_loss_weight=0.0)(x, y, *captions, 14.3)[0] == 0


def test_patch_and_unpatch_are_idempotent() -> None:
    original = open_clip.ClipLoss.forward
    integration.unpatch()
    assert open_clip.ClipLoss.forward is original
    for _ in range(2):
        integration.patch()
        assert open_clip.ClipLoss.forward is not original
    for _ in range(2):
        integration.unpatch()
        assert open_clip.ClipLoss.forward is original


def test_patched_restores_what_was_there() -> None:
    x, y = features("random", 8, 8, 4)
    loss = open_clip.ClipLoss()
    original = loss(x, y, 5.0)
    with integration.patched(label_smoothing=0.1):
        smoothed = loss(x, y, 5.0)
        with integration.patched(label_smoothing=0.3):
            assert not torch.equal(loss(x, y, 5.0), smoothed)
        assert torch.equal(loss(x, y, 5.0), smoothed)
        with pytest.raises(ZeroDivisionError), integration.patched(label_smoothing=0.3):
            raise ZeroDivisionError
        assert torch.equal(loss(x, y, 5.0), smoothed)
    assert open_clip.ClipLoss.forward is integration.OPEN_CLIP_FORWARDS[open_clip.ClipLoss]
    assert torch.equal(loss(x, y, 5.0), original)


def test_get_logits_still_builds_logits() -> None:
    x, y = features("random", 8, 8, 4)
    expected = open_clip.ClipLoss().get_logits(x, y, 5.0, 1.0)
    integration.patch()
    for logits, before in zip(open_clip.ClipLoss().get_logits(x, y, 5.0, 1.0), expected, strict=True):
        assert torch.equal(logits, before)


def test_a_subclass_with_other_logits_keeps_them() -> None:
    class Angles(open_clip.ClipLoss):  # type: ignore[misc]
        def get_logits(self, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
            return tuple(logits.clamp(-1, 1).acos() for logits in super().get_logits(*arguments, **options))

    x, y = features("trained", 8, 8, 4)
    expected = Angles()(x, y, 1.0)
    integration.patch()
    assert torch.equal(Angles()(x, y, 1.0), expected)


def test_float16_and_autocast() -> None:
    """Logits stay float32 where open_clip's forward rounds them."""
    x, y = features("trained", 64, 64, 32)
    exact = reference.contrastive_loss(x.double(), y.double(), 100.0)
    integration.patch()
    loss = open_clip.ClipLoss()
    with torch.autocast("cpu", torch.bfloat16):
        assert error(loss(x, y, 100.0), exact) < 1e-5
    half = [t.half() for t in (x, y)]
    exact_half = reference.contrastive_loss(*(t.double() for t in half), 100.0)
    assert error(loss(*half, torch.tensor(100.0).half()), exact_half) < 1e-5


def test_compiles_as_one_graph() -> None:
    x, y = features("trained", 9, 9, 6)
    integration.patch()
    for loss in losses_of_three(x, y).values():
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        eager, got = evaluate(loss, x, y, 14.3), evaluate(compiled, x, y, 14.3)
        for name, value in vars(eager).items():
            assert error(getattr(got, name), value) <= 1e-6, name


def losses_of_three(x: Tensor, y: Tensor) -> dict[str, Callable[..., Tensor]]:
    """ClipLoss, SigLipLoss and both parts of DistillClipLoss, as functions of x, y, logit_scale and logit_bias."""
    teacher = (*features("trained", len(x), len(y), 7, x.dtype), 20.0)
    clip, siglip, distill = open_clip.ClipLoss(), open_clip.loss.SigLipLoss(), open_clip.loss.DistillClipLoss()
    return {
        "ClipLoss": clip,
        "SigLipLoss": siglip,
        "contrastive_loss": lambda x, y, s, b: distill(x, y, s, *teacher)[0] + 0 * b,
        "distill_loss": lambda x, y, s, b: distill(x, y, s, *teacher)[1] + 0 * b,
    }


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss", "contrastive_loss", "distill_loss"])
@pytest.mark.parametrize("n", [1, 2, 61])
def test_gradients_in_float64(name: str, n: int) -> None:
    """Against the classes as open_clip has them."""
    x, y = features("trained", n, n, 12, torch.float64)
    loss = losses_of_three(x, y)[name]
    expected = evaluate(loss, x, y, 14.3, -3.0, scalar_dtype=torch.float64)
    integration.patch()
    got = evaluate(loss, x, y, 14.3, -3.0, scalar_dtype=torch.float64)
    for value, exact in vars(expected).items():
        assert error(getattr(got, value), exact) <= 1e-12 * max(1.0, exact.abs().max().item()), value


def test_an_option_goes_to_the_losses_that_know_it() -> None:
    """label_smoothing, direction and reduction mean nothing to the sigmoid and the distillation; normalize does."""
    x, y = features("unnormalized", 9, 9, 12)
    teacher = (*features("unnormalized", 9, 9, 7), 20.0)
    siglip, distill = open_clip.loss.SigLipLoss(), open_clip.loss.DistillClipLoss()
    options: dict[str, Any] = {"label_smoothing": 0.1, "direction": "image_to_text", "reduction": "none"}
    integration.patch(normalize=True, backend="torch", **options)
    both = {"normalize": True, "backend": "torch"}
    assert torch.equal(siglip(x, y, 14.3, -3.0), clipfast.siglip_loss(x, y, 14.3, -3.0, **both))
    assert siglip(x, y, 14.3, None, output_dict=True).keys() == {"contrastive_loss"}
    contrastive, distilled = distill(x, y, 14.3, *teacher)
    assert torch.equal(contrastive, clipfast.contrastive_loss(x, y, 14.3, **both, **options))
    assert torch.equal(distilled, clipfast.distillation_loss(x, y, 14.3, *teacher, **both))
    assert torch.equal(open_clip.ClipLoss()(x, y, 14.3), contrastive)


@pytest.mark.parametrize(
    ("class_name", "method"), [("SigLipLoss", "_loss"), ("SigLipLoss", "get_logits"), ("DistillClipLoss", "dist_loss")]
)
def test_a_subclass_with_a_formula_of_its_own_keeps_it(class_name: str, method: str) -> None:
    base = getattr(open_clip.loss, class_name)
    own = getattr(base, method)
    mine = type("Mine", (base,), {method: lambda self, *arguments, **options: 2 * own(self, *arguments, **options)})()
    x, y = features("trained", 8, 8, 4)
    inputs = (x, y, 5.0, -3.0) if class_name == "SigLipLoss" else (x, y, 5.0, y, x, 9.0)
    expected = mine(*inputs)
    integration.patch()
    got = mine(*inputs)
    for value, before in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, expected)), strict=True):
        assert torch.equal(value, before)


def test_all_three_are_patched_and_restored() -> None:
    def forwards() -> list[Any]:
        return [loss.forward for loss in integration.OPEN_CLIP_FORWARDS]

    original = forwards()
    with integration.patched():
        outer = forwards()
        assert not set(outer) & set(original)
        with integration.patched(label_smoothing=0.1):
            assert not set(forwards()) & set(outer)
        assert forwards() == outer
    assert forwards() == original
    integration.patch()
    integration.unpatch()
    assert forwards() == original


@pytest.mark.parametrize("option", [{"world_size": 2}, {"use_horovod": True}])
def test_what_clipfast_does_not_take_is_named(option: dict[str, Any]) -> None:
    x, y = features("random", 8, 8, 4)
    (name,) = option
    integration.patch()
    with pytest.raises(ValueError, match=name):
        open_clip.ClipLoss(**option)(x, y, 5.0)
    with pytest.raises(ValueError, match=name):
        open_clip.CoCaLoss(1.0, 1.0, **option)(x, y, torch.randn(8, 3, 5), torch.ones(8, 3, dtype=torch.long), 5.0)
    with pytest.raises(ValueError, match=name):
        open_clip.loss.DistillClipLoss(**option)(x, y, 5.0, x, y, 5.0)
    if name == "world_size":
        with pytest.raises(ValueError, match=name):
            open_clip.loss.SigLipLoss(**option)(x, y, 5.0, -3.0)


def test_options_are_checked_at_once() -> None:
    with pytest.raises(TypeError, match="temperature"):
        integration.patch(temperature=0.1)
    with pytest.raises(TypeError, match="world_size: not an option of patch"):
        integration.patch(world_size=2)
    with pytest.raises(TypeError, match="dist_impl: not an option of patch"):
        integration.patch(dist_impl="bidir")
    assert open_clip.ClipLoss.forward is integration.OPEN_CLIP_FORWARDS[open_clip.ClipLoss]
    integration.patch(backend="nonsense")
    with pytest.raises(ValueError, match="'nonsense' is unknown"):
        open_clip.ClipLoss()(*features("random", 8, 8, 4), 5.0)


def test_an_empty_batch_is_refused() -> None:
    """Where open_clip's formula gives NaN; the docstring of patch says so."""
    loss, x = open_clip.ClipLoss(), torch.empty(0, 4)
    assert loss(x, x, 5.0).isnan()
    integration.patch()
    with pytest.raises(ValueError, match="image_features"):
        loss(x, x, 5.0)
    assert "n = 0, raises ValueError" in integration.patch.__doc__


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip.loss", None)
    with pytest.raises(ImportError, match=r'pip install "clipfast\[open-clip\]"'):
        importlib.reload(integration)
