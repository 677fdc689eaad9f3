"""Complete the prompts of one JSONL file into another: the work of ``fastsafe generate``.

A row of the prompts is {"prompt"} or {"messages"}, optionally with "adapter" and "id"; the default
id is the line number. A row of the completions is {"id", "adapter", "prompt_sha256", "text",
"token_ids", "finish_reason"}, and "logprobs" if requested, in the order in which they finish.
FILE.manifest.json beside the completions records the settings that determine them.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsafe.audit.backend.on_engine import EngineBackend
from fastsafe.audit.plan.make_plan import differences
from fastsafe.data.conversation import kind_of
from fastsafe.data.records import Record, json_lines
from fastsafe.errors import DataError, FastsafeError, StoreError, TokenizerError, nearest
from fastsafe.io import atomic
from fastsafe.io.json_file import read_object
from fastsafe.io.weight_folder import weights_sha256
from fastsafe.progress import Progress, stage

if TYPE_CHECKING:
    from fastsafe.engine import Completion, SamplingParams

SCHEMA = "fastsafe.completions/1"
KEYS = ("prompt", "messages", "adapter", "id")
# rows in memory at once: many batches, as the last batch of a window is rarely full
WINDOW_ROWS = 4096
_SYNC_EVERY_S = 1.0
_MAX_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True)
class PromptRow:
    """One prompt of the file."""

    line: int
    id: str
    adapter: str | None
    prompt: str | None
    messages: Sequence[Mapping[str, Any]] | None

    @property
    def sha256(self) -> str:
        """Hash of the prompt and the name of its adapter."""
        text = json.dumps([self.prompt, self.messages, self.adapter], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class PromptFile:
    """A JSONL file of prompts, checked as a whole before the first is completed.

    Attributes:
        path: The file.
        count: Number of prompts.

    Raises:
        DataError: It is not a regular file or has no row, or a line is malformed, names an unknown
            adapter, or repeats an id.
    """

    def __init__(self, path: Path, adapters: Collection[str]) -> None:
        if path.exists() and not path.is_file():
            raise DataError(
                f"{path}: is not a regular file, expected JSONL that can be read twice; write it to"
                " a file"
            )
        self.path = path
        self._adapters = adapters
        lines: dict[str, int] = {}
        for row in self:
            if lines.setdefault(row.id, row.line) != row.line:
                raise DataError(
                    f"{path}: line {row.line}: id {row.id!r} is that of line {lines[row.id]},"
                    " expected a different one"
                )
        self.count = len(lines)
        if not lines:
            raise DataError(f"{path}: prompts are 0, expected one or more")

    def __iter__(self) -> Iterator[PromptRow]:
        return map(self._row, json_lines(self.path))

    def _row(self, record: Record) -> PromptRow:
        location, line, row = record
        unknown = next((key for key in row if key not in KEYS), None)
        if unknown is not None:
            raise DataError(f"{location}: key {unknown!r:.60} is unknown; {nearest(unknown, KEYS)}")
        prompt, messages = row.get("prompt"), row.get("messages")
        if (prompt is None) == (messages is None):
            raise DataError(f"{location}: has both or neither of prompt and messages, expected one")
        if messages is not None:
            kind_of({"messages": messages}, location)
        elif not isinstance(prompt, str) or not prompt:
            raise DataError(f"{location}: prompt is {prompt!r:.40}, expected a string")
        adapter, row_id = row.get("adapter"), row.get("id", str(line))
        if adapter is not None and not (isinstance(adapter, str) and adapter in self._adapters):
            names = ", ".join(self._adapters) or "none"
            raise DataError(
                f"{location}: adapter {adapter!r:.60} is unknown, expected one given by --adapter:"
                f" {names}"
            )
        if not isinstance(row_id, str | int) or isinstance(row_id, bool):
            raise DataError(f"{location}: id is {row_id!r:.40}, expected a string or an integer")
        return PromptRow(line, str(row_id), adapter, prompt, messages)


class CompletionFile:
    """The file of completions, open for appending; made by ``open_completions``.

    Attributes:
        path: The file.
        done: Hash of the prompt of every completion, by id.
    """

    def __init__(self, path: Path, descriptor: int, done: dict[str, str]) -> None:
        self.path = path
        self.done = done
        self._descriptor = descriptor
        self._synced = time.monotonic()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a completion; it survives a kill of the process once this returns."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        try:
            while line:  # os.write may write only a part
                line = line[os.write(self._descriptor, line) :]
            if time.monotonic() - self._synced >= _SYNC_EVERY_S:
                os.fsync(self._descriptor)
                self._synced = time.monotonic()
        except OSError as error:
            raise StoreError(
                f"{self.path}: cannot be written: {error.strerror}; make room and run the same"
                " command to resume"
            ) from error


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
    if path.exists() and not path.is_file():
        raise StoreError(
            f"{path}: is not a regular file, expected a JSONL file to write; use another --out"
        )
    manifest = path.with_name(path.name + ".manifest.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
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


def _read_done(path: Path, descriptor: int) -> dict[str, str]:
    """Return the prompt hash of every completion by id, and cut off a last line left unfinished."""
    done: dict[str, str] = {}
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
                if row is not None:
                    done[row["id"]] = row["prompt_sha256"]
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
    prompts: PromptFile,
    completions: CompletionFile,
    params: "SamplingParams",
    *,
    progress: Progress | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> GenerateSummary:
    """Complete every prompt that has no completion yet.

    The seed of a row is derived from ``params.seed`` and its id, so that its completion depends on
    no other row.

    Args:
        llm: An ``LLM`` or a ``TransformersLLM`` with the adapters loaded.
        prompts: Checked prompts.
        completions: File that completions are appended to.
        params: Sampling parameters of all rows.
        progress: Shows the progress; None shows nothing.
        is_stopping: Called before each window; True ends the run.

    Raises:
        DataError: A prompt exceeds the context of the model, or its id has a completion of another
            prompt.
        KeyboardInterrupt: ``is_stopping`` returned True.
    """
    generation = _Generation(llm, prompts, completions, params, progress or Progress())
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
    prompts: PromptFile
    completions: CompletionFile
    params: "SamplingParams"
    progress: Progress
    summary: GenerateSummary = field(default_factory=GenerateSummary)

    def pending(self) -> Iterator[PromptRow]:
        """Yield the rows without a completion."""
        for row in self.prompts:
            done_sha256 = self.completions.done.get(row.id)
            if done_sha256 is None:
                yield row
            elif done_sha256 == row.sha256:
                self.summary.skipped += 1
                self.progress.advance(1)
            else:
                raise DataError(
                    f"{self.prompts.path}: line {row.line}: id {row.id!r} has a completion of"
                    f" another prompt in {self.completions.path}, expected the same one; use new"
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

    def _encode(self, row: PromptRow) -> list[int]:
        location = f"{self.prompts.path}: line {row.line}"
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
