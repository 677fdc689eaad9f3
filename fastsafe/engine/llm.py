"""LLM: a checkpoint and any number of adapters, answering in one continuous batch."""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastsafe.data.conversation import Message
from fastsafe.engine import options
from fastsafe.engine.adapters import Merged
from fastsafe.engine.gpu_lane import DeviceLane
from fastsafe.engine.lane import Lane
from fastsafe.engine.lane_pool import Ended, LanePool, plan_lane, run
from fastsafe.engine.paged_cache import is_native, page_tokens
from fastsafe.engine.planner import MAX_ROWS, MemoryPlan, choose_adapters
from fastsafe.engine.prompts import Prompt, Prompts
from fastsafe.engine.readers import Drawing, Labels, Reader, Scoring
from fastsafe.engine.request import Completion, SamplingParams, Score
from fastsafe.engine.sampling import RowParams
from fastsafe.engine.scheduler import Row
from fastsafe.errors import UsageError
from fastsafe.io import hub
from fastsafe.io.checkpoint import Checkpoint
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.model import nf4
from fastsafe.model.attention import PackedAttention
from fastsafe.model.lora import BASE, AdapterBank, AdapterLease
from fastsafe.model.transformer import Project, Transformer


class LLM:
    """A base model with adapters: generate, stream, chat, score, logits.

    A completion's token ids and log-probabilities are the same bits alone, in any batch, order or
    place, after preemption, beside other adapters, and with the prefix cache on or off.

    Attributes:
        path: Checkpoint directory.
        model: The frozen base.
        tokenizer: Its tokenizer and chat template.
        bank: The loaded adapters.
        adapters: "merged" multiplies each adapter's rows by merged weights, "mixed" adds each
            row's own update to the base's results.
        batch_size: Most rows computed together by one lane: a core of a CPU, or the GPU.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        *,
        adapters: Literal["merged", "mixed"] | None = None,
        batch_size: int | Literal["auto"] = "auto",
        strict: bool = True,
        prefix_cache: bool = True,
        quantize: Literal["nf4"] | None = None,
    ) -> None:
        """Load a checkpoint directory or a hub id.

        Args:
            path: Directory with config.json, safetensors and tokenizer.json, or "owner/name".
            device: "cpu" or "cuda".
            dtype: "float32", "bfloat16" or "float16"; weights are converted on load.
            adapters: How adapters are applied; None takes "merged" on a CPU for models under
                1 GiB and "mixed" otherwise, or, where ``strict`` is False, what should be faster
                for the rows of each call. ``describe()`` says which and why.
            batch_size: Most rows computed together by one lane; "auto" is 256 on a CPU, 1024 on a
                GPU.
            strict: Whether a row's bits are its own on a GPU, too, by steps of one shape; False
                shrinks them to the rows that run. A CPU always keeps the promise.
            prefix_cache: Whether rows with equal beginnings share what was computed of them.
            quantize: "nf4" holds the base in 4 bits as ``fastsafe train --quantize nf4`` does, and
                multiplies by the dequantized weights; slower, in less memory.

        Raises:
            UsageError: An option is none of those above, or the device is absent.
            CheckpointError: The checkpoint is missing or malformed.
            TokenizerError: The tokenizer is missing or malformed.
        """
        options.check(device, dtype, batch_size)
        if adapters not in (None, "merged", "mixed"):
            raise UsageError(f"LLM: adapters is {adapters!r}, expected 'merged' or 'mixed'")
        if quantize not in (None, "nf4"):
            raise UsageError(f"LLM: quantize is {quantize!r}, expected 'nf4' or None")
        self.path = hub.resolve(str(path))
        checkpoint = Checkpoint(self.path)
        load = nf4.load if quantize else Transformer.load
        self.model: Transformer = load(checkpoint, device=device, dtype=options.DTYPES[dtype])
        self.tokenizer = Tokenizer.load(self.path)
        self.tokenizer.check_vocab(self.model.config.vocab_size)
        self.bank = AdapterBank(self.model)
        kind = self.model.device.type
        self.batch_size = MAX_ROWS[kind] if batch_size == "auto" else batch_size
        self._plan: MemoryPlan | None = None  # of the lanes made last
        self._strict = strict
        self._prefix_cache = prefix_cache
        positions = self.model.config.max_position_embeddings
        self._prompts = Prompts(self.tokenizer, positions, self.bank.slot)
        self._lanes = LanePool()
        self._merged = Merged(self.bank)
        self.adapters = adapters or "mixed"
        self._is_free = adapters is None
        self._why = "" if self._is_free else f"{adapters}: as asked for"
        if self._is_free:
            self._choose(())

    def describe(self) -> dict[str, Any]:
        """Choices that shape the numbers, for the manifest."""
        return {
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "quantize": "nf4" if isinstance(self.model, nf4.NF4Transformer) else None,
            "adapters": self.adapters,
            "adapters_why": self._why,
            "batch_size": self.batch_size,
            "strict": self._strict or is_native(self.model.device),
            "invariant_products": sorted(self.model.invariant_products),
            "prefix_cache": self._prefix_cache,
            "memory": self._plan.why if self._plan else "nothing was computed yet",
            "threads": torch.get_num_threads(),
        }

    def load_adapter(self, path: str | Path, name: str = "") -> None:
        """Load a PEFT directory under ``name`` (its folder's name when empty).

        Raises:
            AdapterError: The adapter is malformed, does not fit, or the name is taken.
        """
        self.bank.load(path, name)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            AdapterError: It is not loaded, or a stream that has not ended asks it.
        """
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
            on_result: Called with (index, completion) as each finishes, in the order of
                finishing. What it raises ends the call.

        Returns:
            One completion per prompt, in order.

        Raises:
            UsageError: Lists differ in length, or a prompt is empty, too long or out of range.
            AdapterError: An adapter is not loaded.
        """
        done: dict[int, Completion] = {}
        stream = self.stream(prompts, params, adapters)
        try:
            for index, completion in stream:
                done[index] = completion
                if on_result:
                    on_result(index, completion)
        finally:
            stream.close()
        return [done[i] for i in range(len(done))]

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> Generator[tuple[int, Completion]]:
        """Complete every prompt; gives (index, completion) in the order of finishing.

        Nothing runs before the first is asked for. Closing the iterator cancels the rest. See
        ``generate``.
        """
        rows = [
            Row(
                index=each.index,
                slot=each.place,
                tokens=tuple(each.tokens),
                limit=each.limit,
                params=each.params,
                has_stop_text=self._prompts.stop_check(each.params),
            )
            for each in self._prompts.asked(prompts, params, adapters)
        ]
        return self._complete(rows, self.bank.lease(row.slot for row in rows))

    def _complete(self, rows: list[Row], lease: AdapterLease) -> Generator[tuple[int, Completion]]:
        each = [row.params for row in rows if row.params]
        ends = [
            frozenset(() if p.ignore_eos else self.tokenizer.eos_ids) | set(p.stop_token_ids)
            for p in each
        ]
        params = RowParams.stack(each, self.model.device, ends)
        wants_logprobs = any(p.logprobs for p in each)

        def reader(lane: Lane) -> Reader:
            return Drawing(self.model, params, lane.max_rows, wants_logprobs)

        with lease:
            for row, reason, found in self._run(rows, reader):
                tokens, logprobs = found or (row.tokens, ())
                drawn = tokens[len(row.tokens) :]
                given = row.params, len(row.tokens), drawn, logprobs, reason or "error"
                yield row.index, self._prompts.completion(*given)

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: Sequence[str | None] | None = None,
        on_result: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Answer conversations through the checkpoint's chat template; see ``generate``."""
        return self.generate(self._prompts.chats(conversations), params, adapters, on_result)

    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        adapters: Sequence[str | None] | None = None,
        shared_prefix: Prompt | None = None,
    ) -> list[Score]:
        """Log-likelihood of each continuation given its prompt, by prefill only.

        Args:
            prompts: Texts or token lists, at least one token each.
            continuations: Texts, encoded without special tokens, or token lists; not empty.
            adapters: As in ``generate``.
            shared_prefix: What stands before every prompt, computed once per adapter; the
                prompts' texts are then encoded without special tokens.
        """
        prefix, given = self._prompts.prefixed(prompts, shared_prefix)
        targets = self._prompts.encode(continuations, "continuation", special=False)
        if len(given) != len(targets):
            raise UsageError(
                f"score: {len(targets)} continuations, expected {len(given)}, one per prompt"
            )
        starts = [len(prefix) + len(prompt) - 1 for prompt in given]
        whole = [prefix + a + b for a, b in zip(given, targets, strict=True)]
        count = len(prefix)
        scoring = lambda lane: Scoring(self.model, with_greedy=True, shared_tokens=count)  # noqa: E731
        found = self._read_targets("score", whole, starts, adapters, scoring)
        return [found[i] for i in range(len(found))]

    def prompt_logprobs(
        self, prompts: Sequence[Prompt], adapters: Sequence[str | None] | None = None
    ) -> list[tuple[float | None, ...]]:
        """Log-probability of every prompt token given those before it, None for the first.

        Args:
            prompts: Texts, encoded with special tokens, or token lists.
            adapters: As in ``generate``.
        """
        whole = self._prompts.encode(prompts, "prompt", special=True)
        scoring = lambda lane: Scoring(self.model, with_greedy=False)  # noqa: E731
        found = self._read_targets("prompt_logprobs", whole, [0] * len(whole), adapters, scoring)
        behind = [found[i].token_logprobs if i in found else () for i in range(len(whole))]
        return [(None, *logprobs) for logprobs in behind]

    def label_logprobs(
        self,
        prompts: Sequence[Prompt],
        labels: Sequence[int | str],
        adapters: Sequence[str | None] | None = None,
        shared_prefix: Prompt | None = None,
    ) -> list[tuple[float, ...]]:
        """Log-probability of each label as the token after each prompt, by prefill only.

        Args:
            prompts: Texts, encoded with special tokens, or token lists.
            labels: Token ids, or texts of one token each, encoded without special tokens.
            adapters: As in ``generate``.
            shared_prefix: As in ``score``.

        Returns:
            For each prompt, one value per label, in nats.

        Raises:
            UsageError: A label is not one token, or as for ``generate``.
        """
        ids = self._prompts.labels(labels)
        prefix, given = self._prompts.prefixed(prompts, shared_prefix)
        slots = self._prompts.places(adapters, len(given))
        rows = []
        for i, prompt in enumerate(given):
            whole = (*prefix, *prompt)
            self._prompts.check_context(f"label_logprobs: prompt {i}", len(whole))
            rows.append(Row(i, slots[i], whole, 0, feed=len(whole), keep_from=len(whole) - 1))
        found = self._read(rows, lambda lane: Labels(self.model, ids, len(prefix)))
        return [found[i] for i in range(len(rows))]

    def _read_targets(
        self,
        what: str,
        whole: Sequence[list[int]],
        starts: Sequence[int],
        adapters: Sequence[str | None] | None,
        reader: Callable[[Lane], Reader],
    ) -> dict[int, Score]:
        """Score all tokens behind position ``starts`` of each row that has any, by index."""
        slots = self._prompts.places(adapters, len(whole))
        rows = []
        for i, ids in enumerate(whole):
            self._prompts.check_context(f"{what}: row {i}", len(ids))
            # the last token predicts nothing that is asked for
            feed = len(ids) - 1
            if feed > starts[i]:
                rows.append(Row(i, slots[i], tuple(ids), 0, feed=feed, keep_from=starts[i]))
        return self._read(rows, reader)

    def _read(self, rows: list[Row], reader: Callable[[Lane], Reader]) -> dict[int, Any]:
        found: dict[int, Any] = {}
        with self.bank.lease(row.slot for row in rows):
            for row, reason, result in self._run(rows, reader):
                if reason is not None:
                    size = len(row.tokens)
                    raise MemoryError(f"LLM: row {row.index} of {size} tokens does not fit")
                found[row.index] = result
        return found

    def logits(self, token_ids: Sequence[int] | Tensor, adapter: str | None = None) -> Tensor:
        """Logits after every token of one sequence.

        Args:
            token_ids: [N] token ids.
            adapter: Name of a loaded adapter, None for the base.

        Returns:
            [N, V] fp32 on the model's device.
        """
        ids = self._prompts.ids(token_ids, "logits: token_ids")
        self._prompts.check_context("logits: token_ids", len(ids))
        slot = self.bank.slot(adapter)
        with torch.inference_mode():
            tokens = torch.tensor(ids, device=self.model.device)
            positions = torch.arange(len(ids), device=self.model.device)
            project: Project | None = self.bank.merged(slot)
            if self.adapters == "mixed":
                project = self.bank.mixed(torch.full((len(ids),), slot))
            hidden = self.model.forward(tokens, positions, PackedAttention([len(ids)]), project)
            return self.model.logits(hidden)

    def _run(self, rows: list[Row], reader: Callable[[Lane], Reader]) -> Iterator[Ended]:
        if self._is_free and not self._strict:
            self._choose([row.slot for row in rows])
        tokens, wanted = page_tokens(self.model.device), self.batch_size
        longest = max((max(row.limit, row.feed) for row in rows), default=0)

        def fits(lane: Lane) -> bool:
            return lane.wanted_rows == wanted and lane.num_pages * tokens >= longest

        take = lambda: self._lanes.take(fits, lambda: self._lane(longest))  # noqa: E731
        return run(rows, self.model.device, take, self._lanes.give, reader)

    def _lane(self, longest: int) -> Lane:
        """Make a lane with room for rows of ``longest`` tokens; UsageError if there is none."""
        merged = self._merged if self.adapters == "merged" else None
        self._plan = plan_lane(self.model, merged is not None, self.batch_size, longest)
        sizes: dict[str, Any] = {
            "num_pages": self._plan.num_pages,
            "wanted_rows": self.batch_size,
            "max_rows": self._plan.batch_size,
            "budget": self._plan.prefill_tokens,
            "prefix_cache": self._prefix_cache,
        }
        if is_native(self.model.device):
            return Lane(self.bank, merged, **sizes)
        return DeviceLane(self.bank, merged, strict=self._strict, **sizes)

    def _choose(self, slots: Sequence[int]) -> None:
        """Decide how adapters are applied to rows of these slots, where nobody has."""
        config, kind = self.model.config, self.model.device.type
        counts = Counter(slot for slot in slots if slot != BASE)
        if not counts and self._why:
            return
        mode, self._why = choose_adapters(
            list(counts.values()),
            config=config,
            itemsize=self.model.dtype.itemsize,
            lora_parameters=self.bank.parameters_each(),
            device_kind=kind,
            strict=self._strict,
            batch_size=self.batch_size,
        )
        if mode != self.adapters:
            self.adapters, self._lanes = mode, LanePool()
