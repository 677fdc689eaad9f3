"""Progress: bars, lines and events say the same."""

import io
import json

import pytest

from fastsafe.progress import (
    Bars,
    Events,
    Lines,
    Progress,
    duration,
    stage,
)


class EveryLine(Lines):
    every_s = 0


class EveryEvent(Events):
    every_s = 0


def show(progress: Progress) -> None:
    with stage(progress, "train", 4, "steps"):
        progress.advance(1)
        progress.say("a fact")
        progress.advance(3, "loss 0.5")
    progress.event("done", path="x")


def test_lines() -> None:
    stream = io.StringIO()
    show(EveryLine(stream))
    first, middle, said, last = stream.getvalue().splitlines()
    assert first == "train: 4 steps"
    assert middle == "train: 1/4 steps (25%), about 0 s left"
    assert said == "a fact"
    assert last == "train: 4/4 steps in 0 s"


@pytest.mark.parametrize("kind", [Lines, Bars])
def test_a_stage_without_work_is_not_shown(kind: type[Progress]) -> None:
    stream = io.StringIO()
    progress = kind(stream)  # type: ignore[call-arg]
    with stage(progress, "derive", 0, "adapters"):
        progress.advance(0)
    assert stream.getvalue().strip() == ""


def test_events_are_json_lines() -> None:
    stream = io.StringIO()
    show(EveryEvent(stream))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [e["event"] for e in events] == [
        "stage_started",
        "progress",
        "note",
        "progress",
        "stage_finished",
        "done",
    ]
    assert events[3] == {"event": "progress", "stage": "train", "done": 4, "total": 4}
    assert events[-1] == {"event": "done", "path": "x"}


def test_events_are_few() -> None:
    stream = io.StringIO()
    with stage(Events(stream), "train", 1000, "steps"):
        pass
    assert len(stream.getvalue().splitlines()) == 2


def test_bars() -> None:
    stream = io.StringIO()
    show(Bars(stream))
    assert "a fact" in stream.getvalue()
    assert "train" in stream.getvalue()
    assert "4/4" in stream.getvalue()


def test_silence(capfd: pytest.CaptureFixture[str]) -> None:
    show(Progress())
    assert capfd.readouterr() == ("", "")


def test_a_stage_closes_on_errors() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError), stage(Lines(stream), "train", 4, "steps"):
        raise KeyError
    assert stream.getvalue().splitlines()[-1].startswith("train: 0/4 steps in")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3700, "1 h 1 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


HOSTILE = "answers by \x1b[31m[red]{task}\u202e"


@pytest.mark.parametrize("kind", [EveryLine, EveryEvent, Bars])
def test_names_from_a_recipe_reach_no_terminal_raw(kind: type[Progress]) -> None:
    stream = io.StringIO()
    progress = kind(stream)  # type: ignore[call-arg]
    with stage(progress, "judge", 2, HOSTILE):
        progress.advance(1)
        progress.say(HOSTILE)
        progress.advance(1)
    shown = stream.getvalue()
    assert "[red]{task}" in shown
    assert "\x1b[31m" not in shown
    assert "\u202e" not in shown
