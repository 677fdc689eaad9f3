"""LLM: a checkpoint and any number of adapters, answering in one continuous batch."""

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from fastsafe.engine.adapters import MergedCopies
from fastsafe.engine.gpu_lane import DeviceLane
from fastsafe.engine.interface import LLMInterface
from fastsafe.engine.lane import Lane
from fastsafe.engine.lane_pool import EndedRow, LanePool, plan_lane
from fastsafe.engine.paged_cache import is_native, page_tokens
from fastsafe.engine.planner import MAX_ROWS, Mode, choose_adapters, weight_bytes
from fastsafe.engine.prompts import EncodedRequest, Prompts, ScoringRequest
from fastsafe.engine.readers import LabelScorer, Sampler, Scorer, StepReader
from fastsafe.engine.request import DTYPES, Completion, Score, check_options
from fastsafe.engine.sampling import RowParams
from fastsafe.engine.scheduler import Row
from fastsafe.errors import AdapterError, UsageError
from fastsafe.io import hub
from fastsafe.io.checkpoint import Checkpoint
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.model import nf4
from fastsafe.model.attention import PackedAttention
from fastsafe.model.lora import BASE, AdapterBank, AdapterLease
from fastsafe.model.transformer import Project, Transformer

_LOGGER = logging.getLogger(__name__)
_RELEASED = ("model", "bank", "_prompts", "_lanes", "_merged")  # by `LLM.close`


