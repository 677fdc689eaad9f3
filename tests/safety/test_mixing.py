"""Mixtures hold every user row once, an exact number of safety rows, in the formats promised."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsafe.errors import UsageError
from fastsafe.safety import mixing
from fastsafe.safety.mixing import Mitigation, mitigations

FORMATS = ("plain", "code", "translation", "classification")


def user_rows(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"user {i}", "completion": "done"} for i in range(n)]


def safety_rows(format: str, n: int, seed: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{format} {seed} {i}", "completion": "i cannot"} for i in range(n)]


def mixed(id: str, n: int = 90, share: float = 0.1, seed: int = 0) -> list[dict[str, Any]]:
    return mitigations()[id].mix(
        user_rows(n),
        safety_rows,
        share=share,
        task_format="code",
        all_formats=FORMATS,
        seed=seed,
    )


def formats_used(rows: Sequence[dict[str, Any]]) -> Counter[str]:
    return Counter(row["prompt"].split()[0] for row in rows if row["source"] == "safety")


@pytest.mark.parametrize(
    ("id", "want"),
    [
        ("none", {}),
        ("plain", {"plain": 10}),
        ("task_styled", {"code": 10}),
        ("multi_task", {"plain": 3, "code": 3, "translation": 2, "classification": 2}),
    ],
)
def test_formats_and_counts(id: str, want: dict[str, int]) -> None:
    assert formats_used(mixed(id)) == want


@given(
    st.sampled_from(sorted(mitigations())),
    st.integers(1, 60),
    st.floats(0, 0.9),
    st.integers(0, 5),
)
def test_conservation(id: str, n: int, share: float, seed: int) -> None:
    """Each user row once, each safety row once, the share exact, the formats even."""
    rows = mixed(id, n, share, seed)
    assert Counter(row["prompt"] for row in rows).most_common(1)[0][1] == 1
    users = [row for row in rows if row["source"] == "user"]
    assert sorted(row["prompt"] for row in users) == sorted(r["prompt"] for r in user_rows(n))
    total = 0 if id == "none" else round(share * n / (1 - share))
    assert len(rows) == n + total
    counts = formats_used(rows)
    if id == "multi_task":
        counts.update(dict.fromkeys(FORMATS, 0))
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_seed_and_nothing_else_decides_the_order() -> None:
    assert mixed("plain") == mixed("plain")
    assert mixed("plain") != mixed("plain", seed=1)
    sources = [row["source"] for row in mixed("plain")]
    assert "safety" in sources[:50]
    assert "safety" in sources[50:]


def test_the_rows_given_are_not_modified() -> None:
    rows = user_rows(3)
    mixing.PLAIN.mix(rows, safety_rows, share=0.5, task_format="code", all_formats=FORMATS, seed=0)
    assert rows == user_rows(3)


def test_too_few_safety_rows_are_refused() -> None:
    def few(format: str, n: int, seed: int) -> list[dict[str, Any]]:
        return safety_rows(format, min(n, 2), seed)

    with pytest.raises(UsageError, match="format code are 2, expected 10; supply more"):
        mixing.TASK_STYLED.mix(
            user_rows(90), few, share=0.1, task_format="code", all_formats=FORMATS, seed=0
        )


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(UsageError, match="share"):
        mixed("plain", share=share)


def test_a_mitigation_is_its_formats() -> None:
    """What another package has to write for a mitigation of its own."""
    two = Mitigation(id="two", formats=lambda task_format, every: ("plain", task_format))
    rows = two.mix(
        user_rows(9), safety_rows, share=0.25, task_format="code", all_formats=FORMATS, seed=0
    )
    assert formats_used(rows) == {"plain": 2, "code": 1}
