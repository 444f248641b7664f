"""Gradients of a large batch in the memory of a small one: embeddings first, then their gradients through the encoders.

The loss needs the embeddings of the whole batch and nothing else of it (GradCache: Gao et al. 2021, arXiv:2101.06983):

    f = cat(model(part) for part in parts)                     # no graph but the first part's
    g = dloss/df                                               # once, over the ranks of a group too
    for part in parts: model(part).backward(g of the part)     # encoded again, but for the first

What is not of a row, logit_scale and logit_bias, takes part in the loss once, and gets its gradient once, with the last
part. The price is one more forward pass of the encoders over all parts but those whose graph is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from clipfast import arguments

SHARED = ("logit_scale", "logit_bias")  # how the names of outputs that are not of a row end
SYNCS = ("last", "each")

Outputs = dict[str, Tensor]


def cached_step(
    model: nn.Module,
    batch: Any,
    loss: Callable[..., Tensor],
    micro_batch: int,
    *,
    scaler: torch.amp.GradScaler | None = None,
    keep_bytes: int | None = None,
    sync: str = "last",
    equal_shards: bool = False,
) -> Tensor:  # 0-D
    """Add the gradients of `loss(**model(*batch))` to the parameters, with activations of one micro-batch at a time.

    Equal to `loss(**model(*batch)).backward()` for a model whose rows do not see each other. Batch normalization does:
    it takes the statistics of each micro-batch, and its running ones are updated once by each.

    Args:
        model: gives a dict, the loss's arguments, as open_clip's and `clipfast.models` do: tensors with a row for each
            of the batch, and logit_scale and logit_bias (or names that end so), of one element. It may be, or hold,
            modules under DistributedDataParallel or fully_shard, and may be compiled.
        batch: what the model is called with, positional (a tuple or list) or by name (a mapping). Tensors and lists in
            it, also nested, are cut along their first dimension; what else there is, each call gets whole.
        loss: called once, with the outputs of the whole batch, under the caller's autocast; gives a tensor of one
            element. A loss over the ranks of a group is called as without micro-batches.
        micro_batch: most rows that are encoded with a graph at a time. All micro-batches have this size or one less.
        scaler: scales the loss before the backward pass; the loss that comes back is not scaled.
        keep_bytes: how many bytes the graphs that are kept from the first pass may take, so that their micro-batches
            are not encoded twice; None keeps one.
        sync: under fully_shard, when gradients are reduced: at the "last" micro-batch, unsharded gradients staying in
            memory until then, or after "each". Under DistributedDataParallel always one all-reduce, with the last.
        equal_shards: a promise that all ranks have the same number of rows; they do not compare them then.

    Returns:
        The loss, detached.

    Raises:
        TypeError, ValueError: an argument is not as stated; the text names it.
    """
    value = cached_loss(model, batch, loss, micro_batch, keep_bytes=keep_bytes, sync=sync, equal_shards=equal_shards)
    torch.autograd.backward(value if scaler is None else scaler.scale(value))
    return value.detach()


def cached_loss(
    model: nn.Module,
    batch: Any,
    loss: Callable[..., Tensor],
    micro_batch: int,
    *,
    keep_bytes: int | None = None,
    sync: str = "last",
    equal_shards: bool = False,
) -> Tensor:  # 0-D
    """`cached_step` in two: the loss, whose `backward()` encodes again and adds the gradients. For trainers.

    Random numbers of torch, and autocast, are in the backward pass as they were in the forward pass. The batch gets no
    gradient, and there is no second derivative. Without gradients (torch.no_grad) it is the loss, in micro-batches.
    """
    arguments.choice("sync", sync, SYNCS)
    if isinstance(micro_batch, bool) or not isinstance(micro_batch, int) or micro_batch < 1:
        raise ValueError(f"micro_batch: got {micro_batch!r}; accepted is a number of rows from 1")
    if not isinstance(batch, Mapping | tuple | list):
        raise TypeError(f"batch: got {type(batch).__name__}; accepted is a tuple, a list or a mapping")
    rows = _rows(batch)
    count = -(-rows // micro_batch)
    if not equal_shards:
        count = _agreed_count(model, rows, count)
    parts = _Parts(model, _cut(batch, rows, count), sync)
    outputs = parts.encode(keep_bytes)
    if torch.is_grad_enabled() and parts.differentiable:
        anchor = torch.empty(0, requires_grad=True)
        outputs = dict(zip(outputs, _Encoded.apply(anchor, parts, outputs), strict=True))  # type: ignore[no-untyped-call]
    value = loss(**outputs)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError(f"loss: gave {type(value).__name__}; accepted is one that gives a tensor of one element")
    return value


class _Encoded(torch.autograd.Function):
    """The whole batch's outputs; their gradients go through the encoders one part at a time."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, parts: _Parts, outputs: Outputs) -> tuple[Tensor, ...]:
        ctx.parts, ctx.names = parts, tuple(outputs)
        ctx.mark_non_differentiable(*(value for name, value in outputs.items() if name not in parts.differentiable))
        return tuple(outputs.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.parts.backward(dict(zip(ctx.names, gradients, strict=True)))
        return None, None, None


class _Parts:
    """The micro-batches of a step: encodes them, and again exactly as before."""

    def __init__(self, model: nn.Module, inputs: list[Any], sync: str) -> None:
        self.model, self.inputs, self.sync = model, inputs, sync
        modules = list(model.modules())
        self.replicated = [module for module in modules if isinstance(module, DistributedDataParallel)]
        self.sharded = [module for module in modules if isinstance(module, FSDPModule)]
        self.norms = [module for module in modules if isinstance(module, _BatchNorm) and module.track_running_stats]
        self.device = _device(model)
        kinds = dict.fromkeys((self.device.type, "cpu"))
        self.autocast = (
            {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds},
            torch.is_autocast_cache_enabled(),
        )
        self.rng: list[list[Tensor] | None] = []  # of each part; None where it drew nothing
        self.rows: list[int] = []  # of each part
        self.kept: dict[int, Outputs] = {}  # outputs with their graphs
        self.differentiable: frozenset[str] = frozenset()

    def encode(self, keep_bytes: int | None) -> Outputs:
        """All parts, and their outputs put together without graph; some of the graphs are kept."""
        grad, last = torch.is_grad_enabled(), len(self.inputs) - 1
        found, keep = list[Outputs](), 1
        for index in range(len(self.inputs)):
            graph = grad and (index == 0 or index < keep)
            before = _rng_state(self.device)
            saved = _SavedBytes(self.model) if index == 0 and keep_bytes is not None else None
            # Without a graph autocast must not cache: the passes with one would find casts that have none.
            with (
                torch.set_grad_enabled(graph),
                self._autocast(graph),
                self._synced(index == last),
                saved or nullcontext(),
            ):
                outputs = self._call(index)
            after = _rng_state(self.device)
            self.rng.append(None if all(map(torch.equal, before, after)) else before)
            if index == 0:
                self.differentiable = frozenset(name for name, value in outputs.items() if value.requires_grad)
                if saved is not None and keep_bytes is not None:
                    keep = keep_bytes // max(1, saved.total)
            if graph and index < keep:
                self.kept[index] = outputs
            found.append({name: value.detach() for name, value in outputs.items()})
        # A copy of what is not of a row: the loss must not hold the parameter itself.
        return {
            name: value.clone() if _is_shared(name, value) else torch.cat([outputs[name] for outputs in found])
            for name, value in found[0].items()
        }

    def backward(self, gradients: Outputs) -> None:
        """The kept graphs at once, and then the other parts, encoded again; gradients are reduced with the last."""
        kept, self.kept = self.kept, {}
        rest = [index for index in range(len(self.inputs)) if index not in kept]
        if not any(name in self.differentiable and not _is_shared(name, g) for name, g in gradients.items()):
            rest = rest[-1:]  # frozen encoders: the last alone has a gradient
        try:
            if kept:
                self._run_backward(kept, gradients, last=not rest)
                kept.clear()
            for index in rest:
                with torch.enable_grad(), self._autocast(), self._replayed(index), self._synced(index == rest[-1]):
                    outputs = self._call(index)
                self._run_backward({index: outputs}, gradients, last=index == rest[-1])
                del outputs
        finally:
            for module in self.sharded:
                module.set_requires_gradient_sync(True, recurse=False)

    def _run_backward(self, outputs: Mapping[int, Outputs], gradients: Outputs, last: bool) -> None:
        roots, of_roots = list[Tensor](), list[Tensor]()
        final = max(outputs) if last else None
        for index, part in outputs.items():
            begin = sum(self.rows[:index])
            for name, value in part.items():
                if not value.requires_grad:
                    continue
                if not _is_shared(name, value):
                    of_roots.append(gradients[name][begin : begin + len(value)])
                elif index == final:
                    of_roots.append(gradients[name])
                else:
                    continue
                roots.append(value)
        for module in self.sharded:
            module.set_requires_gradient_sync(last or self.sync == "each", recurse=False)
        if roots:
            with self._synced(last):
                torch.autograd.backward(roots, of_roots)

    def _call(self, index: int) -> Outputs:
        part, rows = self.inputs[index], _rows(self.inputs[index])
        outputs = self.model(**part) if isinstance(part, Mapping) else self.model(*part)
        if not isinstance(outputs, Mapping):
            raise TypeError(f"model: gave {type(outputs).__name__}; accepted is a dict, the loss's arguments by name")
        for name, value in outputs.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"model: {name} is of type {type(value).__name__}; accepted are tensors")
            if not _is_shared(name, value) and len(value) != rows:
                raise ValueError(f"model: {name} has {len(value)} rows; accepted are the {rows} of its micro-batch")
        if index == len(self.rows):
            self.rows.append(rows)
        return dict(outputs)

    @contextmanager
    def _autocast(self, cache: bool = True) -> Iterator[None]:
        kinds, cached = self.autocast
        with ExitStack() as stack:
            for kind, (enabled, dtype) in kinds.items():
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cached and cache))
            yield

    @contextmanager
    def _replayed(self, index: int) -> Iterator[None]:
        """The random numbers of the first pass; batch normalization leaves its running statistics alone."""
        state, kind = self.rng[index], self.device.type
        for norm in self.norms:
            norm.track_running_stats = not norm.training
        try:
            if state is None:
                yield
                return
            with torch.random.fork_rng([] if kind == "cpu" else [self.device], device_type=kind):
                torch.set_rng_state(state[0])
                if kind != "cpu":
                    torch.get_device_module(kind).set_rng_state(state[1], self.device)
                yield
        finally:
            for norm in self.norms:
                norm.track_running_stats = True

    @contextmanager
    def _synced(self, last: bool) -> Iterator[None]:
        """Around a forward and its backward; DistributedDataParallel reduces after the last alone."""
        with ExitStack() as stack:
            for module in self.replicated if not last else ():
                stack.enter_context(cast(AbstractContextManager[None], module.no_sync()))
            yield


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a graph keeps, without those of the model's own tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._count, lambda tensor: tensor)
        tensors = (*model.parameters(), *model.buffers())
        self._seen = {_local(tensor).untyped_storage().data_ptr() for tensor in tensors}
        self.total = 0

    def _count(self, tensor: Tensor) -> Tensor:
        storage = _local(tensor).untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_shared(name: str, value: Tensor) -> bool:
    return value.ndim == 0 or (name.endswith(SHARED) and value.numel() == 1)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _rng_state(device: torch.device) -> list[Tensor]:
    state = [torch.get_rng_state()]
    if device.type != "cpu":
        state.append(torch.get_device_module(device).get_rng_state(device))
    return state


