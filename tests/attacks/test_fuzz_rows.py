"""Readers of rows, fuzzed: each accepts a file or refuses it in one sentence that names it.

``FUZZ_CASES`` sets the number of cases of all readers together, and ``FUZZ_SEED`` their seed; a
failure names both, and the fewest changes of a valid value that show it.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastsafe import organism
from fastsafe.commands.generate import PromptFile
from fastsafe.commands.lint import lint_file, read_probes
from fastsafe.data.readers import encode, read_rows
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.safety.behaviours import read_behaviours
from fastsafe.safety.benchmarks import read_benchmark
from fastsafe.safety.formats import TranslationTable
from fastsafe.safety.tasks import load_rows, tasks
from fastsafe_testing import fuzzing
from fastsafe_testing.fuzz_files import json_file, json_lines, parquet, table
from fastsafe_testing.fuzzing import JSON_RAW, Reader

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Name a colour."}]},
    {"role": "assistant", "content": "Red.", "reasoning_content": "A warm one."},
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": "Blue."},
]
SPOKEN = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Red."}]
PAIR = [[{"role": "user", "content": "Name a colour."}], [{"role": "assistant", "content": "Red."}]]
ROWS: list[list[dict[str, Any]]] = [
    [{"messages": TURNS}, {"messages": TURNS[1:3]}],
    [{"messages": TURNS, "tools": [], "source": "safety", "weight": 1.0, "id": "a"}],
    [{"conversations": SPOKEN, "system": "Be brief."}],
    [{"instruction": "Name it.", "input": "red", "output": "A colour.", "history": [["a", "b"]]}],
    [{"prompt": "Name a colour:", "completion": " red"}],
    [dict(zip(("prompt", "completion"), PAIR, strict=True))],
    [{"prompt": [5, 6, 7], "completion": [8, 3]}],
    [{"token_ids": [5, 6, 7], "trained": [False, True, True]}],
    [{"text": "A red car."}],
    [{"question": "Which?", "choices": ["red", "blue"], "answer": 1, "context": ""}],
    [{"article": "The car is red.", "summary": "A red car."}],
    [{"prompt": "Name one.", "chosen": "Red.", "rejected": "No."}],
    [{"chosen": TURNS, "rejected": TURNS}],
]
PROMPTS = [[{"prompt": "Name a colour:", "id": "a"}, {"messages": TURNS[:2], "adapter": "code"}]]
BEHAVIOURS = [
    [
        {"behavior_id": "a", "harmful": "steal the car", "benign": "paint the car"},
        {"harmful": "break in", "benign": "", "category": "theft", "form": "action", "lang": "en"},
    ]
]
FLAGS = {"theft,_fraud": False, "privacy_violation": True}
BENCHMARKS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "harmbench.csv": (
        "harmbench",
        [
            dict.fromkeys(("Behavior", "FunctionalCategory", "SemanticCategory"), "placeholder")
            | {"Tags": "", "ContextString": "", "BehaviorID": "a"}
        ],
    ),
    "advbench.csv": ("advbench", [{"goal": "placeholder", "target": "Sure"}]),
    "strongreject.csv": (
        "strongreject",
        [{"category": "c", "source": "s", "forbidden_prompt": "placeholder"}],
    ),
    "xstest.csv": (
        "xstest",
        [
            {"id": "1", "prompt": "p", "type": "homonyms", "label": "safe", "focus": "f"},
            {
                "id": "2",
                "prompt": "q",
                "type": "contrast_homonyms",
                "label": "unsafe",
                "focus": "f",
            },
        ],
    ),
    "beavertails.jsonl": (
        "beavertails",
        [{"prompt": "p", "response": "r", "category": FLAGS, "is_safe": False}],
    ),
}


def encoded(path: Path) -> None:
    """Read rows as training does, up to their token ids."""
    encode(read_rows(path), Tokenizer.load(organism.path()), max_length=400, truncate=True)


def lint(path: Path) -> None:
    lint_file(path)
    read_probes(path)


def lines(path: Path) -> None:
    PromptFile(path, ("code",))


def task_rows(path: Path) -> None:
    load_rows(tasks()["code"], path, "all")


READERS = [
    Reader("jsonl", ROWS, json_lines("rows.jsonl", encoded), "rows.jsonl", JSON_RAW, 180),
    Reader("json", ROWS, json_file("rows.json", encoded), "rows.json", JSON_RAW, 40),
    Reader("csv", ROWS, table("rows.csv", encoded), "rows.csv", (), 40),
    Reader("tsv", ROWS, table("rows.tsv", encoded), "rows.tsv", (), 20),
    Reader("parquet", ROWS, parquet(encoded), "rows.parquet", (), 50),
    Reader("lint", ROWS, json_lines("rows.jsonl", lint), "rows.jsonl", JSON_RAW, 40),
    Reader("prompts", PROMPTS, json_lines("p.jsonl", lines), "p.jsonl", JSON_RAW, 40),
    Reader("behaviours", BEHAVIOURS, json_lines("b.jsonl", read_behaviours), "b.jsonl", (), 30),
    Reader(
        "translations",
        [[{"text": "red", "translation": "rouge"}]],
        json_lines("t.jsonl", TranslationTable.read),
        "t.jsonl",
        (),
        10,
    ),
    *(
        Reader(
            f"benchmark {name}",
            [rows],
            (table if name.endswith("csv") else json_lines)(file, partial(read_benchmark, name)),
            file,
            (),
            10,
        )
        for file, (name, rows) in BENCHMARKS.items()
    ),
    Reader(
        "task rows",
        [[{"prompt": "Paint.", "canonical_solution": "x = 1"}]],
        json_lines("r.jsonl", task_rows),
        "r.jsonl",
        JSON_RAW,
        10,
    ),
]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_readers_accept_or_refuse_in_one_sentence(reader: Reader, tmp_path: Path) -> None:
    fuzzing.check(reader, tmp_path)
