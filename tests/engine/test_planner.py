"""Sizes that fit, free memory, and the choice between merged and mixed adapters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastsafe
from fastsafe import _native
from fastsafe.engine import lane_pool, planner
from fastsafe.engine.planner import Rates, choose_adapters, plan_memory
from fastsafe.errors import UsageError
from fastsafe.io.checkpoint import Checkpoint
from fastsafe.model import ModelConfig, cpu_threads, weights
from fastsafe.model.transformer import Transformer

GIB = 1 << 30
LLAMA_8B = ModelConfig.from_json(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "8b",
)
LORA_R16 = 41_943_040  # parameters of a rank-16 adapter on all linear modules of that shape
H200 = Rates(gemm_flops=790e12, thin_flops=200e12, copy_bytes=4.3e12)


def plan(gib: float, **changes: Any) -> planner.LaneMemory:
    options: dict[str, Any] = {
        "itemsize": 2,
        "page_tokens": 64,
        "cache_itemsize": 2,
        "budget_bytes": int(gib * GIB),
        "device_kind": "cuda",
        "context": 600,
    }
    return plan_memory(LLAMA_8B, **(options | changes))


def test_the_weights_of_a_known_shape() -> None:
    assert planner.weight_bytes(LLAMA_8B, 2) == pytest.approx(16.06e9, rel=1e-3)


@pytest.mark.parametrize("gib", [8, 16])
def test_what_does_not_fit_is_refused_with_its_sizes(gib: int) -> None:
    with pytest.raises(UsageError, match=r"weights of 14\.96 GiB.*need 1[45]\.\d\d GiB") as error:
        plan(gib)
    assert f"at most {0.94 * gib:.2f} GiB" in str(error.value)


@pytest.mark.parametrize(
    ("gib", "rows"), [(24, (64, 128)), (40, (256, 320)), (80, (704, 768)), (141, (1024, 1024))]
)
def test_rows_of_an_8b_model_by_device(gib: int, rows: tuple[int, int]) -> None:
    found = plan(gib)
    assert rows[0] <= found.batch_size <= rows[1]
    assert found.num_pages >= found.batch_size * 10, "ten pages of 64 tokens hold a row of 600"
    assert sum(found.bytes.values()) <= gib * GIB
    assert f"{found.batch_size} rows of 600 tokens" in found.why


def test_a_large_device_has_pages_left_for_shared_prefixes() -> None:
    found = plan(141)
    assert found.num_pages > 1024 * 10
    assert found.prefill_tokens == 16384


def test_adapters_take_from_the_rows() -> None:
    many = plan(80, adapter_bytes=64 * 2 * LORA_R16)
    assert many.bytes["adapters"] == 64 * 2 * LORA_R16
    assert many.batch_size < plan(80).batch_size


def test_a_batch_size_is_a_limit() -> None:
    assert plan(80, batch_size=7).batch_size == 7
    assert "all that are asked for" in plan(80, batch_size=7).why
    assert plan(24, batch_size=4096).batch_size == plan(24).batch_size
    assert "all that fit" in plan(24, batch_size=4096).why


def test_the_organism_in_host_memory() -> None:
    config = ModelConfig.from_json(Checkpoint(fastsafe.organism.path()).config(), "organism")
    sizes: dict[str, Any] = {"itemsize": 4, "page_tokens": 16, "cache_itemsize": 4}
    sizes |= {"device_kind": "cpu", "context": 512}
    found = plan_memory(config, budget_bytes=GIB, **sizes)
    assert found.batch_size == planner.MAX_ROWS["cpu"]
    assert sum(found.bytes.values()) < 3 * GIB // 4, "it does not take what it cannot use"
    with pytest.raises(UsageError, match="use a smaller checkpoint"):
        plan_memory(config, budget_bytes=4 << 20, **sizes)


@given(
    gib=st.floats(0.5, 200),
    itemsize=st.sampled_from([2, 4]),
    page=st.sampled_from([16, 64]),
    kind=st.sampled_from(["cpu", "cuda"]),
    adapters=st.integers(0, 40),
    batch_size=st.one_of(st.just("auto"), st.integers(1, 5000)),
    context=st.integers(1, 131072),
)
def test_a_plan_never_exceeds_its_budget(
    gib: float,
    itemsize: int,
    page: int,
    kind: str,
    adapters: int,
    batch_size: Any,
    context: int,
) -> None:
    changes = {
        "itemsize": itemsize,
        "page_tokens": page,
        "cache_itemsize": 4 if kind == "cpu" else itemsize,
        "device_kind": kind,
        "adapter_bytes": adapters * itemsize * LORA_R16,
        "batch_size": batch_size,
        "context": context,
    }
    try:
        found = plan(gib, **changes)
    except UsageError:
        return
    assert sum(found.bytes.values()) <= gib * GIB
    assert all(size >= 0 for size in found.bytes.values())
    assert found.num_pages * page >= found.batch_size * context, "every row can run to its end"
    assert 1 <= found.batch_size <= (5000 if batch_size == "auto" else batch_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lane_needs_no_memory_for_weights_that_are_there(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """However many cores share what is left: the weights are in memory already, in their dtype."""
    config = replace(LLAMA_8B, num_layers=2, vocab_size=64)
    model = Transformer(config, weights.allocate(config, torch.device("cpu"), dtype))
    monkeypatch.setattr(lane_pool, "available_bytes", lambda device: 8 * GIB)
    monkeypatch.setattr("os.cpu_count", lambda: 32)
    monkeypatch.setattr(lane_pool, "_SHARED_BYTES", 1 << 40)
    found = lane_pool.plan_lane(model, False, 8, 64)
    assert found.batch_size == 8
    assert found.bytes["weights"] == planner.weight_bytes(config, dtype.itemsize)
    assert found.bytes["kv"] == found.num_pages * 2 * 2 * 8 * 128 * 16 * 4, "fp32 on a CPU"
    assert sum(found.bytes.values()) - found.bytes["weights"] < GIB / 8


@given(
    hidden=st.integers(1, 9000),
    intermediate=st.integers(1, 40000),
    kv_heads=st.integers(1, 16),
    group=st.integers(1, 8),
    dim=st.sampled_from([16, 64, 128]),
    tokens=st.integers(1, 4096),
    itemsize=st.sampled_from([2, 4]),
)
def test_a_workspace_holds_all_buffers_of_a_step(
    hidden: int, intermediate: int, kv_heads: int, group: int, dim: int, tokens: int, itemsize: int
) -> None:
    heads = kv_heads * group
    q, qkv = heads * dim, (heads + 2 * kv_heads) * dim
    found = _native.Decoder.workspace_bytes(
        hidden, intermediate, heads, kv_heads, dim, tokens, itemsize
    )
    widest = max(3 * intermediate, qkv + 2 * q)
    assert found == tokens * itemsize * (3 * hidden + max(hidden, q) + widest)
    buffers = 3 * hidden + max(qkv, 2 * intermediate) + q + intermediate
    assert found >= tokens * itemsize * buffers


def test_a_step_of_a_cpu_holds_prompts_and_sampled_tokens() -> None:
    sizes: dict[str, Any] = {"itemsize": 4, "page_tokens": 16, "cache_itemsize": 4}
    sizes |= {"budget_bytes": 64 * GIB, "device_kind": "cpu", "context": 64}
    both = [plan_memory(LLAMA_8B, batch_size=rows, **sizes) for rows in (1, 257)]
    each = [
        found.bytes["activations"] / (found.prefill_tokens + found.batch_size) for found in both
    ]
    assert each[0] == each[1]


def test_host_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert 0 < cpu_threads.available_bytes("cpu") < 1 << 50
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5 kB\n")
    assert cpu_threads._host_bytes(tmp_path / "meminfo") == 5 * 1024
    assert cpu_threads._host_bytes(tmp_path / "absent") > 1 << 20


def test_every_control_group_above_counts(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "cgroup" / "job" / "step"
    own.mkdir(parents=True)
    (tmp_path / "membership").write_text("1:cpu:/other\n0::/job/step\n")
    for group, limit, used in ((own, "max", 10), (own.parent, "1000", 900), (root, "5000", 1000)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
    (own.parent / "memory.stat").write_text("anon 7\ninactive_file 300\nactive_file 9\n")
    assert cpu_threads._group_bytes(root, tmp_path / "membership") == [400, 4000]
    assert cpu_threads._group_bytes(tmp_path / "none", tmp_path / "membership") == []


@pytest.mark.parametrize(
    ("prompts", "mode"),
    [(4, "mixed"), (16, "mixed"), (64, "mixed"), (128, "mixed"), (512, "merged"), (2048, "merged")],
)
def test_the_choice_on_a_gpu_follows_the_bounds(prompts: int, mode: str) -> None:
    """64 adapters of rank 16: the weights are read once per adapter, or the adapters each step."""
    found, why = choose_adapters(
        [prompts] * 64,
        config=LLAMA_8B,
        itemsize=2,
        lora_parameters=LORA_R16,
        device_kind="cuda",
        strict=False,
        batch_size=1024,
        rates=H200,
    )
    assert found == mode, why
    assert f"{64 * prompts} rows of 64 adapters" in why


@given(rows=st.lists(st.integers(1, 10**6), max_size=9), rank=st.integers(1, 64))
def test_strict_mode_never_looks_at_the_workload(rows: list[int], rank: int) -> None:
    for kind, itemsize in (("cuda", 2), ("cpu", 4)):
        mode, why = choose_adapters(
            rows,
            config=LLAMA_8B,
            itemsize=itemsize,
            lora_parameters=rank * LORA_R16 // 16,
            device_kind=kind,
            strict=True,
            batch_size=1024,
        )
        assert mode == "mixed"
        assert "strict mode" in why


def test_a_small_model_on_a_cpu_is_merged() -> None:
    config = ModelConfig.from_json(Checkpoint(fastsafe.organism.path()).config(), "organism")
    for strict in (True, False):
        mode, _ = choose_adapters(
            [500] * 16,
            config=config,
            itemsize=4,
            lora_parameters=50_000,
            device_kind="cpu",
            strict=strict,
            batch_size=256,
            rates=Rates(gemm_flops=2e11, thin_flops=3e10, copy_bytes=1e10),
        )
        assert mode == "merged"


def test_rates_are_measured_once() -> None:
    rates = planner.measure_rates("cpu")
    assert all(rate > 0 for rate in rates)
    assert planner.measure_rates("cpu") is rates
