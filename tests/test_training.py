"""What training code does with the loss: micro-batches, threads, one graph, sharding (traps 2, 13, 15)."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import error, features, reasons_against
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from towers import Towers

import clipfast
from clipfast import dispatch, reference
from clipfast.models import CBOW, CLIP, VisionTransformer
from clipfast.problem import Problem

TEXTS = ("image_features", "text_features")


def batch(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 6, generator=generator), torch.randn(n, 7, generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def exact_gradients(model: nn.Module, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """Of one step with the whole batch, in float64."""
    model = copy.deepcopy(model).double()
    model.zero_grad()
    reference.contrastive_loss(*model(images.double(), texts.double()).values()).backward()
    return gradients(model)


def assert_close(got: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == exact.keys()
    largest = max(gradient.abs().max().item() for gradient in exact.values())
    for name, gradient in got.items():
        assert error(gradient, exact[name]) <= tolerance * largest, name


@pytest.mark.parametrize("rows", [24, 8, 5])
def test_micro_batches_that_are_encoded_again(backend: str, rows: int) -> None:
    """As open_clip's --accum-freq: each pass has a graph for one micro-batch, and the others' cached embeddings.

    Each pass has the whole gradient of the scale, so that it takes part in one of them.
    """
    model, loss = Towers(), clipfast.ContrastiveLoss(backend=backend)
    images, texts = batch(24)
    exact = exact_gradients(model, images, texts)
    chunks = list(zip(images.split(rows), texts.split(rows), strict=True))
    with torch.no_grad():
        cached = [model(*chunk) for chunk in chunks]
    for i, chunk in enumerate(chunks):
        fresh = model(*chunk)
        parts = [*cached[:i], fresh, *cached[i + 1 :]]
        image_features, text_features = (torch.cat([part[name] for part in parts]) for name in TEXTS)
        scale, bias = (fresh[name] if i == 0 else fresh[name].detach() for name in ("logit_scale", "logit_bias"))
        loss(image_features, text_features, scale, bias).backward()
    assert_close(gradients(model), exact)


@pytest.mark.parametrize("rows", [24, 8, 5])
def test_micro_batches_with_cached_gradients(backend: str, rows: int) -> None:
    """One loss over the cached embeddings; their gradients go through the encoders one micro-batch at a time."""
    model, loss = Towers(), clipfast.ContrastiveLoss(backend=backend)
    images, texts = batch(24)
    exact = exact_gradients(model, images, texts)
    with torch.no_grad():
        cached = model(images, texts)
    leaves = [cached[name].requires_grad_() for name in TEXTS]
    loss(*leaves, model.logit_scale.exp(), model.logit_bias).backward()
    for begin in range(0, 24, rows):
        fresh = model(images[begin : begin + rows], texts[begin : begin + rows])
        torch.autograd.backward(
            [fresh[name] for name in TEXTS],
            [leaf.grad[begin : begin + rows] for leaf in leaves if leaf.grad is not None],
        )
    assert_close(gradients(model), exact)


def in_threads(count: int, work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("normalize", [False, True])
def test_backward_in_another_thread(backend: str, normalize: bool) -> None:
    """The same bits, and an error goes to the thread that asked."""
    leaves = [t.requires_grad_() for t in (*features("trained", 200, 200, 33), torch.tensor(14.3))]
    losses = [clipfast.contrastive_loss(*leaves, normalize=normalize, backend=backend) for _ in range(2)]
    expected = torch.autograd.grad(losses[0], leaves)
    results: list[tuple[Tensor, ...]] = []

    def work() -> None:
        results.append(torch.autograd.grad(losses[1], leaves))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            losses[1].backward()
        results.append(expected)

    in_threads(1, work)
    assert len(results) == 2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_threads_that_compute_at_once(backend: str) -> None:
    problem = Problem(200, 200, 33, torch.float32, torch.device("cpu"))
    if reasons := dispatch.get(backend).reasons_against_auto(problem):
        pytest.skip("; ".join(reasons))
    leaves = [t.requires_grad_() for t in (*features("trained", 200, 200, 33), torch.tensor(14.3))]
    results: list[tuple[Tensor, ...]] = []

    def work() -> None:
        results.extend(
            torch.autograd.grad(clipfast.contrastive_loss(*leaves, backend=backend), leaves) for _ in range(5)
        )

    work()
    in_threads(3, work)
    assert len(results) == 20
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


class Step(nn.Module):
    """A model and its loss as one module."""

    def __init__(self, model: nn.Module, backend: str = "auto") -> None:
        super().__init__()
        self.model, self.loss = model, clipfast.ContrastiveLoss(backend=backend)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        value: Tensor = self.loss(**self.model(images, texts))
        return value


@pytest.mark.usefixtures("_fresh_compiler")
def test_model_and_loss_as_one_graph(backend: str) -> None:
    """One graph for the first batch size and one for all others, as torch.compile does without `dynamic`."""
    step = Step(Towers(), backend)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (9, 12, 33, 5):
        images, texts = batch(n)
        step.zero_grad()
        compiled(images, texts).backward()
        assert_close(gradients(step.model), exact_gradients(step.model, images, texts))
    assert compiled_graphs() == 2


@pytest.mark.usefixtures("_fresh_compiler")
def test_one_graph_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept there depends on how float32 is multiplied, which the interpreter is not asked."""
    if reasons := reasons_against("triton", torch.float32):
        pytest.skip("; ".join(reasons))
    triton = dispatch.get("triton")
    monkeypatch.setattr(triton, "_interpreted", lambda: False)
    monkeypatch.setattr(triton, "_missing", lambda device: ())
    step, (images, texts) = Step(Towers(), "triton"), batch(9)
    torch.compile(step, fullgraph=True, backend="aot_eager")(images, texts).backward()
    assert_close(gradients(step.model), exact_gradients(step.model, images, texts))


