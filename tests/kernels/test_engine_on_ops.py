"""The lane of a GPU, interpreted: static buffers and steps without a graph, on CPU tensors."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastsafe_kernels as ops
from fastsafe import LLM, SamplingParams
from fastsafe.engine import planner
from fastsafe.engine.gpu_lane import DeviceLane
from fastsafe.engine.invariance import treats_rows_alike
from fastsafe.model.lora import Adapter, LoraWeights
from fastsafe.model.peft import LoraConfig
from fastsafe_kernels import _spec

pytestmark = pytest.mark.skipif(not _spec.INTERPRET, reason="needs TRITON_INTERPRET=1")

MANY = [[5, 6, 7], [9, 8], [5, 6, 7, 3, 4, 2, 1, 9, 9, 8], [11]]
EACH = [
    SamplingParams(max_tokens=n, temperature=t, seed=3, ignore_eos=True, logprobs=True)
    for n, t in ((3, 0.0), (4, 1.0), (2, 0.0), (3, 0.0))
]
NAMES = ["a", None, "b", "a"]


def few_pages(patch: pytest.MonkeyPatch, num_pages: int) -> None:
    """Lanes that are made from now on have this many pages."""
    plan = planner.plan_memory
    small = lambda *args, **options: replace(plan(*args, **options), num_pages=num_pages)  # noqa: E731
    patch.setattr("fastsafe.engine.lane_pool.plan_memory", small)


@pytest.fixture
def load(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    monkeypatch.setattr("fastsafe.engine.lane_pool._PROMPT_TOKENS", {"cpu": 8})

    def make(**options: object) -> LLM:
        llm = LLM(checkpoint, adapters="mixed", **({"batch_size": 4} | options))
        for seed, name in enumerate(("a", "b")):
            torch.manual_seed(seed)
            weights = {
                module: LoraWeights(
                    0.3 * torch.randn(2, slot.in_features),
                    0.3 * torch.randn(slot.end - slot.begin, 2),
                    1.0,
                )
                for module, slot in llm.model.slots().items()
                if module.endswith(("q_proj", "down_proj"))
            }
            targets = ("q_proj", "down_proj")
            llm.bank.add(
                Adapter(name, LoraConfig(rank=2, alpha=2.0, target_modules=targets), weights)
            )
        return llm

    return make


def test_bits_do_not_depend_on_the_company(load: Callable[..., LLM]) -> None:
    """Together, alone, and without the prefix cache; greedy tokens are those of the logits."""
    llm = load()
    together = llm.generate(MANY, EACH, NAMES)
    assert isinstance(llm._lanes._idle[0], DeviceLane)
    alone = [llm.generate([p], s, [n])[0] for p, s, n in zip(MANY, EACH, NAMES, strict=True)]
    for one, other, name in zip(alone, together, NAMES, strict=True):
        assert one.token_ids == other.token_ids
        # numpy's product, which the interpreter takes, tells the rows of an adapter's tile apart
        assert one == other if name is None else one.logprobs == pytest.approx(other.logprobs)
    assert load(prefix_cache=False).generate(MANY, EACH, NAMES) == together
    for i in (0, 2):
        ids = [*MANY[i], *together[i].token_ids]
        logits = llm.logits(ids[:-1], NAMES[i])[len(MANY[i]) - 1 :]
        assert tuple(logits.argmax(-1).tolist()) == together[i].token_ids
        chosen = logits.log_softmax(-1).max(-1).values.tolist()
        assert together[i].logprobs == pytest.approx(chosen, abs=1e-3)


def test_rows_that_gave_way_draw_the_same(
    load: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pages of 64 tokens for two rows that need two each."""
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=True)
    many = [[i] * 60 for i in (5, 6)]
    monkeypatch.setattr("fastsafe.engine.lane_pool._PROMPT_TOKENS", {"cpu": 64})
    want = load(batch_size=2).generate(many, params)
    few_pages(monkeypatch, 3)
    assert load(batch_size=2).generate(many, params) == want


def test_a_quantized_base_equals_its_dequantized_weights(load: Callable[..., LLM]) -> None:
    """Also where a check has found the library's products uneven."""
    llm, plain = load(quantize="nf4"), load()
    for (layer, name), weight in llm.model.quantized.items():  # type: ignore[attr-defined]
        setattr(plain.model.layers[layer], name, weight.dequantize())
    few = MANY[:2], EACH[:2], NAMES[:2]
    assert llm.generate(*few) == plain.generate(*few)
    x = torch.randn(4, llm.model.config.hidden_size)
    for model in (llm.model, plain.model):
        model.invariant_products = frozenset({"qkv"})
    assert torch.equal(llm.model.linear(0, "qkv", x), plain.model.linear(0, "qkv", x))


