from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class Error(ValueError):
    """Say in one sentence what is wrong with a file, without its path, or with a call."""

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

# fp32 operations on one core. Addresses are of fp32 or int64 elements, 0 for an absent tensor;
# fastsafe/model/cpu_ops.py checks them and the sizes. Strides are in elements.

Matrix = tuple[int, int, int, int, int]
"""Address, rows, columns, stride of a row, stride of a column."""

def instruction_set() -> str:
    """Return the instruction set in use: "avx512", "avx2" or "baseline"."""

def use_instruction_set(name: str) -> bool:
    """Choose another instruction set for tests; return False if the CPU lacks it."""

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

def paged_attention(
    out: int,
    keys: int,
    values: int,
    q: int,
    k: int,
    v: int,
    starts: int,
    positions: int,
    cache_slots: int,
    table: int,
    rows: int,
    width: int,
    heads: int,
    kv_heads: int,
    dim: int,
    q_row: int,
    kv_row: int,
    key_page: int,
    value_page: int,
    scale: float,
    cap: float,
    window: int,
) -> None:
    """Write keys and values to their pages and attend from every token over its row's context."""

class Patches:
    """Changes of an adapter to ``count`` linears, by layer * 4 + (qkv, o, gate_up, down)."""

    def __init__(self, count: int) -> None: ...
    def replace(self, index: int, weight: int) -> None: ...
    def add(
        self, index: int, a: int, rank: int, parts: list[tuple[int, int, int, int, int]]
    ) -> None:
        """Parts: begin and end of the columns, first and last row of A, address of B."""

class Layer:
    """Addresses of a layer's weights."""

    def __init__(
        self, linears: list[tuple[int, int, int, int]], norms: list[int], window: int, rotation: int
    ) -> None:
        """Linears: weight, bias, out, in of each."""

class Decoder:
    """A decoder's forward pass over packed tokens in pages; see csrc/decoder.hpp."""

    def __init__(
        self,
        vocab: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        dim: int,
        eps: float,
        scale: float,
        cap: float,
        embedding_scale: float,
        residual_scale: float,
        one_plus: bool,
        gelu: bool,
        norms_projection: bool,
        layers: list[Layer],
        embedding: int,
        final_norm: int,
    ) -> None: ...
    @staticmethod
    def workspace_bytes(
        hidden: int,
        intermediate: int,
        heads: int,
        kv_heads: int,
        dim: int,
        tokens: int,
        itemsize: int,
    ) -> int:
        """Return the bytes of a step's buffers for elements of ``itemsize`` bytes."""
    def forward(
        self,
        out: int,
        token_ids: int,
        tokens: int,
        keep: int,
        kept: int,
        segments: list[tuple[Patches | None, int, int]],
        rotations: list[tuple[int, int, int, int]],
        starts: int,
        positions: int,
        cache_slots: int,
        table: int,
        rows: int,
        width: int,
        keys: int,
        values: int,
        key_page: int,
        value_page: int,
        key_layer: int,
        value_layer: int,
        threads: int,
    ) -> None:
        """Segments: patches, end, kept end. Rotations: cos, sin, stride of a row, columns."""

# The batch of the engine; csrc/batch.hpp defines its terms.

Ints = NDArray[np.int64]

class StepPlan:
    """The tables of a step: packed tokens, rows sorted by adapter slot."""

    @property
    def token_ids(self) -> Ints: ...
    @property
    def positions(self) -> Ints: ...
    @property
    def cache_slots(self) -> Ints: ...
    @property
    def context_lens(self) -> Ints: ...
    @property
    def handles(self) -> Ints: ...
    @property
    def starts(self) -> Ints: ...
    @property
    def keep(self) -> Ints: ...
    @property
    def kept_handles(self) -> Ints: ...
    @property
    def kept_stamps(self) -> Ints: ...
    @property
    def targets(self) -> Ints: ...
    @property
    def preempted(self) -> Ints: ...
    @property
    def segments(self) -> Ints: ...
    @property
    def copies(self) -> Ints: ...
    @property
    def table(self) -> NDArray[np.int32]: ...

class Batch:
    """Waiting and running rows, their pages, and the prefix index of published pages."""

    def __init__(
        self,
        pages: int,
        page_tokens: int,
        rows: int,
        prefix_cache: bool,
        separate_decode_step: bool,
        recompute_beyond: int,
    ) -> None: ...
    def add(
        self,
        adapter_slot: int,
        cache_namespace: int,
        tokens: Sequence[int] | NDArray[np.int32],
        max_tokens_total: int,
        prefill_until: int,
        logits_from: int,
    ) -> int: ...
    def admit(self, handle: int) -> int:
        """Return the tokens found in the cache; -1: too few pages; -2: wait for a running row."""
    def plan(self, prefill: bool, decode: bool, budget: int) -> StepPlan: ...
    def append(
        self,
        handles: Ints,
        stamps: Ints,
        ids: Ints,
        logprobs: NDArray[np.float32] | None,
        finite: NDArray[np.bool_],
        stops: NDArray[np.bool_],
    ) -> list[int]:
        """Return handles and endings of rows that ended: 0 stop, 1 length, 2 error, 3 scored."""
    def record(
        self,
        handles: Ints,
        stamps: Ints,
        logprobs: NDArray[np.float32],
        greedy: NDArray[np.bool_],
    ) -> list[int]: ...
    def remove(self, handle: int) -> None: ...
    def preempt_all(self) -> None: ...
    def evict_all(self) -> None: ...
    def tokens(self, handle: int) -> list[int]: ...
    def logprobs(self, handle: int) -> list[float]: ...
    def is_greedy(self, handle: int) -> bool: ...
    def check(self) -> str: ...
    @property
    def running(self) -> int: ...
    @property
    def available(self) -> int: ...
