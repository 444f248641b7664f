"""Wrong input raises before anything is computed; the text names the argument, what came and what is accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import clipfast
from clipfast import operators

X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"image_features": [[1.0]]}, TypeError, "image_features: got list; accepted is a torch.Tensor"),
        ({"text_features": None}, TypeError, "text_features: got NoneType; accepted is a torch.Tensor"),
        ({"image_features": torch.ones(4, 3, dtype=torch.long)}, TypeError, "image_features: got torch.int64"),
        ({"text_features": X.to(torch.complex64)}, TypeError, "text_features: got torch.complex64; accepted are"),
        ({"text_features": X.to_sparse()}, TypeError, "text_features: got layout torch.sparse_coo; accepted"),
        ({"image_features": X[0]}, ValueError, r"image_features: got shape \[3\]; accepted is \[rows, d\]"),
        ({"text_features": X[None]}, ValueError, r"text_features: got shape \[1, 4, 3\]; accepted"),
        ({"image_features": X[:0]}, ValueError, r"image_features: got shape \[0, 3\]; at least one row"),
        ({"image_features": X[:, :0], "text_features": X[:, :0]}, ValueError, r"image_features: got shape \[4, 0\]"),
        ({"text_features": torch.randn(4, 5)}, ValueError, r"text_features: got shape \[4, 5\]; its d must be that of"),
        ({"text_features": X[:0]}, ValueError, r"text_features: got shape \[0, 3\]; at least one row"),
        ({"text_features": X[:2]}, ValueError, "text_features: got 2 rows; accepted are at least the 4 rows"),
        ({"text_features": X.to("meta")}, ValueError, "text_features: is on meta; image_features is on cpu"),
        ({"logit_scale": "14"}, TypeError, "logit_scale: got str; accepted is a number or a tensor of one element"),
        ({"logit_scale": True}, TypeError, "logit_scale: got bool; accepted"),
        ({"logit_scale": None}, TypeError, "logit_scale: got NoneType; accepted"),
        ({"logit_scale": torch.ones(2)}, ValueError, r"logit_scale: got shape \[2\]; accepted is a single element"),
        ({"logit_scale": torch.ones(0)}, ValueError, r"logit_scale: got shape \[0\]; accepted is a single element"),
        (
            {"logit_scale": torch.ones((), dtype=torch.cfloat)},
            TypeError,
            "logit_scale: got a tensor of torch.complex64",
        ),
        ({"logit_bias": torch.ones(3)}, ValueError, r"logit_bias: got shape \[3\]; accepted is a single element"),
        ({"logit_bias": "0"}, TypeError, "logit_bias: got str; accepted"),
        ({"logit_bias": False}, TypeError, "logit_bias: got bool; accepted"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: got 1.5; accepted is a number from 0 to 1"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing: got -0.1; accepted is a number from 0 to 1"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing: got nan; accepted"),
        ({"label_smoothing": "0.1"}, TypeError, "label_smoothing: got str; accepted"),
        ({"normalize": 1}, TypeError, "normalize: got int; accepted is True or False"),
        ({"deterministic": "yes"}, TypeError, "deterministic: got str; accepted"),
        ({"grad_reduction": "none"}, ValueError, "grad_reduction: got 'none'; accepted are 'mean' and 'sum'"),
        ({"group": "world"}, TypeError, "group: got str; accepted is a torch.distributed.ProcessGroup"),
        ({"backend": "fast"}, ValueError, "backend: 'fast' is unknown; accepted are 'auto', 'triton', 'cpu', 'torch'"),
        ({"backend": None}, TypeError, "backend: got NoneType; accepted"),
        ({"image_ids": [1, 2, 3, 4]}, TypeError, "image_ids: got list; accepted is a torch.Tensor of integers"),
        ({"image_ids": torch.ones(4)}, TypeError, "image_ids: got torch.float32; accepted are torch.int64"),
        (
            {"image_ids": torch.arange(3)},
            ValueError,
            r"image_ids: got shape \[3\]; accepted is one id for each",
        ),
        ({"image_ids": torch.arange(4, device="meta")}, ValueError, "image_ids: is on meta; the features are on cpu"),
        ({"text_ids": torch.arange(4)}, ValueError, "image_ids: got None with text_ids; accepted are both"),
        (
            {"image_ids": torch.arange(4), "text_features": torch.randn(5, 3)},
            ValueError,
            "text_ids: got None; with 4 images and 5 texts the texts' own are needed",
        ),
        ({"same_id": "drop"}, ValueError, "same_id: got 'drop'; accepted are 'ignore' and 'positive'"),
        ({"direction": "rows"}, ValueError, "direction: got 'rows'; accepted are 'both', 'image_to_text' and"),
        ({"reduction": "sum"}, ValueError, "reduction: got 'sum'; accepted are 'mean' and 'none'"),
        ({"return_metrics": 1}, TypeError, "return_metrics: got int; accepted is True or False"),
        ({"logit_scale": torch.tensor(True)}, TypeError, "logit_scale: got a tensor of torch.bool; accepted"),
    ],
)
def test_wrong_argument(
    arguments: dict[str, Any], error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(*arguments: object) -> None:
        pytest.fail("computed before all arguments were checked")

    monkeypatch.setattr(operators, "contrastive_loss", compute)
    with pytest.raises(error, match=text):
        clipfast.contrastive_loss(**{"image_features": X, "text_features": X, "logit_scale": 1.0, **arguments})


def test_a_group_without_this_process() -> None:
    with pytest.raises(ValueError, match="group: this process is not in it"):
        clipfast.contrastive_loss(X, X, 1.0, group=torch.distributed.GroupMember.NON_GROUP_MEMBER)


def test_several_processes_without_a_group() -> None:
    with pytest.raises(ValueError, match=r"world_size: got 2; accepted is 1 until .*init_process_group"):
        clipfast.ContrastiveLoss(world_size=2)(X, X, 1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"rank": 1}, ValueError, "rank: got 1; accepted is a number below world_size, 1"),
        ({"rank": -1}, ValueError, "rank: got -1; accepted"),
        ({"world_size": 0}, ValueError, "rank: got 0; accepted"),
        ({"world_size": 2, "group": object()}, ValueError, "world_size: got 2 together with a group"),
        ({"use_horovod": True}, ValueError, "use_horovod: got True; accepted is False, with torch.distributed"),
    ],
)
def test_wrong_constructor_argument(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        clipfast.ContrastiveLoss(**arguments)


@pytest.mark.parametrize("name", ["image_dim", "text_dim", "embed_dim"])
def test_wrong_width(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0; accepted is a positive width"):
        clipfast.ProjectionHead(**{"image_dim": 2, "text_dim": 2, "embed_dim": 2, name: 0})
