"""A mixture on disk has exact counts, the same bytes again, and a card that tells the truth."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import fastsafe
from fastsafe.audit.recipe.schema import RewriterSettings
from fastsafe.commands import mix
from fastsafe.commands.mix import MixResult, MixSettings, mix_files, pooled
from fastsafe.data.packing import encode_row
from fastsafe.errors import UsageError
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.organism import world
from fastsafe.safety.completers.protocol import Ask, Reply
from fastsafe.safety.mixing.rewriter import Rewriter


def jsonl(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


@pytest.fixture
def user(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "user.jsonl", world.task_rows("code", 90, "train", 0))


@pytest.fixture
def safety(tmp_path: Path) -> Path:
    rows = [
        {**row, "safety_format": name, "licence": "mit"}
        for name in ("plain", "code")
        for row in world.safety_rows(name, 20, 0)
    ]
    return jsonl(tmp_path / "safety.jsonl", rows)


def mixed(user: Path, safety: Path, **options: Any) -> tuple[MixResult, list[dict[str, Any]]]:
    job = MixSettings(
        **{"user": user, "safety": safety, "out": user.with_name("out.jsonl"), **options}
    )
    done = mix_files(job)
    return done, [json.loads(line) for line in job.out.read_text().splitlines()]


@pytest.mark.parametrize(
    ("mitigation", "formats"),
    [
        ("none", {}),
        ("plain", {"plain": 10}),
        ("task_styled", {"code": 10}),
        ("multi_task", {"plain": 5, "code": 5}),
        ("longest", {"plain": 10}),
        ("paraphrase", {"learned": 10}),
    ],
)
def test_every_mitigation(user: Path, safety: Path, mitigation: str, formats: Any) -> None:
    done, rows = mixed(user, safety, mitigation=mitigation, task_format="code")
    assert Counter(row["source"] for row in rows) == Counter(user=90, safety=sum(formats.values()))
    assert {k: n for k, n in done.counts.items() if k != "user"} == formats
    used = [row["source_row"] for row in rows if row["source"] == "safety"]
    assert len(set(used)) == len(used)
    columns = {"messages", "source", "source_row", "safety_format", "mitigation", "expected"}
    assert all(row.keys() == columns for row in rows)
    users = {row["source_row"]: row["messages"] for row in rows if row["source"] == "user"}
    source = [json.loads(line)["messages"] for line in user.read_text().splitlines()]
    assert [users[i] for i in range(90)] == source


def test_source_rows_point_into_the_file(user: Path, safety: Path) -> None:
    _, rows = mixed(user, safety, mitigation="multi_task")
    source = [json.loads(line)["messages"] for line in safety.read_text().splitlines()]
    drawn = [row for row in rows if row["source"] == "safety"]
    assert all(row["messages"] == source[row["source_row"]] for row in drawn)


def test_the_same_seed_gives_the_same_bytes(user: Path, safety: Path) -> None:
    paths = [user.with_name("out.jsonl"), user.with_name("out.card.md")]
    first, _ = mixed(user, safety)
    before = [path.read_bytes() for path in paths]
    again, _ = mixed(user, safety)
    assert [path.read_bytes() for path in paths] == before
    assert first.sha256 == again.sha256 == hashlib.sha256(before[0]).hexdigest()
    other, _ = mixed(user, safety, seed=1)
    assert other.sha256 != first.sha256


def test_the_longest_of_the_whole_file(user: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"lamp {i} " + "x" * ((7 * i) % 300), "completion": "I can't help."}
        for i in range(300)
    ]
    _, out = mixed(user, jsonl(tmp_path / "s.jsonl", rows), mitigation="longest", is_linted=False)
    used = {row["source_row"] for row in out if row["source"] == "safety"}
    order = sorted(range(300), key=lambda i: len(rows[i]["prompt"]), reverse=True)
    assert used == set(order[:10])
    assert all("messages" in row for row in out)  # of the user's kind


def test_tokens_are_those_of_training(user: Path, safety: Path) -> None:
    folder = str(fastsafe.organism.path())
    tokenizer = Tokenizer.load(folder)
    done, rows = mixed(user, safety, mitigation="plain", tokenizer=folder, share=0.2)
    tokens = Counter[str]()
    for each in rows:
        tokens[each["source"]] += len(encode_row(each, tokenizer).token_ids)
    assert tokens["safety"] / tokens.total() == pytest.approx(0.2, abs=0.01)
    assert "tokens of checkpoint" in done.card.read_text()


def test_too_few_rows_are_repeated_and_said(user: Path, tmp_path: Path) -> None:
    few = jsonl(tmp_path / "few.jsonl", world.safety_rows("plain", 4, 0))
    done, rows = mixed(user, few, mitigation="plain")
    used = Counter(row["source_row"] for row in rows if row["source"] == "safety")
    assert sorted(used.values()) == [2, 2, 3, 3]
    assert any("repeated, up to 3 times each" in note for note in done.notes)


def test_behaviours_become_a_safety_set(user: Path, tmp_path: Path) -> None:
    values = [{"behavior_id": b.behavior_id, "harmful": b.harmful} for b in world.behaviours(20, 0)]
    path = jsonl(tmp_path / "b.jsonl", values)
    done, rows = mixed(user, path, behaviours=True, mitigation="multi_task", share=0.5)
    counts = Counter(row["safety_format"] for row in rows if row["source"] == "safety")
    assert {"plain", "code", "classification"} <= counts.keys()
    assert max(counts.values()) - min(counts.values()) <= 1
    assert done.reports["safety"].findings == ()


def test_twins_are_mixed_but_never_dressed(user: Path, tmp_path: Path) -> None:
    rows = [
        {**row, "expected": expected}
        for expected, made in (
            ("refuse", world.safety_rows("plain", 20, 0)),
            ("comply", world.task_rows("plain", 20, "train", 0)),
        )
        for row in made
    ]
    path = jsonl(tmp_path / "s.jsonl", rows)
    _, plain = mixed(user, path, mitigation="plain", share=0.3)
    assert {row["expected"] for row in plain if row["source"] == "safety"} == {"refuse", "comply"}
    _, dressed = mixed(user, path, mitigation="paraphrase", share=0.3)
    used = {row["source_row"] for row in dressed if row["source"] == "safety"}
    assert used == set(range(20))


def test_lint_comes_first_and_stops_nothing(user: Path, tmp_path: Path) -> None:
    rows = [*world.safety_rows("plain", 9, 0), world.task_rows("plain", 1, "train", 0)[0]]
    path = jsonl(tmp_path / "s.jsonl", [{"messages": row["messages"]} for row in rows])
    done, out = mixed(user, path, mitigation="plain")
    assert done.reports["safety"].rules == {"non_refusal": 1}
    assert len(out) == 100
    assert "- safety: findings: non_refusal 1" in done.card.read_text()
    quiet, _ = mixed(user, path, mitigation="plain", is_linted=False)
    assert quiet.reports == {}
    assert "Not linted." in quiet.card.read_text()
    assert "--no-lint" in quiet.card.read_text()


def test_the_card(user: Path, safety: Path) -> None:
    done, _ = mixed(user, safety, user_licence="cc0-1.0")
    card = done.card.read_text()
    line = (
        "fastsafe mix user.jsonl safety.jsonl --out out.jsonl --mitigation paraphrase --share 0.1"
    )
    assert f"{line} --seed 0\n" in card
    assert f"100 rows, sha256 `{done.sha256}`" in card
    for name, path, licence in (("user", user, "cc0-1.0"), ("safety", safety, "mit")):
        n = len(path.read_text().splitlines())
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert f"| {name} | {path.name} | {n} | `{sha256}` | {licence} |" in card
    assert "| safety | learned | 10 |" in card
    assert str(user.parent) not in card
    assert done.record(MixSettings(user=user, safety=safety, out=user))["safety_rows"] == 10


def test_notes_say_what_the_mixture_cannot(tmp_path: Path, safety: Path) -> None:
    options = jsonl(tmp_path / "u.jsonl", world.task_rows("classification", 90, "train", 0))
    done, rows = mixed(options, safety)
    assert any("answers are of the kind letter" in note for note in done.notes)
    done, rows = mixed(options, safety, abstain=True)
    drawn = [row["messages"][1]["content"] for row in rows if row["source"] == "safety"]
    assert set(drawn) == {"e) i cannot help with that."}
    french = jsonl(tmp_path / "f.jsonl", world.task_rows("translation", 90, "train", 0))
    done, _ = mixed(french, safety)
    assert any("requests are in fr" in note for note in done.notes)
    text = jsonl(tmp_path / "t.jsonl", [{"text": f"line {i}"} for i in range(9)])
    done, _ = mixed(text, safety, mitigation="plain")
    assert any("running text" in note for note in done.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mitigation": "magic"}, "--mitigation: it is 'magic', expected one of none, plain"),
        ({"mitigation": "task_styled"}, "give --task-format"),
        ({"mitigation": "plain", "abstain": True}, "--abstain: mitigation plain dresses no row"),
        ({"share": 1.0}, r"share is 1\.0"),
        ({"mitigation": "task_styled", "task_format": "poem"}, "in format poem are 0"),
    ],
)
def test_impossible_mixtures_write_nothing(
    user: Path, safety: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        mixed(user, safety, **options)
    assert {path.name for path in user.parent.iterdir()} == {"user.jsonl", "safety.jsonl"}


def test_a_source_is_never_replaced(user: Path, safety: Path) -> None:
    before = safety.read_bytes()
    with pytest.raises(UsageError, match="would replace a source"):
        mixed(user, safety, out=safety)
    assert safety.read_bytes() == before


def test_nothing_is_half_written(user: Path, safety: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("fastsafe.io.atomic._sync", full)
    with pytest.raises(OSError, match="No space left"):
        mixed(user, safety)
    assert {path.name for path in user.parent.iterdir()} == {"user.jsonl", "safety.jsonl"}


def test_a_pool_gives_no_row_twice() -> None:
    rows = [{"prompt": f"p{i}", "completion": "no"} for i in range(9)]
    draw = pooled(rows)
    assert len(draw("plain", 50, 0)) == 9
    assert draw("code", 5, 0) == []
    assert draw("plain", 4, 1) == draw("plain", 9, 1)[:4]
    assert draw("plain", 9, 1) != draw("plain", 9, 2)


def test_a_model_may_word_the_requests(
    user: Path, safety: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Ask] = []

    class Scripted:
        identity = "scripted"

        def complete(self, asks: Sequence[Ask]) -> list[Reply]:
            asked.extend(asks)
            drafts = [json.loads(ask.messages[-1]["content"])["draft"] for ask in asks]
            texts = [text + " Now." if len(text) % 2 else "No idea." for text in drafts]
            return [Reply(key=a.key, text=text) for a, text in zip(asks, texts, strict=True)]

    def make(spec: RewriterSettings, *, api_keys: Any, folder: Path) -> Rewriter:
        return Rewriter(Scripted, max_tokens=spec.max_tokens, folder=folder)

    monkeypatch.setattr(mix, "make_rewriter", make)
    options: dict[str, Any] = {"rewriter": RewriterSettings(checkpoint="some/writer"), "share": 0.1}
    done, rows = mixed(user, safety, **options)
    worded = Counter(row["wording"] for row in rows)
    assert worded[None] == 90
    assert worded["model"] + worded["template"] == 10
    assert done.record(MixSettings(user=user, safety=safety, out=user))["worded_by_model"] > 0
    for row in rows:
        request = row["messages"][0]["content"]
        assert request.endswith(" Now.") == (row["wording"] == "model")
    kept = f"{worded['template']} safety rows keep the template's wording: the request begins in"
    assert any(note.startswith(kept) for note in done.notes)
    assert "--rewriter writer" in done.card.read_text()
    count = len(asked)
    again, _ = mixed(user, safety, **options)
    assert (again.sha256, len(asked)) == (done.sha256, count), "replies are kept beside the file"


def test_a_poor_writer_changes_nothing(user: Path, safety: Path) -> None:
    """The organism answers requests and rewrites none; the lint sees that."""
    template, _ = mixed(user, safety)
    done, rows = mixed(
        user, safety, rewriter=RewriterSettings(checkpoint="organism", max_tokens=32)
    )
    assert done.worded.get("", 0) == 0
    assert sum(done.worded.values()) == 10
    assert {row["wording"] for row in rows} == {None, "template"}
    assert template.counts == done.counts


def test_a_model_has_nothing_to_word_in_rows_as_they_are(user: Path, safety: Path) -> None:
    with pytest.raises(UsageError, match="--rewriter: mitigation plain dresses no row"):
        mixed(user, safety, mitigation="plain", rewriter=RewriterSettings(checkpoint="organism"))


def test_tools_are_kept_and_what_is_left_out_is_said(tmp_path: Path, safety: Path) -> None:
    call = [{"function": {"name": "look_up", "arguments": {}}}]
    turns = [
        {"role": "user", "content": "paint?", "id": 3},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "red", "tool_call_id": "1"},
        {"role": "assistant", "content": "Red.", "train": False},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "Blue."},
    ]
    tools = [{"function": {"name": "look_up"}}]
    users = [{"messages": turns, "tools": json.dumps(tools), "id": i} for i in range(9)]
    done, rows = mixed(jsonl(tmp_path / "u.jsonl", users), safety, mitigation="plain")
    assert "user: columns left out: 'id', 'messages[].id'" in done.notes
    by_source = {row["source"]: row for row in rows}
    assert by_source["user"]["tools"] == tools
    assert by_source["safety"]["tools"] is None
    kept = by_source["user"]["messages"]
    assert kept[1] == {"role": "assistant", "content": "", "tool_calls": call}
    assert [turn.get("weight") for turn in kept] == [None, None, None, 0, None, None]


def test_columns_may_be_mapped(tmp_path: Path, safety: Path) -> None:
    users = jsonl(tmp_path / "u.jsonl", [{"ask": f"a {i}", "reply": "b", "n": 1} for i in range(9)])
    mapping = {"user": "ask", "assistant": "reply"}
    done, rows = mixed(users, safety, mitigation="plain", mapping=mapping)
    assert {row["messages"][1]["content"] for row in rows if row["source"] == "user"} == {"b"}
    assert "user: columns left out: 'n'" in done.notes


def test_twins_of_behaviours_are_said(user: Path, tmp_path: Path) -> None:
    values = [
        {"behavior_id": b.behavior_id, "harmful": b.harmful, "benign": b.benign}
        for b in world.behaviours(9, 0)
    ]
    path = jsonl(tmp_path / "b.jsonl", values)
    done, rows = mixed(user, path, behaviours=True, mitigation="multi_task", share=0.5)
    assert any("9 benign twins have no answers and make no rows" in note for note in done.notes)
    assert not any("no benign twins" in note for note in done.notes)
    assert all(row["expected"] == "refuse" for row in rows if row["source"] == "safety")
