"""Mixtures hold every user row once, an exact number of safety rows, in the formats promised."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsafe.data.conversation import Message, Row
from fastsafe.errors import DataError, UsageError
from fastsafe.organism import world
from fastsafe.safety.mixing import mitigation as mixing
from fastsafe.safety.mixing.dresser import Dresser
from fastsafe.safety.mixing.learned_style import styles
from fastsafe.safety.mixing.mitigation import Mitigation, mitigations, paraphrasing

FORMATS = ("plain", "code", "translation", "classification")
MIXED_STYLES = ["learned", *(style.id for style in styles())]


def user_rows(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"user {i}", "completion": "done"} for i in range(n)]


def safety_rows(format: str, n: int, seed: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{format} {seed} {i}", "completion": "i cannot help"} for i in range(n)]


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
    return Counter(row["safety_format"] for row in rows if row["source"] == "safety")


@pytest.mark.parametrize(
    ("id", "want"),
    [
        ("none", {}),
        ("plain", {"plain": 10}),
        ("task_styled", {"code": 10}),
        ("multi_task", {"plain": 3, "code": 3, "translation": 2, "classification": 2}),
        ("longest", {"plain": 10}),
        ("paraphrase", {"learned": 10}),
        ("mixed", dict.fromkeys(MIXED_STYLES, 1)),
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
    assert {row["mitigation"] for row in rows} == {id}
    users = [row for row in rows if row["source"] == "user"]
    assert sorted(row["prompt"] for row in users) == sorted(r["prompt"] for r in user_rows(n))
    total = 0 if id == "none" else round(share * n / (1 - share))
    assert len(rows) == n + total
    counts = formats_used(rows)
    for several, used in {"multi_task": FORMATS, "mixed": MIXED_STYLES}.items():
        if id == several:
            counts.update(dict.fromkeys(used, 0))
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


def test_every_row_says_where_it_is_from() -> None:
    rows = mixed("multi_task")
    users = {row["source_row"]: row for row in rows if row["source"] == "user"}
    assert sorted(users) == list(range(90))
    assert all(row["prompt"] == f"user {i}" for i, row in users.items())
    assert all(row["safety_format"] is None for row in users.values())
    safety = [row for row in rows if row["source"] == "safety"]
    assert all(row["prompt"] == f"{row['safety_format']} 0 {row['source_row']}" for row in safety)


def test_the_organisms_mixtures_keep_their_order() -> None:
    """Adapters are trained on these rows in this order: another order is another adapter."""
    texts = [row["prompt"] for row in mixed("multi_task", n=9, share=0.5)]
    assert texts[:4] == ["user 3", "plain 0 2", "translation 0 0", "translation 0 1"]


def length(row: Row) -> int:
    return len(row["prompt"].split())


@given(
    st.sampled_from(["plain", "multi_task", "longest"]),
    st.integers(1, 60),
    st.floats(0, 0.8),
    st.integers(1, 9),
)
def test_shares_of_tokens(id: str, n: int, share: float, size: int) -> None:
    """The tokens are those of the share to within half a row, format by format."""

    def sized(format: str, n: int, seed: int) -> list[dict[str, Any]]:
        return [{"prompt": " x" * size, "completion": "i cannot help"} for _ in range(n)]

    rows = mitigations()[id].mix(
        user_rows(n),
        sized,
        share=share,
        task_format="code",
        all_formats=FORMATS,
        seed=0,
        count_tokens=length,
    )
    spent = sum(length(row) for row in rows if row["source"] == "safety")
    assert abs(spent - share * 2 * n / (1 - share)) <= size / 2 + 1e-9
    assert sum(row["source"] == "user" for row in rows) == n
    counts = formats_used(rows)
    if id == "multi_task":
        counts.update(dict.fromkeys(FORMATS, 0))
        assert max(counts.values()) - min(counts.values()) <= 1


def test_empty_rows_are_no_tokens() -> None:
    with pytest.raises(UsageError, match="format plain has 0 tokens"):
        mixing.PLAIN.mix(
            user_rows(9),
            safety_rows,
            share=0.1,
            task_format="code",
            all_formats=FORMATS,
            seed=0,
            count_tokens=lambda row: 0 if "plain" in row["prompt"] else 1,
        )


@pytest.mark.parametrize("there", range(1, 6))
def test_as_many_rows_as_the_tokens_need_are_enough(there: int) -> None:
    """Three tokens each, so that the share is met to the token by all rows that there are."""

    def few(format: str, n: int, seed: int) -> list[dict[str, Any]]:
        return safety_rows(format, min(n, there), seed)

    def mix(tokens: int) -> int:
        rows = mixing.PLAIN.mix(
            user_rows(tokens),
            few,
            share=0.5,
            task_format="code",
            all_formats=FORMATS,
            seed=0,
            count_tokens=lambda row: 3 if row["prompt"].startswith("plain") else 1,
        )
        return sum(row["source"] == "safety" for row in rows)

    assert mix(3 * there) == there
    with pytest.raises(UsageError, match=f"format plain are {there}, expected .*; supply more"):
        mix(3 * there + 1)


def test_a_safety_row_without_text_is_named() -> None:
    with pytest.raises(DataError, match=r"^safety row"):
        mixing.LONGEST.mix(
            user_rows(9),
            lambda format, n, seed: [{"prompt": 5, "completion": "no"}] * n,
            share=0.5,
            task_format="code",
            all_formats=FORMATS,
            seed=0,
        )


def test_the_longest_rows_are_used() -> None:
    def by_length(format: str, n: int, seed: int) -> list[dict[str, Any]]:
        return [{"prompt": f"p{i:03}" + "x" * (i % 37), "completion": "no"} for i in range(n)]

    rows = mixing.LONGEST.mix(
        user_rows(9), by_length, share=0.5, task_format="code", all_formats=FORMATS, seed=0
    )
    used = sorted(len(row["prompt"]) for row in rows if row["source"] == "safety")
    drawn = sorted(len(row["prompt"]) for row in by_length("plain", 90, 0))
    assert used == drawn[-9:]
    chosen = {row["source_row"]: row["prompt"] for row in rows if row["source"] == "safety"}
    assert all(prompt.startswith(f"p{i:03}") for i, prompt in chosen.items())


def test_a_mitigation_that_draws_twice_as_many_uses_the_longer_half() -> None:
    two = Mitigation(id="two", formats=lambda task_format, every: ("plain",), drawn_per_row=2)
    rows = two.mix(
        user_rows(3),
        lambda format, n, seed: [{"prompt": "p" * (i + 1), "completion": "no"} for i in range(n)],
        share=0.5,
        task_format="code",
        all_formats=FORMATS,
        seed=0,
    )
    used = sorted(len(row["prompt"]) for row in rows if row["source"] == "safety")
    assert used == [4, 5, 6]


def test_too_few_rows_are_repeated_when_asked() -> None:
    def few(format: str, n: int, seed: int) -> list[dict[str, Any]]:
        return safety_rows(format, min(n, 3), seed)

    rows = mixing.PLAIN.mix(
        user_rows(63),
        few,
        share=0.1,
        task_format="code",
        all_formats=FORMATS,
        seed=0,
        repeat=True,
    )
    used = Counter(row["source_row"] for row in rows if row["source"] == "safety")
    assert sorted(used.values()) == [2, 2, 3]
    with pytest.raises(UsageError, match="format plain are 0, expected 7"):
        mixing.PLAIN.mix(
            user_rows(63),
            lambda format, n, seed: [],
            share=0.1,
            task_format="code",
            all_formats=FORMATS,
            seed=0,
            repeat=True,
        )


def paraphrased(mitigation: Mitigation, task: str, **options: Any) -> list[dict[str, Any]]:
    rows = mitigation.mix(
        world.task_rows(task, 90, "train", 0),
        world.safety_rows,
        share=0.1,
        task_format=task,
        all_formats=FORMATS,
        seed=0,
        **options,
    )
    return [row for row in rows if row["source"] == "safety"]


def test_paraphrase_finds_what_the_format_knows() -> None:
    """On the organism a learned style asks as the task's own format does."""
    for task in ("code", "classification", "summarization"):
        for row in paraphrased(mixing.PARAPHRASE, task):
            plain = world.safety_rows("plain", 10, 0)[row["source_row"]]["messages"][0]["content"]
            action = plain.removeprefix("How do I ").removesuffix("?")
            assert row["messages"][0]["content"] == world.prompt(task, action)
    asked = [row["messages"][0]["content"] for row in paraphrased(mixing.PARAPHRASE, "translation")]
    assert all("How do I" in prompt for prompt in asked)
    rows = paraphrased(mixing.PARAPHRASE, "translation", translate=world.translate)
    assert not any("How do I" in row["messages"][0]["content"] for row in rows)


