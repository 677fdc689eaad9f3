"""Continuous batching: equal bits alone and in any batch, streams, cancellation, memory."""

import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsafe import LLM, FinetuneJob, SamplingParams, TrainConfig, finetune
from fastsafe.engine import planner
from fastsafe.engine.lane import Lane
from fastsafe.errors import UsageError

FREE = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=True)
NAMES = (None, "a", "b")


def few_pages(patch: pytest.MonkeyPatch, num_pages: int) -> None:
    """Lanes that are made from now on have this many pages."""
    plan = planner.plan_memory
    small = lambda *args, **options: replace(plan(*args, **options), num_pages=num_pages)  # noqa: E731
    patch.setattr("fastsafe.engine.lane_pool.plan_memory", small)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Make prompts, some with long common prefixes."""
    rng = random.Random(seed)
    starts = [[rng.randrange(96) for _ in range(n)] for n in (0, 5, 21, 40)]
    return [
        [*rng.choice(starts), *(rng.randrange(96) for _ in range(rng.randint(1, 30)))]
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def adapter_dirs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    rows = [{"prompt": p, "completion": p[:3]} for p in prompts(8)]
    config = TrainConfig(max_steps=4, learning_rate=0.02, batch_size=4)
    jobs = [FinetuneJob(name, rows, config) for name in ("a", "b")]
    jobs[1] = FinetuneJob("b", rows, TrainConfig(max_steps=4, learning_rate=0.02, seed=1, rank=3))
    found = finetune(LLM(checkpoint), jobs, tmp_path_factory.mktemp("adapters"))
    return {result.name: Path(result.adapter_dir) for result in found}


def load(checkpoint: Path, adapter_dirs: dict[str, Path], **options: Any) -> LLM:
    llm = LLM(checkpoint, **options)
    for name, path in adapter_dirs.items():
        llm.load_adapter(path, name=name)
    return llm


@pytest.fixture(scope="module", params=["merged", "mixed", "merged shared", "mixed shared"])
def llm(
    checkpoint: Path, adapter_dirs: dict[str, Path], request: pytest.FixtureRequest
) -> Iterator[LLM]:
    """On two lanes, or on one whose steps two threads share, as for weights that no cache holds."""
    mode, *shared = request.param.split()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        if shared:
            patch.setattr("fastsafe.engine.lane_pool._SHARED_BYTES", 0)
        yield load(checkpoint, adapter_dirs, adapters=mode)
    torch.set_num_threads(threads)


def check_idle(llm: LLM) -> None:
    """Check that no page, row or thread is left."""
    assert not [t for t in threading.enumerate() if t.name.startswith("lane")]
    for lane in llm._lanes._idle:
        assert lane.batch.check() == ""
        assert lane.batch.running == 0
        assert lane.batch.available == lane.num_pages


def requests(count: int, seed: int) -> tuple[list[list[int]], list[SamplingParams], list[Any]]:
    rng = random.Random(seed)
    each = [
        SamplingParams(
            max_tokens=rng.randint(1, 40),
            temperature=rng.choice([0.0, 1.0]),
            seed=i,
            logprobs=True,
            ignore_eos=rng.random() < 0.5,
        )
        for i in range(count)
    ]
    return prompts(count, seed), each, [rng.choice(NAMES) for _ in range(count)]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 32, 256])
def test_bits_do_not_depend_on_the_batch(llm: LLM, batch_size: int) -> None:
    """Tokens and log-probabilities at every batch size, shuffled, without the prefix cache."""
    count = {1: 8, 2: 16}.get(batch_size, 70)
    many, each, names = requests(70, seed=3)
    if not hasattr(llm, "wanted"):
        llm.wanted = llm.generate(many, each, names)  # type: ignore[attr-defined]
    order = random.Random(batch_size).sample(range(70), count)
    llm.batch_size, size = batch_size, llm.batch_size
    try:
        for llm._prefix_cache in (False, True):
            llm._lanes._idle.clear()
            got = llm.generate(*([x[i] for i in order] for x in (many, each, names)))
            assert got == [llm.wanted[i] for i in order]  # type: ignore[attr-defined]
    finally:
        llm.batch_size = size
    check_idle(llm)


@settings(max_examples=6)
@given(data=st.data())
def test_random_arrivals_in_few_pages_equal_one_row_at_a_time(
    llm: LLM, data: st.DataObject
) -> None:
    """Preempted, cancelled and beside others: a row samples the tokens that it samples alone."""
    many, each, names = requests(data.draw(st.integers(2, 9)), data.draw(st.integers(0, 99)))
    alone = [llm.generate([p], s, [n])[0] for p, s, n in zip(many, each, names, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        few_pages(patch, data.draw(st.integers(8, 20)))
        llm._lanes._idle.clear()
        patch.setattr(
            "fastsafe.engine.lane_pool._PROMPT_TOKENS", {"cpu": data.draw(st.integers(1, 60))}
        )
        assert llm.generate(many, each, names) == alone
        stream = llm.stream(many, each, names)
        for _ in range(data.draw(st.integers(1, len(many)))):
            index, completion = next(stream)
            assert completion == alone[index]
        stream.close()
        check_idle(llm)


def test_preemption_happens_and_loses_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    preempted = 0
    compute = Lane.compute

    def count(lane: Lane, plan: Any) -> torch.Tensor:
        nonlocal preempted
        preempted += len(plan.preempted)
        return compute(lane, plan)

    long = SamplingParams(max_tokens=70, ignore_eos=True, logprobs=True)
    many = prompts(30)
    alone = [llm.generate([p], long)[0] for p in many[:6]]
    few_pages(monkeypatch, 10)
    llm._lanes._idle.clear()
    monkeypatch.setattr(Lane, "compute", count)
    assert llm.generate(many, long)[:6] == alone
    assert preempted > 0
    check_idle(llm)


def test_two_processes_agree(checkpoint: Path, adapter_dirs: dict[str, Path]) -> None:
    code = """
