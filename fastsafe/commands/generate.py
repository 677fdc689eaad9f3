"""Prompts of one JSONL file answered into another: what ``fastsafe generate`` does.

A row of PROMPTS is {"prompt"} or {"messages"}, with "adapter" and "id" if there is one; an id is
the line's number where it is left out. A row of the answers is {"id", "adapter", "prompt_sha256",
"text", "token_ids", "finish_reason"} and "logprobs" if asked for, in order of finishing. Beside
the answers lies FILE.manifest.json with what they depend on.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsafe.audit.backend.on_engine import EngineBackend
from fastsafe.data.conversation import kind_of
from fastsafe.errors import DataError, FastsafeError, StoreError, TokenizerError, nearest
from fastsafe.io import atomic
from fastsafe.io.json_file import read_object
from fastsafe.io.weight_folder import weights_sha256
from fastsafe.progress import Progress, stage

if TYPE_CHECKING:
    from fastsafe.engine import Completion, SamplingParams

SCHEMA = "fastsafe.completions/1"
KEYS = ("prompt", "messages", "adapter", "id")
# Rows in memory at once; many batches, so that the last one of a window costs little.
WINDOW_ROWS = 4096
_SYNC_EVERY_S = 1.0
_MAX_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True)
class PromptRow:
    """One line of the prompts."""

    line: int
    id: str
    adapter: str | None
    prompt: str | None
    messages: Sequence[Mapping[str, Any]] | None

    @property
    def sha256(self) -> str:
        """Hash of what is asked of whom."""
        asked = json.dumps([self.prompt, self.messages, self.adapter], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()


class Prompts:
    """A JSONL file of prompts, checked as a whole before the first is answered.

    Attributes:
        path: The file.
        count: Number of rows.

    Raises:
        DataError: It is no regular file or has no row, or a line is malformed, names an unknown
            adapter, or has the id of another.
    """

    def __init__(self, path: Path, adapters: Collection[str]) -> None:
        if path.exists() and not path.is_file():
            raise DataError(
                f"{path}: is no regular file, expected JSONL that can be read twice; write it to a"
                " file"
            )
        self.path = path
        self._adapters = adapters
        first: dict[str, int] = {}
        for row in self:
            if first.setdefault(row.id, row.line) != row.line:
                raise DataError(
                    f"{path}: line {row.line}: id {row.id!r} is that of line {first[row.id]},"
                    " expected one of its own"
                )
        self.count = len(first)
        if not first:
            raise DataError(f"{path}: prompts are 0, expected one or more")

    def __iter__(self) -> Iterator[PromptRow]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._row(line, number)

    def _row(self, line: bytes, number: int) -> PromptRow:
        where = f"{self.path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: is no JSON ({error}), expected one object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: is a {type(row).__name__}, expected an object")
        unknown = next((key for key in row if key not in KEYS), None)
        if unknown is not None:
            raise DataError(f"{where}: key {unknown!r:.60} is unknown; {nearest(unknown, KEYS)}")
        prompt, messages = row.get("prompt"), row.get("messages")
        if (prompt is None) == (messages is None):
            raise DataError(f"{where}: has both or neither of prompt and messages, expected one")
        if messages is not None:
            kind_of({"messages": messages}, where)
        elif not isinstance(prompt, str) or not prompt:
            raise DataError(f"{where}: prompt is {prompt!r:.40}, expected a text")
        adapter, own_id = row.get("adapter"), row.get("id", str(number))
        if adapter is not None and not (isinstance(adapter, str) and adapter in self._adapters):
            known = ", ".join(self._adapters) or "none"
            raise DataError(
                f"{where}: adapter {adapter!r:.60} is unknown, expected one given by --adapter:"
                f" {known}"
            )
        if not isinstance(own_id, str | int) or isinstance(own_id, bool):
            raise DataError(f"{where}: id is {own_id!r:.40}, expected a text or an integer")
        return PromptRow(number, str(own_id), adapter, prompt, messages)


class Answers:
    """The file of answers, open for appending; made by ``open_answers``.

    Attributes:
        done: Id of every answer -> the hash of its prompt.
    """

    def __init__(self, path: Path, descriptor: int, done: dict[str, str]) -> None:
        self.path = path
        self.done = done
        self._descriptor = descriptor
        self._synced = time.monotonic()

    def add(self, row: Mapping[str, Any]) -> None:
        """Write an answer; once this returns it survives the end of the process."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        try:
            while line:  # a full disk may take a part
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
def open_answers(
    path: Path, identity: Mapping[str, Any], environment: Mapping[str, Any]
) -> Iterator[Answers]:
    """Open a new file of answers, or one that the same command began.

    Args:
        path: The file.
        identity: What answers depend on, plain JSON; that of a file that is there must be equal.
        environment: Further facts for the manifest.

    Raises:
        StoreError: The file is in use, of another identity, damaged, or cannot be written.
    """
    if path.exists() and not path.is_file():
        raise StoreError(f"{path}: is no regular file, expected a JSONL file to write; name one")
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
            whole = {"schema": SCHEMA, "identity": identity, "environment": environment}
            atomic.write_text(manifest, json.dumps(whole, indent=2, sort_keys=True) + "\n")
        yield Answers(path, descriptor, _done(path, descriptor))
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
    written, wanted = _flat(written), _flat(json.loads(json.dumps(identity)))
    changed = [
        f"{key}: {written.get(key)!r:.80} -> {wanted.get(key)!r:.80}"
        for key in sorted(written.keys() | wanted.keys())
        if written.get(key) != wanted.get(key)
    ]
    if changed:
        raise StoreError(
            f"{path}: was begun with other settings ({'; '.join(changed)}), expected the same;"
            " use another --out"
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The settings inside sampling and adapters under names of their own."""
    found: dict[str, Any] = {}
    for key, value in identity.items():
        inner = value.items() if isinstance(value, dict) else None
        found |= {f"{key}.{k}": v for k, v in inner} if inner is not None else {key: value}
    return found


def _done(path: Path, descriptor: int) -> dict[str, str]:
    """Ids and prompts of the answers; what a killed process left of a last line is cut off."""
    found: dict[str, str] = {}
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
                if row is not None:
                    found[row["id"]] = row["prompt_sha256"]
                    end += len(line)
            except (ValueError, KeyError, TypeError):
                if file.read(1):
                    raise StoreError(
                        f"{path}: line {number} is no answer, expected none but the last to be"
                        " damaged; use another --out"
                    ) from None
    os.ftruncate(descriptor, end)
    return found


@dataclass
class Summary:
    """What one call did."""

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
    """What answers depend on, beside their prompts."""
    sampling = vars(params) | {"stop": params.stop_texts}
    return {
        **runtime.engine,
        "adapters": {name: weights_sha256(path) for name, path in adapters.items()},
        "applied": runtime.llm.describe().get("adapters"),
        "strict": strict,
        "sampling": sampling,
    }


def complete(
    llm: Any,
    prompts: Prompts,
    answers: Answers,
    params: "SamplingParams",
    *,
    progress: Progress | None = None,
    window: int = WINDOW_ROWS,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Summary:
    """Answer every prompt that has no answer yet.

    A row's seed is made of ``params.seed`` and its id, so that its answer depends on no other row.

    Args:
        llm: An ``LLM`` or a ``TransformersLLM`` with the adapters loaded.
        prompts: Checked prompts.
        answers: Where answers go.
        params: Of all rows.
        progress: Where to show progress; nowhere when None.
        window: Rows that are in memory at once.
        is_stopping: Asked before each window.

    Raises:
        DataError: A prompt does not fit into the model, or was answered in another wording.
        KeyboardInterrupt: ``is_stopping`` said so.
    """
    progress = progress or Progress()
    summary = Summary()
    began = time.monotonic()
    with stage(progress, "generate", prompts.count, "prompts"):
        rows = _unanswered(prompts, answers, summary, progress)
        while batch := list(islice(rows, window)):
            if is_stopping():
                raise KeyboardInterrupt
            _answer(llm, prompts.path, batch, answers, params, summary, progress)
    summary.seconds = time.monotonic() - began
    return summary


def _unanswered(
    prompts: Prompts, answers: Answers, summary: Summary, progress: Progress
) -> Iterator[PromptRow]:
    for row in prompts:
        known = answers.done.get(row.id)
        if known is None:
            yield row
        elif known == row.sha256:
            summary.skipped += 1
            progress.advance(1)
        else:
            raise DataError(
                f"{prompts.path}: line {row.line}: id {row.id!r} has an answer to another prompt"
                f" in {answers.path}, expected the same one; use new ids or another --out"
            )


def _answer(
    llm: Any,
    where: Path,
    rows: Sequence[PromptRow],
    answers: Answers,
    params: "SamplingParams",
    summary: Summary,
    progress: Progress,
) -> None:
    """Answer rows that are in memory together."""
    most = getattr(llm.model.config, "max_position_embeddings", None)
    encoded = []
    for row in rows:
        try:
            if row.messages is not None:
                ids = llm.tokenizer.encode_chat(list(row.messages))
            else:
                ids = llm.tokenizer.encode(row.prompt)
        except TokenizerError as error:
            raise DataError(f"{where}: line {row.line}: {error}") from error
        if not ids or (most is not None and len(ids) >= most):
            raise DataError(
                f"{where}: line {row.line}: the prompt is {len(ids)} tokens, expected 1 to"
                f" {'any number' if most is None else most - 1}, which leaves room for an answer"
            )
        encoded.append(ids)

    def on_result(index: int, completion: "Completion") -> None:
        row = rows[index]
        found: dict[str, Any] = {
            "id": row.id,
            "adapter": row.adapter,
            "prompt_sha256": row.sha256,
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        if completion.logprobs is not None:
            found["logprobs"] = list(completion.logprobs)
        answers.add(found)
        summary.rows += 1
        summary.tokens += len(completion.token_ids)
        summary.errors += completion.finish_reason == "error"
        progress.advance(1)

    seeded = [replace(params, seed=_seed(params.seed, row.id)) for row in rows]
    llm.generate(encoded, seeded, [row.adapter for row in rows], on_result)


def _seed(seed: int, row_id: str) -> int:
    """Seed of a row's noise: two rows must not share theirs."""
    digest = hashlib.sha256(f"{seed} {row_id}".encode(errors="backslashreplace")).digest()
    return int.from_bytes(digest[:8], "little") >> 1
