"""The generate stage: every planned prompt that has no answer yet goes to the engine.

Rows are inserted once, and rows that are computed together are always computed together, so that
a resumed run has the same bits as an unbroken one.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastsafe.audit.backend.on_engine import EngineBackend
from fastsafe.audit.backend.protocol import Answer
from fastsafe.audit.plan.conditions import BASE
from fastsafe.audit.plan.make_plan import Plan
from fastsafe.audit.stages.train import ADAPTERS
from fastsafe.audit.store.rows import CompletionRow
from fastsafe.audit.store.sqlite_store import Store, now
from fastsafe.progress import Progress, stage

# Prompts that go to the engine together. On resume an unfinished chunk is asked again whole.
CHUNK_ROWS = 2048
COMMIT_EVERY_S = 1.0
COMMIT_ROWS = 256


def generate(
    plan: Plan, store: Store, backend: EngineBackend, run_dir: Path, progress: Progress
) -> None:
    """Generate every planned answer that the store does not hold."""
    positions = store.positions()
    done = [status.is_done for status in positions]
    folder = run_dir / ADAPTERS
    adapter_of = {condition.id: condition.adapter for condition in plan.conditions}
    with stage(progress, "generate", len(positions), "answers"):
        progress.advance(sum(done))
        for adapters, begin, end in _chunks(plan, [status.condition for status in positions]):
            if all(done[begin:end]):
                continue
            first, last = positions[begin].position, positions[end - 1].position
            keys, requests = zip(*store.requests(first, last, adapter_of), strict=True)
            missing = {key for key, old in zip(keys, done[begin:end], strict=True) if not old}
            writer = _AnswerWriter(store, progress, keys, missing)
            began = time.monotonic()
            try:
                backend.generate(
                    requests,
                    {name: folder / name for name in adapters},
                    plan.recipe.sampling,
                    writer.add,
                )
            finally:
                writer.flush()
            with store.transaction():
                detail = {
                    "rows": len(requests),
                    "prompt_tokens": sum(len(request.token_ids) for request in requests),
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
    _buffer: list[CompletionRow] = field(default_factory=list)
    _last: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, index: int, answer: Answer) -> None:
        """Buffer one answer, from any thread."""
        with self._lock:
            key = self.keys[index]
            row = CompletionRow(key, answer.text, answer.token_ids, answer.finish_reason)
            self._buffer.append(row)
            self.num_tokens += len(answer.token_ids)
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
        new = self.missing & {row.key for row in self._buffer}
        self.missing -= new
        self._buffer.clear()
        self._last = time.monotonic()
        self.progress.advance(len(new))
