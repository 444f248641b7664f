class Block:
    def __init__(
        self,
        *,
        dtype: str,
        product: str,
        n: int,
        m: int,
        d: int,
        x: int,
        x_row_stride: int,
        x_col_stride: int,
        y: int,
        y_row_stride: int,
        y_col_stride: int,
        scale: float,
        bias: float,
        diag_offset: int,
    ) -> None: ...

def instruction_sets() -> list[tuple[str, bool]]: ...
def forward(isa: str, block: Block, row_lse: int, col_lse: int, positive: int, threads: int) -> None: ...
def backward(
    isa: str,
    block: Block,
    row_lse: int,
    row_weight: int,
    col_lse: int,
    col_weight: int,
    positive_weight: int,
    dx: int,
    dy: int,
    threads: int,
) -> float: ...
def symmetric_cross_entropy(row_lse: int, col_lse: int, positive: int, n: int) -> float: ...
def symmetric_cross_entropy_weights(
    row_lse: int,
    col_lse: int,
    positive: int,
    n: int,
    m: int,
    gradient: float,
    row_weight: int,
    col_weight: int,
    positive_weight: int,
) -> None: ...
def workspace_bytes(isa: str, dtype: str, product: str, n: int, m: int, d: int, threads: int) -> int: ...
def exp2(isa: str, dtype: str, x: int, out: int, count: int) -> None: ...
