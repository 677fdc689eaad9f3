"""Planner: batch sizes that fit into memory, and the faster way to apply adapters.

It computes with the shape of a model alone, so it also plans for checkpoints that are not loaded;
torch is imported only to ask a device for its free memory or to time it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import fastsafe._native as _native
from fastsafe.errors import UsageError
from fastsafe.model.config import ModelConfig

# Most rows of a step. On a CPU the activations of 256 rows stay in the L2 cache; on a GPU a step of
# 1024 rows is well past the point where it is limited by reading the weights.
MAX_ROWS = {"cpu": 256, "cuda": 1024}
# Prompt tokens of a step: the most, and the fewest that are worth a launch.
_PREFILL_TOKENS = {"cpu": (4096, 256), "cuda": (16384, 512)}
# Share of the budget kept free for allocator fragments, library workspaces and CUDA graphs. On
# a CPU the caller passes only a share of the host's memory as the budget.
_RESERVE = {"cpu": 0.0, "cuda": 0.06}
# Share of the memory beside the weights that activations may take before prefill steps get smaller.
_ACTIVATION_SHARE = 0.125
# Pages per page that running rows need: the others cache prefixes for later rows.
_CACHED_PREFIXES = 2
# Largest model on a CPU for which a merged copy of the weights is worth its memory.
MERGE_LIMIT_BYTES = 1 << 30
# Tokens that a row is assumed to generate.
_TOKENS_PER_ROW = 64

Mode = Literal["merged", "mixed"]


@dataclass(frozen=True, kw_only=True)
class LaneMemory:
    """Memory plan of one lane.

    Attributes:
        requested_rows: Maximum number of rows that were asked for.
        batch_size: Maximum number of rows of a step that fit, each with room for its whole context.
        num_pages: Pages of the KV cache.
        prefill_tokens: Most prompt tokens of a step.
        bytes: Bytes of weights, adapters, kv, activations and logits; their sum is within the
            budget.
        why: One sentence for users and the manifest.
    """

    requested_rows: int
    batch_size: int
    num_pages: int
    prefill_tokens: int
    bytes: Mapping[str, int]
    why: str


def weight_bytes(config: ModelConfig, itemsize: int) -> int:
    """Return the bytes of all weights, norms and biases included."""
    layer = 4 * config.hidden_size + 2 * (config.qkv_features + config.hidden_size)
    layer += 2 * config.intermediate_size
    return itemsize * (config.num_parameters + config.num_layers * layer + config.hidden_size)


def plan_memory(
    config: ModelConfig,
    *,
    itemsize: int,
    page_tokens: int,
    cache_itemsize: int | None = None,
    budget_bytes: int,
    device_kind: str,
    adapter_bytes: int = 0,
    batch_size: int | Literal["auto"] = "auto",
    context: int,
) -> LaneMemory:
    """Divide a budget among weights, adapters, KV cache, activations and logits.

    Args:
        config: Shape of the model.
        itemsize: Bytes of a weight, and of an activation.
        page_tokens: Tokens of a page.
        cache_itemsize: Bytes of an element of the cache; None: ``itemsize``.
        budget_bytes: Bytes to divide; includes the weights, even if they are loaded already.
        device_kind: "cpu" or "cuda".
        adapter_bytes: Bytes of all adapters and of merged copies of the weights.
        batch_size: Maximum number of rows of a step; "auto": ``MAX_ROWS``, or as many as fit.
        context: Tokens of the longest row, its completion included.

    Raises:
        UsageError: The model, or one row of this context, does not fit.
    """
    most, least = _PREFILL_TOKENS[device_kind]
    fixed = weight_bytes(config, itemsize) + adapter_bytes
    share = 1 - _RESERVE[device_kind]
    usable = int(budget_bytes * share)
    kv_itemsize = itemsize if cache_itemsize is None else cache_itemsize
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * kv_itemsize
    page = token * page_tokens
    row_pages = -(-context // page_tokens)
    # fp32 logits, their copy in the weights' dtype, and the sampler's copy
    row_logits = config.vocab_size * (2 * 4 + itemsize)
    prefill = most
    while prefill > least and _activations(config, prefill, itemsize) > _ACTIVATION_SHARE * max(
        0, usable - fixed
    ):
        prefill //= 2
    limit = MAX_ROWS[device_kind] if batch_size == "auto" else batch_size
    # a CPU runs prefill and decode in one step, a GPU in two
    step_tokens = prefill + limit if device_kind == "cpu" else max(prefill, limit)
    scratch = _activations(config, step_tokens, itemsize)
    room = usable - fixed - scratch
    rows = min(limit, room // (row_pages * page + row_logits))
    if rows < 1:
        need = fixed + scratch + row_pages * page + row_logits
        raise UsageError(
            f"memory: weights of {_gib(fixed - adapter_bytes)}, adapters of {_gib(adapter_bytes)},"
            f" activations of {_gib(scratch)} and one row of {context} tokens of"
            f" {_gib(row_pages * page + row_logits)} need {_gib(need)}, expected at most"
            f" {_gib(usable)}, which is {share:.0%} of what is free; use a smaller"
            " checkpoint, a smaller dtype or shorter rows"
        )
    pages = min(
        (room - rows * row_logits) // page, max(row_pages, _CACHED_PREFIXES * rows * row_pages)
    )
    parts = {
        "weights": fixed - adapter_bytes,
        "adapters": adapter_bytes,
        "kv": pages * page,
        "activations": scratch,
        "logits": rows * row_logits,
    }
    bound = "all that are asked for" if rows == limit else "all that fit"
    why = f"{rows} rows of {context} tokens, {bound} into {_gib(budget_bytes)}: " + ", ".join(
        f"{name} {_gib(size)}" for name, size in parts.items()
    )
    return LaneMemory(
        requested_rows=limit,
        batch_size=rows,
        num_pages=pages,
        prefill_tokens=prefill,
        bytes=parts,
        why=why,
    )


def _activations(config: ModelConfig, tokens: int, itemsize: int) -> int:
    return _native.Decoder.workspace_bytes(
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        tokens,
        itemsize,
    )


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


class Rates(NamedTuple):
    """Measured rates of a device, per second."""

    gemm_flops: float  # of a large product
    thin_flops: float  # of a product with an inner or outer size of 16, like LoRA's
    copy_bytes: float  # read and written, both counted


@lru_cache(maxsize=4)
def measure_rates(device: str) -> Rates:
    """Time a large product, a thin one and a copy, in fp32 on a CPU, bf16 on a GPU; cached."""
    import torch

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    n = 512 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    thin = torch.randn(16, n, device=device).to(dtype)
    big = torch.randn(1 << (22 if device == "cpu" else 28), device=device)
    target = torch.empty_like(big)

    def seconds(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(4):
            if device != "cpu":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            for _ in range(3):
                work()
            if device != "cpu":
                torch.cuda.synchronize(device)
            best = min(best, (time.perf_counter() - begin) / 3)
        return best

    return Rates(
        2 * n**3 / seconds(lambda: a @ a.T),
        2 * 16 * n**2 / seconds(lambda: a @ thin.T),
        2 * big.numel() * 4 / seconds(lambda: target.copy_(big)),
    )


def choose_adapters(
    rows_per_adapter: Sequence[int],
    *,
    config: ModelConfig,
    itemsize: int,
    lora_parameters: int,
    device_kind: str,
    strict: bool,
    batch_size: int,
    rates: Rates | None = None,
) -> tuple[Mode, str]:
    """Choose how adapters are applied: merged one after another, or mixed in one batch.

    Args:
        rows_per_adapter: Number of rows of each adapter, without the base's.
        config: Shape of the model.
        itemsize: Bytes of a weight.
        lora_parameters: Mean number of parameters of an adapter.
        device_kind: "cpu" or "cuda".
        strict: Whether bits must not depend on the workload. The two ways differ in bits, and
            measured rates differ from run to run, so the choice then depends on shape alone.
        batch_size: Maximum number of rows of a step.
        rates: Rates of the device; measured when None.

    Returns:
        The choice, and the reason in one sentence.
    """
    size = weight_bytes(config, itemsize)
    if strict:
        small = device_kind == "cpu" and size < MERGE_LIMIT_BYTES
        mode: Mode = "merged" if small else "mixed"
        return mode, (
            f"{mode}: {_gib(size)} of weights on {device_kind}, where merging is taken on a CPU"
            f" below {_gib(MERGE_LIMIT_BYTES)}; strict mode looks at nothing else"
        )
    rates = rates or measure_rates(device_kind)
    parameters = config.num_parameters

    def decode_seconds(rows: int, num_adapters: int) -> float:
        """Estimate the time to decode ``rows`` rows in full batches and a last one.

        A step takes the longer of reading the weights once and multiplying by them, and then the
        same for the adapters in it. KV cache and sampling cost the same either way.
        """
        total = 0.0
        for step_rows in filter(None, [batch_size] * (rows // batch_size) + [rows % batch_size]):
            read_s = parameters * itemsize / rates.copy_bytes
            step = max(read_s, 2 * parameters * step_rows / rates.gemm_flops)
            present = min(num_adapters, step_rows)
            read_s = present * lora_parameters * itemsize / rates.copy_bytes
            if num_adapters:
                step += max(read_s, 2 * lora_parameters * step_rows / rates.thin_flops)
            total += step * _TOKENS_PER_ROW
        return total

    merge_s = 2 * size / rates.copy_bytes  # read the weights and write the merged copy
    merged = sum(merge_s + decode_seconds(rows, 0) for rows in rows_per_adapter)
    mixed = decode_seconds(sum(rows_per_adapter), len(rows_per_adapter))
    mode = "merged" if merged < mixed else "mixed"
    return mode, (
        f"{mode}: {sum(rows_per_adapter)} rows of {len(rows_per_adapter)} adapters should take"
        f" {merged:.3g} s merged and {mixed:.3g} s mixed at {rates.gemm_flops / 1e9:.0f} GFLOP/s,"
        f" {rates.thin_flops / 1e9:.0f} in LoRA's products, and {rates.copy_bytes / 1e9:.0f} GB/s"
    )
