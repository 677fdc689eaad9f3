"""Scheduler: which rows of a lane run. Rows are admitted adapter by adapter, and preempted.

``_native.Batch`` keeps the pages and plans the steps; this file decides what it leaves open.
csrc/batch.hpp defines the terms.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import fastsafe._native as _native
from fastsafe.engine.request import SamplingParams

FinishReason = Literal["stop", "length", "error"]
_ENDINGS: tuple[FinishReason | None, ...] = ("stop", "length", "error", None)  # None: scored
_NO_ROOM = -1


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt to complete, or one sequence to score.

    Attributes:
        index: Position in the caller's list.
        slot: Its adapter's slot in the bank, -1 for the base.
        tokens: The prompt, or the whole sequence to score.
        max_tokens_total: Length, prompt included, at which sampling ends; 0 for a sequence to
            score.
        prefill_until: Number of tokens to compute of a sequence to score.
        logits_from: First token of it whose successor is scored.
        params: Sampling parameters; None for a sequence to score.
        has_stop_text: Returns whether sampled tokens decode to a text with a stop text in it;
            None without stop texts.
    """

    index: int
    slot: int
    tokens: tuple[int, ...]
    max_tokens_total: int
    prefill_until: int = 0
    logits_from: int = 0
    params: SamplingParams | None = None
    has_stop_text: Callable[[Sequence[int]], bool] | None = None


