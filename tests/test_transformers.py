"""The patch of transformers' CLIPModel, against the real package on small random configurations (traps 11, 18)."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import (
    LOGITS,
    N,
    assert_same,
    distance,
    flat,
    gradients,
    make_batch,
    make_model,
    norm,
    transformers,
)
from oracle import assert_three_way, error, evaluate
from torch import Tensor, nn

import clipfast
from clipfast import reference

integration = importlib.import_module("clipfast.integrations.transformers")
modeling_clip = importlib.import_module("transformers.models.clip.modeling_clip")
EXAMPLE = Path(__file__).parents[1] / "examples" / "transformers_trainer.py"


@pytest.fixture(autouse=True)
def _unpatch() -> Iterator[None]:
    yield
    integration.unpatch()


def exact_loss(model: Any, output: Any) -> Tensor:
    """The loss of the model's own embeddings, in float64 from there on."""
    return reference.contrastive_loss(
        output.text_embeds.double(), output.image_embeds.double(), model.logit_scale.double().exp()
    )


def dense_loss(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """transformers' formula."""
    loss: Tensor = modeling_clip.image_text_contrastive_loss(x @ y.t() * s + b)
    return loss


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_gradients_of_the_embeddings(scale: float, backend: str) -> None:
    """Judged three ways on the embeddings of the model; what goes back into the encoders is that, bitwise."""
    batch = make_batch()
    model = make_model(scale)
    integration.patch(backend=backend)
    output = model(**batch)
    for embeds in (output.text_embeds, output.image_embeds):
        embeds.retain_grad()
    output.loss.backward()
    x, y = output.text_embeds.detach(), output.image_embeds.detach()
    scale = model.logit_scale.exp().item()
    assert_three_way(x, y, scale, backend=backend, formula=dense_loss)
    expected = evaluate(lambda *inputs: clipfast.contrastive_loss(*inputs, backend=backend), x, y, scale)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.text_embeds.grad, expected.dx)
    assert torch.equal(output.image_embeds.grad, expected.dy)
    assert error(model.logit_scale.grad, expected.dscale * scale) <= 1e-6 * max(1.0, scale)


def training_step(double: bool) -> dict[str, Tensor]:
    """What one step of SGD takes from each parameter."""
    model, batch = make_model(100.0), make_batch()
    if double:
        model, batch["pixel_values"] = model.double(), batch["pixel_values"].double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(**batch).loss.backward()
    optimizer.step()
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def test_training_step() -> None:
    """A step with the patch is as near to the step of a model in float64 as transformers' own.

    err(patched) <= 2 err(transformers) + rounding, in the 2-norm over all parameters: a key's bias has no gradient but
    its rounding, so not one by one. In float64, where rounding hides nothing, one by one. The rounding is the oracle's:
    what eps |L| in every logit does to the gradient of the embeddings, and so to whatever is linear in it.
    """
    exact, dense = training_step(double=True), training_step(double=False)
    integration.patch()
    got = training_step(double=False)
    assert list(got) == list(exact)

    rounding = torch.finfo(torch.float32).eps * (100 + 2 + math.sqrt(N)) * norm(exact)
    assert distance(got, exact) <= 2 * distance(dense, exact) + rounding
    for name, update in training_step(double=True).items():
        assert error(update, exact[name]) <= 1e-12 * max(1.0, norm(exact)), name


@pytest.mark.parametrize("options", [{}, {"output_hidden_states": True, "output_attentions": True}], ids=["", "all"])
def test_training_output_is_as_before_without_logits(options: dict[str, bool]) -> None:
    model, batch = make_model(), make_batch() | options
    model.set_attn_implementation("eager")
    expected = model(**batch)
    integration.patch()
    output = model(**batch)
    assert type(output) is type(expected)
    assert_same(output, expected, apart=LOGITS)
    assert len(output.to_tuple()) == len(expected.to_tuple()) == 7
    for name in LOGITS:
        assert output[name].shape == (N, 0)
    assert ("text_model_output.hidden_states.0." in flat(output)) == bool(options)


