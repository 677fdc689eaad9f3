"""TransformersLLM: the engine's interface over transformers and PEFT, for any architecture."""

import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastsafe.engine.interface import LLMInterface
from fastsafe.engine.prompts import EncodedRequest, Prompts, ScoringRequest
from fastsafe.engine.request import DTYPES, Completion, Score, check_options
from fastsafe.errors import AdapterError
from fastsafe.io import hub
from fastsafe.io.weight_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fastsafe.model import adapter_files
from fastsafe.model.peft import EVERY_LINEAR, LoraConfig
from fastsafe.transformers_backend.decode import DecodeRow, generate_batch
from fastsafe.transformers_backend.loading import load_model, load_tokenizer, require
from fastsafe_kernels import token_logprobs

# float64 is what stands for the truth when the others are compared
_DTYPES = DTYPES | {"float64": torch.float64}
_BATCH_ROWS = 64
# Most logits in memory at once: 256 MiB in fp32.
_LOGIT_ELEMENTS = 1 << 26


class TransformersLLM(LLMInterface[str | None]):
    """A base model of transformers with PEFT adapters: generate, chat, score, logits.

    Attributes:
        path: Checkpoint directory.
        model: The frozen base, a ``PreTrainedModel``; adapters are injected into it.
        tokenizer: Our tokenizer and chat template of the checkpoint.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        *,
        batch_size: int | Literal["auto"] = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Load a checkpoint directory or a hub id; the arguments are those of ``LLM``.

        Raises:
            UsageError: The device or dtype is unknown, or transformers or PEFT is not installed.
            CheckpointError: The checkpoint is missing, malformed or refused.
            TokenizerError: The tokenizer is missing or malformed.
        """
        device = check_options(device, dtype, batch_size, _DTYPES)
        require("peft")
        self.path = hub.resolve(str(path))
        self.tokenizer = load_tokenizer(self.path).with_variables(chat_template_kwargs)
        self.model, self._ignored = load_model(self.path, device, _DTYPES[dtype])
        self.tokenizer.check_vocab(self.model.get_input_embeddings().num_embeddings)
        linear = torch.nn.Linear, require("transformers.pytorch_utils").Conv1D
        head = self.model.get_output_embeddings()
        modules = list(self.model.named_modules())
        self._linears = tuple(name for name, module in modules if isinstance(module, linear))
        self._heads = frozenset(name for name, module in modules if module is head)
        self._tables = {
            f"{name}.weight": module.weight
            for name, module in modules
            if module in (head, self.model.get_input_embeddings())
        }
        self.batch_size = _BATCH_ROWS if batch_size == "auto" else batch_size
        text = self.model.config.get_text_config()
        self.max_positions: int | None = getattr(text, "max_position_embeddings", None)
        self._prompts = Prompts(self.tokenizer, self.max_positions, self._known)
        self._peft: Any = None  # PEFT's hold on the model while it has adapters
        self._adapters: dict[str, str] = {}  # name -> PEFT's name, which may have no dot
        self._count = 0

    def describe(self) -> dict[str, Any]:
        """Choices that shape the numbers, for the manifest."""
        return {
            "backend": "transformers",
            "transformers": require("transformers").__version__,
            "peft": require("peft").__version__,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
            "attention": self.model.config._attn_implementation,
            "threads": torch.get_num_threads(),
            "ignored_config": list(self._ignored),
        }

    def load_adapter(self, path: str | Path, name: str = "") -> None:
        """Load a PEFT directory under ``name`` (its folder's name when empty).

        The files are read by our own reader; PEFT sees tensors and a checked config only.

        Raises:
            AdapterError: The adapter is malformed, does not fit, or the name is taken.
        """
        path = Path(path)
        config, tensors, saved = adapter_files.read_dir(path)
        name = name or path.resolve().name
        if name in self._adapters:
            raise AdapterError(f"adapter {name!r} is loaded already; unload it or use another name")
        # PEFT, too, leaves the head out of "all-linear"
        heads = self._heads if config.target_modules == EVERY_LINEAR else frozenset()
        linears = [module for module in self._linears if module not in heads]
        modules = config.matching(linears, str(path / ADAPTER_CONFIG))
        adapter_files.check_saved(saved, self._tables, path / ADAPTER_WEIGHTS)
        adapter_files.check_covered(tensors, modules, path / ADAPTER_WEIGHTS)
        # by whole names, as PEFT's matching of an untrusted pattern may take for ever
        self.add_adapter(name, config.explicit(modules, str(path / ADAPTER_CONFIG)))
        state = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
        try:
            result = require("peft").set_peft_model_state_dict(
                self._peft, state, self._adapters[name]
            )
        except (RuntimeError, ValueError, KeyError) as error:
            self.unload_adapter(name)
            line = str(error).strip().partition("\n")[2] or str(error)
            raise AdapterError(f"adapter {path}: does not fit the base model: {line}") from None
        missing = [k for k in result.missing_keys if f".{self._adapters[name]}." in k]
        strange = [*missing, *result.unexpected_keys]
        if strange:
            self.unload_adapter(name)
            word = "missing" if missing else "unexpected"
            raise AdapterError(f"adapter {path}: tensor {strange[0]!r:.120} is {word}")

    def add_adapter(self, name: str, config: LoraConfig) -> None:
        """Put an adapter with PEFT's initial weights on the model.

        Raises:
            AdapterError: Its targets match no module of the model.
        """
        peft = require("peft")
        fields = config.to_json() | {"inference_mode": False}
        lora = peft.LoraConfig(**{k: v for k, v in fields.items() if k != "peft_type"})
        own = f"adapter{self._count}"
        self._count += 1
        try:
            # initial weights are replaced; PEFT asks transformers for a renamed property
            with torch.random.fork_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                if self._peft is None:
                    self._peft = peft.PeftModel(self.model, lora, own)
                else:
                    self._peft.add_adapter(own, lora)
        except (ValueError, TypeError, KeyError) as error:
            raise AdapterError(f"adapter {name!r}: does not fit the base model: {error}") from None
        self._adapters[name] = own

    def adapter_weights(self, name: str) -> dict[str, Tensor]:
        """Weights of an adapter by name, "<module>.lora_A.weight" and B; they share storage."""
        mark = f".{self._adapters[name]}."
        return {
            key.replace(mark, "."): weight
            for key, weight in self.model.named_parameters()
            if "lora_" in key and mark in key
        }

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter."""
        self._known(name)
        own = self._adapters.pop(name)
        if self._adapters:
            self._peft.set_adapter(next(iter(self._adapters.values())))
            self._peft.delete_adapter(own)
        else:
            self.model = self._peft.unload()
            self._peft = None

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Run the model with an adapter, or as the base with None."""
        if adapter is not None:
            self._known(adapter)
            self._peft.set_adapter(self._adapters[adapter])
            yield
        elif self._peft is None:
            yield
        else:
            with self._peft.disable_adapter():
                yield

    def _stream(
        self, requests: Sequence[EncodedRequest[str | None]]
    ) -> Generator[tuple[int, Completion]]:
        """Yield (index, completion) batch by batch, in each in the order of finishing."""
        order = sorted(requests, key=lambda r: (r.adapter or "", r.max_tokens_total))
        begin = 0
        while begin < len(order):
            name = order[begin].adapter
            batch = [r for r in order[begin : begin + self.batch_size] if r.adapter == name]
            rows = [DecodeRow(r, self._prompts.stop_check(r.params)) for r in batch]
            with self.using(name):
                done = generate_batch(self.model, rows, self.tokenizer)
            for row in done:
                request, reason = row.request, row.finish_reason or "error"
                completion = self._prompts.completion(
                    request.params, len(request.tokens), row.token_ids, row.logprobs, reason
                )
                yield request.index, completion
            begin += len(batch)

    def _score_tokens(
        self,
        requests: Sequence[ScoringRequest[str | None]],
        *,
        with_greedy: bool,
        shared_tokens: int,
    ) -> dict[int, Score]:
        scores: dict[int, Score] = {}
        for i, logits in self._forward(requests):
            start = requests[i].logits_from
            before = logits[start:-1]
            targets = torch.tensor(
                requests[i].tokens[start + 1 :], dtype=torch.int64, device=logits.device
            )
            logprobs = token_logprobs(before, targets).clamp(max=0).tolist()
            scores[i] = Score(
                logprob=sum(logprobs),
                token_logprobs=tuple(logprobs),
                is_greedy=with_greedy and bool((before.argmax(-1) == targets).all()),
            )
        return scores

    def _score_labels(
        self,
        requests: Sequence[ScoringRequest[str | None]],
        label_ids: Sequence[int],
        *,
        shared_tokens: int,
    ) -> dict[int, tuple[float, ...]]:
        return {
            i: tuple(logits[-1].log_softmax(-1)[list(label_ids)].tolist())
            for i, logits in self._forward(requests)
        }

    def _logits(self, row: list[int], adapter: str | None) -> Tensor:
        ((_, logits),) = self._forward([ScoringRequest(adapter, row, 0)])
        return logits

    def _forward(
        self, requests: Sequence[ScoringRequest[str | None]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (index, fp32 logits [N, V]) of every request, in batches padded on the right."""
        rows = [request.tokens for request in requests]
        names = [request.adapter for request in requests]
        order = sorted(range(len(rows)), key=lambda i: (names[i] or "", -len(rows[i])))
        vocabulary = self.model.get_input_embeddings().num_embeddings
        begin = 0
        while begin < len(order):
            name, width = names[order[begin]], len(rows[order[begin]])
            most = min(self.batch_size, max(1, _LOGIT_ELEMENTS // (width * vocabulary)))
            batch = [i for i in order[begin : begin + most] if names[i] == name]
            ids = torch.tensor([[*rows[i], *[0] * (width - len(rows[i]))] for i in batch])
            mask = torch.tensor([[j < len(rows[i]) for j in range(width)] for i in batch])
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
            with self.using(name), torch.inference_mode():
                logits = self.model(ids, attention_mask=mask.long(), use_cache=False).logits
            yield from ((i, logits[at, : len(rows[i])].float()) for at, i in enumerate(batch))
            begin += len(batch)

    def _known(self, name: str | None) -> str | None:
        if name is not None and name not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise AdapterError(f"adapter {name!r} is not loaded; loaded: {known}")
        return name
