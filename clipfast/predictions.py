"""What a loss over the ranks of a group costs each of them: bytes sent, memory, products."""

from __future__ import annotations

from typing import NamedTuple

import torch

from clipfast.collectives import RECORD, Ranks, Shards
from clipfast.logit_sums import Sums
from clipfast.problem import accumulation_dtype, kept_dtype
from clipfast.schemes import AUTO, RING, Scheme, chosen, make

CONTRASTIVE, SIGLIP, DISTILLATION = LOSSES = ("contrastive", "siglip", "distillation")
PRODUCTS = {CONTRASTIVE: (1, 3), SIGLIP: (3, 0), DISTILLATION: (6, 0)}  # forward, backward

NUMBER = torch.float64.itemsize
RECALLS = 7 * torch.float32.itemsize  # of three k in both directions, and the rows


class Asked(NamedTuple):
    """The options of a loss that say what is sent and held."""

    loss: str = CONTRASTIVE
    ids: bool = False  # pairs with equal ids are ignored or, with positives, made positives
    positives: bool = False
    smoothing: bool = False
    metrics: bool = False
    mean: bool = True  # the reduction
    text_gradients: bool = True  # some rank wants a gradient of its text features
    equal_shards: bool = False  # ranks do without the record
    normalize: bool = False

    @property
    def sums(self) -> bool:
        """Whether sums of logits are needed."""
        return self.loss == CONTRASTIVE and (self.smoothing or self.positives)

    @property
    def col_numbers(self) -> int:
        """Of each column, which the ranks merge in the forward pass."""
        return {CONTRASTIVE: 1 + self.metrics + len(Sums._fields) * self.sums, SIGLIP: 0, DISTILLATION: 2}[self.loss]


class Prediction(NamedTuple):
    """Of each rank; P counts products of the whole job's N*M*d multiply-adds."""

    scheme: str
    reason: str
    forward_bytes: int  # sent by this rank
    backward_bytes: int
    held_bytes: int  # of other ranks' texts and the gradients by them
    saved_bytes: int  # between the passes, of other ranks' texts too
    workspace_bytes: int  # at most, beyond what is saved, the gradients and the backend's own
    forward_products: float  # P
    backward_products: float

    @property
    def products(self) -> float:
        return self.forward_products + self.backward_products


def predict(
    ranks: int, n: int, m: int, d: int, dtype: torch.dtype, scheme: str = AUTO, **asked: bool | str
) -> Prediction:
    """For equal shards of n images and m texts on each rank; `asked` are the fields of `Asked`.

    A teacher's features are taken to have the student's d.
    """
    wants = Asked(**asked)  # type: ignore[arg-type]
    name, reason = chosen(scheme, ranks * m, d, dtype)
    job = make(name, Ranks(None, 0, ranks), Shards((n,) * ranks, (m,) * ranks, True, True), d, dtype)
    forward_products, backward_products = (count / ranks for count in PRODUCTS[wants.loss])
    return Prediction(
        name,
        reason,
        *bytes_sent(job, d, dtype, wants),
        held_bytes=_held(job, d, dtype),
        saved_bytes=_saved(job, d, dtype, wants),
        workspace_bytes=_workspace(job, d, dtype, wants),
        forward_products=forward_products,
        backward_products=backward_products,
    )


