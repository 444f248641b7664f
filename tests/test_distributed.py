"""The loss over several ranks is that of one process with the whole batch (traps 1, 16, 17, 31, 32)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import error, features
from ranks import (
    FAIL_TIMEOUT,
    Failed,
    Ranks,
    against_open_clip,
    call,
    compiled,
    contrastive,
    cost,
    fail,
    mesh_step,
    step,
)
from torch import Tensor
from torch.nn.functional import log_softmax
from towers import Towers

from clipfast import collectives, dispatch, reference, schemes
from clipfast.collectives import Shards
from clipfast.problem import HALF_DTYPES, Problem, accumulation_dtype

SCHEMES = ("gather", "ring")
# Images and texts of each rank.
SHARDS: dict[str, list[tuple[int, int]]] = {
    "one rank": [(6, 6)],
    "two ranks": [(5, 5), (5, 5)],
    "three ranks": [(4, 4)] * 3,
    "four ranks": [(3, 3)] * 4,
    "more texts": [(3, 5)] * 4,
    "unequal": [(5, 5), (9, 9), (2, 2)],
    "unequal texts": [(5, 5), (2, 9), (3, 4)],
    "an empty rank": [(4, 4), (0, 0), (7, 7)],
    "no images": [(4, 4), (0, 3), (7, 7)],
    "one pair": [(0, 0), (1, 1)],
}
IDS = (0, 1, 2, 3, 1, 4, 5, 1, 6, 6)  # an id's pairs are on several ranks, and in some cases on one
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


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    four = Ranks(4)
    yield four
    four.close()


class Batch:
    """The rows of all ranks, and each rank's."""

    def __init__(self, sizes: list[tuple[int, int]], d: int, dtype: torch.dtype, ids: bool = False) -> None:
        self.sizes = sizes
        self.n, self.m = (sum(size) for size in zip(*sizes, strict=True))
        x, y = features("trained", self.n, self.m, d, torch.float64)
        starts = [sum(m for _, m in sizes[:rank]) for rank in range(len(sizes))]
        self.match = torch.cat([start + torch.arange(n) for start, (n, _) in zip(starts, sizes, strict=True)])
        others = [j for j in range(self.m) if j not in set(self.match.tolist())]
        placed = torch.empty_like(y)
        placed[self.match], placed[others] = y[: self.n], y[self.n :]
        self.x, self.y = (1.5 * x).to(dtype), placed.to(dtype)
        self.ids: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if ids:
            text_ids = torch.tensor([7 * IDS[j % len(IDS)] - 5 for j in range(self.m)])
            self.ids = text_ids[self.match], text_ids
        self.shards = []
        rows = [n for n, _ in sizes], [m for _, m in sizes]
        for place, (x, y) in enumerate(zip(self.x.split(rows[0]), self.y.split(rows[1]), strict=True)):
            shard = {"x": x, "y": y}
            if ids:
                shard["image_ids"], shard["text_ids"] = (t.split(r)[place] for t, r in zip(self.ids, rows, strict=True))
            self.shards.append(shard)

    def losses(self, x: Tensor, y: Tensor, s: Tensor, b: Tensor, options: dict[str, Any]) -> Tensor:  # [2, n]
        if options.get("normalize"):
            x, y = reference.l2_normalize(x), reference.l2_normalize(y)
        smoothing, ignore = options.get("label_smoothing", 0.0), options.get("same_id", "ignore") == "ignore"
        logits = s * (x @ y.T) + b
        own = torch.zeros(self.n, self.m, dtype=torch.bool)
        own[torch.arange(self.n), self.match] = True
        same = torch.zeros_like(own) if self.ids[0] is None else (self.ids[0][:, None] == self.ids[1]) & ~own
        allowed, positive = (~same, own) if ignore else (torch.ones_like(own), own | same)
        losses = []
        for side in (logits, allowed, positive), tuple(t.T[self.match] for t in (logits, allowed, positive)):
            scores, allowed, positive = side
            target = (1 - smoothing) * positive.to(x.dtype) / positive.sum(1, keepdim=True)
            target = target + smoothing * allowed.to(x.dtype) / allowed.sum(1, keepdim=True)
            chances = log_softmax(scores.masked_fill(~allowed, -torch.inf), dim=1).masked_fill(~allowed, 0)
            losses.append(-(target * chances).sum(1))
        return torch.stack(losses)

    def evaluate(
        self, dtype: torch.dtype, scale: float, bias: float, options: dict[str, Any], upstream: list[Any] | None
    ) -> dict[str, Tensor]:
        """The dense formula over the whole batch; the gradients of what the ranks make of their losses together.

        With reduction "mean" the features' are W times, and the scale's and bias's are, those of the mean over ranks.
        """
        count = len(self.sizes)
        x, y = (t.to(dtype).detach().requires_grad_() for t in (self.x, self.y))
        s, b = (torch.tensor(v, dtype=accumulation_dtype(dtype), requires_grad=True) for v in (scale, bias))
        s_, b_ = (s, b) if dtype not in HALF_DTYPES else (s.to(dtype), b.to(dtype))
        losses = self.losses(x, y, s_, b_, options)
        losses = {"image_to_text": losses[0], "text_to_image": losses[1]}.get(options.get("direction", "both"), losses)
        if options.get("reduction", "mean") == "none":
            out = losses
            gradient = torch.cat([torch.as_tensor(u) for u in upstream], dim=-1) if upstream else torch.ones_like(out)
            total = (losses * gradient).sum()
        else:
            out = losses.mean()
            total = out * (sum(upstream) if upstream else count)
        dx, dy, ds, db = torch.autograd.grad(total, (x, y, s, b))
        return {"loss": out.detach(), "dx": dx, "dy": dy, "dscale": ds / count, "dbias": db / count}


