"""Benchmark files: published columns and known quirks, on made-up rows that ask for nothing."""

import csv
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from fastsafe.errors import DataError, UsageError
from fastsafe.io.digest import file_sha256
from fastsafe.safety.benchmarks import benchmarks, read_benchmark
from fastsafe.safety.formats import formats

HARMBENCH = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID"


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_every_benchmark_is_found_and_licensed() -> None:
    found = benchmarks()
    assert set(found) >= {
        "harmbench",
        "advbench",
        "strongreject",
        "xstest",
        "beavertails",
        "hexphi",
        "jailbreakbench",
    }
    assert all(each.licence for each in found.values())
    assert found["beavertails"].commercial is False
    assert found["hexphi"].gated
    assert found["orbench_hard"].commercial is None


def test_harmbench_with_bom_crlf_and_line_breaks_in_a_passage(tmp_path: Path) -> None:
    path = write(
        tmp_path / "h.csv",
        f"\ufeff{HARMBENCH}\r\n"
        "placeholder request 1,standard,illegal,,,one\r\n"
        '"placeholder request 2, about it",contextual,harmful,context,'
        '"line 1\nline 2\n\nline 4",two\r\n',
    )
    one, two = read_benchmark("harmbench", path)
    assert (one.behavior_id, one.harmful, one.category) == (
        "one",
        "placeholder request 1",
        "illegal",
    )
    assert (one.functional_category, two.functional_category) == ("standard", "contextual")
    assert two.context == "line 1\nline 2\n\nline 4"
    assert two.action(True) == f"{two.context}\n\n---\n\nplaceholder request 2, about it"
    assert formats()["plain"].ask(two, True) == two.action(True)
    assert (one.source_row, two.source_row) == (1, 2)
    assert one.form == "request"
    assert one.origin is two.origin
    assert one.origin is not None
    assert (one.origin.name, one.origin.sha256) == ("harmbench", file_sha256(path))
    assert (one.origin.licence, one.origin.commercial, one.origin.gated) == ("MIT", True, False)


@pytest.mark.parametrize(
    "text",
    [
        "goal,target\nplaceholder request 1,Sure\nplaceholder request 2,Sure\n",
        "target,prompt\nSure,placeholder request 1\nSure,placeholder request 2\n",
        "\ufeffGoal\nplaceholder request 1\nplaceholder request 2\n",
        "placeholder request 1\r\nplaceholder request 2\r\n",
        '"placeholder request 1"\n\nplaceholder request 2',
        "Behavior\nplaceholder request 1\nplaceholder request 2\n",
        "instruction\rplaceholder request 1\rplaceholder request 2\r",
        ",goal,target\n0,placeholder request 1,Sure\n1,placeholder request 2,Sure\n",
        "goal,target,\nplaceholder request 1,Sure,\nplaceholder request 2,Sure,\n",
    ],
)
def test_advbench_with_and_without_a_header(tmp_path: Path, text: str) -> None:
    found = read_benchmark("advbench", write(tmp_path / "a.csv", text))
    assert [each.harmful for each in found] == ["placeholder request 1", "placeholder request 2"]
    assert [each.behavior_id for each in found] == ["advbench-1", "advbench-2"]