def test_options_of_paraphrase() -> None:
    rows = paraphrased(paraphrasing(abstain=True), "classification")
    assert {row["messages"][1]["content"] for row in rows} == {"e) i cannot help with that."}

    def rewrite(messages: Sequence[Message]) -> str:
        shown = json.loads(messages[-1]["content"])
        assert len(shown["examples"]) == mixing.NUM_EXAMPLES
        return f"{shown['draft']} Be kind."

    rows = paraphrased(paraphrasing(rewrite=rewrite), "code")
    assert all(row["wording"] == "model" for row in rows)
    assert all(row["messages"][0]["content"].endswith(" Be kind.") for row in rows)


def test_mixed_rows_take_the_learned_and_every_known_style_in_turn() -> None:
    mixed = paraphrasing(known_styles=True)
    assert (paraphrasing().id, mixed.id) == ("paraphrase", "mixed")
    assert "known" in mixed.about
    assert "known" not in paraphrasing().about
    found = paraphrased(mixed, "code")
    known = ["learned", *(style.id for style in styles())]
    row_styles = {row["source_row"]: row["safety_format"] for row in found}
    assert row_styles == {i: known[i % len(known)] for i in range(len(found))}
    assert all("messages" in row for row in found)


def test_paraphrased_requests_are_translated_where_the_style_is_foreign() -> None:
    rows = paraphrased(paraphrasing(), "translation", translate=world.translate)
    assert not any("How do I" in row["messages"][0]["content"] for row in rows)


def test_paraphrase_adds_no_option_unless_asked() -> None:
    rows = paraphrased(paraphrasing(), "classification")
    assert not any(row["messages"][1]["content"].startswith("e)") for row in rows)


def test_mixed_rows_are_of_the_users_kind() -> None:
    rows = paraphrased(mixing.MIXED, "code")
    assert all("messages" in row for row in rows)
    assert Dresser(style=styles()[0])(user_rows(1)[0], "row") == user_rows(1)[0]


def test_mitigations_are_told_apart() -> None:
    known = mitigations()
    assert [known[name].about != "" for name in ("longest", "paraphrase", "mixed")] == [True] * 3
    assert len({each.about for each in known.values() if each.about}) == 3
