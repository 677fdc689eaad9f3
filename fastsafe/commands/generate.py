"""Complete prompts into a JSONL file or a stream: the work of ``fastsafe generate``.

A row of the prompts is {"prompt"} or {"messages"}, optionally with "adapter" and "id"; the default
id is the line number. A row of the completions is {"id", "adapter", "prompt_sha256", "text",
"token_ids", "finish_reason"}, and "logprobs" and the prompt if requested, in the order in which
they finish. FILE.manifest.json beside the completions records the settings that determine them.
"""

import fcntl
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastsafe.audit.backend.on_engine import EngineBackend
from fastsafe.audit.plan.make_plan import differences
from fastsafe.commands.prompt_rows import PromptFile, PromptRow, PromptSet
from fastsafe.errors import DataError, FastsafeError, StoreError, TokenizerError
from fastsafe.io import atomic
from fastsafe.io.json_file import read_object
from fastsafe.io.weight_folder import weights_sha256
from fastsafe.progress import Progress, stage

if TYPE_CHECKING:
    from fastsafe.engine import Completion, SamplingParams

__all__ = [
    "CompletionStream",
    "CompletionTexts",
    "PromptFile",
    "complete",
    "identity_of",
    "open_completions",
]

SCHEMA = "fastsafe.completions/1"
# rows in memory at once: many batches, as the last batch of a window is rarely full
WINDOW_ROWS = 4096
_SYNC_EVERY_S = 1.0
_OPEN = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
_MAX_MANIFEST_BYTES = 1 << 20


# Hash of the prompt of every completion that is there: id -> adapter -> hash.
Done = Mapping[str, Mapping[str | None, str]]


class Completions(Protocol):
    """Where completions go: a file, or a stream."""

    name: str
    done: Done

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a completion."""


class CompletionFile:
    """The file of completions, open for appending; made by ``open_completions``."""

    def __init__(self, path: Path, descriptor: int, done: Done) -> None:
        self.name = str(path)
        self.done = done
        self._descriptor = descriptor
        self._synced = time.monotonic()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a completion; it survives a kill of the process once this returns."""
        try:
            atomic.write_through(self._descriptor, _json_line(row))
            if time.monotonic() - self._synced >= _SYNC_EVERY_S:
                os.fsync(self._descriptor)
                self._synced = time.monotonic()
        except OSError as error:
            raise StoreError(
                f"{self.name}: cannot be written: {error.strerror}; make room and run the same"
                " command to resume"
            ) from error


class CompletionStream:
    """Completions as JSON lines on a stream, such as standard output; none is there before.

    Args:
        name: Of the stream, for messages.
        write: Writes one line.
    """

    def __init__(self, name: str, write: Callable[[bytes], None]) -> None:
        self.name = name
        self.done: Done = {}
        self._write = write

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a completion."""
        self._write(_json_line(row))


class CompletionTexts:
    """The texts of completions for people, in the order of the prompts.

    Args:
        prompts: The prompts.
        write: Receives the text of each completion; if there are several, below its id and adapter.
    """

    def __init__(self, prompts: PromptSet, write: Callable[[str], None]) -> None:
        self.name = "stdout"
        self.done: Done = {}
        self._write = write
        self._is_single = prompts.count == 1
        self._order = deque((row.id, row.adapter) for row in prompts)
        self._finished: dict[tuple[str, str | None], str] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a completion once those before it are written."""
        self._finished[row["id"], row["adapter"]] = row["text"]
        while self._order and self._order[0] in self._finished:
            row_id, adapter = key = self._order.popleft()
            text = self._finished.pop(key)
            self._write(text if self._is_single else f"# {row_id}, {adapter or 'base'}\n{text}\n")


def _json_line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


@contextmanager
def open_completions(
    path: Path, identity: Mapping[str, Any], environment: Mapping[str, Any]
) -> Iterator[CompletionFile]:
    """Open a new file of completions, or resume one that the same command began.

    Args:
        path: The file.
        identity: Settings that determine the completions, as JSON values; an existing file must
            have equal ones.
        environment: Further facts for the manifest.

    Raises:
        StoreError: The file is in use, has another identity, is damaged or cannot be written.
    """
    try:
        atomic.check_file(path)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    manifest = path.with_name(path.name + ".manifest.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, _OPEN, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"{path}: is in use by another process; wait for it, or use another --out"
            ) from None
        if os.fstat(descriptor).st_size or manifest.exists():
            _check_manifest(path, manifest, identity)
        else:
            content = {"schema": SCHEMA, "identity": identity, "environment": environment}
            atomic.write_text(manifest, json.dumps(content, indent=2, sort_keys=True) + "\n")
        yield CompletionFile(path, descriptor, _read_done(path, descriptor))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_manifest(path: Path, manifest: Path, identity: Mapping[str, Any]) -> None:
    if not manifest.exists():
        raise StoreError(
            f"{path}: exists without {manifest.name}, expected a new file or one that fastsafe"
            " generate began; use another --out"
        )
    try:
        written = read_object(manifest, _MAX_MANIFEST_BYTES).get("identity")
    except FastsafeError as error:
        raise StoreError(f"{error}; use another --out") from None
    if not isinstance(written, dict):
        raise StoreError(f"{manifest}: has no identity, expected one; use another --out")
    # through JSON, as the file did: tuples become lists
    changed = differences(written, json.loads(json.dumps(identity)))
    if changed:
        raise StoreError(
            f"{path}: was begun with other settings ({'; '.join(changed)}), expected the same;"
            " use another --out"
        )