def joined(results: list[dict[str, Tensor]], options: dict[str, Any]) -> dict[str, Tensor]:
    """What ranks returned as one process's; values that all must have are the same bit for bit."""
    for result in results:
        assert not isinstance(result, Failed), result
    alike = {"dscale", "dbias"} | ({"loss"} if options.get("reduction", "mean") == "mean" else set())
    for name in alike:
        assert all(torch.equal(result[name].nan_to_num(), results[0][name].nan_to_num()) for result in results), name
    return {
        name: results[0][name]
        if name in alike
        else torch.cat([r[name] for r in results], dim=-1 if name == "loss" else 0)
        for name in results[0]
    }


def assert_right(
    ranks: Ranks,
    batch: Batch,
    options: dict[str, Any],
    scale: float = 14.3,
    bias: float = -0.5,
    upstream: list[Any] | None = None,
    **how: Any,
) -> None:
    """err(clipfast) <= 2 err(PyTorch, same dtype, one process) + the oracle's roundings."""
    call = batch.shards, scale, bias, options, upstream or (), *how.values()
    assert list(how) == ["scheme", "grad_reduction", "equal_shards"][: len(how)]
    got = joined(ranks.run(contrastive, *call, ranks=range(len(batch.sizes))), options)
    dtype = batch.x.dtype
    scale = torch.tensor(scale, dtype=accumulation_dtype(dtype)).item()
    exact = batch.evaluate(torch.float64, scale, bias, options, upstream)
    dense = batch.evaluate(dtype, scale, bias, options, upstream)
    accumulator = accumulation_dtype(dtype)
    length = 1.0 if options.get("normalize") else max(t.double().norm(dim=1).max().item() for t in (batch.x, batch.y))
    total = (
        len(batch.sizes)
        if upstream is None
        else max(1.0, float(torch.cat([torch.as_tensor(u).flatten() for u in upstream]).abs().sum()))
    )
    if options.get("reduction") == "none":
        total *= batch.n
    feature = 2 / batch.n * scale * length * total
    terms = {"loss": 1.0, "dx": feature, "dy": feature, "dscale": 2 * length**2 * total, "dbias": 2.0 * total}
    for name, term in terms.items():
        value, truth = got[name], exact[name]
        assert value.dtype == (dtype if name in ("dx", "dy") else accumulator)
        rounding = 2 * torch.finfo(value.dtype).eps * truth.abs().max().item()
        rounding += torch.finfo(accumulator).eps * (scale * length**2 + abs(bias) + 2 + math.sqrt(batch.m)) * term
        bound = 2 * error(dense[name], truth) + (8 if accumulator == torch.float64 else 1) * rounding
        assert error(value, truth) <= bound, f"{name}: {error(value, truth):.3g} > {bound:.3g}"
    if options.get("metrics"):
        assert_counts(batch, got, scale, bias, options)


