"""The public functions' arguments: errors name the argument, what came and what is accepted."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipfast.block import number_ids
from clipfast.problem import DTYPES

T = TypeVar("T")

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def remembered(check: Callable[..., T]) -> Callable[..., T]:
    """The check, which remembers what it gave for the same arguments: a training asks the same at each step.

    What it raises is not remembered. torch.compile traces through the check itself.
    """
    known = functools.lru_cache(maxsize=1024, typed=True)(check)

    @functools.wraps(check)
    def remembering(*values: Any) -> T:
        if not torch.compiler.is_compiling():
            try:
                return known(*values)
            except TypeError:  # a value that cannot be hashed, or the check's own
                pass
        return check(*values)

    return remembering


NAMES = ("image_features", "text_features")
IMAGE_NAMES, TEXT_NAMES = (NAMES[0], "w_i", "b_i"), (NAMES[1], "w_t", "b_t")  # of a projection


def matched_features(
    image_features: object, text_features: object, names: tuple[str, str] = NAMES, fewest_rows: int = 1
) -> tuple[Tensor, Tensor]:
    """`feature_pair`, with a text for each image at least."""
    images, texts = feature_pair(image_features, text_features, names, fewest_rows)
    n, m = images.shape[0], texts.shape[0]
    if m < n:
        raise ValueError(f"{names[1]}: got {m} rows; accepted are at least the {n} rows of {names[0]}")
    return images, texts


def feature_pair(
    image_features: object, text_features: object, names: tuple[str, str] = NAMES, fewest_rows: int = 1
) -> tuple[Tensor, Tensor]:
    """Both feature matrices, checked, resolved to plain memory and promoted to one dtype."""
    images, texts = features(names[0], image_features, fewest_rows), features(names[1], text_features, fewest_rows)
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"{names[1]}: got shape {shape(texts)}; its d must be that of {names[0]}, {shape(images)}")
    _check_device(names[1], texts, names[0], images)
    if images.dtype == texts.dtype:
        return images, texts
    promoted = torch.promote_types(images.dtype, texts.dtype)
    return images.to(promoted), texts.to(promoted)


def features(name: str, value: object, fewest_rows: int = 1) -> Tensor:  # [rows, d]
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type_name(value)}; accepted is a torch.Tensor")
    if value.is_nested:
        raise TypeError(f"{name}: got a nested tensor; accepted is a dense (strided) tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}; accepted is a dense (strided) tensor")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: got {value.dtype}; accepted are {', '.join(map(str, DTYPES))}")
    if value.ndim != 2:
        raise ValueError(f"{name}: got shape {shape(value)}; accepted is [rows, d]")
    if value.shape[0] < fewest_rows or value.shape[1] == 0:
        raise ValueError(f"{name}: got shape {shape(value)}; at least one row and one column are needed")
    return plain(name, value)


def projection(
    given: tuple[object, object, object], name: str, matrix_name: str, bias_name: str, fewest_rows: int = 1
) -> tuple[Tensor, Tensor, Tensor | None]:  # [rows, d], [d, d'], [d'] or None
    """Features, the matrix and the bias of their projection, checked."""
    rows, weights = features(name, given[0], fewest_rows), features(matrix_name, given[1])
    if rows.shape[1] != weights.shape[0]:
        raise ValueError(
            f"{matrix_name}: got shape {shape(weights)}; its rows must be the columns of {name}, {shape(rows)}"
        )
    _check_device(matrix_name, weights, name, rows)
    bias = given[2]
    if bias is None:
        return rows, weights, None
    if not isinstance(bias, Tensor):
        raise TypeError(f"{bias_name}: got {type_name(bias)}; accepted is a torch.Tensor or None")
    if bias.dtype not in DTYPES:
        raise TypeError(f"{bias_name}: got {bias.dtype}; accepted are {', '.join(map(str, DTYPES))}")
    if bias.shape != weights.shape[1:]:
        raise ValueError(
            f"{bias_name}: got shape {shape(bias)}; accepted is one number for each column of {matrix_name}"
        )
    _check_device(bias_name, bias, name, rows)
    return rows, weights, plain(bias_name, bias)


def _check_device(name: str, value: Tensor, others_name: str, others: Tensor) -> None:
    if value.device != others.device:
        raise ValueError(
            f"{name}: is on {value.device}; {others_name} is on {others.device}, both must be on one device"
        )


def plain(name: str, value: Tensor) -> Tensor:
    """The tensor with its lazy negations carried out and its lazy zeros in memory: kernels read memory."""
    if torch.compiler.is_compiling():
        return value
    if torch._is_functional_tensor(value):
        raise TypeError(f"{name}: got a functional tensor (torch.func.functionalize); accepted is one in plain memory")
    if value._is_zerotensor():
        return value.clone()
    return value.resolve_neg() if value.is_neg() else value


def scalar(name: str, value: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-D tensor of the given dtype on the given device, differentiable where value is; inf beyond the dtype."""
    if isinstance(value, Tensor):
        if value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{name}: got a tensor of {value.dtype}; accepted is a real one")
        if value.numel() != 1:
            raise ValueError(f"{name}: got shape {shape(value)}; accepted is a single element")
        if value.ndim or value.dtype != dtype or value.device != device:
            value = value.reshape(()).to(device=device, dtype=dtype)
        return plain(name, value)
    if isinstance(value, bool) or not isinstance(value, (float, Real)):  # the first is found sooner
        raise TypeError(f"{name}: got {type_name(value)}; accepted is a number or a tensor of one element")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond float64
        number = -math.inf if str(value).startswith("-") else math.inf
    if abs(number) > torch.finfo(dtype).max:
        number = math.copysign(math.inf, number)
    return torch.scalar_tensor(number, dtype=dtype, device=device)