@pytest.mark.parametrize("wish", [{}, {"return_dict": False}, {"return_dict": True}, "configuration"], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_every_field_keeps_its_place(training: bool, wish: Any) -> None:
    """Logits, without a graph, in evaluation mode and in a tuple that was asked for."""
    model, batch = make_model().train(training), make_batch()
    by_configuration = wish == "configuration"  # transformers' own forward does not take it from there
    batch |= {} if by_configuration else wish
    expected = model(**batch, return_dict=False) if by_configuration else model(**batch)
    model.config.return_dict = not by_configuration
    integration.patch()
    output = model(**batch)
    assert type(output) is type(expected)
    output, expected = (v if isinstance(v, tuple) else v.to_tuple() for v in (output, expected))
    with_logits = not training or wish in ("configuration", {"return_dict": False})
    assert len(output) == len(expected) == 7
    assert_same(dict(enumerate(output[3:])), dict(enumerate(expected[3:])))
    assert error(output[0], expected[0]) <= 1e-6
    for logits, before in zip(output[1:3], expected[1:3], strict=True):
        assert torch.equal(logits, before) if with_logits else logits.shape == (N, 0)
        assert not logits.requires_grad
    output[0].backward()


def test_return_logits() -> None:
    """True asks for them with their graph, False for none anywhere."""
    model, batch = make_model(), make_batch()
    expected = model(**batch)
    integration.patch()
    output = model(**batch, return_logits=True)
    assert_same(output, expected)
    assert all(output[name].requires_grad for name in LOGITS)
    assert torch.equal(output.loss, model(**batch).loss)
    for options in ({}, {"return_dict": False}):
        assert model.eval()(**batch, return_logits=False, **options)[1].shape == (N, 0)


def make_trainer(path: Path, model: nn.Module) -> Any:
    pytest.importorskip("accelerate", reason="accelerate is missing; transformers' Trainer needs it")
    names = ("input_ids", "attention_mask", "pixel_values")
    batch = make_batch()
    rows = [{name: batch[name][i] for name in names} for i in range(N)]

    def collate(some: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {name: torch.stack([row[name] for row in some]) for name in names} | {"return_loss": True}

    arguments = transformers.TrainingArguments(
        output_dir=str(path), per_device_eval_batch_size=16, report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, data_collator=collate, eval_dataset=rows)
    return trainer, rows


def test_trainer_predicts_what_it_did(tmp_path: Path) -> None:
    """Every field of every batch in its place: predictions[0] is logits_per_image."""
    trainer, rows = make_trainer(tmp_path, make_model())
    expected = trainer.predict(rows)
    integration.patch()
    got = trainer.predict(rows)
    assert expected.predictions[0].shape == (N, 16)  # three batches, the last padded

    assert_same(got.predictions, expected.predictions)
    for metrics in (got.metrics, trainer.evaluate()):
        loss = next(value for name, value in metrics.items() if name.endswith("_loss"))
        assert loss == pytest.approx(expected.metrics["test_loss"], abs=1e-6)


def test_the_loss_of_a_model_in_bfloat16_is_float32() -> None:
    model, batch = make_model(100.0).bfloat16(), make_batch()
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    expected = model(**batch)
    integration.patch()
    output = model(**batch, return_logits=True)
    assert (expected.loss.dtype, output.loss.dtype) == (torch.bfloat16, torch.float32)
    assert_same(output, expected, apart=("loss",))
    embeds = output.text_embeds.double(), output.image_embeds.double()
    assert error(output.loss, reference.contrastive_loss(*embeds, model.logit_scale.exp().double())) <= 1e-5
    model.eval()
    assert_same(model(**batch), model(**batch, return_logits=True))


@pytest.mark.parametrize("return_loss", [None, False])
def test_without_a_loss_it_is_transformers_forward(return_loss: bool | None) -> None:
    """Zero-shot classification: five texts for 37 pictures."""
    model, batch = make_model().eval(), make_batch() | {"return_loss": return_loss}
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name][:5]
    expected = model(**batch)
    integration.patch()
    output = model(**batch)
    assert output.logits_per_image.shape == (N, 5)
    before, after = flat(expected), flat(output)
    assert list(before) == list(after)
    assert all(torch.equal(after[place], before[place]) for place in before)


def test_positional_arguments_and_signature() -> None:
    model, batch = make_model(), make_batch()
    before = inspect.signature(model.forward).parameters
    expected = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], None, True)
    integration.patch()
    after = inspect.signature(model.forward).parameters
    assert [name for name in after if name != "return_logits"] == list(before)
    output = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], None, True)
    assert error(output.loss, expected.loss) <= 1e-6
    for wrong in (([None] * 7, {}), ([batch["input_ids"]], batch)):
        with pytest.raises(TypeError, match=r"forward\(\)"):
            model(*wrong[0], **wrong[1])


