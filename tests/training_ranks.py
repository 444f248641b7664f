"""Training on ranks: other libraries' own, patched or not, and DDP's ways to run."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision_stub import make_importable
from towers import Towers

import clipfast

BATCH, STEPS = 5, 3


def open_clip_training(
    rank: int, group: Any, flags: list[str], patched: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """open_clip's own loop over an epoch of a small CLIP in float64: its parameters before and after."""
    make_importable()
    integration = importlib.import_module("clipfast.integrations.open_clip")
    open_clip, params, train = (
        importlib.import_module(name) for name in ("open_clip", "open_clip_train.params", "open_clip_train.train")
    )
    args = params.parse_args([*flags, "--model", "tiny", "--precision", "fp32", "--skip-scheduler"])
    args.device, args.distributed, args.rank, args.world_size = "cpu", True, rank, dist.get_world_size(group)
    args.distill, args.wandb = args.distill_model is not None, False

    def model() -> nn.Module:
        vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 4, "image_size": 8}
        text = {"context_length": 6, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
        bias = -10.0 if args.siglip else None
        return open_clip.CLIP(16, vision, text, output_dict=True, init_logit_bias=bias).double()  # type: ignore[no-any-return]

    student, teacher = model(), model()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    torch.manual_seed(rank)
    steps = STEPS * args.accum_freq
    batches = [
        (torch.randn(BATCH, 3, 8, 8, dtype=torch.float64), torch.randint(1, 50, (BATCH, 6))) for _ in range(steps)
    ]
    loader = type("Batches", (list,), {"num_batches": steps, "num_samples": 2 * BATCH * steps})(batches)
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
    # A step that Adam scales would hide a gradient of 1/W.
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    wrapped = DistributedDataParallel(student, process_group=group)
    with warnings.catch_warnings(), integration.patched(backend="torch") if patched else nullcontext():
        warnings.simplefilter("ignore", FutureWarning)  # open_clip gathers by a function that torch deprecates
        loss = open_clip.create_loss(args)
        train.train_one_epoch(wrapped, data, loss, 0, optimizer, None, None, teacher, args)
    return before, {name: p.detach().clone() for name, p in student.named_parameters()}


def sentence_training(
    rank: int, group: Any, patched: bool, options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """sentence-transformers' loss of queries, their positives and a negative of each, under DDP."""
    make_importable()
    integration = importlib.import_module("clipfast.integrations.sentence_transformers")
    make = integration.MultipleNegativesRankingLoss if patched else integration.losses.MultipleNegativesRankingLoss
    loss = make(nn.Module(), gather_across_devices=True, **options)
    towers = Towers().double()
    before = {name: p.detach().clone() for name, p in towers.named_parameters()}
    torch.manual_seed(rank)
    columns = [torch.randn(BATCH, width, dtype=torch.float64) for width in (6, 7, 7)]
    train_steps(towers, group, lambda model: sentence_loss(model, loss, columns))
    return before, {name: p.detach().clone() for name, p in towers.named_parameters()}


def sentence_loss(model: nn.Module, loss: Any, columns: list[Tensor]) -> Tensor:
    queries, positives, negatives = columns
    found = model(queries, torch.cat((positives, negatives)))
    texts = found["text_features"].chunk(2)
    unused = 0 * (found["logit_scale"] + found["logit_bias"])
    value: Tensor = loss.compute_loss_from_embeddings([found["image_features"], *texts], None)
    return value + unused


def train_steps(model: nn.Module, group: Any, loss_of: Callable[[nn.Module], Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wrapped = DistributedDataParallel(model, process_group=group)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(wrapped).backward()
            optimizer.step()


def transformers_training(rank: int, group: Any, name: str, whole: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model of transformers under DDP and the patch with a group; `whole`: unpatched, each with all pairs."""
    make_importable()
    integration = importlib.import_module("clipfast.integrations.transformers")
    transformers = importlib.import_module("transformers")
    width = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = width | {"vocab_size": 50, "max_position_embeddings": 6, "projection_size": 16}
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 49}
    config = getattr(transformers, f"{name}Config")(
        text_config=text | tokens, vision_config=width | {"image_size": 8, "patch_size": 4}
    )
    model = getattr(transformers, f"{name}Model")(config).double().train()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    torch.manual_seed(7)
    sizes = (BATCH, BATCH + 2)
    ids = torch.randint(2, 49, (sum(sizes), 6))
    ids[:, -1] = 49
    pixels = torch.randn(sum(sizes), 3, 8, 8, dtype=torch.float64)
    if not whole:
        ids, pixels = (t.split(sizes)[rank] for t in (ids, pixels))

    def loss_of(wrapped: nn.Module) -> Tensor:
        return wrapped(input_ids=ids, pixel_values=pixels, return_loss=True).loss  # type: ignore[no-any-return]

    with nullcontext() if whole else integration.patched(model, group=group, backend="torch"):
        train_steps(model, group, loss_of)
    return before, {key: p.detach().clone() for key, p in model.named_parameters()}


def against_open_clip(rank: int, group: Any, flags: dict[str, bool]) -> dict[str, tuple[Tensor, Tensor]]:
    """open_clip's own loss under its flags and clipfast's: the losses, and the gradients after DDP's averaging."""
    make_importable()
    open_clip_loss = importlib.import_module("open_clip.loss")
    torch.manual_seed(rank)
    images, texts = torch.randn(4, 6), torch.randn(4, 7)
    found = []
    for loss in (
        open_clip_loss.ClipLoss(rank=rank, world_size=dist.get_world_size(), **flags),
        clipfast.ContrastiveLoss(rank=rank, world_size=dist.get_world_size(), backend="torch", **flags),
    ):
        torch.manual_seed(0)
        model = Towers()
        with warnings.catch_warnings():
            # open_clip gathers by a function that torch deprecates.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(model)  # averages while it lives
            value = loss(**wrapped(images, texts))
            value.backward()
        found.append({"loss": value.detach()} | {name: p.grad for name, p in model.named_parameters()})
    return {name: (found[0][name], found[1][name]) for name in found[0]}


def accumulated(
    rank: int, group: Any, images: list[list[Tensor]], texts: list[list[Tensor]], scheme: str
) -> dict[str, Tensor]:
    """Gradients after two losses of two micro-batches, the first inside DDP's no_sync."""
    model = Towers().double()
    wrapped = DistributedDataParallel(model, process_group=group)
    loss = clipfast.ContrastiveLoss(group=group, scheme=scheme, backend="torch")
    with wrapped.no_sync():
        loss(**wrapped(images[0][rank], texts[0][rank])).backward()
    loss(**wrapped(images[1][rank], texts[1][rank])).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def projected(rank: int, group: Any, leaves: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """The loss over the group of this rank's features, both matrices and t; and this rank's gradients."""
    own = [t.detach().requires_grad_() for t in leaves[rank]]
    options: dict[str, Any] = {"group": group, "grad_reduction": "sum", "label_smoothing": 0.1}
    loss = clipfast.projected_contrastive_loss(*own[:4], own[4].exp(), **options)
    return loss.detach(), *torch.autograd.grad(loss, own)