def ids(
    image_ids: Tensor | None, text_ids: Tensor | None, images: Tensor, texts: Tensor
) -> tuple[Tensor | None, Tensor | None]:  # [n], [m], int64
    """Ids of both sides; text_ids are image_ids where they are left out and the rows are as many."""
    if image_ids is None:
        if text_ids is not None:
            raise ValueError("image_ids: got None with text_ids; accepted are both, or image_ids alone")
        return None, None
    _check_ids("image_ids", image_ids, images)
    if text_ids is None:
        if len(images) != len(texts):
            raise ValueError(
                f"text_ids: got None; with {len(images)} images and {len(texts)} texts the texts' own are needed"
            )
        text_ids = image_ids
    _check_ids("text_ids", text_ids, texts)
    return image_ids.long(), text_ids.long()


def numbered(
    row_ids: Tensor | None, col_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:  # [n], [m], int64 -> int32
    """`ids` as a block takes them."""
    return (None, None) if row_ids is None or col_ids is None else number_ids(row_ids, col_ids)


def _check_ids(name: str, value: object, rows: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type_name(value)}; accepted is a torch.Tensor of integers")
    if value.dtype not in ID_DTYPES:
        raise TypeError(f"{name}: got {value.dtype}; accepted are {', '.join(map(str, ID_DTYPES))}")
    if value.shape != rows.shape[:1]:
        raise ValueError(f"{name}: got shape {shape(value)}; accepted is one id for each of the {len(rows)} rows")
    if value.device != rows.device:
        raise ValueError(f"{name}: is on {value.device}; the features are on {rows.device}, both must be on one device")


def choice(name: str, value: object, accepted: Sequence[str]) -> None:
    if value not in accepted:
        *first, last = map(repr, accepted)
        raise ValueError(f"{name}: got {value!r}; accepted are {', '.join(first)} and {last}")


def fraction(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {type_name(value)}; accepted is a number from 0 to 1")
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name}: got {value}; accepted is a number from 0 to 1")
    return number


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type_name(value)}; accepted is True or False")


def positive_integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: got {type_name(value)}; accepted is an integer from 1")
    if value < 1:
        raise ValueError(f"{name}: got {value}; accepted is an integer from 1")
    return int(value)


def bytes_or_none(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 0):
        raise TypeError(f"{name}: got {value!r}; accepted is a number of bytes, or None")


def backend_name(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"backend: got {type_name(value)}; accepted is a name from clipfast.backends()")
    return value


def process_group(value: object) -> torch.distributed.ProcessGroup | None:
    """The group, None if it has no other process."""
    if value is None:
        return None
    if value == torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this process is not in it; accepted is a group that it is in, or None")
    if not isinstance(value, torch.distributed.ProcessGroup):
        raise TypeError(f"group: got {type_name(value)}; accepted is a torch.distributed.ProcessGroup or None")
    return value if torch.distributed.get_world_size(value) > 1 else None


def device_of(features: object) -> torch.device:
    """From which the ranks can send, also where the features are none."""
    return features.device if isinstance(features, Tensor) else torch.device("cpu")


def options_of(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options, refused if one is no keyword option of the function; ids come with each batch."""
    parameters = inspect.signature(function).parameters.values()
    accepted = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("image_ids", "text_ids")]
    for name in options:
        if name not in accepted:
            raise TypeError(f"{name}: not an option; accepted are {', '.join(accepted)}")
    return options


def shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def type_name(value: object) -> str:
    return type(value).__name__