def _leaves(batch: Any) -> Iterator[Tensor | Sequence[Any]]:
    """What of a batch is cut: its tensors, and its lists and tuples of other things."""
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, Tensor) or (isinstance(batch, list | tuple) and not _nests(batch)):
        if not isinstance(batch, Tensor) or batch.ndim:
            yield batch
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _leaves(value)


def _nests(values: Sequence[Any]) -> bool:
    return any(isinstance(value, Tensor | Mapping | list | tuple) for value in values)


def _rows(batch: Any) -> int:
    counts = {len(leaf) for leaf in _leaves(batch)}
    if len(counts) != 1 or not min(counts):
        got = ", ".join(map(str, sorted(counts))) or "of no tensor"
        raise ValueError(f"batch: got first dimensions {got}; accepted is one number of rows, from 1")
    return counts.pop()


def _cut(batch: Any, rows: int, count: int) -> list[Any]:
    """`count` parts of equal size or one row less."""
    bounds = [index * rows // count for index in range(count + 1)]
    return [_slice(batch, slice(*pair)) for pair in pairwise(bounds)]


def _slice(batch: Any, rows: slice) -> Any:
    if isinstance(batch, Mapping):
        return {name: _slice(value, rows) for name, value in batch.items()}
    if isinstance(batch, Tensor):
        return batch[rows] if batch.ndim else batch
    if isinstance(batch, list | tuple):
        return [_slice(value, rows) for value in batch] if _nests(batch) else batch[rows]
    return batch


def _agreed_count(model: nn.Module, rows: int, count: int) -> int:
    """The largest number of parts of any rank: each part is a collective call of a replicated or sharded model."""
    groups = _groups(model)
    if not groups:
        return count
    facts = torch.tensor([count, -rows], device=_device(model))
    for group in groups:
        dist.all_reduce(facts, dist.ReduceOp.MAX, group)
    count, fewest = facts.tolist()[0], -facts.tolist()[1]
    if fewest < count:
        raise ValueError(f"batch: a rank has {fewest} rows; accepted is at least one for each of {count} micro-batches")
    return int(count)


def _groups(model: nn.Module) -> list[dist.ProcessGroup]:
    groups = [module.process_group for module in model.modules() if isinstance(module, DistributedDataParallel)]
    meshes = [parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)]
    groups += [group for mesh in dict.fromkeys(meshes) for group in mesh.get_all_groups()]
    return list(dict.fromkeys(groups))