class RowQueue:
    """Thread-safe queue of pending rows, grouped by adapter: a lane keeps to few adapters."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._lock = threading.Lock()
        self._rows: dict[int, deque[Row]] = {}
        self._lanes: dict[int, set[int]] = {}  # lanes that run rows of each adapter
        # sorted, prompts with equal prefixes run one after another, while their pages are cached
        for row in sorted(rows, key=lambda row: (row.slot, row.tokens)):
            self._rows.setdefault(row.slot, deque()).append(row)
        self._is_cancelled = False
        self._is_of_main_thread = threading.current_thread() is threading.main_thread()

    @property
    def is_cancelled(self) -> bool:
        """Whether the caller is gone, so that lanes stop at their next step.

        An interpreter that exits joins its threads before it closes a stream that was left open.
        """
        is_exiting = self._is_of_main_thread and not threading.main_thread().is_alive()
        return self._is_cancelled or is_exiting

    def cancel(self) -> None:
        """Stop the lanes; ``take`` returns None from now on."""
        self._is_cancelled = True

    def take(self, lane: int, slots: Sequence[int], max_slots: int) -> Row | None:
        """Take a row for a lane, if possible of an adapter that the lane runs already.

        Args:
            lane: Number of the lane.
            slots: Adapters of the rows that the lane runs.
            max_slots: Maximum number of adapters that it may run at once.

        Returns:
            None when no row is left, or none that the lane may run now.
        """
        with self._lock:
            if self.is_cancelled:
                return None
            for lanes in self._lanes.values():
                lanes.discard(lane)
            for slot in slots:
                self._lanes.setdefault(slot, set()).add(lane)
            chosen = next((slot for slot in slots if slot in self._rows), None)
            if chosen is None and self._rows and len(slots) < max_slots:
                # the adapter with the fewest lanes, and of those the one with most rows
                chosen = min(
                    self._rows,
                    key=lambda slot: (len(self._lanes.get(slot, ())), -len(self._rows[slot])),
                )
            if chosen is None:
                return None
            rows = self._rows[chosen]
            row = rows.popleft()
            if not rows:
                del self._rows[chosen]
            return row


class Scheduler:
    """Waiting and running rows of one lane, during one call.

    Args:
        batch: The lane's batch, without rows.
        queue: Source of rows.
        lane: Number of this lane.
        max_rows: Most running rows; at most the number of handles of ``batch``.
        max_slots: Maximum number of adapters at once.
        on_add: Called with the handle and the row before a new row is admitted.
    """

    def __init__(
        self,
        batch: _native.Batch,
        queue: RowQueue,
        *,
        lane: int,
        max_rows: int,
        max_slots: int,
        on_add: Callable[[int, Row], None],
    ) -> None:
        self.batch = batch
        self.max_rows = max_rows
        self.rows: dict[int, Row] = {}  # waiting and running rows by handle
        self._queue = queue
        self._lane = lane
        self._max_slots = max_slots
        self._on_add = on_add
        self._waiting: deque[int] = deque()
        self._stop_checks: dict[int, Callable[[Sequence[int]], bool]] = {}  # by handle
        self._rows_of_slot: dict[int, int] = {}  # number of rows of each adapter

    def fill(self) -> bool:
        """Admit rows while there is room; return whether any row is running."""
        if self._queue.is_cancelled:
            return False
        while self.batch.running < self.max_rows:
            if not self._waiting and not self._take():
                break
            admitted = self.batch.admit(self._waiting[0])
            if admitted < 0:
                if admitted == _NO_ROOM and not self.batch.running:
                    raise RuntimeError("a row needs more pages than there are")
                break
            self._waiting.popleft()
        return bool(self.batch.running)

    def _take(self) -> bool:
        row = self._queue.take(self._lane, tuple(self._rows_of_slot), self._max_slots)
        if row is None:
            return False
        handle = self.batch.add(
            row.slot,
            row.slot + 1,  # cache namespace: not negative, and one per adapter
            row.tokens,
            row.max_tokens_total,
            row.prefill_until,
            row.logits_from,
        )
        self.rows[handle] = row
        self._rows_of_slot[row.slot] = self._rows_of_slot.get(row.slot, 0) + 1
        if row.has_stop_text:
            self._stop_checks[handle] = row.has_stop_text
        self._waiting.append(handle)
        self._on_add(handle, row)
        return True

    def plan(self, budget: int, *, prefill: bool = True, decode: bool = True) -> _native.StepPlan:
        """Plan the next step; preempted rows wait in front of all others.

        Args:
            budget: Maximum number of tokens of prefill.
            prefill: Whether the step computes prompts and preempted rows.
            decode: Whether it computes the last sampled tokens.
        """
        plan = self.batch.plan(prefill, decode, budget)
        self._waiting.extendleft(plan.preempted.tolist())
        return plan

    def ended(self, pairs: Sequence[int]) -> list[tuple[int, FinishReason | None]]:
        """Return handles and finish reasons of the rows that ended; None for a scored row.

        Args:
            pairs: Handles and endings, from ``_native.Batch.append`` or ``record``.
        """
        reasons = {
            handle: _ENDINGS[ending] for handle, ending in zip(pairs[::2], pairs[1::2], strict=True)
        }
        for handle, has_stop_text in self._stop_checks.items():
            num_prompt_tokens = len(self.rows[handle].tokens)
            sampled = self.batch.tokens(handle)[num_prompt_tokens:]
            if sampled and reasons.get(handle, "length") == "length" and has_stop_text(sampled):
                reasons.pop(handle, None)  # a stop text ends after the other rows
                reasons[handle] = "stop"
        return list(reasons.items())

    def remove(self, handle: int) -> Row:
        """Remove a row, release its pages, and return it."""
        row = self.rows.pop(handle)
        self.batch.remove(handle)
        self._stop_checks.pop(handle, None)
        self._rows_of_slot[row.slot] -= 1
        if not self._rows_of_slot[row.slot]:
            del self._rows_of_slot[row.slot]
        return row

    def halve_batch(self) -> int | None:
        """Halve the batch limit and preempt every row, after an out-of-memory error.

        Returns:
            None, or the handle of the row that ran alone: it does not fit.
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
        """Remove all rows and evict every page."""
        for handle in list(self.rows):
            self.remove(handle)
        self._waiting.clear()
        self.batch.evict_all()
