"""The loss over several ranks is that of one process with the whole batch (traps 1, 16, 17, 31, 32)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import error
from ranks import Failed, Ranks, contrastive, mesh_step, step, under_autocast
from shards import SCHEMES, SHARDS, Batch, assert_right, joined
from torch import Tensor
from torch.nn.functional import cross_entropy
from towers import Towers
from training_ranks import accumulated, against_open_clip

from clipfast import dispatch, reference
from clipfast.problem import Problem

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalize": {"normalize": True},
    "smoothing": {"label_smoothing": 0.1},
    "normalize, smoothing": {"normalize": True, "label_smoothing": 0.1},
    "image to text": {"direction": "image_to_text"},
    "text to image": {"direction": "text_to_image", "label_smoothing": 0.1},
    "none": {"reduction": "none"},
    "none, one direction": {"reduction": "none", "direction": "text_to_image"},
    "ignore": {"same_id": "ignore"},
    "ignore, smoothing": {"same_id": "ignore", "label_smoothing": 0.1, "normalize": True},
    "positive": {"same_id": "positive"},
    "positive, smoothing": {"same_id": "positive", "label_smoothing": 0.1},
    "positive, none, text to image": {"same_id": "positive", "reduction": "none", "direction": "text_to_image"},
    "metrics": {"metrics": True},
    "metrics, positive": {"metrics": True, "same_id": "positive"},
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shards", SHARDS)
def test_loss_and_gradients(ranks: Ranks, shards: str, options: str, scheme: str) -> None:
    chosen = OPTIONS[options]
    batch = Batch(SHARDS[shards], 7, torch.float64, ids="same_id" in chosen)
    assert_right(ranks, batch, chosen, scheme=scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", ["plain", "normalize, smoothing", "positive, smoothing"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_dtypes_and_backends(ranks: Ranks, backend: str, options: str, dtype: torch.dtype, scheme: str) -> None:
    chosen = OPTIONS[options]
    batch = Batch([(30, 34), (50, 50), (9, 20)], 16, dtype, ids="same_id" in chosen)
    problem = Problem(30, 104, 16, dtype, torch.device("cpu"), frozenset({"ids"} if "same_id" in chosen else ()))
    if reasons := dispatch.get(backend).unsupported_reasons(problem):
        pytest.skip("; ".join(reasons))
    assert_right(ranks, batch, chosen | {"backend": backend}, scheme=scheme)


def test_repeats_bitwise(ranks: Ranks) -> None:
    batch = Batch([(5, 8), (0, 0), (12, 12), (7, 9)], 16, torch.float32, ids=True)
    for scheme in SCHEMES:
        call = batch.shards, 14.3, 0.0, OPTIONS["positive, smoothing"], (), scheme
        first, second = ranks.run(contrastive, *call), ranks.run(contrastive, *call)
        for a, b in zip(first, second, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("options", ["plain", "normalize, smoothing", "ignore", "positive, smoothing", "metrics"])
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_kept_logits_change_no_bit(ranks: Ranks, backend: str, options: str, scheme: str) -> None:
    """Of unequal shards, and where one rank's fit what others' do not."""
    problem = Problem(1, 1, 1, torch.float32, torch.device("cpu"))
    if reasons := dispatch.get(backend).unsupported_reasons(problem):
        pytest.skip("; ".join(reasons))
    batch = Batch([(5, 8), (0, 0), (12, 12), (7, 9)], 16, torch.float32, ids="same_id" in OPTIONS[options])
    some = dispatch.kept_bytes(backend, 7, 29, torch.float32)  # enough for the last rank's
    kept = [
        ranks.run(
            contrastive,
            batch.shards,
            14.3,
            0.0,
            OPTIONS[options] | {"backend": backend, "keep_bytes": count},
            (),
            scheme,
        )
        for count in (0, 1 << 20, some)
    ]
    for others in kept[1:]:
        for a, b in zip(kept[0], others, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("options", ["plain", "none", "normalize, smoothing"])
def test_every_rank_has_an_upstream_gradient_of_its_own(ranks: Ranks, options: str, scheme: str) -> None:
    sizes = [(5, 5), (9, 9), (2, 2)]
    upstream: list[Any] = [0.5, -3.0, 1.25]
    if options == "none":
        upstream = [torch.randn(2, n, dtype=torch.float64) for n, _ in sizes]
    assert_right(ranks, Batch(sizes, 7, torch.float64), OPTIONS[options], upstream=upstream, scheme=scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_shards_need_no_record(ranks: Ranks, scheme: str) -> None:
    batch = Batch([(5, 8)] * 3, 7, torch.float64)
    assert_right(ranks, batch, {"normalize": True}, scheme=scheme, grad_reduction="mean", equal_shards=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_not_finite_input(ranks: Ranks, scheme: str, value: float) -> None:
    """It comes out as in the dense formula."""
    batch = Batch([(5, 5), (3, 6)], 7, torch.float64)
    batch.shards[1]["y"][1, 2] = value
    batch.y[6, 2] = value
    got = joined(ranks.run(contrastive, batch.shards, 14.3, 0.0, {}, (), scheme, ranks=(0, 1)), {})
    dense = batch.evaluate(torch.float64, 14.3, 0.0, {}, None)
    for name in ("loss", "dx", "dy", "dscale"):
        assert torch.equal(got[name].isnan(), dense[name].isnan()), name
        assert torch.equal(got[name].isinf(), dense[name].isinf()), name


def trained(images: list[Tensor], texts: list[Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    """`ranks.step` in this process alone, with the dense formula over the whole batch."""
    torch.manual_seed(0)
    model = Towers().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        out = model(torch.cat(images), torch.cat(texts))
        loss = reference.contrastive_loss(*out.values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def assert_trains_alike(ranks: Ranks, sizes: list[int], wrapper: str, options: dict[str, Any]) -> None:
    images, texts = ([torch.randn(n, width, dtype=torch.float64) for n in sizes] for width in (6, 7))
    expected_losses, expected = trained(images, texts)
    for result in ranks.run(step, images, texts, wrapper, options, ranks=range(len(sizes))):
        assert not isinstance(result, Failed), result
        losses, parameters = result
        assert losses == pytest.approx(expected_losses, rel=1e-12)
        for name, parameter in parameters.items():
            assert error(parameter, expected[name]) <= 1e-12 * max(1.0, expected[name].abs().max().item()), name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("sizes", [[4], [5, 5], [5, 9, 2], [4, 0, 7], [3, 3, 3, 3]], ids=str)
def test_training_under_a_wrapper(ranks: Ranks, sizes: list[int], wrapper: str, scheme: str) -> None:
    assert_trains_alike(ranks, sizes, wrapper, {"scheme": scheme})


def test_gradients_that_are_added(ranks: Ranks) -> None:
    """DDP's mean, times W, is the sum."""
    for scheme in SCHEMES:
        assert_trains_alike(ranks, [5, 9, 2], "ddp", {"scheme": scheme, "grad_reduction": "sum"})