def test_activation_checkpointing_changes_no_bit() -> None:
    batch = make_batch()
    integration.patch()
    plain = make_model()
    expected = gradients(plain, plain(**batch).loss)
    saving = make_model()
    # The old name warns in newer versions, the new one is missing in older ones.
    getattr(saving, "activation_checkpointing_enable", saving.gradient_checkpointing_enable)()
    got = gradients(saving, saving(**batch).loss)
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())


def test_no_matrix_of_logits_is_saved() -> None:
    """For the backward pass, the only time at which transformers' forward still needs one."""

    def saved_shapes() -> set[tuple[int, ...]]:
        shapes = set()

        def note(tensor: Tensor) -> Tensor:
            shapes.add(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            make_model()(**make_batch()).loss.backward()
        return shapes

    assert (N, N) in saved_shapes()
    integration.patch()
    assert (N, N) not in saved_shapes()


def test_autocast() -> None:
    """Logits stay float32 where transformers' forward rounds them to bfloat16."""
    model, batch = make_model(100.0), make_batch()
    integration.patch()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch, return_logits=True)
    assert output.logits_per_text.dtype == torch.bfloat16
    assert error(output.loss, exact_loss(model, output)) <= 1e-5


def test_texts_and_images_come_in_pairs() -> None:
    model, batch = make_model(), make_batch()
    integration.patch()
    for n in (N - 1, 1):
        with pytest.raises(ValueError, match=f"input_ids: got {n} texts for {N} images"):
            model(**batch | {name: batch[name][:n] for name in ("input_ids", "attention_mask")})
        with pytest.raises(ValueError, match=f"input_ids: got {N} texts for {n} images"):
            model(**batch | {"pixel_values": batch["pixel_values"][:n]})


def test_patch_and_unpatch_are_idempotent() -> None:
    original = transformers.CLIPModel.forward
    integration.unpatch()
    assert transformers.CLIPModel.forward is original
    for _ in range(2):
        integration.patch()
        assert transformers.CLIPModel.forward is not original
    for _ in range(2):
        integration.unpatch()
        assert transformers.CLIPModel.forward is original


def test_patched_restores_what_was_there() -> None:
    model, batch = make_model(), make_batch()

    def loss() -> float:
        return float(model(**batch).loss.item())

    original = loss()
    with integration.patched(label_smoothing=0.1):
        smoothed = loss()
        with integration.patched(label_smoothing=0.3):
            assert loss() != smoothed
        assert loss() == smoothed
        with pytest.raises(ZeroDivisionError), integration.patched(label_smoothing=0.3):
            raise ZeroDivisionError
        assert loss() == smoothed
    assert loss() == original


@pytest.mark.parametrize(
    ("options", "error_type", "text"),
    [
        ({"temperature": 0.1}, TypeError, "temperature"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank: got 2"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], error_type: type[Exception], text: str) -> None:
    with pytest.raises(error_type, match=text):
        integration.patch(**options)
    assert transformers.CLIPModel.forward is integration.TRANSFORMERS_FORWARDS[transformers.CLIPModel]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.clip.modeling_clip", None)
    with pytest.raises(ImportError, match=r'pip install "clipfast\[transformers\]"'):
        importlib.reload(integration)


def test_compiles_as_one_graph() -> None:
    integration.patch()
    model, batch = make_model(), make_batch()
    expected = model(**batch).loss
    expected_gradients = gradients(model, expected)
    model.zero_grad()
    torch.compiler.reset()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch).loss
    assert error(loss, expected) <= 1e-6
    assert distance(gradients(model, loss), expected_gradients) <= 1e-5 * norm(expected_gradients)


def run_example(*arguments: str) -> dict[str, float]:
    specification = importlib.util.spec_from_file_location("transformers_trainer", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    metrics: dict[str, float] = example.main(arguments)
    return metrics


def test_the_example_with_trainer_learns(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is missing; transformers' Trainer needs it")
    metrics = run_example("--out", str(tmp_path), "--concepts", "200", "--steps", "60", "--batch-size", "40")
    assert metrics["train_loss"] < 0.75 * math.log(40)
    assert metrics["image_to_text_R@5"] > 3 * 5 / 200
