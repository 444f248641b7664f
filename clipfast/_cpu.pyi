# csrc/block.h says what the nouns hold; `precision` is torch.get_float32_matmul_precision(), of float32.

from torch import Tensor

from clipfast.block import Block, Gradients, Matches, Statistics, Weights

KEPT_HEAD: int
KEPT_PADDING: int

def item(scalar: Tensor, /) -> float: ...  # of a 0-D tensor, float32 or float64
def getenv(*names: str) -> tuple[str | None, ...]: ...
def release_workspace() -> None: ...
def instruction_sets() -> list[tuple[str, bool]]: ...
def forward(block: Block, precision: str, threads: int, matches: Matches | None, out: Statistics, /) -> None: ...
def matches(block: Block, precision: str, threads: int, out: Matches, /) -> None: ...
def backward(block: Block, precision: str, threads: int, weights: Weights, out: Gradients, /) -> None: ...
def sigmoid(
    block: Block, precision: str, threads: int, unit: float, row_loss: Tensor, out: Gradients | None, /
) -> float: ...  # dbias
def distillation(
    block: Block,
    precision: str,
    threads: int,
    weights: Weights,
    teacher: Block,
    teacher_weights: Weights,
    row_cross: Tensor,
    col_cross: Tensor,
    out: Gradients | None,
    /,
) -> None: ...
def workspace_bytes(
    dtype: str,
    precision: str,
    n: int,
    m: int,
    d: int,
    *,
    norms: bool,
    ranks: bool,
    symmetric: bool,
    sigmoid: bool,
    distillation: bool,
    threads: int,
) -> int: ...
def symmetric(block: Block, precision: str, threads: int, loss: Tensor, out: Gradients, dbias: Tensor, /) -> None: ...
def symmetric_cross_entropy(statistics: Statistics, n: int, loss: Tensor, /) -> None: ...
def symmetric_gradients(
    block: Block,
    precision: str,
    threads: int,
    statistics: Statistics,
    gradient: float,
    out: Gradients,
    dbias: Tensor,
    /,
) -> None: ...
def multiply_adds(isa: str, dtype: str, rounds: int, /) -> float: ...
def exp2(isa: str, dtype: str, x: int, out: int, count: int, /) -> None: ...
def softplus_and_sigmoid(isa: str, dtype: str, x: int, softplus: int, sigmoid: int, count: int, /) -> None: ...
