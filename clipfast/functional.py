"""The losses as functions: check the arguments, then compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from clipfast import arguments, dispatch, distillation, operators, sigmoid
from clipfast.block import IGNORE, SAME_IDS
from clipfast.collectives import Ranks, refusing, warn_of_a_local_loss
from clipfast.norms import l2_normalize
from clipfast.problem import DISTILLATION, IDS, RANKS, SIGMOID, Problem, accumulation_dtype
from clipfast.schemes import SCHEMES, GroupOptions
from clipfast.softmax import BOTH, DIRECTIONS, IMAGE_TO_TEXT, MEAN, REDUCTIONS, TEXT_TO_IMAGE, Options

GRAD_REDUCTIONS = ("mean", "sum")
METRIC_KS = (1, 5, 10)


def contrastive_loss(
    image_features: Tensor,  # [n, d]
    text_features: Tensor,  # [m, d]
    logit_scale: Tensor | float,  # exp(t)
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    direction: str = BOTH,
    reduction: str = MEAN,
    image_ids: Tensor | None = None,  # [n]
    text_ids: Tensor | None = None,  # [m]
    same_id: str = IGNORE,
    return_metrics: bool = False,
    group: Any = None,
    grad_reduction: str = "mean",
    scheme: str = "auto",
    equal_shards: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:  # 0-D; with return_metrics (Tensor, dict of 0-D tensors)
    """CLIP's symmetric cross-entropy over the batch, without ever storing the n*m logits.

    Equal to (Radford et al. 2021, arXiv:2103.00020, figure 3):

        logits = logit_scale * image_features @ text_features.T + logit_bias          # [n, m], never stored
        labels = torch.arange(n)
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.T[:n], labels)) / 2

    in value and in the gradients of all four inputs. Forward and backward together cost four n*m*d matrix products
    and O((n + m) d) memory. Logits and sums are float32 (float64 for float64 features), also under autocast.

    Args:
        image_features: [n, d], n >= 1, any strides; float32, bfloat16, float16 or float64. Row i belongs to text row i.
        text_features: [m, d], m >= n; rows from n on are extra negatives. A pair of dtypes is promoted as by torch.
        logit_scale: the factor exp(t), already exponentiated; a number or a tensor of one element. Never clamped.
        logit_bias: added to every logit; it cannot change this loss, its gradient is zero up to rounding. A tensor [n],
            with n = m, is what open_clip's ClipLoss makes of one: element j is added to the logits of candidate j.
        normalize: l2-normalize the rows first. Without it the features are taken as they are, of any length.
        label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy.
        direction: "both", "image_to_text" (the images choose among all texts: cross_entropy(logits, labels)) or
            "text_to_image" (the n matched texts among all images).
        reduction: "mean", or "none": the loss of every image and every matched text, [2, n], of one direction [n].
        image_ids: [n] integers. Pairs of different rows whose ids are equal belong together: duplicates, or several
            captions of one image. What becomes of them `same_id` says.
        text_ids: [m] integers; image_ids where left out and m = n.
        same_id: "ignore" leaves such pairs out of both softmaxes; "positive" makes them positives too, the target being
            uniform over a row's positives (Khosla et al. 2020, arXiv:2004.11362, equation 2). Smoothed labels are
            uniform over what is not left out.
        return_metrics: also return in-batch recall, counted by the pass that sees every logit.
        group: a process group, over all of whose ranks' rows the loss is taken; None for this process's own. Ranks may
            have different numbers of rows, some of them none. Each gets the loss, and the metrics, of the whole.
        grad_reduction: "mean" or "sum", how the data-parallel wrapper reduces gradients; no effect in one process.
        scheme: "gather" (every rank holds all texts), "ring" (texts go round; memory does not grow with the number of
            ranks) or "auto", which gathers where all texts and their gradients take no more than 4 GiB.
        equal_shards: a promise that all ranks call with the same shapes, dtypes, options and wanted gradients. They do
            not compare them then, and do not wait for the device.
        deterministic: every backend repeats bitwise, so None, True and False give the same result.
        backend: "auto" or a name from `clipfast.backends()`; a name never falls back to another backend.

    Returns:
        A 0-D tensor, float32 (float64 for float64 features), or what `reduction` says. Gradients have their input's
        dtype and shape. With return_metrics (loss, metrics): 0-D tensors on the features' device by
        "image_to_text_R@1", "image_to_text_R@5", ..., "text_to_image_R@10", the fraction of rows with fewer than k
        candidates of another id at or above their best match; ties and NaN count against the model.

    Raises:
        TypeError, ValueError: an argument is not as stated; the text names it. Nothing has been computed by then.
            In a group the ranks that wait for this one raise ValueError too.
    """
    ranks = _ranks_of(group)
    with telling(ranks, image_features, equal_shards):
        _check_common(normalize, grad_reduction, scheme, deterministic)
        arguments.choice("direction", direction, DIRECTIONS)
        arguments.choice("reduction", reduction, REDUCTIONS)
        arguments.choice("same_id", same_id, SAME_IDS)
        arguments.flag("return_metrics", return_metrics)
        label_smoothing = arguments.fraction("label_smoothing", label_smoothing)
        x, y = arguments.matched_features(image_features, text_features, fewest_rows=0 if ranks else 1)
        ids = arguments.ids(image_ids, text_ids, x, y)
        biases = _biases_of_candidates(logit_bias, x, y)
        scale, bias = _scalars(x, logit_scale, 0.0 if logit_bias is None or biases is not None else logit_bias)
        needs = {IDS} if ids[0] is not None else set()
        backend = _select(x, y, backend, needs | {RANKS} if return_metrics else needs)
    if biases is not None:
        of_one: dict[str, Any] = {
            "normalize": normalize, "label_smoothing": label_smoothing, "reduction": reduction, "image_ids": image_ids,
            "text_ids": text_ids, "same_id": same_id, "return_metrics": return_metrics, "group": group,
            "grad_reduction": grad_reduction, "scheme": scheme, "equal_shards": equal_shards, "backend": backend,
        }  # fmt: skip
        return _with_bias_of_candidates(x, y, logit_scale, biases, direction, **of_one)
    options = Options(normalize, label_smoothing, direction, reduction, same_id, return_metrics, backend)
    if ranks is None:
        numbers = arguments.numbered_ids(*ids, x, y)
        loss, _, _, _, row_above, col_above = operators.contrastive_loss(x, y, scale, bias, *numbers, *options)
    else:
        from clipfast import distributed  # imports torch's compiler, which takes a second

        group_options = GroupOptions(ranks, grad_reduction, scheme, equal_shards)
        loss, row_above, col_above = distributed.contrastive_loss(x, y, scale, bias, *ids, options, group_options)
    if not return_metrics:
        return loss
    return loss, recalls(row_above, col_above[: len(x)], direction, ranks)  # type: ignore[return-value]


def siglip_loss(
    image_features: Tensor,  # [n, d]
    text_features: Tensor,  # [m, d]
    logit_scale: Tensor | float,  # exp(t)
    logit_bias: Tensor | float,
    *,
    normalize: bool = False,
    image_ids: Tensor | None = None,  # [n]
    text_ids: Tensor | None = None,  # [m]
    same_id: str = IGNORE,
    group: Any = None,
    grad_reduction: str = "mean",
    scheme: str = "auto",
    equal_shards: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:  # 0-D
    """The sigmoid loss of SigLIP, without ever storing the n*m logits.

    Equal to (Zhai et al. 2023, arXiv:2303.15343, equation 1; open_clip's SigLipLoss):

        logits = logit_scale * image_features @ text_features.T + logit_bias          # [n, m], never stored
        labels = 2 * torch.eye(n, m) - 1
        loss = -logsigmoid(labels * logits).sum() / n

    Where gradients are wanted they are formed in the pass that forms the loss: three n*m*d matrix products in all, and
    O((n + m) d) memory; for the backward pass the gradients are kept, not the features.

    Args:
        logit_bias: added to every logit; a number or a tensor of one element.
        same_id: "ignore" leaves pairs of different rows with equal ids out, "positive" labels them +1.
        others: see `clipfast.contrastive_loss`.

    Returns:
        A 0-D tensor, float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: an argument is not as stated; the text names it. Nothing has been computed by then.
            In a group the ranks that wait for this one raise ValueError too.
    """
    ranks = _ranks_of(group)
    with telling(ranks, image_features, equal_shards):
        _check_common(normalize, grad_reduction, scheme, deterministic)
        arguments.choice("same_id", same_id, SAME_IDS)
        x, y = arguments.matched_features(image_features, text_features, fewest_rows=0 if ranks else 1)
        scale, bias = _scalars(x, logit_scale, logit_bias)
        ids = arguments.ids(image_ids, text_ids, x, y)
        backend = _select(x, y, backend, {SIGMOID} if ids[0] is None else {SIGMOID, IDS})
    if ranks is not None:
        from clipfast import distributed

        options = sigmoid.Options(normalize, same_id, backend)
        group_options = GroupOptions(ranks, grad_reduction, scheme, equal_shards)
        return distributed.siglip_loss(  # type: ignore[no-any-return]
            x, y, scale, bias, *ids, options, group_options
        )
    wanted, numbers = _wants_gradients(x, y, scale, bias), arguments.numbered_ids(*ids, x, y)
    loss, *_ = operators.siglip_loss(x, y, scale, bias, *numbers, wanted, normalize, same_id, backend)
    return loss


def distillation_loss(
    image_features: Tensor,  # [n, d]
    text_features: Tensor,  # [m, d]
    logit_scale: Tensor | float,  # exp(t)
    teacher_image_features: Tensor,  # [n, d']
    teacher_text_features: Tensor,  # [m, d']
    teacher_logit_scale: Tensor | float,
    *,
    normalize: bool = False,
    group: Any = None,
    grad_reduction: str = "mean",
    scheme: str = "auto",
    equal_shards: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:  # 0-D
    """The cross-entropy of a student's softmaxes under its teacher's, without either one's n*m logits.

    Equal to the distill_loss of open_clip's DistillClipLoss:

        student = logit_scale * image_features @ text_features.T                                  # never stored
        teacher = teacher_logit_scale * teacher_image_features @ teacher_text_features.T          # never stored
        rows = -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
        columns = -(teacher.T[:n].softmax(1) * student.T[:n].log_softmax(1)).sum(1).mean()
        loss = (rows + columns) / 2

    The teacher gets no gradient. Six matrix products in all where both have one d: two of the teacher's.

    Args:
        teacher_image_features, teacher_text_features: as many rows as the student's, and any d'. All four are promoted
            to one dtype.
        normalize: l2-normalize all four first.
        others: see `clipfast.contrastive_loss`.

    Returns:
        A 0-D tensor, float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: an argument is not as stated; the text names it. Nothing has been computed by then.
            In a group the ranks that wait for this one raise ValueError too.
    """
    ranks = _ranks_of(group)
    with telling(ranks, image_features, equal_shards):
        _check_common(normalize, grad_reduction, scheme, deterministic)
        fewest_rows = 0 if ranks else 1
        x, y = arguments.matched_features(image_features, text_features, fewest_rows=fewest_rows)
        names = ("teacher_image_features", "teacher_text_features")
        teacher = arguments.matched_features(teacher_image_features, teacher_text_features, names, fewest_rows)
        for name, theirs, own in zip(names, teacher, (x, y), strict=True):
            if len(theirs) != len(own):
                raise ValueError(f"{name}: got {len(theirs)} rows; accepted are the student's {len(own)}")
            if theirs.device != own.device:
                raise ValueError(f"{name}: is on {theirs.device}; the student's are on {own.device}")
        dtype = torch.promote_types(x.dtype, teacher[0].dtype)
        x, y, teacher_x, teacher_y = (t.to(dtype) for t in (x, y, *(t.detach() for t in teacher)))
        scale, _ = _scalars(x, logit_scale)
        teacher_scale = arguments.scalar("teacher_logit_scale", teacher_logit_scale, scale.dtype, x.device).detach()
        backend = _select(x, y, backend, {DISTILLATION})
    both = x, y, scale, teacher_x, teacher_y, teacher_scale
    if ranks is not None:
        from clipfast import distributed

        options = distillation.Options(normalize, backend)
        group_options = GroupOptions(ranks, grad_reduction, scheme, equal_shards)
        return distributed.distillation_loss(  # type: ignore[no-any-return]
            *both, options, group_options
        )
    loss, *_ = operators.distillation_loss(*both, _wants_gradients(x, y, scale), normalize, backend)
    return loss


def _with_bias_of_candidates(
    x: Tensor,  # [n, d]
    y: Tensor,  # [n, d]
    logit_scale: Tensor | float,
    logit_bias: Tensor,  # [n]
    direction: str,
    *,
    normalize: bool,
    **options: Any,
) -> Tensor:
    """`contrastive_loss` with a bias for each candidate: a column more of the features, for one direction at a time."""
    if direction == BOTH:
        parts: list[Any] = [
            _with_bias_of_candidates(x, y, logit_scale, logit_bias, one, normalize=normalize, **options)
            for one in (IMAGE_TO_TEXT, TEXT_TO_IMAGE)
        ]
        losses, metrics = zip(*parts, strict=True) if options["return_metrics"] else (parts, ())
        loss = torch.stack(losses)
        loss = loss.mean() if options["reduction"] == MEAN else loss
        return (loss, metrics[0] | metrics[1]) if metrics else loss  # type: ignore[return-value]
    scale, _ = _scalars(x, logit_scale)
    if normalize:
        x, y = l2_normalize(x), l2_normalize(y)
    one, bias = scale.new_ones(len(x), 1), logit_bias.to(scale.dtype)[:, None]
    extra = (one, bias) if direction == IMAGE_TO_TEXT else (bias, one)
    x, y = (torch.cat((t, column), dim=1) for t, column in zip((scale * x, y), extra, strict=True))
    return contrastive_loss(x, y, 1.0, direction=direction, **options)


def recalls(
    row_above: Tensor,  # [n]
    col_above: Tensor,  # [n]
    direction: str = BOTH,
    group: Any = None,
) -> dict[str, Tensor]:
    """Recall at METRIC_KS of the counts of what is at or above a match, over the ranks of a group."""
    counts = {IMAGE_TO_TEXT: row_above, TEXT_TO_IMAGE: col_above}
    names = counts if direction == BOTH else (direction,)
    hits = {f"{name}_R@{k}": (counts[name] < k).float().sum() for name in names for k in METRIC_KS}
    totals = torch.stack((*hits.values(), torch.full_like(next(iter(hits.values())), row_above.shape[0])))
    if group is not None:
        totals = Ranks.of(group).sum(totals)
    return dict(zip(hits, totals[:-1] / totals[-1], strict=True))


def _ranks_of(group: Any) -> Any:
    """The group that the loss is taken over, None for this process's own rows, which in a larger job is told once."""
    if group is None:
        warn_of_a_local_loss()
    return arguments.process_group(group)


def _check_common(normalize: object, grad_reduction: object, scheme: object, deterministic: object) -> None:
    """The options that all losses have."""
    arguments.flag("deterministic", False if deterministic is None else deterministic)
    arguments.choice("grad_reduction", grad_reduction, GRAD_REDUCTIONS)
    arguments.choice("scheme", scheme, SCHEMES)
    arguments.flag("normalize", normalize)


def telling(group: Any, image_features: object, equal_shards: bool) -> AbstractContextManager[None]:
    """An error in the arguments is told to the other ranks, which wait for this one."""
    if group is None:
        return nullcontext()
    arguments.flag("equal_shards", equal_shards)
    return refusing(group, arguments.device_of(image_features), equal_shards)


def _biases_of_candidates(logit_bias: object, x: Tensor, y: Tensor) -> Tensor | None:  # [n]
    """The bias, if it is one for each candidate, as open_clip's ClipLoss takes a tensor [n]."""
    if isinstance(logit_bias, Tensor) and len(x) > 1 and logit_bias.shape == x.shape[:1] == y.shape[:1]:
        return logit_bias
    return None


def _scalars(x: Tensor, logit_scale: object, logit_bias: object = 0.0) -> tuple[Tensor, Tensor]:
    """logit_scale and logit_bias, 0-D, as the operators take them."""
    dtype = accumulation_dtype(x.dtype)
    return (
        arguments.scalar("logit_scale", logit_scale, dtype, x.device),
        arguments.scalar("logit_bias", logit_bias, dtype, x.device),
    )


def _select(x: Tensor, y: Tensor, backend: str, needs: set[str]) -> str:
    n, m = (max(1, t.shape[0]) for t in (x, y))  # a rank of several may have no rows
    problem = Problem(n, m, x.shape[1], x.dtype, x.device, frozenset(needs))
    return dispatch.select(problem, arguments.backend_name(backend))


def _wants_gradients(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
