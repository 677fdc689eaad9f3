"""LLM: a checkpoint and any number of adapters, answering in batches."""

import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastsafe.data.conversation import Message
from fastsafe.engine.request import Completion, SamplingParams, Score
from fastsafe.engine.runner import Row, generate_tile, score_tile
from fastsafe.errors import UsageError
from fastsafe.io import hub
from fastsafe.io.checkpoint import Checkpoint
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.model.attention import PackedAttention
from fastsafe.model.lora import AdapterBank
from fastsafe.model.parallel import tile_runner
from fastsafe.model.transformer import Project, Transformer

Prompt = str | Sequence[int]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Rows of a tile. On a CPU the tile's activations stay in the L2 cache; on a GPU more rows share
# one read of the weights.
_TILE_ROWS = {"cpu": 128, "cuda": 1024}
_TILE_PROMPT_TOKENS = {"cpu": 4096, "cuda": 65536}
_TILE_CACHE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 34}
# Above this size a merged copy of the weights per core is not worth its memory.
_MERGE_LIMIT_BYTES = 1 << 30


class LLM:
    """A base model with adapters: generate, chat, score, logits.

    Attributes:
        path: Checkpoint directory.
        model: The frozen base.
        tokenizer: Its tokenizer and chat template.
        bank: The loaded adapters.
        adapters: "merged" computes rows of one adapter together on merged weights, "mixed" puts
            rows of different adapters into one batch.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        *,
        adapters: Literal["merged", "mixed"] | None = None,
        batch_size: int | Literal["auto"] = "auto",
    ) -> None:
        """Load a checkpoint directory or a hub id.

        Args:
            path: Directory with config.json, safetensors and tokenizer.json, or "owner/name".
            device: "cpu" or "cuda".
            dtype: "float32", "bfloat16" or "float16"; weights are converted on load.
            adapters: How adapters are applied; None takes "merged" on a CPU for models under
                1 GiB and "mixed" otherwise. ``describe()`` says which.
            batch_size: Most rows computed together; "auto" is 128 on a CPU, 1024 on a GPU.

        Raises:
            UsageError: The device or dtype is unknown or absent.
            CheckpointError: The checkpoint is missing or malformed.
            TokenizerError: The tokenizer is missing or malformed.
        """
        if dtype not in _DTYPES:
            raise UsageError(f"LLM: dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")
        if device not in ("cpu", "cuda") and not device.startswith("cuda:"):
            raise UsageError(f"LLM: device is {device!r}, expected 'cpu' or 'cuda'")
        if device != "cpu" and not torch.cuda.is_available():
            raise UsageError(
                f"LLM: device is {device!r}, but torch finds no CUDA device; use 'cpu'"
            )
        if batch_size != "auto" and batch_size < 1:
            raise UsageError(f"LLM: batch_size is {batch_size}, expected at least 1 or 'auto'")
        if adapters not in (None, "merged", "mixed"):
            raise UsageError(f"LLM: adapters is {adapters!r}, expected 'merged' or 'mixed'")
        self.path = hub.resolve(str(path))
        checkpoint = Checkpoint(self.path)
        self.model = Transformer.load(checkpoint, device=device, dtype=_DTYPES[dtype])
        self.tokenizer = Tokenizer.load(self.path)
        self.tokenizer.check_vocab(self.model.config.vocab_size)
        self.bank = AdapterBank(self.model)
        kind = self.model.device.type
        num_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        small_cpu = kind == "cpu" and num_bytes < _MERGE_LIMIT_BYTES
        self.adapters = adapters or ("merged" if small_cpu else "mixed")
        self.batch_size = _TILE_ROWS[kind] if batch_size == "auto" else batch_size

    def describe(self) -> dict[str, Any]:
        """Choices that shape the numbers, for the manifest."""
        return {
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "adapters": self.adapters,
            "batch_size": self.batch_size,
            "attention": "torch",
            "threads": torch.get_num_threads(),
        }

    def load_adapter(self, path: str | Path, name: str = "") -> None:
        """Load a PEFT directory under ``name`` (its folder's name when empty).

        Raises:
            AdapterError: The adapter is malformed, does not fit, or the name is taken.
        """
        self.bank.load(path, name)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter."""
        self.bank.remove(name)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: Sequence[str | None] | None = None,
        on_result: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete every prompt.

        Args:
            prompts: Texts, encoded with the tokenizer's special tokens, or token lists.
            params: One for all prompts or one per prompt; defaults when None.
            adapters: Adapter name per prompt, None for the base; all base when None.
            on_result: Called with (index, completion) as each finishes, from one thread at a
                time and in no promised order.

        Returns:
            One completion per prompt, in order.

        Raises:
            UsageError: Lists differ in length, or a prompt is empty, too long or out of range.
            AdapterError: An adapter is not loaded.
        """
        rows = self._rows(prompts, params, adapters)
        done: dict[int, Completion] = {}
        lock = threading.Lock()

        def finish(row: Row) -> None:
            completion = self._completion(row)
            with lock:
                done[row.index] = completion
                if on_result:
                    on_result(row.index, completion)

        def run(tile: list[Row]) -> None:
            generate_tile(self.model, tile, self._project_for(tile[0].slot), finish)

        with tile_runner(self.model.device) as runner:
            for _ in runner.map(run, self._tiles(rows)):
                pass
        return [done[i] for i in range(len(rows))]

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: Sequence[str | None] | None = None,
        on_result: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Answer conversations through the checkpoint's chat template; see ``generate``."""
        prompts = [self.tokenizer.encode_chat(list(c)) for c in conversations]
        return self.generate(prompts, params, adapters, on_result)

    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        adapters: Sequence[str | None] | None = None,
    ) -> list[Score]:
        """Log-likelihood of each continuation given its prompt, by prefill only.

        Args:
            prompts: Texts or token lists, at least one token each.
            continuations: Texts, encoded without special tokens, or token lists; not empty.
            adapters: As in ``generate``.
        """
        given = self._encode(prompts, "prompt", special=True)
        targets = self._encode(continuations, "continuation", special=False)
        if len(given) != len(targets):
            raise UsageError(
                f"score: {len(targets)} continuations, expected {len(given)}, one per prompt"
            )
        slots = self._slots(adapters, len(given))
        for i, (a, b) in enumerate(zip(given, targets, strict=True)):
            self._check_context(f"score: row {i}", len(a) + len(b))
        lengths = [len(a) + len(b) for a, b in zip(given, targets, strict=True)]
        order = sorted(range(len(given)), key=lambda i: (slots[i], lengths[i]))
        tiles = self._cut(order, slots, lengths, [0] * len(given))

        def run(tile: list[int]) -> list[tuple[list[float], bool]]:
            return score_tile(
                self.model,
                [given[i] + targets[i] for i in tile],
                [len(given[i]) for i in tile],
                torch.tensor([slots[i] for i in tile]),
                self._project_for(slots[tile[0]]),
            )

        scores: dict[int, Score] = {}
        with tile_runner(self.model.device) as runner:
            for tile, results in zip(tiles, runner.map(run, tiles), strict=True):
                for i, (logprobs, is_greedy) in zip(tile, results, strict=True):
                    scores[i] = Score(
                        logprob=sum(logprobs), token_logprobs=tuple(logprobs), is_greedy=is_greedy
                    )
        return [scores[i] for i in range(len(given))]

    def logits(self, token_ids: Sequence[int] | Tensor, adapter: str | None = None) -> Tensor:
        """Logits after every token of one sequence.

        Args:
            token_ids: [N] token ids.
            adapter: Name of a loaded adapter, None for the base.

        Returns:
            [N, V] fp32 on the model's device.
        """
        ids = [int(t) for t in token_ids]
        self._check_ids("logits: token_ids", ids)
        self._check_context("logits: token_ids", len(ids))
        slot = self.bank.slot(adapter)
        with torch.inference_mode():
            tokens = torch.tensor(ids, device=self.model.device)
            positions = torch.arange(len(ids), device=self.model.device)
            project = self._project_for(slot)(torch.full((len(ids),), slot))
            hidden = self.model.forward(tokens, positions, PackedAttention([len(ids)]), project)
            return self.model.logits(hidden)

    def _project_for(self, slot: int) -> Callable[[Tensor], Project | None]:
        """Projection of a tile: one merged copy for all its batches, or one per batch."""
        if self.adapters == "mixed":
            return self.bank.mixed
        merged = self.bank.merged(slot)
        return lambda slots: merged

    def _rows(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapters: Sequence[str | None] | None,
    ) -> list[Row]:
        encoded = self._encode(prompts, "prompt", special=True)
        count = len(encoded)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * count
        if len(params) != count:
            raise UsageError(f"generate: {len(params)} params, expected {count}, one per prompt")
        slots = self._slots(adapters, count)
        rows = []
        for i, (prompt, p) in enumerate(zip(encoded, params, strict=True)):
            self._check_context(f"generate: prompt {i}", len(prompt) + 1)
            room = self.model.config.max_position_embeddings - len(prompt)
            ends = frozenset(() if p.ignore_eos else self.tokenizer.eos_ids)
            rows.append(
                Row(
                    index=i,
                    slot=slots[i],
                    prompt=tuple(prompt),
                    params=p,
                    end_ids=ends | frozenset(p.stop_token_ids),
                    has_stop_text=self._stop_check(p),
                    max_tokens=min(p.max_tokens, room),
                )
            )
        return rows

    def _stop_check(self, params: SamplingParams) -> Callable[[Sequence[int]], bool] | None:
        stops = params.stop_texts
        if not stops:
            return None

        def has_stop_text(token_ids: Sequence[int]) -> bool:
            text = self.tokenizer.decode(list(token_ids))
            return any(stop in text for stop in stops)

        return has_stop_text

    def _completion(self, row: Row) -> Completion:
        text = self.tokenizer.decode(row.token_ids)
        cuts = [at for at in (text.find(stop) for stop in row.params.stop_texts) if at >= 0]
        return Completion(
            text=text[: min(cuts)] if cuts else text,
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs) if row.params.logprobs else None,
            finish_reason=row.finish_reason or "error",
            num_prompt_tokens=len(row.prompt),
        )

    def _tiles(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows of one tile share an adapter (unless mixed) and have similar lengths."""
        order = sorted(rows, key=lambda r: (r.slot, len(r.prompt) + r.max_tokens, r.index))
        slots = [row.slot for row in rows]
        lengths = [len(row.prompt) for row in rows]
        contexts = [len(row.prompt) + row.max_tokens for row in rows]
        tiles = self._cut([row.index for row in order], slots, lengths, contexts)
        return [[rows[i] for i in tile] for tile in tiles]

    def _cut(
        self,
        order: Sequence[int],
        slots: Sequence[int],
        lengths: Sequence[int],
        contexts: Sequence[int],
    ) -> list[list[int]]:
        """Cut rows into tiles by number, by tokens of prompts, and by memory of the cache."""
        config, kind = self.model.config, self.model.device.type
        token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        slots_of_cache = _TILE_CACHE_BYTES[kind] // (token_bytes * self.model.dtype.itemsize)
        tiles: list[list[int]] = []
        tokens = widest = 0
        for i in order:
            wider = max(widest, contexts[i])
            if (
                tiles
                and len(tiles[-1]) < self.batch_size
                and tokens + lengths[i] <= _TILE_PROMPT_TOKENS[kind]
                and (len(tiles[-1]) + 1) * wider <= slots_of_cache
                and (self.adapters == "mixed" or slots[tiles[-1][-1]] == slots[i])
            ):
                tiles[-1].append(i)
                tokens, widest = tokens + lengths[i], wider
            else:
                tiles.append([i])
                tokens, widest = lengths[i], contexts[i]
        return tiles

    def _encode(self, texts: Sequence[Prompt], what: str, *, special: bool) -> list[list[int]]:
        if isinstance(texts, str | Mapping):
            raise UsageError(
                f"LLM: {what}s is a {type(texts).__name__}, expected a list of {what}s"
            )
        encoded = []
        for i, text in enumerate(texts):
            if isinstance(text, str):
                ids = self.tokenizer.encode(text, add_special_tokens=special)
            else:
                try:
                    ids = [operator.index(token) for token in text]
                except TypeError:
                    raise UsageError(
                        f"{what} {i} is {text!r:.40}, expected a text or a list of token ids; "
                        f"a single {what} goes into a list of its own"
                    ) from None
            self._check_ids(f"{what} {i}", ids)
            encoded.append(ids)
        return encoded

    def _slots(self, adapters: Sequence[str | None] | None, count: int) -> list[int]:
        if adapters is None:
            return [self.bank.slot(None)] * count
        if isinstance(adapters, str) or len(adapters) != count:
            got = adapters if isinstance(adapters, str) else len(adapters)
            raise UsageError(f"LLM: adapters is {got!r}, expected {count} names, one per prompt")
        known = {name: self.bank.slot(name) for name in set(adapters)}
        return [known[name] for name in adapters]

    def _check_ids(self, what: str, ids: Sequence[int]) -> None:
        vocab = self.model.config.vocab_size
        if not ids:
            raise UsageError(f"{what} is empty, expected at least one token")
        if min(ids) < 0 or max(ids) >= vocab:
            bad = next(t for t in ids if not 0 <= t < vocab)
            raise UsageError(f"{what} has token id {bad}, expected ids in [0, {vocab})")

    def _check_context(self, what: str, num_tokens: int) -> None:
        most = self.model.config.max_position_embeddings
        if num_tokens > most:
            raise UsageError(
                f"{what} needs {num_tokens} positions, the model has {most}; shorten it"
            )
