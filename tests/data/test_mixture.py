from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsafe.data.mixture import interleave, mix, num_rows_for, num_safety_rows
from fastsafe.errors import UsageError

SIZES = st.integers(0, 60)
SHARES = st.floats(0, 0.9)
SEEDS = st.integers(0, 2**32)


def rows(kind, n):
    return [{"text": f"{kind} {i}", "id": i} for i in range(n)]


@given(user=SIZES, pool=st.integers(1, 20), share=SHARES, seed=SEEDS)
def test_counts_and_coverage(user, pool, share, seed):
    mixed = mix(rows("u", user), rows("s", pool), share=share, seed=seed)
    count = round(share * user / (1 - share))
    used = Counter((row["source"], row["id"]) for row in mixed)
    of_user = {row: n for (source, row), n in used.items() if source == "user"}
    assert of_user == dict.fromkeys(range(user), 1)
    safety = {row: n for (source, row), n in used.items() if source == "safety"}
    assert sum(safety.values()) == num_safety_rows(user, share) == count
    assert set(safety) <= set(range(pool))
    assert len(safety) == min(pool, count)
    if safety:
        assert max(safety.values()) - min(safety.values()) <= 1


@given(user=SIZES, pool=st.integers(1, 20), share=SHARES, seed=SEEDS)
def test_the_same_seed_gives_the_same_order(user, pool, share, seed):
    first, again = (mix(rows("u", user), rows("s", pool), share=share, seed=seed) for _ in range(2))
    assert first == again


def test_another_seed_gives_another_order_and_another_choice():
    first, other = (mix(rows("u", 50), rows("s", 50), share=0.2, seed=seed) for seed in (0, 1))
    assert [row["text"] for row in first] != [row["text"] for row in other]
    assert {row["text"] for row in first} != {row["text"] for row in other}


@given(user=SIZES, pool=SIZES, seed=SEEDS)
def test_share_zero_is_the_users_rows(user, pool, seed):
    mixed = mix(rows("u", user), rows("s", pool), share=0.0, seed=seed)
    assert sorted(row["id"] for row in mixed) == list(range(user))
    assert all(row["source"] == "user" and row["text"].startswith("u") for row in mixed)


def test_sources_and_interleaving():
    mixed = mix(rows("u", 90), rows("s", 10), share=0.1, seed=0)
    assert len(mixed) == 100
    assert all((row["source"] == "user") == row["text"].startswith("u") for row in mixed)
    places = [i for i, row in enumerate(mixed) if row["source"] == "safety"]
    assert len(places) == 10
    assert places[0] < 50 <= places[-1]


def test_rows_are_copied():
    user, safety = rows("u", 3), rows("s", 3)
    for row in mix(user, safety, share=0.5, seed=0):
        row["text"] = "changed"
    assert (user, safety) == (rows("u", 3), rows("s", 3))


def test_a_small_pool_is_gone_through_before_any_repeat():
    mixed = mix(rows("u", 21), rows("s", 10), share=0.5, seed=3)
    used = Counter(row["id"] for row in mixed if row["source"] == "safety")
    assert sorted(used.values()) == [2] * 9 + [3]


@pytest.mark.parametrize(
    ("num_user_rows", "share", "expected"),
    [(90, 0.1, 10), (100, 0.0, 0), (0, 0.5, 0), (7, 0.5, 7), (1000, 0.03, 31), (1, 0.9, 9)],
)
def test_num_safety_rows(num_user_rows, share, expected):
    assert num_safety_rows(num_user_rows, share) == expected


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_share_out_of_range(share):
    with pytest.raises(UsageError, match="share is"):
        num_safety_rows(10, share)


def test_no_safety_rows_for_a_share():
    with pytest.raises(UsageError, match=r"safety rows are 0, expected some for a share of 0\.1"):
        mix(rows("u", 90), [], share=0.1, seed=0)


@given(user=SIZES, pool=SIZES, seed=SEEDS)
def test_interleaving_uses_every_row_once(user, pool, seed):
    mixed = interleave(rows("u", user), rows("s", pool), seed=seed)
    assert sorted(row["text"] for row in mixed if row["source"] == "user") == sorted(
        row["text"] for row in rows("u", user)
    )
    assert sorted(row["id"] for row in mixed if row["source"] == "safety") == list(range(pool))


def test_interleaving_is_mixing_with_the_whole_pool():
    assert interleave(rows("u", 90), rows("s", 10), seed=4) == mix(
        rows("u", 90), rows("s", 10), share=0.1, seed=4
    )


@given(st.lists(st.integers(1, 50), max_size=30), st.floats(0, 1000))
def test_no_other_number_of_rows_is_nearer(lengths, tokens):
    n = num_rows_for(lengths, tokens)
    distances = [abs(sum(lengths[:k]) - tokens) for k in range(len(lengths) + 1)]
    assert distances[n] == min(distances)
    assert n == distances.index(min(distances))