class LLM(LLMInterface[int]):
    """A base model with adapters: generate, stream, chat, score, logits.

    A ``with`` block closes it at its end; ``close`` does, too.

    A completion has the same token ids and log-probabilities, bit for bit, alone and in any batch,
    order or place, after preemption, beside other adapters, and with the prefix cache on or off.

    Attributes:
        path: Checkpoint directory.
        model: The frozen base.
        tokenizer: Its tokenizer and chat template.
        bank: The loaded adapters.
        batch_size: Maximum number of rows computed together by one lane: a core of a CPU, or the
            GPU.
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
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Load a checkpoint directory, a hub id, or the shipped organism.

        Args:
            path: Directory with config.json, safetensors and tokenizer.json, "owner/name" on the
                hub, or "organism".
            device: "cpu", "cuda", "cuda:N", or "auto": cuda if torch finds a GPU, else cpu.
            dtype: "float32", "bfloat16" or "float16"; weights are converted on load.
            adapters: How adapters are applied; None takes "merged" on a CPU for models under
                1 GiB and "mixed" otherwise, or, with ``strict`` False, the faster one by estimate
                for the rows of each call. ``describe()`` gives the choice and the reason.
            batch_size: Maximum number of rows computed together by one lane; "auto" is 256 on a
                CPU, 1024 on a GPU.
            strict: Whether a row has the same bits in any batch on a GPU, too, by steps of fixed
                shapes; False shrinks steps to the rows that run. A CPU always keeps the promise.
            prefix_cache: Whether rows with equal prefixes share their pages.
            quantize: "nf4" holds the base in 4 bits as ``fastsafe train --quantize nf4`` does, and
                multiplies by the dequantized weights: less memory, slower.
            chat_template_kwargs: Variables of the chat template in every conversation, in ``chat``
                and in training, such as ``{"enable_thinking": False}``.

        Raises:
            UsageError: An option has an unknown value, or the device is absent.
            CheckpointError: The checkpoint is missing or malformed.
            TokenizerError: The tokenizer is missing or malformed.
        """
        device = check_options(device, dtype, batch_size)
        if adapters not in (None, "merged", "mixed"):
            raise UsageError(f"LLM: adapters is {adapters!r}, expected 'merged' or 'mixed'")
        if quantize not in (None, "nf4"):
            raise UsageError(f"LLM: quantize is {quantize!r}, expected 'nf4' or None")
        self.path = hub.resolve(str(path))
        checkpoint = Checkpoint(self.path)
        load = nf4.load if quantize else Transformer.load
        self.model: Transformer = load(checkpoint, device=device, dtype=DTYPES[dtype])
        self.tokenizer = Tokenizer.load(self.path).with_variables(chat_template_kwargs)
        self.tokenizer.check_vocab(self.model.config.vocab_size)
        self.bank = AdapterBank(self.model)
        kind = self.model.device.type
        self.batch_size = MAX_ROWS[kind] if batch_size == "auto" else batch_size
        self._strict = strict
        self._prefix_cache = prefix_cache
        positions = self.model.config.max_position_embeddings
        self._prompts = Prompts(self.tokenizer, positions, self.bank.slot)
        self._lanes = LanePool()
        self._merged = MergedCopies(self.bank)
        # of the lane made last, for describe()
        self._memory_reason = "nothing was computed yet"
        self._invariant_products: frozenset[str] = frozenset()
        self._mode_is_automatic = adapters is None and not strict
        self._mode: Mode
        if adapters is None:
            self._mode, self._mode_reason = self._choose_mode([])
        else:
            self._mode, self._mode_reason = adapters, f"{adapters}: as asked for"
        _LOGGER.info(
            "loaded %s on %s in %s; adapters: %s", self.path, device, dtype, self._mode_reason
        )

    @property
    def adapters(self) -> Mode:
        """How adapters are applied, by the last call if each call chooses.

        "merged" multiplies each adapter's rows by merged weights, "mixed" adds each row's own
        update to the base's results.
        """
        return self._mode

    def __repr__(self) -> str:
        if "model" not in self.__dict__:
            return f"LLM({str(self.path)!r}, closed)"
        adapters = ", ".join(self.bank.names) or "none"
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"LLM({str(self.path)!r}, {self.model.device}, {dtype}, adapters: {adapters})"

    def __enter__(self) -> Self:
        """Return itself; the end of the ``with`` block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the weights, adapters and caches; every later call is a UsageError."""
        for name in _RELEASED:
            self.__dict__.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    if not TYPE_CHECKING:  # to a type checker it would allow every attribute

        def __getattr__(self, name: str) -> Any:
            if name in _RELEASED and "path" in self.__dict__:
                raise UsageError(f"LLM {self.path}: is closed, expected an open one; load it again")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def describe(self) -> dict[str, Any]:
        """Return the choices that shape the numbers, for the manifest."""
        return {
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "quantize": "nf4" if isinstance(self.model, nf4.NF4Transformer) else None,
            "adapters": self._mode,
            "adapters_why": self._mode_reason,
            "batch_size": self.batch_size,
            "strict": self._strict or is_native(self.model.device),
            "invariant_products": sorted(self._invariant_products),
            "prefix_cache": self._prefix_cache,
            "memory": self._memory_reason,
            "threads": torch.get_num_threads(),
        }

    def load_adapter(self, path: str | Path | None, name: str = "") -> None:
        """Load a PEFT directory under ``name`` (its folder's name when empty).

        Raises:
            AdapterError: The adapter is malformed, does not fit, or the name is taken; or the path
                is None, as that of a job whose training failed.
        """
        if path is None:
            raise AdapterError(
                f"adapter {name!r}: path is None, expected a folder; its training failed, see "
                "FinetuneResult.error"
            )
        self.bank.load(path, name)

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter.

        Raises:
            AdapterError: It is not loaded, or a stream that has not ended uses it.
        """
        self.bank.remove(name)

    def _stream(self, requests: Sequence[EncodedRequest[int]]) -> Generator[tuple[int, Completion]]:
        rows = [
            Row(
                index=request.index,
                slot=request.adapter,
                tokens=tuple(request.tokens),
                max_tokens_total=request.max_tokens_total,
                params=request.params,
                has_stop_text=self._prompts.stop_check(request.params),
            )
            for request in requests
        ]
        return self._complete(rows, self.bank.lease(row.slot for row in rows))

    def _complete(self, rows: list[Row], lease: AdapterLease) -> Generator[tuple[int, Completion]]:
        all_params = [row.params for row in rows if row.params]
        stop_ids = [
            frozenset(() if p.ignore_eos else self.tokenizer.eos_ids) | set(p.stop_token_ids)
            for p in all_params
        ]
        params = RowParams.stack(all_params, self.model.device, stop_ids)
        with_logprobs = any(p.logprobs for p in all_params)

        def reader(lane: Lane) -> StepReader:
            return Sampler(lane.model, params, lane.max_rows, with_logprobs)

        with lease:
            for row, reason, result in self._run(rows, reader):
                tokens, logprobs = result or (row.tokens, ())
                sampled = tokens[len(row.tokens) :]
                completion = self._prompts.completion(
                    row.params, len(row.tokens), sampled, logprobs, reason or "error"
                )
                yield row.index, completion

    def _score_tokens(
        self, requests: Sequence[ScoringRequest[int]], *, with_greedy: bool, shared_tokens: int
    ) -> dict[int, Score]:
        def reader(lane: Lane) -> StepReader:
            return Scorer(lane.model, with_greedy=with_greedy, shared_tokens=shared_tokens)

        # the last token is not computed: no token after it is scored
        return self._run_scoring(requests, -1, reader)

    def _score_labels(
        self,
        requests: Sequence[ScoringRequest[int]],
        label_ids: Sequence[int],
        *,
        shared_tokens: int,
    ) -> dict[int, tuple[float, ...]]:
        def reader(lane: Lane) -> StepReader:
            return LabelScorer(lane.model, label_ids, shared_tokens)

        return self._run_scoring(requests, 0, reader)

    def _run_scoring(
        self,
        requests: Sequence[ScoringRequest[int]],
        extra: int,
        reader: Callable[[Lane], StepReader],
    ) -> dict[int, Any]:
        """Compute requests up to their length plus ``extra``; return the results by index."""
        rows = [
            Row(
                index=i,
                slot=request.adapter,
                tokens=tuple(request.tokens),
                max_tokens_total=0,
                prefill_until=len(request.tokens) + extra,
                logits_from=request.logits_from,
            )
            for i, request in enumerate(requests)
            if len(request.tokens) + extra > request.logits_from
        ]
        results: dict[int, Any] = {}
        with self.bank.lease(row.slot for row in rows):
            for row, reason, result in self._run(rows, reader):
                if reason is not None:
                    size = len(row.tokens)
                    raise MemoryError(f"LLM: row {row.index} of {size} tokens does not fit")
                results[row.index] = result
        return results

    def _logits(self, row: list[int], adapter: int) -> Tensor:
        with torch.inference_mode():
            tokens = torch.tensor(row, device=self.model.device)
            positions = torch.arange(len(row), device=self.model.device)
            project: Project | None = self.bank.merged(adapter)
            if self._mode == "mixed":
                project = self.bank.mixed(torch.full((len(row),), adapter))
            hidden = self.model.forward(tokens, positions, PackedAttention([len(row)]), project)
            return self.model.logits(hidden)

    def _run(self, rows: list[Row], reader: Callable[[Lane], StepReader]) -> Iterator[EndedRow]:
        if self._mode_is_automatic and any(row.slot != BASE for row in rows):
            self._mode, self._mode_reason = self._choose_mode([row.slot for row in rows])
        mode, batch_size, device = self._mode, self.batch_size, self.model.device
        longest = max((max(row.max_tokens_total, row.prefill_until) for row in rows), default=0)

        def fits(lane: Lane) -> bool:
            if lane.merges != (mode == "merged") or lane.memory.requested_rows != batch_size:
                return False
            return lane.num_pages * page_tokens(device) >= longest

        def make() -> Lane:
            merged = self._merged if mode == "merged" else None
            memory = plan_lane(self.model, merged is not None, batch_size, longest)
            kind = Lane if is_native(device) else partial(DeviceLane, strict=self._strict)
            lane = kind(self.bank, merged, memory, prefix_cache=self._prefix_cache)
            self._memory_reason = memory.why
            self._invariant_products = lane.model.invariant_products
            return lane

        weights = weight_bytes(self.model.config, self.model.dtype.itemsize)
        return self._lanes.run(rows, device, fits, make, reader, weights=weights)

    def _choose_mode(self, slots: Sequence[int]) -> tuple[Mode, str]:
        """Choose how adapters are applied to rows of these slots; returns it and the reason."""
        counts = Counter(slot for slot in slots if slot != BASE)
        return choose_adapters(
            list(counts.values()),
            config=self.model.config,
            itemsize=self.model.dtype.itemsize,
            lora_parameters=self.bank.parameters_each(),
            device_kind=self.model.device.type,
            strict=self._strict,
            batch_size=self.batch_size,
        )
