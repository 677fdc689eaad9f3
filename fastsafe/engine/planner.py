"""What fits and what is faster: sizes of a batch, and how adapters are applied.

Arithmetic over a model's shape; torch is imported only where a device is asked for its free
memory or timed.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from fastsafe.errors import UsageError
from fastsafe.model.config import ModelConfig

# Most rows of a step. On a CPU a step's activations stay in the L2 cache; on a GPU 1024 rows are
# well past where reading the weights stops being the limit.
MAX_ROWS = {"cpu": 256, "cuda": 1024}
# Prompt tokens of a step: the most, and the least that is still worth a launch.
_PREFILL_TOKENS = {"cpu": (4096, 256), "cuda": (16384, 512)}
# Held back for the allocator's fragments, the libraries' workspaces and CUDA graphs. Of a host's
# memory the caller plans with a part alone.
_RESERVE = {"cpu": 0.0, "cuda": 0.06}
# Most of what the weights leave that activations may take before prefill is cut smaller.
_ACTIVATION_SHARE = 0.125
# Pages beyond what the rows themselves need keep prefixes that later rows share.
_CACHED_PREFIXES = 2
# A merged copy of the weights is not worth its memory on a CPU above this size.
MERGE_LIMIT_BYTES = 1 << 30
# Tokens that a row is expected to generate where the caller does not say.
_TOKENS_PER_ROW = 64

Mode = Literal["merged", "mixed"]


@dataclass(frozen=True, kw_only=True)
class LaneMemory:
    """Sizes that fit into a budget.

    Attributes:
        batch_size: Most rows of a step, each with room for its whole context.
        num_pages: Pages of the cache.
        prefill_tokens: Most prompt tokens of a step.
        bytes: Of weights, adapters, kv, activations and logits; their sum is within the budget.
        why: One sentence for people and the manifest.
    """

    batch_size: int
    num_pages: int
    prefill_tokens: int
    bytes: Mapping[str, int]
    why: str


def weight_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of all weights, with norms and biases."""
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
    """Share a budget among weights, adapters, cache, activations and logits.

    Args:
        config: Shape of the model.
        itemsize: Bytes of a weight, and of an activation.
        page_tokens: Tokens of a page.
        cache_itemsize: Bytes of a number in the cache; None: that of the weights.
        budget_bytes: What may be taken, the weights included even when they are loaded.
        device_kind: "cpu" or "cuda".
        adapter_bytes: Of all adapters, and of merged copies of the weights.
        batch_size: Most rows of a step; "auto" takes as many as are worth it and fit.
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
    # fp32 logits, their copy in the weights' dtype, and what the sampler keeps of them
    row_logits = config.vocab_size * (2 * 4 + itemsize)
    prefill = most
    while prefill > least and _activations(config, prefill, itemsize) > _ACTIVATION_SHARE * max(
        0, usable - fixed
    ):
        prefill //= 2
    wanted = MAX_ROWS[device_kind] if batch_size == "auto" else batch_size
    # a CPU computes prompts and drawn tokens in one step, a GPU in two
    together = prefill + wanted if device_kind == "cpu" else max(prefill, wanted)
    scratch = _activations(config, together, itemsize)
    room = usable - fixed - scratch
    rows = min(wanted, room // (row_pages * page + row_logits))
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
    limit = "all that are asked for" if rows == wanted else "all that fit"
    why = f"{rows} rows of {context} tokens, {limit} into {_gib(budget_bytes)}: " + ", ".join(
        f"{name} {_gib(size)}" for name, size in parts.items()
    )
    return LaneMemory(
        batch_size=rows, num_pages=pages, prefill_tokens=prefill, bytes=parts, why=why
    )


def _activations(config: ModelConfig, tokens: int, itemsize: int) -> int:
    """Bytes of a step's tokens in a layer: residual, norm, output, what attention gives, and the
    widest of what comes between, which ``csrc/decoder.cpp`` has room for all at once."""
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    widest = max(3 * config.intermediate_size, config.qkv_features + 2 * heads)
    return tokens * itemsize * (3 * hidden + max(hidden, heads) + widest)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def available_bytes(device: str) -> int:
    """Bytes that this process can still take on a device.

    Args:
        device: "cpu", "cuda" or "cuda:N". On a CPU the limit of the control group counts, too.
    """
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return min([_host_bytes(Path("/proc/meminfo")), *_group_bytes(Path("/sys/fs/cgroup"))])


def _host_bytes(meminfo: Path) -> int:
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux


def _group_bytes(root: Path, membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What is left of every limit on this process's control group (version 2) and those above."""
    own = ""
    if membership.exists():
        lines = membership.read_text().splitlines()
        own = next((line[3:] for line in lines if line.startswith("0::")), "")
    found = []
    folder = root / own.strip("/")
    for group in (folder, *folder.parents):
        limit, used = group / "memory.max", group / "memory.current"
        if group.is_relative_to(root) and limit.is_file() and used.is_file():
            text = limit.read_text().strip()
            if text != "max":
                found.append(int(text) - int(used.read_text()) + _inactive(group))
    return found


