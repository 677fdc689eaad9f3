"""Which rows run: taken adapter by adapter from shared work, admitted by free pages, and preempted.

Pages and the tables of a step are kept by ``_native.Batch``; here is what it leaves open.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import fastsafe._native as _native
from fastsafe.engine.request import SamplingParams

FinishReason = Literal["stop", "length", "error"]
_ENDINGS: tuple[FinishReason, ...] = ("stop", "length", "error")
_READ = 3  # a row that is only read has been
_NO_ROOM = -1


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt to complete or to read.

    Attributes:
        index: Place in the caller's list.
        slot: Its adapter's slot in the bank, -1 for the base.
        tokens: The prompt, with what is to be scored behind it.
        limit: Tokens at which it ends; 0 for a row that is only read.
        feed: Tokens that are computed of a row that is only read.
        keep_from: First token whose hidden state is wanted of a row that is only read.
        params: How tokens are drawn; None for a row that is only read.
        has_stop_text: Whether these tokens decode to a text that ends it; None to not ask.
    """

    index: int
    slot: int
    tokens: tuple[int, ...]
    limit: int
    feed: int = 0
    keep_from: int = 0
    params: SamplingParams | None = None
    has_stop_text: Callable[[Sequence[int]], bool] | None = None


class Work:
    """Rows that nobody has taken yet, by adapter; several lanes may take from it at once."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._lock = threading.Lock()
        self._rows: dict[int, deque[Row]] = {}
        self._lanes: dict[int, set[int]] = {}  # of each adapter, those that run rows of it
        # prompts with one beginning come one after another, so that the pages of it are warm
        for row in sorted(rows, key=lambda row: (row.slot, row.tokens)):
            self._rows.setdefault(row.slot, deque()).append(row)
        self._is_cancelled = False
        self._is_of_main = threading.current_thread() is threading.main_thread()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for the rows any more: lanes let go of them at their next step.

        An interpreter that ends waits for its threads before it drops a stream that was left open.
        """
        is_over = self._is_of_main and not threading.main_thread().is_alive()
        return self._is_cancelled or is_over

    def cancel(self) -> None:
        """Give out nothing more."""
        self._is_cancelled = True

    def take(self, lane: int, slots: Sequence[int], most_slots: int) -> Row | None:
        """Take one row for a lane: of an adapter that it runs already, or of another one.

        Args:
            lane: Who asks.
            slots: Adapters of the rows that the lane runs.
            most_slots: Most adapters that it may run at once.
        """
        with self._lock:
            if self.is_cancelled:
                return None
            for lanes in self._lanes.values():
                lanes.discard(lane)
            for slot in slots:
                self._lanes.setdefault(slot, set()).add(lane)
            found = next((slot for slot in slots if slot in self._rows), None)
            if found is None and self._rows and len(slots) < most_slots:
                # the adapter that the fewest lanes run, and of those the one with most rows
                found = min(
                    self._rows,
                    key=lambda slot: (len(self._lanes.get(slot, ())), -len(self._rows[slot])),
                )
            if found is None:
                return None
            rows = self._rows[found]
            row = rows.popleft()
            if not rows:
                del self._rows[found]
            return row


class Scheduler:
    """The rows of one lane, waiting and running.

    Args:
        batch: Its pages; no row in it.
        work: Where rows come from.
        lane: Number of this lane.
        max_rows: Most rows at once; not more than ``batch`` has handles.
        max_slots: Most adapters at once.
        space_of: Namespace of an adapter's pages.
        on_add: Told each handle and row that is given a place, before it runs.
    """

    def __init__(
        self,
        batch: _native.Batch,
        work: Work,
        *,
        lane: int,
        max_rows: int,
        max_slots: int,
        space_of: Callable[[int], int],
        on_add: Callable[[int, Row], None],
    ) -> None:
        self.batch = batch
        self.max_rows = max_rows
        self.rows: dict[int, Row] = {}  # by handle, those that wait for room included
        self._work = work
        self._lane = lane
        self._max_slots = max_slots
        self._space_of = space_of
        self._on_add = on_add
        self._waiting: deque[int] = deque()
        self._asks: dict[int, Callable[[Sequence[int]], bool]] = {}  # rows with stop texts
        self._slots: dict[int, int] = {}  # rows of each adapter

    def fill(self) -> bool:
        """Admit rows while there is room; False when nothing is left to run."""
        if self._work.is_cancelled:
            return False
        while self.batch.running < self.max_rows:
            if not self._waiting and not self._take():
                break
            found = self.batch.admit(self._waiting[0])
            if found < 0:
                if found == _NO_ROOM and not self.batch.running:
                    raise RuntimeError("a row needs more pages than there are")
                break
            self._waiting.popleft()
        return bool(self.batch.running)

    def _take(self) -> bool:
        row = self._work.take(self._lane, tuple(self._slots), self._max_slots)
        if row is None:
            return False
        space = self._space_of(row.slot)
        handle = self.batch.add(row.slot, space, row.tokens, row.limit, row.feed, row.keep_from)
        self.rows[handle] = row
        self._slots[row.slot] = self._slots.get(row.slot, 0) + 1
        if row.has_stop_text:
            self._asks[handle] = row.has_stop_text
        self._waiting.append(handle)
        self._on_add(handle, row)
        return True

    def plan(self, budget: int, *, prompts: bool = True, decodes: bool = True) -> _native.Plan:
        """Tables of the next step; rows that gave way are the first to be admitted again.

        Args:
            budget: Most tokens of prompts.
            prompts: Whether rows are computed that have not drawn a token yet.
            decodes: Whether those are that have.
        """
        plan = self.batch.plan(prompts, decodes, budget)
        self._waiting.extendleft(plan.preempted.tolist())
        return plan

    def ended(self, pairs: Sequence[int]) -> list[tuple[int, FinishReason | None]]:
        """Handles and reasons of the rows that ended; None as the reason of rows that were read.

        Args:
            pairs: What ``_native.Batch.append`` or ``record`` returned.
        """
        ends = dict(zip(pairs[::2], pairs[1::2], strict=True))
        found: list[tuple[int, FinishReason | None]] = [
            (handle, None if ending == _READ else _ENDINGS[ending])
            for handle, ending in ends.items()
        ]
        for handle, has_stop_text in self._asks.items():
            given = len(self.rows[handle].tokens)
            drawn = self.batch.tokens(handle)[given:]
            if drawn and _ENDINGS[ends.get(handle, 1)] == "length" and has_stop_text(drawn):
                found = [pair for pair in found if pair[0] != handle]
                found.append((handle, "stop"))
        return found

    def remove(self, handle: int) -> Row:
        """Let go of a row and its pages."""
        row = self.rows.pop(handle)
        self.batch.remove(handle)
        self._asks.pop(handle, None)
        self._slots[row.slot] -= 1
        if not self._slots[row.slot]:
            del self._slots[row.slot]
        return row

    def halve(self) -> int | None:
        """Half the rows from now on, all of them computed anew; memory ran out.

        Returns:
            None, or the handle of the row that was running alone.
        """
        running = [handle for handle in self.rows if handle not in self._waiting]
        self.batch.preempt_all()
        self._waiting.extendleft(reversed(running))
        self.max_rows = max(1, len(running) // 2)
        if len(running) > 1:
            return None
        self._waiting.remove(running[0])
        return running[0]

    def clear(self) -> None:
        """Let go of all rows, and of every page."""
        for handle in list(self.rows):
            self.remove(handle)
        self._waiting.clear()
        self.batch.forget()
