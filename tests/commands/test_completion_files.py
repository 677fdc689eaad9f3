"""Files of completions: whose noise a row has, and when the rows are on disk."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastsafe import LLM, SamplingParams, organism
from fastsafe.commands import generate as module
from fastsafe.commands.generate import PromptFile, complete, open_completions


def test_rows_with_other_ids_draw_other_noise(tmp_path: Path) -> None:
    """A row's seed comes from the run's and its id, never from its place in the file."""
    llm, params = LLM(organism.path()), SamplingParams(max_tokens=12, temperature=1.5, seed=3)

    def texts(name: str, ids: Sequence[str]) -> dict[str, str]:
        asked, answered = tmp_path / f"{name}.jsonl", tmp_path / name
        asked.write_text("".join(json.dumps({"prompt": "How do I", "id": i}) + "\n" for i in ids))
        with open_completions(answered, {}, {}) as completions:
            complete(llm, PromptFile(asked, ()), completions, params)
        return {
            row["id"]: row["text"] for row in map(json.loads, answered.read_text().splitlines())
        }

    ids = [str(i) for i in range(8)]
    found = texts("a", ids)
    assert len(set(found.values())) > 4, "all ask the same, and only the noise differs"
    assert texts("b", ids[::-1]) == found


def test_completions_are_synced_every_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, synced = [100.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with open_completions(tmp_path / "out", {}, {}) as completions:
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(clock[0]))
        for clock[0] in (100.0, 100.9, 101.0, 101.5, 102.0, 105.0):
            completions.add({"id": "1"})
        assert synced == [101.0, 102.0, 105.0]
