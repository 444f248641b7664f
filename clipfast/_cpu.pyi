# Addresses are data_ptr(), 0 where there is nothing; those of scalars are of 0-D tensors in the type that adds features
# up. csrc/block.h says what the nouns hold.

class Matrix:
    def __init__(self, data: int, rows: int, cols: int, row_stride: int, col_stride: int, factors: int = 0) -> None: ...

class Block:
    def __init__(
        self,
        dtype: str,
        product: str,
        x: Matrix,
        y: Matrix,
        scale: int = 0,
        bias: int = 0,
        diag_offset: int = 0,
        row_ids: int = 0,
        col_ids: int = 0,
        ignores_same_ids: bool = True,
    ) -> None: ...

class Matches:
    def __init__(self, rows: int = 0, cols: int = 0) -> None: ...

class Statistics:
    def __init__(
        self, row_lse: int, col_lse: int, positive: int, row_above: int = 0, col_above: int = 0, kept: int = 0
    ) -> None: ...

class Weights:
    def __init__(
        self,
        row_lse: int,
        row_weight: int,
        col_lse: int,
        col_weight: int,
        positive_weight: int,
        row_target: int = 0,
        col_target: int = 0,
        kept: int = 0,
    ) -> None: ...

class Gradients:
    def __init__(self, dx: int, dy: int, dtype: str, dscale: int, dbias: int = 0) -> None: ...

class Crosses:
    def __init__(self, rows: int, cols: int) -> None: ...

KEPT_HEAD: int
KEPT_PADDING: int

def getenv(name: str, /) -> str | None: ...
def release_workspace() -> None: ...
def instruction_sets() -> list[tuple[str, bool]]: ...
def forward(isa: str, block: Block, matches: Matches, out: Statistics, threads: int, /) -> None: ...
def matches(isa: str, block: Block, out: Matches, threads: int, /) -> None: ...
def backward(isa: str, block: Block, weights: Weights, out: Gradients, threads: int, /) -> None: ...
def sigmoid(
    isa: str, block: Block, unit: float, row_loss: int, out: Gradients | None, threads: int, /
) -> float: ...  # dbias
def distillation(
    isa: str,
    block: Block,
    weights: Weights,
    teacher: Block,
    teacher_weights: Weights,
    crosses: Crosses,
    out: Gradients | None,
    threads: int,
    /,
) -> None: ...
def workspace_bytes(
    isa: str,
    block: Block,
    *,
    ranks: bool = False,
    symmetric: bool = False,
    sigmoid: bool = False,
    distillation: bool = False,
    threads: int,
) -> int: ...
def symmetric(isa: str, block: Block, loss: int, out: Gradients, threads: int, /) -> None: ...
def symmetric_cross_entropy(row_lse: int, col_lse: int, positive: int, n: int, loss: int, dtype: str, /) -> None: ...
def symmetric_gradients(
    isa: str, block: Block, statistics: Statistics, gradient: float, out: Gradients, threads: int, /
) -> None: ...
def multiply_adds(isa: str, dtype: str, rounds: int, /) -> float: ...
def exp2(isa: str, dtype: str, x: int, out: int, count: int, /) -> None: ...
def softplus_and_sigmoid(isa: str, dtype: str, x: int, softplus: int, sigmoid: int, count: int, /) -> None: ...