import json, random, sys
from fastsafe import LLM, SamplingParams
llm = LLM(sys.argv[1])
llm.load_adapter(sys.argv[2], name="a")
many = [[random.Random(i).randrange(96) for _ in range(9)] for i in range(20)]
params = SamplingParams(max_tokens=9, temperature=1.0, logprobs=True)
outs = llm.generate(many, params, ["a", None] * 10)
print(json.dumps([[o.token_ids, [x.hex() for x in o.logprobs]] for o in outs]))
"""
    args = [sys.executable, "-c", code, str(checkpoint), str(adapter_dirs["a"])]
    runs = [
        subprocess.run(args, capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(json.loads(runs[0])) == 20


def test_prefix_hits_are_used(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = 0
    compute = Lane.compute

    def count(lane: Lane, plan: Any) -> torch.Tensor:
        nonlocal computed
        computed += len(plan.positions)
        return compute(lane, plan)

    monkeypatch.setattr(Lane, "compute", count)
    same = [[*range(50), i] for i in range(30)]
    llm.generate(same, SamplingParams(max_tokens=1))
    # each lane computes the beginning once, and then a token or two of each row
    assert computed < 2 * 51 + 30 * 3


def test_stream_gives_results_in_order_of_finishing(llm: LLM) -> None:
    each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (40, 1, 20, 5)]
    found = list(llm.stream([[5, 6]] * 4, each))
    assert [index for index, _ in found] == [1, 3, 2, 0]
    assert [c for _, c in sorted(found)] == llm.generate([[5, 6]] * 4, each)


def test_a_stream_checks_its_arguments_at_once_and_runs_when_asked(llm: LLM) -> None:
    with pytest.raises(UsageError, match="prompt 0 is empty"):
        llm.stream([[]])
    stream = llm.stream(prompts(40), FREE)
    check_idle(llm)
    stream.close()


LEFT_OPEN = """
import atexit, sys
from fastsafe import LLM, SamplingParams
from fastsafe.engine.scheduler import RowQueue
taken, take = [], RowQueue.take
RowQueue.take = lambda *args: taken.append(take(*args)) or taken[-1]
stream = LLM(sys.argv[1]).stream([[5, i % 90] for i in range(50_000)], SamplingParams())
next(stream)
atexit.register(lambda: print(len(taken)))
raise KeyError("who left it")
"""


def test_a_stream_left_open_does_not_keep_the_process(checkpoint: Path) -> None:
    """What was not begun stays so, and the only error is the caller's."""
    words = [sys.executable, "-c", LEFT_OPEN, str(checkpoint)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert 0 < int(done.stdout) < 50_000
    assert done.stderr.splitlines()[-1] == "KeyError: 'who left it'"
    assert "ignored" not in done.stderr


def test_calls_within_a_stream(llm: LLM) -> None:
    """A judge may score while completions arrive."""
    want = llm.generate(prompts(30), FREE)
    for index, completion in llm.stream(prompts(30), FREE):
        assert completion == want[index]
        score = llm.score([prompts(30)[index]], [completion.token_ids])[0]
        assert score.token_logprobs == pytest.approx(completion.logprobs, abs=1e-5)
    check_idle(llm)


def test_an_error_in_a_lane_ends_the_call(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(lane: Lane, plan: Any) -> torch.Tensor:
        raise ValueError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "compute", fail)
        with pytest.raises(ValueError, match="broken"):
            llm.generate(prompts(40), FREE)
    check_idle(llm)
    assert len(llm.generate(prompts(40), FREE)) == 40


def test_an_error_of_the_caller_cancels_the_rest(llm: LLM) -> None:
    seen = []

    def fail(index: int, completion: Any) -> None:
        seen.append(index)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        llm.generate(prompts(100), FREE, on_result=fail)
    assert len(seen) == 1
    check_idle(llm)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_halves_the_batch(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Steps of more than 3 rows fail: the completions equal those with enough memory."""
    many, each, names = requests(24, seed=8)
    want = llm.generate(many, each, names)
    compute = Lane.compute
    sizes = []

    def scarce(lane: Lane, plan: Any) -> torch.Tensor:
        sizes.append(len(plan.handles))
        if len(plan.handles) > 3:
            raise error
        return compute(lane, plan)

    monkeypatch.setattr(Lane, "compute", scarce)
    assert llm.generate(many, each, names) == want
    assert max(sizes) > 3
    check_idle(llm)


def test_a_row_that_does_not_fit_alone_is_a_row_error(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Lane.compute

    def scarce(lane: Lane, plan: Any) -> torch.Tensor:
        if 95 in plan.token_ids:
            raise MemoryError
        return compute(lane, plan)

    monkeypatch.setattr(Lane, "compute", scarce)
    many = [[1, 2], [3, 95], [4, 5]]
    each = SamplingParams(max_tokens=1)
    assert [c.finish_reason for c in llm.generate(many, each)] == ["length", "error", "length"]
    with pytest.raises(MemoryError, match="row 1 of 3 tokens does not fit"):
        llm.score(many, [[6]] * 3)
    check_idle(llm)


def test_a_row_larger_than_the_cache_is_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsafe.engine.lane_pool.available_bytes", lambda device: 1 << 20)
    llm._lanes._idle.clear()
    with pytest.raises(UsageError, match=r"memory: weights .* one row of 120 tokens"):
        llm.generate([[5] * 20], SamplingParams(max_tokens=100))


def test_labels_are_read_off_the_next_token(llm: LLM) -> None:
    many, _, names = requests(30, seed=5)
    found = llm.label_logprobs(many, ["w7", 9], names)
    for label, column in ((7, 0), (9, 1)):
        scores = llm.score(many, [[label]] * 30, names)
        assert [f[column] for f in found] == pytest.approx([s.logprob for s in scores], abs=1e-5)
    alone = [llm.label_logprobs([p], [7, 9], [n])[0] for p, n in zip(many, names, strict=True)]
    assert alone == found


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["w1 w2"], "label 0 is 'w1 w2', which is 2 tokens, expected one"),
        ([""], "label 0 is '', which is 0 tokens"),
        ([3, 96], "label 1 has token id 96"),
        ([], "labels is empty"),
    ],
)
def test_labels_of_another_length_are_refused(llm: LLM, labels: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        llm.label_logprobs([[5]], labels)


def test_prompt_logprobs_echo_the_prompt(llm: LLM) -> None:
    many, _, names = requests(20, seed=6)
    many[3] = [5]
    found = llm.prompt_logprobs(many, names)
    assert found[3] == (None,)
    for ids, name, got in zip(many, names, found, strict=True):
        assert len(got) == len(ids)
        if len(ids) > 1:
            (score,) = llm.score([ids[:1]], [ids[1:]], [name])
            assert got == (None, *score.token_logprobs)


def test_a_shared_prefix_changes_nothing_but_the_work(llm: LLM) -> None:
    prefix = list(range(45))
    many, _, names = requests(12, seed=7)
    many = [p[:40] for p in many]
    whole = [[*prefix, *p] for p in many]
    targets = [[i, 3] for i in range(12)]
    assert llm.score(many, targets, names, shared_prefix=prefix) == llm.score(whole, targets, names)
    shared = llm.label_logprobs(many, [4, 5], names, shared_prefix=prefix)
    assert shared == llm.label_logprobs(whole, [4, 5], names)


def test_a_slot_that_another_adapter_takes(
    checkpoint: Path, adapter_dirs: dict[str, Path], llm: LLM
) -> None:
    """Nothing of the one that was there before is used again."""
    many = prompts(20)
    other = LLM(checkpoint, adapters=llm.adapters)  # type: ignore[arg-type]
    for name in ("a", "b", "a"):
        other.load_adapter(adapter_dirs[name], name=name)
        names = [name] * 20
        assert other.generate(many, FREE, names) == llm.generate(many, FREE, names)
        other.unload_adapter(name)


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([]) == []
    assert llm.score([], []) == []
    assert llm.prompt_logprobs([]) == []


def test_describe_names_the_choices(llm: LLM) -> None:
    found = llm.describe()
    assert found["strict"] is True
    assert found["prefix_cache"] is True
    assert found["invariant_products"] == []