def assert_counts(batch: Batch, got: dict[str, Tensor], scale: float, bias: float, options: dict[str, Any]) -> None:
    logits = scale * batch.x.double() @ batch.y.double().T + bias
    own = torch.zeros_like(logits, dtype=torch.bool)
    own[torch.arange(batch.n), batch.match] = True
    same = torch.zeros_like(own) if batch.ids[0] is None else (batch.ids[0][:, None] == batch.ids[1]) & ~own
    for name, dim in (("row_above", 1), ("col_above", 0)):
        best = logits.masked_fill(~(own | same), -torch.inf).amax(dim=dim, keepdim=True)
        assert torch.equal(got[name].long(), ((logits >= best) & ~(own | same)).sum(dim=dim)), name


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


COSTS: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    "plain": ({}, {}),
    "ignore": ({"same_id": "ignore"}, {"ids": True}),
    "positive, smoothing": (
        {"same_id": "positive", "label_smoothing": 0.1},
        {"ids": True, "positives": True, "smoothing": True},
    ),
    "metrics, none": ({"metrics": True, "reduction": "none"}, {"metrics": True, "mean": False}),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("options", COSTS)
def test_bytes_sent_and_products(ranks: Ranks, options: str, scheme: str) -> None:
    """What explain predicts, counted: bytes on every rank, and 4 P over all of them."""
    chosen, predicted = COSTS[options]
    for sizes in ([(4, 4)] * 4, [(5, 6), (0, 0), (9, 9), (2, 5)]):
        batch = Batch(sizes, 8, torch.bfloat16, ids="ids" in predicted)
        got = ranks.run(cost, batch.shards, chosen, scheme, False)
        images, texts = zip(*sizes, strict=True)
        for rank, (forward, backward, products, _) in enumerate(got):
            shards = Shards(images, texts, True, True)
            job = schemes.make(scheme, collectives.Ranks(None, rank, 4), shards, 8, torch.bfloat16)
            assert schemes.bytes_sent(job, 8, torch.bfloat16, **predicted) == (forward, backward)
            assert products == 4 * images[rank] * batch.m * 8
    prediction = schemes.predict(4, 4, 4, 8, torch.bfloat16, scheme, **predicted)
    batch = Batch([(4, 4)] * 4, 8, torch.bfloat16, ids="ids" in predicted)
    for forward, backward, products, _ in ranks.run(cost, batch.shards, chosen, scheme, False):
        assert (prediction.forward_bytes, prediction.backward_bytes) == (forward, backward)
        assert prediction.products * batch.n * batch.m * 8 == products


def test_saved_bytes_of_the_ring_are_flat(ranks: Ranks) -> None:
    saved = {}
    for count in (2, 3, 4):
        batch = Batch([(32, 40)] * count, 16, torch.float32)
        for scheme in SCHEMES:
            results = ranks.run(cost, batch.shards, {"normalize": True}, scheme, True, ranks=range(count))
            assert len({result[3] for result in results}) == 1
            saved[scheme, count] = results[0][3]
    assert saved["ring", 2] == saved["ring", 3] == saved["ring", 4]
    for count in (2, 3, 4):
        assert saved["gather", count] - saved["ring", count] == 40 * count * 16 * 4


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


