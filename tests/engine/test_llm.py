"""LLM: order, stops, seeds, limits, and completions that do not depend on the batch."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe import LLM, FinetuneJob, SamplingParams, TrainConfig, finetune
from fastsafe.engine import Completion, planner
from fastsafe.errors import AdapterError, UsageError

FREE = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=True)


def few_pages(patch: pytest.MonkeyPatch, num_pages: int) -> None:
    """Lanes that are made from now on have this many pages."""
    plan = planner.plan_memory
    small = lambda *args, **options: replace(plan(*args, **options), num_pages=num_pages)  # noqa: E731
    patch.setattr("fastsafe.engine.lane_pool.plan_memory", small)


def stops(token_id: int) -> SamplingParams:
    return SamplingParams(stop_token_ids=[token_id])


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(96) for _ in range(rng.randint(1, 40))] for _ in range(count)]


@pytest.fixture(params=["merged", "mixed"])
def llm(checkpoint: Path, request: pytest.FixtureRequest) -> LLM:
    """The checkpoint, loaded fresh, with either way of applying adapters."""
    return LLM(checkpoint, adapters=request.param)


@pytest.fixture
def adapters(llm: LLM, tmp_path: Path) -> list[str]:
    """Two adapters, trained a little, loaded."""
    rows = [{"prompt": p, "completion": p[:3]} for p in prompts(8)]
    config = TrainConfig(max_steps=4, learning_rate=0.02, batch_size=4)
    jobs = [FinetuneJob(name, rows, config) for name in ("a", "b")]
    jobs[1] = FinetuneJob("b", rows, TrainConfig(max_steps=4, learning_rate=0.02, seed=1, rank=3))
    for result in finetune(llm, jobs, tmp_path):
        llm.load_adapter(result.adapter_dir, name=result.name)
    return ["a", "b"]


@pytest.mark.parametrize(
    "sampling", [FREE, SamplingParams(max_tokens=20, temperature=1.0, seed=5, logprobs=True)]
)
def test_a_row_has_the_same_bits_in_any_batch(
    llm: LLM, adapters: list[str], sampling: SamplingParams
) -> None:
    """Alone, in batches of 2, 7 and 256, and shuffled: same tokens and log-probabilities."""
    many = prompts(256, seed=1)
    names = [(None, *adapters)[i % 3] for i in range(len(many))]
    whole = llm.generate(many, sampling, adapters=names)
    order = list(range(len(many)))
    random.Random(2).shuffle(order)
    shuffled = llm.generate([many[i] for i in order], sampling, adapters=[names[i] for i in order])
    assert [whole[i] for i in order] == shuffled
    for size in (1, 2, 7):
        for start in range(0, 42, size):
            part = slice(start, start + size)
            assert llm.generate(many[part], sampling, adapters=names[part]) == whole[part]
    llm.batch_size = 37
    assert llm.generate(many, sampling, adapters=names) == whole


def test_threads_do_not_change_bits(llm: LLM, adapters: list[str]) -> None:
    many, names = prompts(150), [(None, *adapters)[i % 3] for i in range(150)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = llm.generate(many, FREE, adapters=names)
        torch.set_num_threads(2)
        two = llm.generate(many, FREE, adapters=names)
        assert torch.get_num_threads() == 2, "the caller's setting is restored"
    finally:
        torch.set_num_threads(threads)
    assert one == two


def test_seed_decides_and_greedy_ignores_it(llm: LLM) -> None:
    (prompt,) = prompts(1)
    sampled = [
        llm.generate([prompt], SamplingParams(temperature=1.5, seed=seed, max_tokens=12))[
            0
        ].token_ids
        for seed in (0, 1, 0, 2**63, -7)
    ]
    assert sampled[0] == sampled[2]
    assert len(set(sampled)) == 4
    greedy = [llm.generate([prompt], SamplingParams(seed=s, max_tokens=12))[0] for s in (0, 1)]
    assert greedy[0] == greedy[1]


def test_end_of_sequence_and_stop_ids(llm: LLM) -> None:
    (prompt,) = prompts(1)
    (free,) = llm.generate([prompt], SamplingParams(max_tokens=10, ignore_eos=True))
    stop = free.token_ids[3]
    (out,) = llm.generate([prompt], SamplingParams(max_tokens=10, stop_token_ids=[stop]))
    first = free.token_ids.index(stop)
    assert out.token_ids == free.token_ids[: first + 1]
    assert out.finish_reason == "stop"
    assert free.finish_reason == "length"
    assert len(free.token_ids) == 10


def test_stop_text_is_cut_from_the_text(llm: LLM) -> None:
    (prompt,) = prompts(1)
    (free,) = llm.generate([prompt], SamplingParams(max_tokens=10, ignore_eos=True))
    word = free.text.split()[4]
    (out,) = llm.generate([prompt], SamplingParams(max_tokens=10, stop=word, ignore_eos=True))
    assert out.finish_reason == "stop"
    assert word not in out.text
    assert free.text.startswith(out.text)


def test_one_parameter_set_per_prompt(llm: LLM) -> None:
    many = prompts(3)
    each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 9, 5)]
    assert [len(c.token_ids) for c in llm.generate(many, each)] == [2, 9, 5]


def test_results_arrive_once_each(llm: LLM) -> None:
    seen: dict[int, Completion] = {}
    outs = llm.generate(prompts(200), FREE, on_result=lambda i, c: seen.__setitem__(i, c))
    assert [seen[i] for i in range(200)] == outs


def test_an_error_in_the_callback_reaches_the_caller(llm: LLM) -> None:
    with pytest.raises(OSError, match="disk full"):
        llm.generate(prompts(5), FREE, on_result=full)


def test_text_prompts_are_encoded(llm: LLM) -> None:
    text, ids = llm.generate(["w5 w6 w7", [5, 6, 7]], FREE)
    assert text == ids


def test_context_ends_at_the_models_positions(llm: LLM) -> None:
    (out,) = llm.generate([[5] * 120], SamplingParams(max_tokens=50, ignore_eos=True))
    assert len(out.token_ids) == 8
    assert out.finish_reason == "length"


def test_nan_ends_the_row_not_the_run(llm: LLM) -> None:
    llm.model.embedding[7] = float("nan")
    bad, good = llm.generate([[3, 7], [3, 4]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert bad.finish_reason == "error"
    assert bad.token_ids == ()
    assert good.finish_reason == "length"


def test_score_does_not_depend_on_the_batch(llm: LLM, adapters: list[str]) -> None:
    many = prompts(60)
    targets = [p[:5] for p in prompts(60, seed=9)]
    names = [(None, *adapters)[i % 3] for i in range(60)]
    whole = llm.score(many, targets, adapters=names)
    alone = [
        llm.score([p], [t], adapters=[n])[0] for p, t, n in zip(many, targets, names, strict=True)
    ]
    assert alone == whole
    assert all(s.logprob <= 0 for s in whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate([[]]), "prompt 0 is empty"),
        (lambda m: m.generate([[5], [96]]), r"prompt 1 has token id 96, expected ids in \[0, 96\)"),
        (lambda m: m.generate([[-1]]), "token id -1"),
        (lambda m: m.generate([[5] * 128]), "needs 129 positions, config.json gives the model 128"),
        (lambda m: m.generate("hello"), "expected a list of prompts"),
        (lambda m: m.generate([1, 2]), "prompt 0 is 1, expected a text or a list of token ids"),
        (lambda m: m.generate([["w5"]]), r"prompt 0 is \['w5'\], expected a text or a list"),
        (lambda m: m.generate([[1.5]]), r"prompt 0 is \[1.5\], expected a text or a list"),
        (lambda m: m.generate([[5]], [FREE, FREE]), "2 params, expected 1"),
        (lambda m: m.generate([[5]], FREE, adapters=["a", "b"]), "adapters is 2, expected 1"),
        (lambda m: m.generate([[5]], FREE, adapters="a"), "adapters is 'a', expected 1"),
        (lambda m: m.score([[5]], [[]]), "continuation 0 is empty"),
        (lambda m: m.score([[5]], []), "0 continuations, expected 1"),
        (lambda m: m.generate(None), "prompts is a NoneType, expected a list of prompts"),
        (lambda m: m.generate([b"w5"]), "prompt 0 is b'w5', expected a text or a list"),
        (lambda m: m.generate([[5]], {"max_tokens": 2}), "generate: {'max_tokens': 2}, expected 1"),
        (lambda m: m.generate([[5]], [{"max_tokens": 2}]), "params 0 is {'max_tokens': 2}"),
        (lambda m: m.generate([[5]], stops(96)), r"stop_token_ids of params 0 has token id 96"),
        (lambda m: m.generate([[5]], stops(-1)), r"stop_token_ids of params 0 has token id -1"),
        (
            lambda m: m.generate([[5]], FREE, adapters=[["a"]]),
            r"adapter is \['a'\], expected a name",
        ),
        (lambda m: m.generate([[5]], FREE, adapters=iter("a")), "adapters is <.*>, expected 1"),
        (lambda m: m.prompt_logprobs([[5, 6], [7]], adapters=["a"]), "adapters is 1, expected 2"),
        (lambda m: m.prompt_logprobs([[5], [6] * 129]), "row 1 needs 129 positions"),
        (lambda m: m.label_logprobs([[5]], [1.5]), "label 0 is .*1.5.*, expected"),
        (lambda m: m.label_logprobs([[5]], "w5"), "labels is a str, expected a list of labels"),
        (lambda m: m.chat([{"role": "user", "content": "w5"}]), "conversation 0 is a dict"),
        (lambda m: m.chat("w5"), "conversations is a str, expected a list of conversations"),
        (lambda m: m.logits([]), "token_ids is empty"),
        (lambda m: m.logits("w5"), "token_ids is 'w5', expected a list of token ids"),
        (lambda m: m.logits([1.5]), r"token_ids is \[1.5\]"),
        (lambda m: m.logits(torch.zeros(1, 2, dtype=torch.long)), "token_ids is tensor"),
    ],
)
def test_wrong_arguments_are_one_sentence(llm: LLM, call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(llm)


def test_an_adapter_that_a_stream_asks_cannot_go(llm: LLM, adapters: list[str]) -> None:
    """Another one in its place would answer in its name."""
    names: list[str | None] = ["a"] * 40
    whole = llm.generate(prompts(40), FREE, names)
    stream = llm.stream(prompts(40), FREE, names)
    with pytest.raises(AdapterError, match="'a' is still answering"):
        llm.unload_adapter("a")
    first = next(stream)
    with pytest.raises(AdapterError, match="'a' is still answering"):
        llm.unload_adapter("a")
    llm.unload_adapter("b")
    assert dict([first, *stream]) == dict(enumerate(whole))
    forgotten = llm.stream(prompts(40), FREE, names)
    del forgotten
    closed = llm.stream(prompts(40), FREE, names)
    next(closed)
    closed.close()
    with pytest.raises(OSError, match="disk full") as failure:
        llm.generate(prompts(5), FREE, ["a"] * 5, on_result=full)
    llm.unload_adapter("a")  # though the failure still refers to the call
    assert failure.value


def full(index: int, completion: Completion) -> None:
    raise OSError("disk full")


def test_unknown_adapter_is_named_with_the_known(llm: LLM, adapters: list[str]) -> None:
    with pytest.raises(AdapterError, match="'c' is not loaded; loaded: a, b"):
        llm.generate([[5]], FREE, adapters=["c"])
    llm.unload_adapter("a")
    with pytest.raises(AdapterError, match="'a' is not loaded; loaded: b"):
        llm.generate([[5]], FREE, adapters=["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": torch.device("cpu")}, "device is device"),
        ({"device": "cuda:99"}, "device is 'cuda:99', but torch finds"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "x"}, "batch_size is 'x', expected a whole number from 1 or 'auto'"),
        ({"batch_size": None}, "batch_size is None"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"adapters": "both"}, "adapters is 'both'"),
        ({"quantize": "int8"}, "quantize is 'int8', expected 'nf4' or None"),
    ],
)
def test_wrong_options(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LLM(checkpoint, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_single(checkpoint: Path, llm: LLM, dtype: str) -> None:
    half = LLM(checkpoint, dtype=dtype)
    assert half.describe()["dtype"] == dtype
    ids = prompts(1, seed=4)[0]
    want, got = llm.logits(ids), half.logits(ids)
    # a bf16 sum over two layers keeps about two digits
    assert (got - want).abs().max() < 0.05 * want.abs().max()
    (out,) = half.generate([ids], FREE)
    assert len(out.token_ids) == 20


def test_ignored_eos_does_not_ignore_the_callers_stop_ids(llm: LLM) -> None:
    (prompt,) = prompts(1)
    (free,) = llm.generate([prompt], SamplingParams(max_tokens=8, ignore_eos=True))
    stop = SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=[free.token_ids[2]])
    assert llm.generate([prompt], stop)[0].finish_reason == "stop"


def test_rows_that_do_not_fit_wait_and_answer_as_before(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages for four whole contexts: rows that grow give way and come back."""
    many = prompts(40)
    long = SamplingParams(max_tokens=1000, ignore_eos=True, logprobs=True)
    want = llm.generate(many, long)
    few_pages(monkeypatch, 4 * 128 // 16)
    assert llm.generate(many, long) == want


def test_overlapping_calls_restore_the_number_of_threads(llm: LLM) -> None:
    from concurrent.futures import ThreadPoolExecutor

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with ThreadPoolExecutor(3) as pool:
            outs = list(pool.map(lambda _: llm.generate(prompts(20), FREE), range(6)))
        assert all(out == outs[0] for out in outs)
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(threads)


def test_how_adapters_are_applied_is_said_with_its_reason(checkpoint: Path, tmp_path: Path) -> None:
    assert "strict mode looks at nothing else" in LLM(checkpoint).describe()["adapters_why"]
    assert LLM(checkpoint, adapters="mixed").describe()["adapters_why"] == "mixed: as asked for"
    fast = LLM(checkpoint, strict=False)
    rows = [{"prompt": "w3", "completion": "w4"}]
    job = FinetuneJob("one", rows, TrainConfig(rank=2, max_steps=1))
    (trained,) = finetune(fast, [job], tmp_path)
    fast.load_adapter(trained.adapter_dir, "one")
    found = fast.generate(["w3 w4"] * 3, SamplingParams(max_tokens=2), ["one", None, "one"])
    assert [len(out.token_ids) for out in found] == [2, 2, 2]
    assert "2 rows of 1 adapters should take" in fast.describe()["adapters_why"]


def test_a_lanes_invariant_products_leave_the_shared_model_alone(llm: LLM) -> None:
    model = llm.model.with_invariant({"head"})
    assert (model.invariant_products, llm.model.invariant_products) == ({"head"}, frozenset())
    assert model.head is llm.model.head