def _read_done(path: Path, descriptor: int) -> Done:
    """Return the prompt hash of every completion, and cut off a last line left unfinished."""
    done: dict[str, dict[str | None, str]] = {}
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
                if row is not None:
                    done.setdefault(row["id"], {})[row["adapter"]] = row["prompt_sha256"]
                    end += len(line)
            except (ValueError, KeyError, TypeError):
                if file.read(1):
                    raise StoreError(
                        f"{path}: line {number} is not a completion, expected only the last line"
                        " to be damaged; use another --out"
                    ) from None
    os.ftruncate(descriptor, end)
    return done


@dataclass
class GenerateSummary:
    """Counts of one call of `complete`."""

    rows: int = 0
    skipped: int = 0
    errors: int = 0
    tokens: int = 0
    seconds: float = 0.0


def identity_of(
    runtime: EngineBackend,
    adapters: Mapping[str, Path],
    params: "SamplingParams",
    *,
    strict: bool,
) -> dict[str, Any]:
    """Return the settings that determine completions, apart from their prompts."""
    return {
        **runtime.engine,
        "adapters": {name: weights_sha256(path) for name, path in adapters.items()},
        "applied": runtime.llm.describe().get("adapters"),
        "strict": strict,
        "sampling": vars(params) | {"stop": params.stop_texts},
    }


def complete(
    llm: Any,
    prompts: PromptSet,
    completions: Completions,
    params: "SamplingParams",
    *,
    with_prompts: bool = False,
    progress: Progress | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> GenerateSummary:
    """Complete every prompt that has no completion yet.

    The seed of a row is derived from ``params.seed`` and its id, so that its completion depends on
    no other row.

    Args:
        llm: An ``LLM`` or a ``TransformersLLM`` with the adapters loaded.
        prompts: Checked prompts.
        completions: Where completions are written.
        params: Sampling parameters of all rows.
        with_prompts: Whether each completion is written with its prompt.
        progress: Shows the progress; None shows nothing.
        is_stopping: Called before each window; True ends the run.

    Raises:
        DataError: A prompt exceeds the context of the model, or its id has a completion of another
            prompt.
        KeyboardInterrupt: ``is_stopping`` returned True.
    """
    generation = _Generation(
        llm, prompts, completions, params, with_prompts, progress or Progress()
    )
    began = time.monotonic()
    with stage(generation.progress, "generate", prompts.count, "prompts"):
        rows = generation.pending()
        while batch := list(islice(rows, WINDOW_ROWS)):
            if is_stopping():
                raise KeyboardInterrupt
            generation.complete(batch)
    generation.summary.seconds = time.monotonic() - began
    return generation.summary


@dataclass
class _Generation:
    """One call of `complete`."""

    llm: Any
    prompts: PromptSet
    completions: Completions
    params: "SamplingParams"
    with_prompts: bool
    progress: Progress
    summary: GenerateSummary = field(default_factory=GenerateSummary)

    def pending(self) -> Iterator[PromptRow]:
        """Yield the rows without a completion."""
        for row in self.prompts:
            done = self.completions.done.get(row.id, {})
            if done.get(row.adapter) == row.sha256:
                self.summary.skipped += 1
                self.progress.advance(1)
            elif not done or (self.prompts.is_crossed and row.adapter not in done):
                yield row
            else:
                raise DataError(
                    f"{self.prompts.name}: line {row.line}: id {row.id!r} has a completion of"
                    f" another prompt in {self.completions.name}, expected the same one; use new"
                    " ids or another --out"
                )

    def complete(self, rows: Sequence[PromptRow]) -> None:
        """Complete the rows of one window and append each completion once it is finished."""

        def on_result(index: int, completion: "Completion") -> None:
            row = rows[index]
            written: dict[str, Any] = {
                "id": row.id,
                "adapter": row.adapter,
                "prompt_sha256": row.sha256,
                **(self._prompt(row) if self.with_prompts else {}),
                "text": completion.text,
                "token_ids": list(completion.token_ids),
                "finish_reason": completion.finish_reason,
            }
            if completion.logprobs is not None:
                written["logprobs"] = list(completion.logprobs)
            self.completions.add(written)
            self.summary.rows += 1
            self.summary.tokens += len(completion.token_ids)
            self.summary.errors += completion.finish_reason == "error"
            self.progress.advance(1)

        encoded = [self._encode(row) for row in rows]
        seeded = [replace(self.params, seed=_seed(self.params.seed, row.id)) for row in rows]
        self.llm.generate(encoded, seeded, [row.adapter for row in rows], on_result)

    def _prompt(self, row: PromptRow) -> dict[str, Any]:
        return {"prompt": row.prompt} if row.messages is None else {"messages": row.messages}

    def _encode(self, row: PromptRow) -> list[int]:
        location = f"{self.prompts.name}: line {row.line}"
        tokenizer = self.llm.tokenizer
        context = getattr(self.llm.model.config, "max_position_embeddings", None)
        try:
            if row.messages is not None:
                ids: list[int] = tokenizer.encode_chat(list(row.messages))
            else:
                ids = tokenizer.encode(row.prompt)
        except TokenizerError as error:
            raise DataError(f"{location}: {error}") from error
        if not ids or (context is not None and len(ids) >= context):
            raise DataError(
                f"{location}: the prompt is {len(ids)} tokens, expected 1 to"
                f" {'any number' if context is None else context - 1}, which leaves room for a"
                " completion"
            )
        return ids


def _seed(seed: int, row_id: str) -> int:
    """Return the sampling seed of a row, derived from its id so that no two rows share one."""
    digest = hashlib.sha256(f"{seed} {row_id}".encode(errors="backslashreplace")).digest()
    return int.from_bytes(digest[:8], "little") >> 1
