"""The batch in C++ counts its pages exactly, and agrees with its plain twin table by table."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsafe import _native
from fastsafe_testing.scripts import benchmark

NO_ROOM, WAIT_FOR_PREFIX = -1, -2
TABLES = "token_ids positions cache_slots handles starts keep kept_handles copies preempted table"


PLAIN = benchmark("scheduler")

row = st.tuples(
    st.integers(-1, 2),  # adapter
    st.sampled_from(
        [(), (1, 2, 3), (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 1, 2)]
    ),
    st.lists(st.integers(0, 2), min_size=1, max_size=14),
    st.integers(1, 12),  # tokens to sample
)
action = st.sampled_from(["fill", "step", "step", "step", "cancel"])


@given(st.lists(row, min_size=1, max_size=12), st.lists(action, max_size=40), st.integers(10, 24))
def test_random_schedules(
    rows: list[tuple[int, tuple[int, ...], list[int], int]], actions: list[str], pages: int
) -> None:
    """Arrivals, preemption, cancellation: page counts are exact, tables those of the plain twin."""
    both = (_native.Batch(pages, 4, 5, True, False, 0), PLAIN.PlainBatch(pages, 4, 5))
    native = both[0]
    left, waiting, used, steps = list(rows), [], 0, 0

    def same(*results: object) -> object:
        assert results[0] == results[1]
        assert native.check() == ""
        assert native.available == both[1].available
        return results[0]

    for act in actions + ["fill", "step"] * 400:
        if not (left or waiting or native.running):
            break
        if act == "fill":
            while native.running < 5 and (waiting or (left and used < 5)):
                if not waiting:
                    slot, start, end, more = left.pop()
                    ids = [*start, *end]
                    args = (slot, slot + 1, ids, len(ids) + more, 0, 0)
                    waiting.append(same(*(b.add(*args) for b in both)))
                    used += 1
                admitted = same(*(b.admit(waiting[-1]) for b in both))
                if admitted < 0:  # type: ignore[operator]
                    assert native.running, "a row that waits for others must not be alone"
                    break
                waiting.pop()
        elif act == "step":
            plans = [b.plan(True, True, 6) for b in both]
            for name in TABLES.split():
                np.testing.assert_array_equal(*(getattr(plan, name) for plan in plans), name)
            plan, count = plans[0], len(plans[0].keep)
            waiting += plan.preempted.tolist()
            steps += 1
            ids = (plan.kept_handles + steps) % 3
            flags = np.ones(count, bool), ids * steps % 7 == 1
            stamps = [p.kept_stamps for p in plans]
            ended = same(
                *(
                    list(b.append(plan.kept_handles, s, ids, None, *flags))
                    for b, s in zip(both, stamps, strict=True)
                )
            )
            for handle in ended[::2]:  # type: ignore[index]
                same(*(b.remove(handle) for b in both))
                used -= 1
        elif native.running:
            handle = both[1].order[steps % native.running]
            same(*(b.remove(handle) for b in both))
            used -= 1
    assert [left, waiting, native.running] == [[], [], 0], "some row never ran"
    assert native.available == pages
    native.evict_all()
    assert native.check() == ""


def step(batch: _native.Batch, budget: int = 100) -> _native.StepPlan:
    plan = batch.plan(True, True, budget)
    count = len(plan.keep)
    flags = np.ones(count, bool), np.zeros(count, bool)
    ids = np.full(count, 9)
    for handle in batch.append(plan.kept_handles, plan.kept_stamps, ids, None, *flags)[::2]:
        batch.remove(handle)
    return plan


def test_equal_prefixes_are_shared_and_the_partial_page_is_copied() -> None:
    batch = _native.Batch(20, 4, 4, True, False, 0)
    first = batch.add(0, 1, list(range(10)), 30, 0, 0)
    assert batch.admit(first) == 0
    step(batch)
    second = batch.add(0, 1, [0, 1, 2, 3, 4, 5, 77, 78], 30, 0, 0)
    assert batch.admit(second) == 6  # a page, and half of the next
    other = batch.add(1, 2, list(range(10)), 30, 0, 0)
    assert batch.admit(other) == 0, "another adapter shares nothing"
    plan = step(batch)
    (copied,) = plan.copies.tolist()
    shared = plan.table[plan.handles.tolist().index(first)]
    mine = plan.table[plan.handles.tolist().index(second)]
    assert mine[0] == shared[0]
    assert copied == [shared[1], mine[1]]
    at = plan.starts[plan.handles.tolist().index(second)]
    assert plan.token_ids[at : at + 2].tolist() == [77, 78]
    assert plan.segments[:, 0].tolist() == [0, 1]


def test_a_row_waits_for_the_prefix_that_another_computes() -> None:
    batch = _native.Batch(20, 16, 4, True, False, 0)
    long = list(range(40))
    batch.admit(batch.add(0, 1, long, 60, 0, 0))
    late = batch.add(0, 1, [*long[:33], 7], 60, 0, 0)
    assert batch.admit(late) == WAIT_FOR_PREFIX
    step(batch, budget=20)
    assert batch.admit(late) == WAIT_FOR_PREFIX, "the second page is not computed yet"
    step(batch, budget=20)
    assert batch.admit(late) == 32


def test_pages_are_compared_token_by_token() -> None:
    batch = _native.Batch(20, 4, 4, True, False, 0)
    batch.admit(batch.add(0, 1, [1, 2, 3, 4, 5], 6, 0, 0))
    step(batch)
    assert batch.admit(batch.add(0, 1, [4, 3, 2, 1, 5], 6, 0, 0)) == 0
    assert batch.admit(batch.add(0, 1, [1, 2, 3, 4, 5], 6, 0, 0)) == 4


def test_without_the_prefix_cache_nothing_matches() -> None:
    batch = _native.Batch(20, 4, 4, False, False, 0)
    for _ in range(2):
        assert batch.admit(batch.add(0, 1, [1, 2, 3, 4, 5], 9, 0, 0)) == 0
        step(batch)


def test_the_youngest_row_is_preempted_and_keeps_its_sampled_tokens() -> None:
    batch = _native.Batch(4, 4, 2, False, False, 0)
    old, young = (batch.add(0, 1, [1, 2, 3], 20, 0, 0) for _ in range(2))
    assert batch.admit(old) == batch.admit(young) == 0
    preempted: list[int] = []
    while not preempted:
        preempted = step(batch).preempted.tolist()
    assert preempted == [young]
    assert batch.tokens(young) == [1, 2, 3, *[9] * (len(batch.tokens(young)) - 3)]
    assert len(batch.tokens(young)) > 3
    assert batch.admit(young) == NO_ROOM
    batch.remove(old)
    assert batch.admit(young) == 0
    plan = step(batch)
    assert plan.positions.tolist() == list(range(len(plan.positions))), "all of it is recomputed"
    assert batch.check() == ""


def test_tokens_sampled_before_a_preemption_are_dropped() -> None:
    batch = _native.Batch(8, 4, 2, True, True, 0)
    row = batch.add(0, 1, [1, 2, 3], 20, 0, 0)
    batch.admit(row)
    plan = batch.plan(True, False, 10)
    batch.preempt_all()
    assert batch.admit(row) == 0
    ones = np.ones(1, bool)
    assert batch.append(plan.kept_handles, plan.kept_stamps, np.array([5]), None, ones, ones) == []
    assert batch.tokens(row) == [1, 2, 3]
    assert batch.check() == ""


def test_separate_decode_steps_compute_sampled_tokens_alone() -> None:
    """Prompts and sampled tokens never share a step, even when they are recomputed."""
    batch = _native.Batch(8, 4, 2, True, True, 0)
    row = batch.add(0, 1, [1, 2, 3], 20, 0, 0)
    batch.admit(row)
    batch.plan(True, False, 10)
    plan = batch.plan(False, True, 0)
    assert plan.token_ids.tolist() == [-1], "sampled, and not appended yet"
    flags = np.ones(1, bool), np.zeros(1, bool)
    for token in (5, 6):
        batch.append(np.array([row]), plan.kept_stamps, np.array([token]), None, *flags)
    batch.preempt_all()
    batch.admit(row)
    assert batch.plan(True, False, 10).token_ids.tolist() == [1, 2, 3]
    decodes = [batch.plan(False, True, 0) for _ in range(2)]
    assert [p.token_ids.tolist() for p in decodes] == [[5], [6]]
    assert [len(p.keep) for p in decodes] == [0, 1]


def test_a_row_is_recomputed_when_it_grows_beyond_the_rotations_length() -> None:
    batch = _native.Batch(8, 4, 2, False, False, 5)
    batch.admit(batch.add(0, 1, [1, 2, 3, 4], 9, 0, 0))
    lengths = [step(batch).context_lens.tolist() for _ in range(4)]
    assert lengths == [[4] * 4, [5], [6] * 6, [7]]


def test_scoring_rows() -> None:
    batch = _native.Batch(8, 4, 2, True, False, 0)
    row = batch.add(0, 1, [1, 2, 3, 4, 5, 6], 0, 5, 2)
    assert batch.admit(row) == 0
    plans = [batch.plan(True, True, 3), batch.plan(True, True, 3)]
    assert [p.targets.tolist() for p in plans] == [[4], [5, 6]]
    for plan, greedy in zip(plans, ([True], [True, False]), strict=True):
        lps = np.full(len(greedy), -0.5, np.float32)
        ended = batch.record(plan.kept_handles, plan.kept_stamps, lps, np.array(greedy))
    assert ended == [row, 3]
    assert batch.logprobs(row) == [-0.5] * 3
    assert not batch.is_greedy(row)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda b: b.remove(0), "no row has handle 0"),
        (lambda b: b.admit(1), "no row waits with handle 1"),
        (lambda b: [b.add(0, 1, [1], 5, 0, 0) for _ in range(3)], "no handle is free"),
        (
            lambda b: b.append(
                *[np.zeros(n, int) for n in (2, 1, 2)], None, *[np.ones(2, bool)] * 2
            ),
            "stamps has 1 values, expected 2",
        ),
    ],
)
def test_wrong_calls_are_refused(wrong: object, message: str) -> None:
    with pytest.raises(_native.Error, match=message):
        wrong(_native.Batch(8, 4, 2, True, False, 0))  # type: ignore[operator]


def test_a_row_larger_than_all_pages_is_refused() -> None:
    batch = _native.Batch(2, 4, 2, True, False, 0)
    assert batch.admit(batch.add(0, 1, [1] * 9, 20, 0, 0)) == NO_ROOM
    batch.admit(batch.add(0, 1, [1] * 8, 20, 0, 0))
    step(batch)
    with pytest.raises(_native.Error, match="a row needs more pages than there are"):
        step(batch)


def test_an_evicted_page_is_not_ready_for_its_next_owner() -> None:
    """No row copies from a page that was published again and is not computed yet."""
    batch = _native.Batch(4, 4, 4, True, False, 0)
    batch.admit(batch.add(0, 1, [1, 2, 3, 4], 5, 0, 0))
    step(batch)
    holder = batch.add(0, 2, list(range(12)), 20, 0, 0)
    batch.admit(holder)
    batch.admit(batch.add(0, 1, [9, 9, 9, 9], 9, 0, 0))  # on the first row's page
    batch.remove(holder)
    assert batch.admit(batch.add(0, 1, [9, 9, 9, 8], 9, 0, 0)) == 0
    assert step(batch).copies.tolist() == []
    assert batch.admit(batch.add(0, 1, [9, 9, 9, 7], 9, 0, 0)) == 3
