"""How much faster is the C++ part of the scheduler than the same algorithm in Python and numpy?

    python benchmarks/scheduler.py [--rows 256] [--prompts 4000] [--out rows.jsonl]

Both sides run one schedule: prompts with shared prefixes are admitted, planned, given a sampled
token at every step and removed when they end. A test compares ``fastsafe._native.Batch`` with
``PlainBatch``, table by table; csrc/batch.hpp defines the terms.
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

NO_ROOM, WAIT_FOR_PREFIX, WORTH_WAITING = -1, -2, 8
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

    adapter_slot: int
    cache_namespace: int
    tokens: list[int]
    max_tokens_total: int
    prompt_tokens: int
    running: bool = False
    sampled: bool = False
    publishes: bool = True
    stamp: int = 0
    first_stamp: int = 0
    computed: int = 0
    known: int = 0
    planned: int = 0
    published: int = 0
    ready: int = 0
    pages: list[int] = field(default_factory=list)


class PlainBatch:
    """``fastsafe._native.Batch`` for rows that sample tokens, in Python and numpy."""

    def __init__(self, pages: int, page_tokens: int, rows: int) -> None:
        self.size = page_tokens
        self.pages = [Page() for _ in range(pages)]
        self.free = list(range(pages))[::-1]
        self.cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self.index: dict[tuple[int, tuple[int, ...]], int] = {}
        self.roots: dict[int, Page] = {}
        self.rows: list[Row | None] = [None] * rows
        self.free_rows = list(range(rows))[::-1]
        self.order: list[int] = []
        self.copies: list[int] = []
        self.step = self.stamps = self.serials = 0

    @property
    def running(self) -> int:
        """Number of running rows."""
        return len(self.order)

    @property
    def available(self) -> int:
        """Number of pages that can be allocated."""
        return len(self.free) + len(self.cached)

    def add(self, slot: int, namespace: int, tokens: Sequence[int], limit: int, *_: int) -> int:
        """See ``_native.Batch``."""
        handle = self.free_rows.pop()
        self.rows[handle] = Row(slot, namespace, list(tokens), limit, len(tokens))
        return handle

    def _root(self, cache_namespace: int) -> Page:
        if cache_namespace not in self.roots:
            self.serials += 1
            self.roots[cache_namespace] = Page(serial=self.serials)
        return self.roots[cache_namespace]

    def _common_tokens(self, parent: Page, child: int, tokens: Sequence[int]) -> int:
        if child < 0 or not self.pages[child].serial:
            return 0
        if self.pages[child].parent_serial != parent.serial:
            return 0
        pairs = zip(self.pages[child].tokens, tokens, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(self.size, len(tokens)))

    def _match(self, row: Row) -> tuple[list[int], int, int, int]:
        """Return full pages, the page to copy from, tokens matched, and tokens pending."""
        end, size = len(row.tokens) - 1, self.size
        parent, at, full = self._root(row.cache_namespace), 0, []

        def following(begin: int) -> int:
            if begin + size > end:
                return -1
            return self.index.get((parent.serial, tuple(row.tokens[begin : begin + size])), -1)

        while (child := following(at)) >= 0 and self.pages[child].ready <= self.step:
            full.append(child)
            parent, at = self.pages[child], at + size
        pending, partial = at, parent.ready_child
        if partial >= 0 and self.pages[partial].ready > self.step:
            partial = -1  # evicted, and published again with other tokens
        copied = self._common_tokens(parent, partial, row.tokens[at:end])
        matched = at + copied
        while (child := following(pending)) >= 0:
            parent, pending = self.pages[child], pending + size
        pending += self._common_tokens(parent, parent.newest_child, row.tokens[pending:end])
        return full, partial if copied else -1, matched, pending

    def admit(self, handle: int) -> int:
        """See ``_native.Batch``."""
        row = self._row(handle)
        full, partial, matched, pending = self._match(row)
        if pending - matched >= WORTH_WAITING:
            return WAIT_FOR_PREFIX
        count = -(-len(row.tokens) // self.size)
        held = [*full, partial] if partial >= 0 else full
        room = self.available - sum(not self.pages[i].refs for i in held)
        if count - len(full) + self.running // 4 > room:
            if self.running or count > len(self.pages):
                return NO_ROOM
            matched, partial, held = matched // self.size * self.size, -1, full
        for i in held:
            self._retain(i)
        row.pages = list(full)
        row.published = row.ready = len(full)
        while len(row.pages) < count:
            row.pages.append(self._allocate())
        if partial >= 0:
            self.copies += [partial, row.pages[len(full)]]
        row.computed, row.known = matched, len(row.tokens)
        row.running, row.sampled, row.publishes = True, False, True
        self.stamps += 1
        row.stamp = self.stamps
        row.first_stamp = row.first_stamp or row.stamp
        self._publish(row, len(row.tokens))
        slots = [self._row(other).adapter_slot for other in self.order]
        later = (i for i, slot in enumerate(slots) if slot > row.adapter_slot)
        self.order.insert(next(later, len(self.order)), handle)
        return matched

    def _publish(self, row: Row, end: int) -> None:
        while row.publishes and (row.published + 1) * self.size <= end:
            at, i = row.published * self.size, row.pages[row.published]
            tokens = tuple(row.tokens[at : at + self.size])
            root = self._root(row.cache_namespace)
            parent = self.pages[row.pages[row.published - 1]] if at else root
            row.publishes = (parent.serial, tokens) not in self.index
            if not row.publishes:
                break
            self.index[parent.serial, tokens] = i
            self.serials += 1
            refs = self.pages[i].refs
            self.pages[i] = Page(
                refs, serial=self.serials, parent_serial=parent.serial, parent=parent, tokens=tokens
            )
            parent.newest_child = i
            row.published += 1
        while row.ready < min(row.published, row.computed // self.size):
            page = self.pages[row.pages[row.ready]]
            page.ready = self.step
            assert page.parent is not None
            page.parent.ready_child = row.pages[row.ready]
            row.ready += 1

    def _retain(self, i: int) -> None:
        self.cached.pop(i, None)
        self.pages[i].refs += 1

    def _allocate(self) -> int:
        if not self.free:
            self._evict()
        i = self.free.pop()
        self.pages[i].refs = 1
        return i

    def _evict(self) -> None:
        i, _ = self.cached.popitem(last=False)
        self._forget_key(i)
        self.free.append(i)

    def _forget_key(self, i: int) -> None:
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
            self.cached[i] = None
        else:
            self._forget_key(i)
            self.free.append(i)

    def _release_pages(self, handle: int) -> None:
        row = self._row(handle)
        for i in reversed(row.pages):
            self._release(i)
        row.pages, row.running = [], False
        row.computed = row.planned = 0
        self.order.remove(handle)

    def remove(self, handle: int) -> None:
        """See ``_native.Batch``."""
        if self._row(handle).running:
            self._release_pages(handle)
        self.rows[handle] = None
        self.free_rows.append(handle)

    def plan(self, prefill: bool, decode: bool, budget: int) -> Any:
        """See ``_native.Batch``."""
        self.step += 1
        preempted = []
        for handle in list(self.order):
            row = self._row(handle)
            todo = row.known - row.computed
            if not row.running or todo < 1 or row.known >= row.max_tokens_total:
                continue
            decodes = row.sampled and todo == 1
            if not (decode if decodes else prefill):
                continue
            row.planned = 1 if decodes else min(todo, budget)
            budget -= 0 if decodes else row.planned
            while row.running and len(row.pages) < -(-(row.computed + row.planned) // self.size):
                if self.available:
                    row.pages.append(self._allocate())
                    continue
                youngest = max(self.order, key=lambda other: self._row(other).first_stamp)
                self._release_pages(youngest)
                preempted.append(youngest)
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
        samples = [row.computed + row.planned == row.known for row in rows]
        for row in rows:
            row.computed, row.planned = row.computed + row.planned, 0
            self._publish(row, 0)
            if row.computed == row.known:
                row.known, row.sampled = row.known + 1, True
        copies, self.copies = self.copies, []
        for i in copies[::2]:
            self._release(i)
        return SimpleNamespace(
            token_ids=np.array(ids, dtype=np.int64),
            positions=positions,
            cache_slots=pages * self.size + positions % self.size,
            handles=np.array(handles, dtype=np.int64),
            starts=starts,
            keep=(starts[1:] - 1)[samples],
            kept_handles=np.array(handles, dtype=np.int64)[samples],
            kept_stamps=np.array([row.stamp for row in rows], dtype=np.int64)[samples],
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
            if not row.running or row.stamp != stamp:
                continue
            row.tokens.append(int(token))
            if stop or len(row.tokens) >= row.max_tokens_total:
                ended += [int(handle), STOP if stop else LENGTH]
            else:
                self._publish(row, min(len(row.tokens), row.computed))
        return ended

    def _row(self, handle: int) -> Row:
        row = self.rows[handle]
        assert row is not None
        return row


def run(
    batch: Any, prompts: Sequence[Sequence[int]], rows: int, max_tokens: int
) -> tuple[float, int]:
    """Return the seconds and steps in which every prompt samples up to ``max_tokens`` tokens."""
    rng = np.random.default_rng(0)
    waiting, left, steps = [], list(prompts)[::-1], 0
    begin = time.perf_counter()
    while left or waiting or batch.running:
        while batch.running < rows and (left or waiting):
            if not waiting:
                tokens = left.pop()
                waiting.append(batch.add(0, 0, tokens, len(tokens) + max_tokens, 0, 0))
            if batch.admit(waiting[-1]) < 0:
                break
            waiting.pop()
        plan = batch.plan(True, True, 512)
        waiting += plan.preempted.tolist()
        _ = plan.token_ids, plan.positions, plan.cache_slots, plan.starts, plan.table, plan.copies
        count = len(plan.keep)
        ids, stops = rng.integers(5, 300, count), rng.random(count) < 1 / max_tokens
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