@pytest.mark.parametrize("key", ["goal", "prompt", "behavior", "instruction", "Behavior"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_advbench_as_json(tmp_path: Path, name: str, key: str) -> None:
    rows = [{key: f"placeholder request {i}", "target": "Sure"} for i in (1, 2)]
    found = read_benchmark("advbench", jsonl(tmp_path / name, rows))
    assert [each.harmful for each in found] == ["placeholder request 1", "placeholder request 2"]
    with pytest.raises(DataError, match="which is JSON, expected plain text"):
        read_benchmark("advbench", write(tmp_path / "a.txt", json.dumps(rows[0]) + "\n"))


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize("index", ["", "Unnamed: 0"])
def test_every_table_may_have_the_index_of_pandas(tmp_path: Path, index: str, end: str) -> None:
    tables = {
        "advbench": "goal,target\nplaceholder 1,Sure",
        "harmbench": f"{HARMBENCH}\nplaceholder 1,standard,illegal,,,one",
        "strongreject": "category,source,forbidden_prompt\nFraud,us,placeholder 1",
        "xstest": "id,prompt,type\n1,placeholder 1,contrast_homonyms",
        "orbench_toxic": "prompt,category\nplaceholder 1,privacy",
    }
    for name, text in tables.items():
        header, row = text.split("\n")
        path = write(tmp_path / f"{name}.csv", end.join([f"{index},{header}", f"0,{row}", ""]))
        assert [each.harmful for each in read_benchmark(name, path)] == ["placeholder 1"]


def test_strongreject(tmp_path: Path) -> None:
    text = "category,source,forbidden_prompt\nFraud,us,placeholder request 1\n"
    (found,) = read_benchmark("strongreject", write(tmp_path / "s.csv", text))
    assert (found.category, found.harmful) == ("Fraud", "placeholder request 1")


XSTEST = """id,prompt,type,label,focus,note
1,placeholder question 1,homonyms,safe,kill,
2,placeholder question 2,homonyms,safe,kill,
3,placeholder question 3,definitions,safe,word,
26,placeholder request 1,contrast_homonyms,unsafe,Kill ,
27,placeholder request 2,contrast_discr,unsafe,other,
"""


def test_xstest_pairs_by_focus(tmp_path: Path) -> None:
    found = read_benchmark("xstest", write(tmp_path / "x.csv", XSTEST))
    assert {(each.behavior_id, each.harmful, each.benign, each.category) for each in found} == {
        ("xstest-2", "", "placeholder question 2", "homonyms"),
        ("xstest-3", "", "placeholder question 3", "definitions"),
        ("xstest-26", "placeholder request 1", "placeholder question 1", "homonyms"),
        ("xstest-27", "placeholder request 2", "", "discr"),
    }
    assert len(found) == 4


def test_xstest_without_label_and_focus(tmp_path: Path) -> None:
    text = "id_v2,prompt,type\nv2-1,placeholder question 1,homonyms\nv2-2,p,contrast_homonyms\n"
    safe, unsafe = read_benchmark("xstest", write(tmp_path / "x.csv", text))
    assert (safe.behavior_id, safe.harmful, safe.benign) == (
        "xstest-v2-1",
        "",
        "placeholder question 1",
    )
    assert (unsafe.harmful, unsafe.benign) == ("p", "")


@pytest.mark.parametrize(("name", "harmful"), [("orbench_hard", False), ("orbench_toxic", True)])
def test_orbench_side_by_name(tmp_path: Path, name: str, harmful: bool) -> None:
    path = write(tmp_path / "o.csv", "prompt,category\nplaceholder prompt 1,privacy\n")
    (found,) = read_benchmark(name, path)
    assert found.action(harmful) == "placeholder prompt 1"
    assert found.action(not harmful) == ""
    assert found.behavior_id == f"{name}-1"


FLAGS = {"theft,_fraud": False, "privacy_violation": False}


def rows_of_beavertails() -> list[dict[str, Any]]:
    def row(prompt: str, safe: bool, **raised: bool) -> dict[str, Any]:
        named = {key.replace("__", ",_"): value for key, value in raised.items()}
        flags = {**FLAGS, **named}
        return {"prompt": prompt, "response": "r", "category": flags, "is_safe": safe}

    return [
        row("placeholder 1", True),
        row("placeholder 2", False, theft__fraud=True),
        row("placeholder 1", False, privacy_violation=True),
        row("placeholder 2", False, privacy_violation=True),
        row("placeholder 3", True),
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_beavertails_counts_prompts_once(tmp_path: Path, packed: bool) -> None:
    path = jsonl(tmp_path / "b.jsonl", rows_of_beavertails())
    if packed:
        (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(path.read_bytes()))
        path = tmp_path / "b.jsonl.xz"
    found = read_benchmark("beavertails", path)
    assert [(each.harmful, each.category, each.source_row) for each in found] == [
        ("placeholder 2", "privacy_violation; theft,fraud", 2),
        ("placeholder 1", "privacy_violation", 3),
    ]


def test_beavertails_evaluation(tmp_path: Path) -> None:
    rows = [{"prompt": "placeholder 1", "category": "theft,_fraud", "category_id": 3}]
    path = write(tmp_path / "test.json", json.dumps(rows))
    (found,) = read_benchmark("beavertails_eval", path)
    assert (found.harmful, found.category) == ("placeholder 1", "theft,fraud")


def test_hexphi_folder(tmp_path: Path) -> None:
    write(tmp_path / "category_10_privacy.csv", "placeholder 1, with a comma\n")
    write(
        tmp_path / "category_2_fraud.csv", '\ufeff"placeholder 2, quoted"\r\n\r\nplaceholder 3\r\n'
    )
    write(tmp_path / "README.md", "x")
    found = read_benchmark("hexphi", tmp_path)
    assert [(each.behavior_id, each.harmful, each.category) for each in found] == [
        ("hexphi-2-1", "placeholder 2, quoted", "fraud"),
        ("hexphi-2-2", "placeholder 3", "fraud"),
        ("hexphi-10-1", "placeholder 1, with a comma", "privacy"),
    ]
    assert read_benchmark("hexphi", tmp_path / "category_2_fraud.csv")[0].harmful.endswith("quoted")
    assert found[0].origin is not None
    before = found[0].origin.sha256
    write(tmp_path / "category_2_fraud.csv", "placeholder 4\n")
    changed = read_benchmark("hexphi", tmp_path)[0].origin
    assert changed is not None
    assert changed.sha256 != before


@pytest.mark.parametrize(
    ("header", "category"), [("", ""), ("Prompt,Category Name\n", "fraud"), ("prompt\n", "")]
)
def test_hexphi_in_one_file(tmp_path: Path, header: str, category: str) -> None:
    line = f'"placeholder 1, quoted",{category}\n' if category else "placeholder 1, quoted\n"
    (found,) = read_benchmark("hexphi", write(tmp_path / "hexphi.csv", header + line))
    wanted = ("hexphi-1", "placeholder 1, quoted", category)
    assert (found.behavior_id, found.harmful, found.category) == wanted


JAILBREAKBENCH = "Index,Goal,Target,Behavior,Category,Source\n"


def test_jailbreakbench_in_halves_and_as_pairs(tmp_path: Path) -> None:
    harmful = write(
        tmp_path / "harmful-behaviors.csv",
        f'{JAILBREAKBENCH}0,"placeholder 1, x",Sure,p,Privacy,O\n1,placeholder 2,S,q,Fraud,O\n',
    )
    benign = write(
        tmp_path / "benign-behaviors.csv",
        f"{JAILBREAKBENCH}1,twin 2,Sure,q,Fraud,Original\n0,twin 1,Sure,p,Privacy,Original\n",
    )
    pairs = read_benchmark("jailbreakbench", tmp_path)
    assert [(b.behavior_id, b.harmful, b.benign, b.category) for b in pairs] == [
        ("jailbreakbench-0", "placeholder 1, x", "twin 1", "Privacy"),
        ("jailbreakbench-1", "placeholder 2", "twin 2", "Fraud"),
    ]
    assert [(b.harmful, b.benign) for b in read_benchmark("jailbreakbench", harmful)] == [
        ("placeholder 1, x", ""),
        ("placeholder 2", ""),
    ]
    assert [(b.harmful, b.benign) for b in read_benchmark("jailbreakbench", benign)] == [
        ("", "twin 2"),
        ("", "twin 1"),
    ]
    write(benign, f"{JAILBREAKBENCH}1,twin 2,Sure,q,Fraud,Original\n")
    with pytest.raises(DataError, match="Index 0 is in one half alone"):
        read_benchmark("jailbreakbench", tmp_path)
    benign.unlink()
    with pytest.raises(DataError, match=r"holds 0 files \*benign\*\.csv"):
        read_benchmark("jailbreakbench", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        (
            "harmbench",
            "h.csv",
            "goal,target\nx,y\n",
            "row 0, line 2: columns are 'goal, target', expected Beh",
        ),
        (
            "harmbench",
            "h.csv",
            f"{HARMBENCH}\n,standard,c,,,id\n",
            "row 0, line 2: Behavior is '', expected",
        ),
        (
            "harmbench",
            "h.csv",
            f"{HARMBENCH}\n" + "x,standard,c,,,id\n" * 2,
            "row 1: .*'id' repeats",
        ),
        ("harmbench", "h.csv", f"{HARMBENCH}\n", "no behaviours"),
        (
            "advbench",
            "a.csv",
            "a,b\nc,d\n",
            "header is 'a, b', expected a prompt, or a header with one of goal",
        ),
        ("advbench", "a.csv", "ask this\ny, z\n", "row 1, line 2: fields are 2, expected 1"),
        (
            "advbench",
            "a.csv",
            "goal,target\n ,y\n",
            "row 0, line 2: fields are 2, expected 2 and a pr",
        ),
        ("strongreject", "s.csv", "category\nx\n", "expected category, source, forbidden_prompt"),
        (
            "xstest",
            "x.csv",
            XSTEST.replace(",unsafe,K", ",safe,K"),
            "row 3, line 5: label is 'safe' and type",
        ),
        ("xstest", "x.csv", "prompt\nx\n", "expected id, prompt, type, or id_v2, prompt, type"),
        (
            "beavertails",
            "b.jsonl",
            '{"prompt": "p", "category": "c", "is_safe": false}',
            "flags in",
        ),
        ("beavertails", "b.jsonl", '{"prompt": "p", "category": {}, "is_safe": 0}', "flags in"),
        ("hexphi", "all.csv", "prompt,category\nx x,\n", "row 0, line 2: category is"),
        ("jailbreakbench", "b.csv", "Goal\nx\n", "expected Index, Goal, Category"),
        (
            "jailbreakbench",
            "b.csv",
            "Index,Goal,Category\n0,x,c\n0,y,c\n",
            "row 1, line 3: Index is '0'",
        ),
    ],
)
def test_wrong_files_name_the_row(
    tmp_path: Path, name: str, file: str, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_benchmark(name, write(tmp_path / file, text))
    assert file in str(caught.value)


def test_missing_unknown_and_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: is missing, expected the file of harmbench"):
        read_benchmark("harmbench", tmp_path / "none.csv")
    with pytest.raises(UsageError, match="benchmark is 'harmbanch', expected one of advbench"):
        read_benchmark("harmbanch", tmp_path)
    with pytest.raises(DataError, match=r"holds no category_\*\.csv, expected the folder"):
        read_benchmark("hexphi", tmp_path)


def test_a_whole_table_survives(tmp_path: Path) -> None:
    """As many rows out as in, whatever the fields hold."""
    nasty = ["a,b", 'a "b"', "a\nb", "=cmd|x", "\u2028", "é", " a "]
    with (tmp_path / "s.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["category", "source", "forbidden_prompt"])
        writer.writerows(["c", "s", f"{text} placeholder"] for text in nasty)
    found = read_benchmark("strongreject", tmp_path / "s.csv")
    assert [each.harmful for each in found] == [f"{text} placeholder".strip() for text in nasty]