def _inactive(group: Path) -> int:
    """Page cache that the kernel gives back when memory is asked for."""
    stat = group / "memory.stat"
    lines = stat.read_text().splitlines() if stat.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


class Rates(NamedTuple):
    """What a device does per second, measured."""

    gemm_flops: float  # large product
    thin_flops: float  # product with an inner or outer size of 16, as LoRA's are
    copy_bytes: float  # read and written, both counted


@lru_cache(maxsize=4)
def measure_rates(device: str) -> Rates:
    """Time a large product, a thin one and a copy in fp32 on a CPU, bf16 elsewhere; cached."""
    import torch

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    n = 512 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    thin = torch.randn(16, n, device=device).to(dtype)
    big = torch.randn(1 << (22 if device == "cpu" else 28), device=device)
    into = torch.empty_like(big)

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
        2 * big.numel() * 4 / seconds(lambda: into.copy_(big)),
    )


def choose_adapters(
    rows_per_adapter: Sequence[int],
    *,
    config: ModelConfig,
    itemsize: int,
    lora_parameters: int,
    device_kind: str,
    strict: bool,
    rates: Rates | None = None,
    batch_size: int | None = None,
) -> tuple[Mode, str]:
    """Decide how adapters are applied: merged one after another, or mixed in one batch.

    Args:
        rows_per_adapter: Rows of each adapter, the base's not counted.
        config: Shape of the model.
        itemsize: Bytes of a weight.
        lora_parameters: Of one adapter, on average.
        device_kind: "cpu" or "cuda".
        strict: Whether bits must not depend on the workload. They differ between the two ways,
            and a measured rate differs from run to run; so the choice is then by shape alone.
        rates: Of the device; measured when None.
        batch_size: Most rows of a step.

    Returns:
        The choice and the reason, one sentence.
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
    batch_size = batch_size or MAX_ROWS[device_kind]
    merged = sum(
        _merge_seconds(size, rates)
        + _decode_seconds(rows, batch_size, config, itemsize, lora_parameters, 0, rates)
        for rows in rows_per_adapter
    )
    mixed = _decode_seconds(
        sum(rows_per_adapter),
        batch_size,
        config,
        itemsize,
        lora_parameters,
        len(rows_per_adapter),
        rates,
    )
    mode = "merged" if merged < mixed else "mixed"
    return mode, (
        f"{mode}: {sum(rows_per_adapter)} rows of {len(rows_per_adapter)} adapters should take"
        f" {merged:.3g} s merged and {mixed:.3g} s mixed at {rates.gemm_flops / 1e9:.0f} GFLOP/s,"
        f" {rates.thin_flops / 1e9:.0f} in LoRA's products, and {rates.copy_bytes / 1e9:.0f} GB/s"
    )


def _merge_seconds(size: int, rates: Rates) -> float:
    """Read the weights, write the merged copy."""
    return 2 * size / rates.copy_bytes


def _decode_seconds(
    rows: int,
    batch_size: int,
    config: ModelConfig,
    itemsize: int,
    lora_parameters: int,
    num_adapters: int,
    rates: Rates,
) -> float:
    """Decode ``rows`` rows in full batches and a last one; ``num_adapters`` are mixed in.

    A step reads the weights once or multiplies by them, whichever takes longer, and then does the
    same for the adapters that are present. Cache and sampling are the same either way.
    """
    total = 0.0
    for step_rows in [batch_size] * (rows // batch_size) + [rows % batch_size]:
        if not step_rows:
            continue
        size = config.num_parameters
        step = max(size * itemsize / rates.copy_bytes, 2 * size * step_rows / rates.gemm_flops)
        if num_adapters:
            present = min(num_adapters, step_rows)
            bytes_read = present * lora_parameters * itemsize / rates.copy_bytes
            multiplied = 2 * lora_parameters * step_rows / rates.thin_flops
            step += max(bytes_read, multiplied)
        total += step * _TOKENS_PER_ROW
    return total
