"""The modules, as open_clip and a plain training loop use them (traps 11, 15), and the retrieval metrics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import error, evaluate, features
from torch import Tensor, nn
from towers import Towers

import clipfast
from clipfast import operators, reference


def test_output_dict_holds_one_key() -> None:
    x, y = features("random", 8, 8, 4)
    loss = clipfast.ContrastiveLoss()
    output = loss(x, y, torch.tensor(14.3), output_dict=True)
    assert list(output) == ["contrastive_loss"]
    assert torch.equal(output["contrastive_loss"], loss(x, y, torch.tensor(14.3)))


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)])
def test_open_clip_constructor(flags: tuple[bool, bool]) -> None:
    """open_clip's create_loss passes these by name; in one process the flags change nothing."""
    x, y = features("trained", 8, 8, 4)
    local_loss, gather_with_grad = flags
    loss = clipfast.ContrastiveLoss(
        local_loss=local_loss,
        gather_with_grad=gather_with_grad,
        cache_labels=True,
        rank=0,
        world_size=1,
        use_horovod=False,
    )
    assert error(loss(x, y, 14.3), reference.contrastive_loss(x, y, 14.3)) < 1e-6


def test_module_hands_its_options_on() -> None:
    x, y = features("unnormalized", 8, 8, 4)
    loss = clipfast.ContrastiveLoss(normalize=True, label_smoothing=0.2)
    exact = reference.contrastive_loss(reference.l2_normalize(x), reference.l2_normalize(y), 5.0, label_smoothing=0.2)
    assert error(loss(x, y, 5.0), exact) < 1e-6


@pytest.mark.usefixtures("process_group")
def test_no_parameter_is_unused_under_ddp(backend: str) -> None:
    model = nn.parallel.DistributedDataParallel(Towers())
    for _ in range(2):  # an unused parameter makes the second forward raise
        losses = clipfast.ContrastiveLoss(group=torch.distributed.group.WORLD, backend=backend)(
            **model(torch.randn(9, 6), torch.randn(9, 7)), output_dict=True
        )
        sum(losses.values()).backward()
    bias_gradient = model.module.logit_bias.grad
    assert bias_gradient is not None
    assert bias_gradient.abs() < 1e-6


def test_grad_scaler(backend: str) -> None:
    model, scaler = Towers(), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.image.weight.detach().clone()
    loss = clipfast.ContrastiveLoss(backend=backend)(**model(torch.randn(9, 6), torch.randn(9, 7)))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before, model.image.weight)
    assert model.image.weight.isfinite().all()


def test_projection_head_is_the_paper() -> None:
    head = clipfast.ProjectionHead(6, 7, 5)
    images, texts = torch.randn(9, 6), torch.randn(9, 7)
    exact = reference.clip_loss(images, texts, head.w_i, head.w_t, head.logit_scale)
    assert math.isclose(head.logit_scale.item(), math.log(1 / 0.07), rel_tol=1e-6)
    assert error(head(images, texts), exact) < 1e-6
    expected = reference.embed(images, texts, head.w_i, head.w_t)
    for got, embedding in zip((head.encode_image(images), head.encode_text(texts)), expected, strict=True):
        assert error(got, embedding) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "test", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_opcheck(backend: str, test: str, normalize: bool, dtype: torch.dtype) -> None:
    x, y = (t.requires_grad_() for t in features("trained", 5, 7, 4, dtype))
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (14.3, 0.5))
    arguments = (x, y, scale, bias, None, None, normalize, 0.1, "both", "mean", "ignore", False, backend)
    torch.library.opcheck(operators.contrastive_loss.operator, arguments, test_utils=test)


def test_compiles_as_one_graph_with_a_dynamic_batch(backend: str) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    def loss(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return clipfast.contrastive_loss(x, y, s, b, normalize=True, label_smoothing=0.1, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    for n in (5, 9, 32):
        x, y = features("unnormalized", n, n, 8)
        eager, got = evaluate(loss, x, y, 14.3), evaluate(compiled, x, y, 14.3)
        for name in ("loss", "dx", "dy", "dscale"):
            assert error(getattr(got, name), getattr(eager, name)) <= 1e-6, name
    assert len(graphs) == 1


def test_compiles_with_inductor() -> None:
    model, loss = Towers(), clipfast.ContrastiveLoss()
    images, texts = torch.randn(9, 6), torch.randn(9, 7)

    def step() -> Tensor:
        return loss(**model(images, texts))

    torch.compiler.reset()
    eager, compiled = step(), torch.compile(step, fullgraph=True)()
    assert error(compiled, eager) < 1e-6
    eager.backward()
    expected = model.image.weight.grad
    model.zero_grad()
    compiled.backward()
    assert expected is not None
    assert model.image.weight.grad is not None
    assert error(model.image.weight.grad, expected) < 1e-6


def test_retrieval_metrics_equal_a_sort() -> None:
    x, y = features("trained", 700, 700, 6)
    metrics = clipfast.retrieval_metrics(x, y, ks=(1, 3, 50))
    similarity = x @ y.T
    for direction, matrix in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        order = matrix.argsort(dim=1, descending=True)
        rank = (order == torch.arange(700)[:, None]).long().argmax(dim=1) + 1
        for k in (1, 3, 50):
            assert metrics[f"{direction}_R@{k}"] == pytest.approx((rank <= k).double().mean().item(), abs=2 / 700)
        assert metrics[f"{direction}_mean_rank"] == pytest.approx(rank.double().mean().item(), rel=1e-3)


def test_retrieval_metrics_give_nothing_to_collapsed_or_broken_features() -> None:
    for features_ in (torch.ones(20, 4), torch.full((20, 4), float("nan"))):
        metrics = clipfast.retrieval_metrics(features_, features_, ks=(1, 19, 20))
        assert (metrics["image_to_text_R@1"], metrics["text_to_image_R@19"]) == (0, 0)
        assert metrics["image_to_text_R@20"] == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((torch.ones(3, 2), torch.ones(4, 2)), "text_features: got 4 rows"), ((torch.ones(3, 2),) * 2, "ks: got 0")],
)
def test_retrieval_metrics_refuse(arguments: tuple[Tensor, Tensor], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        clipfast.retrieval_metrics(*arguments, ks=(1, 0) if text.startswith("ks") else (1,))
