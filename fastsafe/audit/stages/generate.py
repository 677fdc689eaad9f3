"""The generate stage: every planned prompt that has no answer yet goes to the engine.

Rows are inserted once, and rows that are computed together are always computed together, so that
a resumed run has the same bits as an unbroken one.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastsafe.audit.backend.protocol import Answer as Reply
from fastsafe.audit.backend.protocol import Backend, Request
from fastsafe.audit.plan.conditions import BASE
from fastsafe.audit.plan.make_plan import Plan
from fastsafe.audit.stages.train import ADAPTERS, now
from fastsafe.audit.store.rows import Answer
from fastsafe.audit.store.sqlite_store import Store
from fastsafe.progress import Progress, stage

# Prompts that go to the engine together. On resume an unfinished chunk is asked again whole.
CHUNK_ROWS = 2048
COMMIT_EVERY_S = 1.0
COMMIT_ROWS = 256


def generate(plan: Plan, store: Store, backend: Backend, run_dir: Path, progress: Progress) -> None:
    """Generate every planned answer that the store does not hold."""
    positions = store.positions()
    done = [is_done for _, _, is_done in positions]
    folder = run_dir / ADAPTERS
    adapter_of = {condition.id: condition.adapter for condition in plan.conditions}
    with stage(progress, "generate", len(positions), "answers"):
        progress.advance(sum(done))
        for adapters, begin, end in _chunks(plan, [c for _, c, _ in positions]):
            if all(done[begin:end]):
                continue
            rows = store.requests(positions[begin][0], positions[end - 1][0])
            missing = {key for (key, *_), old in zip(rows, done[begin:end], strict=True) if not old}
            writer = _AnswerWriter(store, progress, [key for key, *_ in rows], missing)
            began = time.monotonic()
            try:
                backend.generate(
                    [
                        Request(adapter_of[condition], token_ids, seed, max_tokens)
                        for _, condition, token_ids, seed, max_tokens in rows
                    ],
                    {name: folder / name for name in adapters},
                    plan.recipe.sampling,
                    writer.add,
                )
            finally:
                writer.flush()
            with store.transaction():
                detail = {
                    "rows": len(rows),
                    "prompt_tokens": sum(len(row[2]) for row in rows),
                    "completion_tokens": writer.num_tokens,
                    "duration_s": time.monotonic() - began,
                }
                store.add_event(now(), "generate", detail)


def _chunks(plan: Plan, conditions: Sequence[str]) -> Iterator[tuple[set[str], int, int]]:
    """Yield (adapters to load, begin, end) per chunk; base rows go with the first wave."""
    others = [condition for condition in plan.conditions if condition.id != BASE]
    wave_of = {c.id: n // plan.recipe.wave_size for n, c in enumerate(others)} | {BASE: 0}
    adapters: dict[int, set[str]] = {}
    for condition in others:
        if condition.adapter:
            adapters.setdefault(wave_of[condition.id], set()).add(condition.adapter)
    begin = 0
    for end in range(1, len(conditions) + 1):
        is_full = end - begin == CHUNK_ROWS
        wave = wave_of[conditions[begin]]
        if end == len(conditions) or is_full or wave_of[conditions[end]] != wave:
            yield adapters.get(wave, set()), begin, end
            begin = end


@dataclass
class _AnswerWriter:
    """Stores answers as they arrive; progress counts only answers that are on disk."""

    store: Store
    progress: Progress
    keys: Sequence[str]
    missing: set[str]
    num_tokens: int = 0
    _buffer: list[Answer] = field(default_factory=list)
    _last: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, index: int, reply: Reply) -> None:
        """Buffer one answer, from any thread."""
        with self._lock:
            answer = Answer(self.keys[index], reply.text, reply.token_ids, reply.finish_reason)
            self._buffer.append(answer)
            self.num_tokens += len(reply.token_ids)
            is_late = time.monotonic() - self._last >= COMMIT_EVERY_S
            if is_late or len(self._buffer) >= COMMIT_ROWS:
                self._write()

    def flush(self) -> None:
        """Write the buffered answers."""
        with self._lock:
            if self._buffer:
                self._write()

    def _write(self) -> None:
        with self.store.transaction():
            self.store.add_completions(self._buffer)
        new = self.missing & {answer.key for answer in self._buffer}
        self.missing -= new
        self._buffer.clear()
        self._last = time.monotonic()
        self.progress.advance(len(new))