@pytest.mark.parametrize("local_loss", [False, True])
@pytest.mark.parametrize("gather_with_grad", [False, True])
@pytest.mark.parametrize("cache_labels", [False, True])
def test_flags_of_open_clip(ranks: Ranks, local_loss: bool, gather_with_grad: bool, cache_labels: bool) -> None:
    flags = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "cache_labels": cache_labels}
    assert_trains_alike(ranks, [3, 5, 2, 4], "ddp", flags | {"world_size": 4})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_groups_in_one_step(ranks: Ranks, scheme: str) -> None:
    """A 2 x 2 mesh: each rank's loss over its row and over its column, the ranks of a group not those of the job."""
    x, y = torch.randn(4, 3, 6), torch.randn(4, 3, 6)
    got = ranks.run(mesh_step, x, y, scheme)
    for members in ((0, 1), (2, 3), (0, 2), (1, 3)):
        both = [t[list(members)].double().flatten(0, 1).requires_grad_() for t in (x, y)]
        loss = reference.contrastive_loss(*both, 14.3)
        gradients = [2 * g for g in torch.autograd.grad(loss, both)]
        for place, rank in enumerate(members):
            first = 0 if members in ((0, 1), (2, 3)) else 3
            assert error(got[rank][first], loss) <= 1e-5
            for value, exact in zip(got[rank][first + 1 : first + 3], gradients, strict=True):
                assert error(value, exact[3 * place : 3 * place + 3]) <= 1e-5
    for result in got:
        for together, one, other in zip(result[6:], result[1:3], result[4:6], strict=True):
            assert error(together, one + other) <= 1e-6


