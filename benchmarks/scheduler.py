"""How much faster is the C++ part of the scheduler than the same thing in Python and numpy?

    python benchmarks/scheduler.py [--rows 256] [--prompts 4000] [--out rows.jsonl]

Both sides run one schedule: prompts with shared beginnings are admitted, planned, given a drawn
token at every step and removed when they end. ``PlainBatch`` is also what a test compares
``fastsafe._native.Batch`` with, table by table.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastsafe import _native

NO_ROOM, SOON, WORTH_WAITING = -1, -2, 8
STOP, LENGTH = 0, 1


@dataclass
class Page:
    """A page of the cache."""

    refs: int = 0
    ready: float = float("inf")
    serial: int = 0
    parent_serial: int = 0
    parent: "Page | None" = None
    newest_child: int = -1
    ready_child: int = -1
    tokens: tuple[int, ...] = ()


@dataclass
class Row:
    """A row of the batch."""

    slot: int
    space: int
    tokens: list[int]
    limit: int
    given: int
    runs: bool = False
    drew: bool = False
    chained: bool = True
    stamp: int = 0
    age: int = 0
    computed: int = 0
    expected: int = 0
    planned: int = 0
    entered: int = 0
    readied: int = 0
    pages: list[int] = field(default_factory=list)


class PlainBatch:
    """Like ``fastsafe._native.Batch`` for rows that draw tokens, in Python and numpy."""

    def __init__(self, pages: int, page_tokens: int, rows: int) -> None:
        self.size = page_tokens
        self.pages = [Page() for _ in range(pages)]
        self.free = list(range(pages))[::-1]
        self.idle: OrderedDict[int, None] = OrderedDict()  # oldest first
        self.index: dict[tuple[int, tuple[int, ...]], int] = {}
        self.roots: dict[int, Page] = {}
        self.rows: list[Row | None] = [None] * rows
        self.free_rows = list(range(rows))[::-1]
        self.order: list[int] = []
        self.copies: list[int] = []
        self.step = self.stamps = self.serials = 0

    @property
    def running(self) -> int:
        """Rows that run."""
        return len(self.order)

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self.free) + len(self.idle)

    def add(
        self, slot: int, space: int, tokens: Sequence[int], limit: int, feed: int, keep_from: int
    ) -> int:
        """See ``_native.Batch``."""
        handle = self.free_rows.pop()
        self.rows[handle] = Row(slot, space, list(tokens), limit, len(tokens))
        return handle

    def _root(self, space: int) -> Page:
        if space not in self.roots:
            self.serials += 1
            self.roots[space] = Page(serial=self.serials)
        return self.roots[space]

    def _common(self, parent: Page, child: int, tokens: Sequence[int]) -> int:
        if child < 0 or not self.pages[child].serial:
            return 0
        if self.pages[child].parent_serial != parent.serial:
            return 0
        pairs = zip(self.pages[child].tokens, tokens, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(self.size, len(tokens)))

    def _match(self, row: Row) -> tuple[list[int], int, int, int]:
        """Full pages, page to copy from, tokens found, tokens soon to be found."""
        end, size = len(row.tokens) - 1, self.size
        parent, at, full = self._root(row.space), 0, []

        def following(begin: int) -> int:
            if begin + size > end:
                return -1
            return self.index.get((parent.serial, tuple(row.tokens[begin : begin + size])), -1)

        while (child := following(at)) >= 0 and self.pages[child].ready <= self.step:
            full.append(child)
            parent, at = self.pages[child], at + size
        soon, partial = at, parent.ready_child
        if partial >= 0 and self.pages[partial].ready > self.step:
            partial = -1  # it holds other tokens by now
        copied = self._common(parent, partial, row.tokens[at:end])
        found = at + copied
        while (child := following(soon)) >= 0:
            parent, soon = self.pages[child], soon + size
        soon += self._common(parent, parent.newest_child, row.tokens[soon:end])
        return full, partial if copied else -1, found, soon

    def admit(self, handle: int) -> int:
        """See ``_native.Batch``."""
        row = self._row(handle)
        full, partial, found, soon = self._match(row)
        if soon - found >= WORTH_WAITING:
            return SOON
        count = -(-len(row.tokens) // self.size)
        held = [*full, partial] if partial >= 0 else full
        room = self.available - sum(not self.pages[i].refs for i in held)
        if count - len(full) + self.running // 4 > room:
            if self.running or count > len(self.pages):
                return NO_ROOM
            found, partial, held = found // self.size * self.size, -1, full
        for i in held:
            self._hold(i)
        row.pages = list(full)
        row.entered = row.readied = len(full)
        while len(row.pages) < count:
            row.pages.append(self._take())
        if partial >= 0:
            self.copies += [partial, row.pages[len(full)]]
        row.computed, row.expected = found, len(row.tokens)
        row.runs, row.drew, row.chained = True, False, True
        self.stamps += 1
        row.stamp = self.stamps
        row.age = row.age or row.stamp
        self._enter(row, len(row.tokens))
        later = (i for i, other in enumerate(self.order) if self._row(other).slot > row.slot)
        self.order.insert(next(later, len(self.order)), handle)
        return found

    def _enter(self, row: Row, end: int) -> None:
        while row.chained and (row.entered + 1) * self.size <= end:
            at, i = row.entered * self.size, row.pages[row.entered]
            tokens = tuple(row.tokens[at : at + self.size])
            parent = self.pages[row.pages[row.entered - 1]] if at else self._root(row.space)
            row.chained = (parent.serial, tokens) not in self.index
            if not row.chained:
                break
            self.index[parent.serial, tokens] = i
            self.serials += 1
            refs = self.pages[i].refs
            self.pages[i] = Page(
                refs, serial=self.serials, parent_serial=parent.serial, parent=parent, tokens=tokens
            )
            parent.newest_child = i
            row.entered += 1
        while row.readied < min(row.entered, row.computed // self.size):
            page = self.pages[row.pages[row.readied]]
            page.ready = self.step
            assert page.parent is not None
            page.parent.ready_child = row.pages[row.readied]
            row.readied += 1

    def _hold(self, i: int) -> None:
        self.idle.pop(i, None)
        self.pages[i].refs += 1

    def _take(self) -> int:
        if self.free:
            i = self.free.pop()
        else:
            i, _ = self.idle.popitem(last=False)
            self._drop(i)
        self.pages[i].refs = 1
        return i

    def _drop(self, i: int) -> None:
        page = self.pages[i]
        if page.serial:
            del self.index[page.parent_serial, page.tokens]
        page.serial = 0

    def _release(self, i: int) -> None:
        page = self.pages[i]
        page.refs -= 1
        if page.refs:
            return
        if page.serial and page.ready < float("inf"):
            self.idle[i] = None
        else:
            self._drop(i)
            self.free.append(i)

    def _stop(self, handle: int) -> None:
        row = self._row(handle)
        for i in reversed(row.pages):
            self._release(i)
        row.pages, row.runs = [], False
        row.computed = row.planned = 0
        self.order.remove(handle)

    def remove(self, handle: int) -> None:
        """See ``_native.Batch``."""
        if self._row(handle).runs:
            self._stop(handle)
        self.rows[handle] = None
        self.free_rows.append(handle)

    def plan(self, prompts: bool, decodes: bool, budget: int) -> Any:
        """See ``_native.Batch``."""
        self.step += 1
        preempted = []
        for handle in list(self.order):
            row = self._row(handle)
            todo = row.expected - row.computed
            if not row.runs or todo < 1 or row.expected >= row.limit:
                continue
            alone = row.drew and todo == 1
            if not (decodes if alone else prompts):
                continue
            row.planned = 1 if alone else min(todo, budget)
            budget -= 0 if alone else row.planned
            while row.runs and len(row.pages) < -(-(row.computed + row.planned) // self.size):
                if self.available:
                    row.pages.append(self._take())
                    continue
                victim = max(self.order, key=lambda other: self._row(other).age)
                self._stop(victim)
                preempted.append(victim)
        handles = [handle for handle in self.order if self._row(handle).planned]
        rows = [self._row(handle) for handle in handles]
        counts = np.array([row.planned for row in rows], dtype=np.int64)
        starts = np.concatenate([[0], counts.cumsum()])
        first = np.array([row.computed for row in rows], dtype=np.int64)
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - first, counts)
        width = max((len(row.pages) for row in rows), default=0)
        table = np.zeros((len(rows), width), dtype=np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row.pages)] = row.pages
        owner = np.repeat(np.arange(len(rows)), counts)
        pages = table[owner, positions // self.size] if len(owner) else owner
        ids = [t for row in rows for t in row.tokens[row.computed : row.computed + row.planned]]
        draws = [row.computed + row.planned == row.expected for row in rows]
        for row in rows:
            row.computed, row.planned = row.computed + row.planned, 0
            self._enter(row, 0)
            if row.computed == row.expected:
                row.expected, row.drew = row.expected + 1, True
        copies, self.copies = self.copies, []
        for i in copies[::2]:
            self._release(i)
        return SimpleNamespace(
            token_ids=np.array(ids, dtype=np.int64),
            positions=positions,
            places=pages * self.size + positions % self.size,
            handles=np.array(handles, dtype=np.int64),
            starts=starts,
            keep=(starts[1:] - 1)[draws],
            kept_handles=np.array(handles, dtype=np.int64)[draws],
            kept_stamps=np.array([row.stamp for row in rows], dtype=np.int64)[draws],
            copies=np.array(copies, dtype=np.int64).reshape(-1, 2),
            preempted=np.array(preempted, dtype=np.int64),
            table=table,
        )

    def append(
        self, handles: Any, stamps: Any, ids: Any, logprobs: None, finite: Any, stops: Any
    ) -> list[int]:
        """See ``_native.Batch``."""
        ended = []
        for handle, stamp, token, stop in zip(handles, stamps, ids, stops, strict=True):
            row = self._row(handle)
            if not row.runs or row.stamp != stamp:
                continue
            row.tokens.append(int(token))
            if stop or len(row.tokens) >= row.limit:
                ended += [int(handle), STOP if stop else LENGTH]
            else:
                self._enter(row, min(len(row.tokens), row.computed))
        return ended

    def _row(self, handle: int) -> Row:
        row = self.rows[handle]
        assert row is not None
        return row


def run(batch: Any, prompts: Sequence[Sequence[int]], rows: int, drawn: int) -> tuple[float, int]:
    """Seconds and steps to let every prompt draw up to ``drawn`` tokens."""
    rng = np.random.default_rng(0)
    waiting, left, steps = [], list(prompts)[::-1], 0
    begin = time.perf_counter()
    while left or waiting or batch.running:
        while batch.running < rows and (left or waiting):
            if not waiting:
                tokens = left.pop()
                waiting.append(batch.add(0, 0, tokens, len(tokens) + drawn, 0, 0))
            if batch.admit(waiting[-1]) < 0:
                break
            waiting.pop()
        plan = batch.plan(True, True, 512)
        waiting += plan.preempted.tolist()
        _ = plan.token_ids, plan.positions, plan.places, plan.starts, plan.table, plan.copies
        count = len(plan.keep)
        ids, stops = rng.integers(5, 300, count), rng.random(count) < 1 / drawn
        finite = np.ones(count, dtype=bool)
        ended = batch.append(plan.kept_handles, plan.kept_stamps, ids, None, finite, stops)
        for handle in ended[::2]:
            batch.remove(handle)
        steps += 1
    return time.perf_counter() - begin, steps


def main() -> None:
    """Print one JSON row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=256, help="rows that run together")
    parser.add_argument("--prompts", type=int, default=4000)
    parser.add_argument("--out", type=Path, help="append the JSON row to this file")
    options = parser.parse_args()
    rng = random.Random(0)
    starts = [[rng.randrange(300) for _ in range(rng.randint(8, 40))] for _ in range(5)]
    prompts = sorted(
        [*rng.choice(starts), *(rng.randrange(300) for _ in range(10))]
        for _ in range(options.prompts)
    )
    size = (8 * options.rows, 16, options.rows)
    best: dict[str, float] = {}
    steps = 0
    for _ in range(3):
        for name, batch in (
            ("native", _native.Batch(*size, True, False, 0)),
            ("numpy", PlainBatch(*size)),
        ):
            took, steps = run(batch, prompts, options.rows, 12)
            best[name] = min(took, best.get(name, took))
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    row = {
        "benchmark": "scheduler",
        "commit": commit or "unknown",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "rows": options.rows,
        "prompts": options.prompts,
        "steps": steps,
        "native_us_per_step": 1e6 * best["native"] / steps,
        "numpy_us_per_step": 1e6 * best["numpy"] / steps,
        "ratio": best["numpy"] / best["native"],
    }
    print(json.dumps(row))
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
