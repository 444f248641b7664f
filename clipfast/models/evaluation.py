"""What the paper measures on frozen features: a linear probe (section 3.2), and retrieval in COCO's layout.

Zero-shot classification is in `clipfast.models.zero_shot`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from clipfast.metrics import retrieval_metrics

DECAYS = tuple(10.0**power for power in range(-6, 2))
ITERATIONS = 200


def linear_probe(
    features: Tensor,  # [n, d]
    labels: Tensor,  # [n]
    test_features: Tensor,  # [m, d]
    test_labels: Tensor,  # [m]
    weight_decays: Sequence[float] = DECAYS,
) -> float:
    """Accuracy of a logistic regression on frozen features.

    Features are standardized. The decay is the one of `weight_decays` that is best on the last fifth of the training
    rows, which should be in random order; the probe is then fitted to all of them.

    Args:
        features, test_features: [n, d] and [m, d], of any floating dtype.
        labels, test_labels: [n] and [m] integers from 0.
        weight_decays: of half the squared weights, added to the mean cross-entropy.

    Raises:
        ValueError: rows and labels do not fit, or there are fewer than five rows.
    """
    for name, rows, of in (("labels", labels, features), ("test_labels", test_labels, test_features)):
        if rows.shape != of.shape[:1]:
            raise ValueError(f"{name}: got shape {list(rows.shape)}; accepted is one label for each of {len(of)} rows")
    if len(features) < 5:
        raise ValueError(f"features: got {len(features)} rows; accepted are five or more")
    x, y = features.detach().double(), test_features.detach().double()
    mean, deviation = x.mean(dim=0), x.std(dim=0).clamp(min=1e-12)
    x, y = (x - mean) / deviation, (y - mean) / deviation
    classes = int(labels.max()) + 1
    fit = len(x) - len(x) // 5

    def accuracy(decay: float, rows: int, held_out: Tensor, right: Tensor) -> float:
        weight, bias = _fitted(x[:rows], labels[:rows], classes, decay)
        return (linear(held_out, weight, bias).argmax(dim=-1) == right).double().mean().item()

    best = max(weight_decays, key=lambda decay: accuracy(decay, fit, x[fit:], labels[fit:]))
    return accuracy(best, len(x), y, test_labels)


def _fitted(x: Tensor, labels: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(linear(x, weight, bias), labels) + 0.5 * decay * weight.square().sum()
        torch.autograd.backward(loss)
        return loss.detach()

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def caption_retrieval(
    image_features: Tensor,  # [n, d]
    text_features: Tensor,  # [n, k, d]
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall where every image has k captions, as COCO's five; see `clipfast.retrieval_metrics`.

    Raises:
        ValueError: text_features is not [n, k, d].
    """
    if text_features.ndim != 3 or len(text_features) != len(image_features):
        raise ValueError(
            f"text_features: got shape {list(text_features.shape)}; accepted is [{len(image_features)}, k, d]"
        )
    ids = torch.arange(len(image_features), device=image_features.device)
    text_ids = ids.repeat_interleave(text_features.shape[1])
    return retrieval_metrics(image_features, text_features.flatten(0, 1), ks, image_ids=ids, text_ids=text_ids)