def test_against_open_clip(ranks: Ranks) -> None:
    """Its own is right with gather_with_grad; without, its towers' gradients are 1/W of clipfast's."""
    pytest.importorskip("open_clip", reason="open_clip is missing; the extra `open-clip` brings it")
    for local_loss in (False, True):
        for found in ranks.run(against_open_clip, {"local_loss": local_loss, "gather_with_grad": True}):
            assert not isinstance(found, Failed), found
            for name, (theirs, ours) in found.items():
                if name == "loss" and local_loss:
                    continue  # theirs is of the rank's own rows
                assert error(ours, theirs) <= 1e-5 * max(1.0, theirs.abs().max().item()), name
    for found in ranks.run(against_open_clip, {"local_loss": False, "gather_with_grad": False}):
        for name, (theirs, ours) in found.items():
            share = 4 if name.endswith(("weight", "image.bias", "text.bias")) else 1
            assert error(ours, share * theirs) <= 1e-5 * max(1.0, ours.abs().max().item()), name


def test_what_local_loss_alone_leaves_out(ranks: Ranks) -> None:
    """open_clip's without gather_with_grad takes other ranks' features for constants, as docs/many-gpus.md says."""
    pytest.importorskip("open_clip", reason="open_clip is missing; the extra `open-clip` brings it")
    batch: list[list[Tensor]] = []
    for rank in range(4):
        torch.manual_seed(rank)
        batch.append([torch.randn(4, 6), torch.randn(4, 7)])
    torch.manual_seed(0)
    model = Towers()
    out = model(*(torch.cat(side) for side in zip(*batch, strict=True)))
    x, y, scale, labels = out["image_features"], out["text_features"], out["logit_scale"], torch.arange(16)
    sides = (x, y.detach()), (y, x.detach())
    loss = sum(cross_entropy(scale * rows @ columns.T, labels) for rows, columns in sides) / 2
    loss.backward()
    missing = False
    for found in ranks.run(against_open_clip, {"local_loss": True, "gather_with_grad": False}):
        assert not isinstance(found, Failed), found
        for name, parameter in model.named_parameters():
            theirs, ours = found[name]
            if parameter.grad is not None:
                assert error(theirs, parameter.grad) <= 1e-5 * max(1.0, theirs.abs().max().item()), name
            missing |= name == "image.weight" and error(ours, theirs) > 0.1 * ours.abs().max().item()
    assert missing


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_changes_nothing(ranks: Ranks, scheme: str) -> None:
    x, y = torch.randn(3, 6, 5), torch.randn(3, 6, 5)
    for result in ranks.run(under_autocast, x, y, scheme, ranks=range(3)):
        assert not isinstance(result, Failed), result
        assert all(torch.equal(one, other) for one, other in zip(*result, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_micro_batches_inside_no_sync(ranks: Ranks, scheme: str) -> None:
    sizes = ([4, 0, 7], [2, 5, 3])
    images, texts = ([[torch.randn(n, width, dtype=torch.float64) for n in s] for s in sizes] for width in (6, 7))
    torch.manual_seed(0)
    model = Towers().double()
    for own_images, own_texts in zip(images, texts, strict=True):
        reference.contrastive_loss(*model(torch.cat(own_images), torch.cat(own_texts)).values()).backward()
    for gradients in ranks.run(accumulated, images, texts, scheme, ranks=range(3)):
        assert not isinstance(gradients, Failed), gradients
        for name, parameter in model.named_parameters():
            assert error(gradients[name], parameter.grad) <= 1e-12 * max(1.0, parameter.grad.abs().max().item()), name
