"""The losses as functions: check the arguments, then compute."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from clipfast import arguments, calls, dispatch, distillation, operators, sigmoid
from clipfast.block import IGNORE, SAME_IDS
from clipfast.problem import DISTILLATION, IDS, SIGMOID
from clipfast.projected import Projection
from clipfast.schemes import GroupOptions
from clipfast.softmax import BOTH, MEAN


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
    keep_bytes: int | None = None,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:  # 0-D; with return_metrics (Tensor, dict of 0-D tensors)
    """CLIP's symmetric cross-entropy over the batch, without ever storing the n*m logits.

    Equal to (Radford et al. 2021, arXiv:2103.00020, figure 3):

        logits = logit_scale * image_features @ text_features.T + logit_bias          # [n, m], never stored
        labels = torch.arange(n)
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.T[:n], labels)) / 2

    in value and in the gradients of all four inputs. Forward and backward together cost four n*m*d matrix products
    and O((n + m) d) memory, three where the logits of a small batch fit a constant (`keep_bytes`) and are held.
    Logits and sums are float32 (float64 for float64 features), also under autocast.

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
        keep_bytes: so many bytes of logits may be held. Where all of this process's fit, in a group those of its own
            images with all texts, they are not computed again for the gradients, with the same result to the last bit,
            of `triton` to a rounding. `cpu` forms the gradients of the mean of both directions with the loss then, if
            any is wanted, and the backward pass only scales them. None for the environment variable
            CLIPFAST_KEEP_BYTES, or 80 MiB, of `triton` where products are exact float32 and else 0, which never
            holds them.
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
    return calls.contrastive_loss(
        image_features, text_features, logit_scale, logit_bias,
        normalize=normalize, label_smoothing=label_smoothing, direction=direction, reduction=reduction,
        image_ids=image_ids, text_ids=text_ids, same_id=same_id, return_metrics=return_metrics, group=group,
        grad_reduction=grad_reduction, scheme=scheme, equal_shards=equal_shards, keep_bytes=keep_bytes,
        deterministic=deterministic, backend=backend,
    )  # fmt: skip


DEFAULTS: dict[str, Any] = {
    p.name: p.default for p in inspect.signature(contrastive_loss).parameters.values() if p.kind is p.KEYWORD_ONLY
}


def projected_contrastive_loss(
    image_features: Tensor,  # [n, d_i]
    text_features: Tensor,  # [m, d_t]
    w_i: Tensor,  # [d_i, d]
    w_t: Tensor,  # [d_t, d]
    logit_scale: Tensor | float,  # exp(t)
    logit_bias: Tensor | float | None = None,
    *,
    b_i: Tensor | None = None,  # [d]
    b_t: Tensor | None = None,  # [d]
    **options: Any,
) -> Tensor:  # as contrastive_loss
    """CLIP's loss from the encoders' outputs on: project, normalize, multiply, scale (Radford et al. 2021, figure 3).

    Equal to, in value and in the gradients of all inputs,

        contrastive_loss(image_features @ w_i + b_i, text_features @ w_t + b_t, logit_scale, logit_bias,
                         normalize=True, **options)

    in one operation: `triton` forms the rows' norms in the epilogue of the projection's product, `cpu` in one pass over
    the rows, both take them as factors of the logits, and no normalized copy is stored. A projection's backward
    products are made where its features or its matrix want a gradient. With a group, and with a bias for each
    candidate, it is the composition above. All inputs are promoted to one dtype, as by torch; under autocast rows are
    projected in autocast's dtype.

    Args:
        w_i, w_t: the projections of both, to one width d; of any strides.
        b_i, b_t: added to the projected rows, if given.
        options: the keyword options of `clipfast.contrastive_loss`, but for `normalize`.

    Returns:
        What `clipfast.contrastive_loss` returns. Gradients have their input's dtype.

    Raises:
        TypeError, ValueError: an argument is not as stated; the text names it. Nothing has been computed by then.
            In a group the ranks that wait for this one raise ValueError too.
    """
    if "normalize" in options:
        raise TypeError("normalize: not an option; projected features are always normalized")
    for name in options:
        if name not in DEFAULTS:
            raise TypeError(f"{name}: not an option; accepted are {', '.join(DEFAULTS)}")
    images, texts = Projection(image_features, w_i, b_i), Projection(text_features, w_t, b_t)
    return calls.contrastive_loss(images, texts, logit_scale, logit_bias, **(DEFAULTS | options | {"normalize": True}))


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
    ranks = calls.ranks_of(group)
    with calls.telling(ranks, image_features, equal_shards):
        calls.check_common(normalize, grad_reduction, scheme, deterministic)
        arguments.choice("same_id", same_id, SAME_IDS)
        x, y = arguments.matched_features(image_features, text_features, fewest_rows=0 if ranks else 1)
        scale = calls.scalar_of(x, "logit_scale", logit_scale)
        bias = calls.scalar_of(x, "logit_bias", logit_bias)
        ids = arguments.ids(image_ids, text_ids, x, y)
        backend = dispatch.select(calls.problem_of(x, y, {SIGMOID} if ids[0] is None else {SIGMOID, IDS}), backend)
    options = sigmoid.Options(normalize, same_id, backend)
    if ranks is not None:
        from clipfast import distributed

        group_options = GroupOptions(ranks, grad_reduction, scheme, equal_shards)
        return distributed.siglip_loss(  # type: ignore[no-any-return]
            x, y, scale, bias, *ids, options, group_options
        )
    wanted, numbers = calls.wants_gradients(x, y, scale, bias), arguments.numbered(*ids)
    loss, *_ = operators.siglip_loss(x, y, scale, bias, *numbers, wanted, options)
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
    ranks = calls.ranks_of(group)
    with calls.telling(ranks, image_features, equal_shards):
        calls.check_common(normalize, grad_reduction, scheme, deterministic)
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
        scale = calls.scalar_of(x, "logit_scale", logit_scale)
        teacher_scale = arguments.scalar("teacher_logit_scale", teacher_logit_scale, scale.dtype, x.device).detach()
        backend = dispatch.select(calls.problem_of(x, y, {DISTILLATION}), backend)
    both = x, y, scale, teacher_x, teacher_y, teacher_scale
    options = distillation.Options(normalize, backend)
    if ranks is not None:
        from clipfast import distributed

        group_options = GroupOptions(ranks, grad_reduction, scheme, equal_shards)
        return distributed.distillation_loss(  # type: ignore[no-any-return]
            *both, options, group_options
        )
    loss, *_ = operators.distillation_loss(*both, calls.wants_gradients(x, y, scale), options)
    return loss