def test_stops_end_a_row_one_step_late(load: Callable[..., LLM]) -> None:
    llm = load()
    (free,) = llm.generate([MANY[0]], SamplingParams(max_tokens=5, ignore_eos=True))
    stop = free.token_ids[1]
    params = SamplingParams(max_tokens=5, stop_token_ids=[stop, 90, 91, 92], ignore_eos=True)
    (out,) = llm.generate([MANY[0]], params)
    assert out.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert out.finish_reason == "stop"


def test_without_strictness_shapes_follow_the_rows(load: Callable[..., LLM]) -> None:
    strict, fast = load(), load(strict=False)
    assert strict.describe()["strict"]
    assert not fast.describe()["strict"]
    pairs = zip(strict.generate(MANY, EACH, NAMES), fast.generate(MANY, EACH, NAMES), strict=True)
    for one, other in pairs:
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_one_table_serves_any_mix_of_adapters(load: Callable[..., LLM]) -> None:
    """What a graph would replay: the same projection, told other adapters in between."""
    llm = load()
    fixed = llm.bank.fixed(5)
    x = torch.randn(5, 256)
    with torch.inference_mode():
        for ids in ([-1] * 5, [0] * 5, [-1, 0, 0, 1, 1], [1] * 5):
            fixed.update(ids)
            mixed = llm.bank.mixed(torch.tensor(ids))
            want = llm.model.linear(0, "qkv", x) if mixed is None else mixed(0, "qkv", x, None)
            assert torch.equal(fixed(0, "qkv", x, None), want)
    assert llm.bank.is_current(fixed)
    llm.unload_adapter("a")
    assert not llm.bank.is_current(fixed)


def test_reading_by_prefill(load: Callable[..., LLM]) -> None:
    llm = load()
    (score,) = llm.score([MANY[0]], [[4, 2]], ["a"])
    logprobs = llm.logits([*MANY[0], 4], "a").log_softmax(-1)
    want = [logprobs[2, 4].item(), logprobs[3, 2].item()]
    assert score.token_logprobs == pytest.approx(want, abs=1e-3)
    (labels,) = llm.label_logprobs([MANY[0]], [4, 5], ["a"])
    assert labels == pytest.approx([logprobs[2, 4].item(), logprobs[2, 5].item()], abs=1e-3)


def test_a_shared_prefix_is_attended_to_together(
    load: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a page of it, with adapters: as without sharing, and as alone."""
    monkeypatch.setattr("fastsafe.engine.lane_pool._PROMPT_TOKENS", {"cpu": 32})
    calls = 0
    merge = ops.merge_attention

    def count(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        return merge(*args)

    monkeypatch.setattr(ops, "merge_attention", count)
    llm = load()
    prefix = [i % 90 for i in range(70)]
    many, names = [[5], [6, 7], [8]], [None, None, "a"]
    shared = llm.label_logprobs(many, [4, 9], names, shared_prefix=prefix)
    assert calls
    whole = llm.label_logprobs([[*prefix, *p] for p in many], [4, 9], names)
    for one, other in zip(shared, whole, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    (alone,) = llm.label_logprobs(many[1:2], [4, 9], shared_prefix=prefix)
    assert alone == pytest.approx(shared[1], abs=1e-4)  # numpy's product, again


def test_memory_that_runs_out_halves_the_rows(
    load: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base rows: numpy's product, which the interpreter takes, tells rows of a tile apart."""
    llm = load()
    want = llm.generate(MANY, EACH)
    decode = DeviceLane._decode

    def scarce(lane: DeviceLane, plan: object, with_logprobs: bool) -> object:
        if len(plan.handles) > 2:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError
        return decode(lane, plan, with_logprobs)  # type: ignore[arg-type]

    monkeypatch.setattr(DeviceLane, "_decode", scarce)
    assert llm.generate(MANY, EACH) == want


def test_uneven_products_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 16)
    assert treats_rows_alike(weight, 24)
    product = torch.nn.functional.linear

    def uneven(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = product(x, weight)
        y[0] *= 1 + 1e-6  # as if the first row's sum were split
        return y

    monkeypatch.setattr("torch.nn.functional.linear", uneven)
    assert not treats_rows_alike(weight, 24)