def test_under_torch_compile(ranks: Ranks) -> None:
    """The graph breaks at one place, in every frame above it, with a reason; the values are the same."""
    for result in ranks.run(compiled, ranks=(0, 1)):
        assert not isinstance(result, Failed), result
        got, plain, breaks = result
        assert got == pytest.approx(plain, rel=1e-6)
        assert all("clipfast: ranks agree on sizes and options" in reason for reason, _ in breaks)
        assert len({place for _, place in breaks}) == 1


DISAGREEMENTS: dict[str, tuple[list[dict[str, Any]], list[tuple[int, int, int]], str]] = {
    "d": ([{}] * 3, [(3, 3, 4), (3, 3, 4), (3, 3, 5)], "d of the features: got 4 on ranks 0, 1, 5 on rank 2;"),
    "dtype": ([{}, {"dtype": torch.bfloat16}, {}], [], r"dtype .*: got torch.float32 on ranks 0, 2, torch.bfloat16"),
    "option": ([{}, {"label_smoothing": 0.1}, {}], [], "label_smoothing: got 0.0 on ranks 0, 2, 0.1 on rank 1"),
    "scheme": ([{"scheme": "ring"}, {}, {}], [], "scheme: got ring on rank 0, auto on ranks 1, 2"),
    "reduction": ([{"grad_reduction": "sum"}, {}, {}], [], "grad_reduction: got sum on rank 0"),
    "grad mode": ([{"grad": False}, {}, {}], [], r"torch.is_grad_enabled\(\): got False on rank 0"),
    "no rows": ([{}] * 3, [(0, 0, 4)] * 3, "image_features: got no rows on any rank"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_ranks_that_disagree(ranks: Ranks, case: str) -> None:
    """The same error on every rank, and the group lives on."""
    per_rank, shapes, text = DISAGREEMENTS[case]
    failures = ranks.run(call, per_rank, shapes, ranks=range(3))
    assert len({str(failure) for failure in failures}) == 1
    assert re.match(f"ValueError: {text}", str(failures[0])), failures[0]
    assert len(set(ranks.run(call, [{}] * 3, ranks=range(3)))) == 1


def test_a_rank_that_refuses_its_arguments(ranks: Ranks) -> None:
    """Its own error there, and at once an error that names the rank on the others."""
    failures = ranks.run(call, [{}, {"label_smoothing": 2.0}, {}], ranks=range(3))
    assert str(failures[1]).startswith("ValueError: label_smoothing: got 2.0")
    assert str(failures[0]) == str(failures[2])
    assert str(failures[0]).startswith("ValueError: group: rank 1 refused its arguments")
    assert len(set(ranks.run(call, [{}] * 3, ranks=range(3)))) == 1


def test_ranks_may_want_different_gradients(ranks: Ranks) -> None:
    """A rank whose features and scale want none meets the others in the backward pass all the same."""
    for scheme in SCHEMES:
        wants_none = {"requires_grad": False, "logit_scale": 2.0, "scheme": scheme}
        losses = ranks.run(call, [{"scheme": scheme}, wants_none, {"scheme": scheme}], ranks=range(3))
        assert len(set(losses)) == 1
        assert not isinstance(losses[0], Failed)


@pytest.mark.parametrize(("how", "scheme"), [("raise", "ring"), ("kill", "gather"), ("kill", "ring"), ("hang", "ring")])
def test_a_rank_that_fails_ends_the_others(how: str, scheme: str) -> None:
    """With an error, within the group's timeout."""
    few = Ranks(2, timeout=FAIL_TIMEOUT)
    try:
        waited = few.run(fail, how, scheme)[0]
        assert not isinstance(waited, Failed), waited
        assert waited <= 2 * FAIL_TIMEOUT
    finally:
        few.kill()
