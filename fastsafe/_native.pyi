class Error(ValueError):
    """A file is malformed or unreadable; the message does not name it."""

class File:
    """An open regular file, read by pread from several threads with the GIL released."""

    def __init__(self, path: bytes) -> None: ...
    @property
    def size(self) -> int: ...
    def header(
        self,
    ) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], dict[str, str], int]:
        """Tensors by name (dtype, shape, begin, end), metadata, offset of the data in bytes."""
    def read_into(
        self, address: int, capacity: int, ranges: list[tuple[int, int, int]], threads: int = 0
    ) -> None:
        """Fill memory at ``address``, which must hold ``capacity`` bytes.

        Ranges are (offset in the file, offset in the memory, bytes); 0 threads means one per core.
        """
    def read_bytes(self, offset: int, bytes: int) -> bytes: ...

# fp32 operations on one core. Addresses are of fp32 or int64 elements, 0 where there is none; they
# and the sizes are not checked: fastsafe/model/cpu.py does. Strides are in elements.

Matrix = tuple[int, int, int, int, int]
"""Address, rows, columns, stride of a row, stride of a column."""

def instruction_set() -> str:
    """Name what the operations run on: "avx512", "avx2" or "baseline"."""

def use_instruction_set(name: str) -> bool:
    """Run on another set; False where the CPU lacks it. For tests."""

def linear(
    y: int,
    y_row: int,
    accumulate: bool,
    terms: list[tuple[Matrix, Matrix]],
    bias: int,
    threads: int,
) -> None:
    """Write or add the sum of x w^T over the terms (x, w), plus the bias."""

def norm(
    y: int,
    h: int,
    r: int,
    x: int,
    residual: int,
    w: int,
    rows: int,
    columns: int,
    alpha: float,
    eps: float,
    one_plus: bool,
) -> None: ...
def norm_backward(
    dx: int,
    dy: int,
    dh: int,
    h: int,
    r: int,
    w: int,
    rows: int,
    columns: int,
    one_plus: bool,
) -> None: ...
def gated(y: int, gate_up: int, rows: int, columns: int, gelu: bool) -> None: ...
def gated_backward(
    d_gate_up: int, dy: int, gate_up: int, rows: int, columns: int, gelu: bool
) -> None: ...
def rope(
    y: int,
    y_row: int,
    x: int,
    x_row: int,
    cos: int,
    sin: int,
    table_row: int,
    rows: int,
    heads: int,
    dim: int,
    rotated: int,
    back: bool,
) -> None: ...

class Attention:
    """Causal attention within each of several sequences."""

    def __init__(
        self,
        starts: int,
        sequences: int,
        heads: int,
        kv_heads: int,
        dim: int,
        q_row: int,
        kv_row: int,
        scale: float,
        cap: float,
        window: int,
    ) -> None: ...
    def forward(self, out: int, scales: int, q: int, k: int, v: int) -> None: ...
    def backward(
        self,
        dq: int,
        dk: int,
        dv: int,
        d_out: int,
        scales: int,
        q: int,
        k: int,
        v: int,
    ) -> None: ...

def decode(
    out: int,
    q: int,
    keys: int,
    values: int,
    lengths: int,
    rows: int,
    heads: int,
    kv_heads: int,
    dim: int,
    q_row: int,
    cache_row: int,
    cache_head: int,
    scale: float,
    cap: float,
    window: int,
) -> None:
    """Attend from one query per row over its first ``lengths`` cached keys."""