def bytes_sent(scheme: Scheme, d: int, dtype: torch.dtype, asked: Asked) -> tuple[int, int]:
    """What this rank's forward and backward pass send, if every rank sends to each itself."""
    others = scheme.ranks.count - 1
    texts = d * dtype.itemsize + NUMBER * asked.ids
    gradients = d * accumulation_dtype(dtype).itemsize * asked.text_gradients
    record = 0 if asked.equal_shards else others * RECORD.size
    if asked.loss == SIGLIP:
        sums = 3  # the loss and both scalars' gradients
        forward = scheme.bytes_of_spread(texts) + scheme.bytes_of_columns(texts, gradients)
        return record + forward + sums * NUMBER * others, NUMBER * others
    if asked.loss == DISTILLATION:
        both, of_cols = 2 * texts, 3 * NUMBER
        forward = scheme.bytes_of_spread(both) + scheme.bytes_of_columns(both, NUMBER * asked.col_numbers)
        forward += scheme.bytes_of_spread(of_cols) + scheme.bytes_of_columns(both + of_cols, gradients)
        return record + forward + 2 * NUMBER * others, NUMBER * others
    forward = record + scheme.bytes_of_spread(texts) + 2 * NUMBER * others * asked.mean
    if asked.metrics:
        forward += scheme.bytes_of_columns(texts, NUMBER) + scheme.bytes_of_spread(NUMBER) + RECALLS * others
    forward += scheme.bytes_of_columns(texts + NUMBER * asked.metrics, NUMBER * asked.col_numbers)
    weights = NUMBER * (2 + asked.positives + asked.smoothing)
    backward = scheme.bytes_of_spread(weights) + scheme.bytes_of_columns(texts + weights, gradients)
    return forward, backward + (2 + asked.mean) * NUMBER * others


def _held(scheme: Scheme, d: int, dtype: torch.dtype) -> int:
    """Of all texts, of the gradient by them and of what the other ranks send of this rank's; in the ring of a few."""
    accumulated, m = accumulation_dtype(dtype).itemsize, max(scheme.shards.texts)
    if scheme.name == RING:
        # The texts that are visited and those that come; the gradients that leave, come and are formed, and their sum.
        return m * d * (2 * dtype.itemsize + 5 * accumulated)
    return sum(scheme.shards.texts) * d * (dtype.itemsize + 2 * accumulated)


def _saved(scheme: Scheme, d: int, dtype: torch.dtype, asked: Asked) -> int:
    n, m = (max(rows) for rows in scheme.shards[:2])
    scalars = 2 * accumulation_dtype(dtype).itemsize
    if asked.loss != CONTRASTIVE:
        return (n + m) * d * kept_dtype(dtype).itemsize + NUMBER * (2 if asked.loss == SIGLIP else 1)
    text = d * dtype.itemsize + NUMBER * asked.ids
    vectors = NUMBER * (n + (n + m) * asked.col_numbers)  # the rows' have as many, and their logsumexps
    others = sum(scheme.shards.texts) * text if scheme.holds_all else 0
    return (n + m) * text + vectors + scalars + others


def _workspace(scheme: Scheme, d: int, dtype: torch.dtype, asked: Asked) -> int:
    n, m = (max(rows) for rows in scheme.shards[:2])
    accumulated, visited = accumulation_dtype(dtype).itemsize, m if scheme.name == RING else sum(scheme.shards.texts)
    towers = 2 if asked.loss == DISTILLATION else 1
    numbers = max(asked.col_numbers, 3 + asked.ids)
    # What columns have, as it leaves, comes and is merged.
    vectors = NUMBER * (n * (2 + 2 * asked.col_numbers) + 4 * visited * numbers)
    own = n * d * (2 * accumulated + dtype.itemsize)  # the sum over visits, what a visit adds, and as it is returned
    normalized = 0
    if asked.normalize:
        normalized = towers * (n + m) * d * dtype.itemsize + 4 * max(n, m) * d * accumulated
    held = towers * _held(scheme, d, dtype)
    if asked.loss == CONTRASTIVE and scheme.holds_all:
        held -= visited * d * dtype.itemsize  # is saved
    # Of features in the accumulation dtype; where labels are smoothed, once more beside the gradients.
    sums = (n + visited) * d * accumulated * (4 + 2 * asked.ids) if asked.sums else 0
    forward = normalized + 2 * m * d * dtype.itemsize + sums
    backward = own + normalized + held + sums * asked.smoothing
    return vectors + max(forward, backward) + (1 << 15)