@pytest.mark.usefixtures("_fresh_compiler")
def test_scaled_steps_under_autocast_as_one_graph(backend: str) -> None:
    """Encoders in bfloat16, the loss not; GradScaler skips the step whose gradient is not finite, and goes on."""
    step, scaler = Step(Towers(), backend), torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=10**6)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    for n, broken in ((9, False), (14, True), (14, False)):
        images, texts = batch(n)
        images[3, 2] = float("nan") if broken else images[3, 2]
        before = copy.deepcopy(step.state_dict())
        exact = exact_gradients(step.model, images, texts)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(images, texts)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if not broken:
            assert_close(gradients(step.model), exact, 2e-2)
        scaler.step(optimizer)
        scaler.update()
        for name, value in step.state_dict().items():
            # The bias has no gradient but rounding.
            assert torch.equal(before[name], value) == broken or name == "model.logit_bias", name
    assert scaler.get_scale() == 2.0**15
    assert compiled_graphs() == 1


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_whole_clip_as_one_graph() -> None:
    """Image and text encoder, head and loss; a new batch size needs no other."""
    step = Step(CLIP(VisionTransformer(8, 4, 8, 1, 2), CBOW(20, 8), 6))
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 7, 3):
        images, tokens = torch.randn(n, 3, 8, 8), torch.randint(1, 20, (n, 5))
        results = []
        for call in (step, compiled):
            step.zero_grad()
            call(images, tokens).backward()
            results.append(gradients(step.model))
        assert_close(*results)
    assert compiled_graphs() == 1


@pytest.mark.usefixtures("process_group")
def test_a_scale_of_one_element_that_is_sharded(backend: str) -> None:
    """FSDP2 takes no 0-D parameters: logit_scale and logit_bias have the shape [1]."""
    model = Towers()
    images, texts = batch(9)
    exact = exact_gradients(model, images, texts)
    for name in ("logit_scale", "logit_bias"):
        setattr(model, name, nn.Parameter(getattr(model, name).detach().reshape(1)))
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    clipfast.ContrastiveLoss(backend=backend)(**model(images, texts)).backward()
    got = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    assert got["logit_scale"].shape == (1,)
    assert_close({name: gradient.reshape(exact[name].shape) for name, gradient in got.items()}, exact)
