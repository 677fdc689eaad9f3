"""Progress of a run: bars on a terminal, lines in a log, JSON events for a machine."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from fastsafe.errors import printable


class Progress:
    """Receives the progress of one run and shows nothing; subclasses show it.

    Calls may come from several threads, one at a time.
    """

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Begin a stage of ``total`` units."""

    def advance(self, count: int, note: str = "") -> None:
        """Count units as done, that is on disk."""

    def end(self) -> None:
        """End the stage."""

    def say(self, text: str) -> None:
        """Show a message to the user."""

    def event(self, name: str, **fields: Any) -> None:
        """Emit an event for machines."""


@contextmanager
def stage(progress: Progress, name: str, total: int, unit: str) -> Iterator[None]:
    """Begin a stage and end it when the block exits, with or without an error."""
    progress.begin(name, total, unit)
    try:
        yield
    finally:
        progress.end()


class _Stream(Progress):
    """Writes to a stream, and shows calls of ``advance`` at most once in ``every_s`` seconds."""

    every_s: float

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Store the stage and the time of its begin."""
        self._stage, self._total, self._unit, self._done = stage, total, unit, 0
        self._began = self._last = time.monotonic()

    def _count(self, count: int) -> bool:
        """Count units as done, and return whether the last output is old enough for a new one."""
        self._done += count
        now = time.monotonic()
        is_due = now - self._last >= self.every_s
        self._last = now if is_due else self._last
        return is_due

    def _write(self, text: str) -> None:
        self._stream.write(f"{printable(text)}\n")
        self._stream.flush()


class Lines(_Stream):
    """Plain lines for logs and pipes, at the begin and end of a stage and every few seconds.

    A stage without work has none.
    """

    every_s = 5.0

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Write the name and size of the stage."""
        super().begin(stage, total, unit)
        if total:
            self._write(f"{stage}: {total} {unit}")

    def advance(self, count: int, note: str = "") -> None:
        """Write a line if the last one is old enough."""
        if self._count(count) and 0 < self._done < self._total:
            left = (self._last - self._began) * (self._total - self._done) / self._done
            share = self._done / self._total
            note = f", {note}" if note else ""
            self._write(
                f"{self._stage}: {self._done}/{self._total} {self._unit}"
                f" ({share:.0%}{note}), about {duration(left)} left"
            )

    def end(self) -> None:
        """Write the duration of the stage."""
        took = duration(time.monotonic() - self._began)
        if self._total:
            self._write(f"{self._stage}: {self._done}/{self._total} {self._unit} in {took}")

    def say(self, text: str) -> None:
        """Write one line."""
        self._write(text)


class Events(_Stream):
    """One JSON object per line, at most one progress event per second."""

    every_s = 1.0

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Write a ``stage_started`` event."""
        super().begin(stage, total, unit)
        self.event("stage_started", stage=stage, total=total, unit=unit)

    def advance(self, count: int, note: str = "") -> None:
        """Write a ``progress`` event if the last one is old enough."""
        if self._count(count):
            self.event("progress", stage=self._stage, done=self._done, total=self._total)

    def end(self) -> None:
        """Write a ``stage_finished`` event."""
        seconds = round(time.monotonic() - self._began, 3)
        done = {"done": self._done, "total": self._total}
        self.event("stage_finished", stage=self._stage, **done, duration_s=seconds)

    def say(self, text: str) -> None:
        """Write a ``note`` event."""
        self.event("note", text=text)

    def event(self, name: str, **fields: Any) -> None:
        """Write one event."""
        self._write(json.dumps({"event": name, **fields}))


class Bars(Progress):
    """A rich progress bar per stage, with the time left."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream)

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Show a bar below those of finished stages, none for a stage without work."""
        from rich import progress as rich

        self._bar = rich.Progress(
            rich.TextColumn("{task.description:<9}"),
            rich.BarColumn(bar_width=32),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[unit]}", markup=False),
            rich.TimeElapsedColumn(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.fields[note]}"),
            console=self._console,
        )
        self._task = self._bar.add_task(stage, total=total, unit=printable(unit), note="")
        if total:
            self._bar.start()

    def advance(self, count: int, note: str = "") -> None:
        """Move the bar."""
        self._bar.update(self._task, advance=count, note=note)

    def end(self) -> None:
        """Stop updating the bar and release the terminal."""
        self._bar.update(self._task, note="")
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(printable(text), markup=False, highlight=False)


class LogLines(Lines):
    """The lines of ``Lines`` as records of the logger ``fastsafe``, level INFO."""

    def __init__(self) -> None:
        self._logger = logging.getLogger("fastsafe")

    def _write(self, text: str) -> None:
        self._logger.info(text)


class Calls(Events):
    """Passes each event of ``Events`` to a function, as a mapping."""

    def __init__(self, function: Callable[[dict[str, Any]], object]) -> None:
        self._function = function

    def event(self, name: str, **fields: Any) -> None:
        """Call the function."""
        self._function({"event": name, **fields})


# what callers from Python pass as ``progress``
Reporting = Progress | Callable[[dict[str, Any]], object] | None


def reporter(progress: Reporting) -> Progress:
    """Return what shows the progress that a caller asked for.

    Args:
        progress: None logs lines; a function is called with each event, a mapping such as
            ``{"event": "progress", "stage": "train", "done": 3, "total": 16}``; a ``Progress`` is
            returned.
    """
    if progress is None:
        return LogLines()
    return progress if isinstance(progress, Progress) else Calls(progress)


def for_terminal(*, as_json: bool = False) -> Progress:
    """Return events on stdout for JSON, bars on a terminal, or else lines on stderr."""
    if as_json:
        return Events(sys.stdout)
    return Bars(sys.stderr) if sys.stderr.isatty() else Lines(sys.stderr)


def duration(seconds: float) -> str:
    """Format a duration, such as in a line of progress.

    Example:
        >>> duration(75)
        '1 min 15 s'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
