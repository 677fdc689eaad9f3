"""Train and generate for a run on fastsafe's own engine; weights are loaded when first needed."""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsafe.audit.backend.drift_watch import Watch
from fastsafe.audit.backend.protocol import (
    Answer,
    ChatTokenizer,
    Job,
    OnAnswer,
    OnStep,
    Request,
    Trained,
)
from fastsafe.audit.recipe.schema import Recipe, Sampling, Training
from fastsafe.data.thoughts import opened_thought
from fastsafe.errors import AdapterError, RecipeError, UsageError
from fastsafe.io import hub
from fastsafe.io.weight_folder import is_adapter

if TYPE_CHECKING:
    from fastsafe.model.config import ModelConfig
    from fastsafe.train import DriftReading, FinetuneResult

# The files beside the weights that render prompts, end answers and turn tokens into text.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

_MARK_TOKENS = 32  # at the end of a prompt, in which its mark of an opened thought is looked for


class EngineBackend:
    """The engine and the trainer of fastsafe over one checkpoint."""

    name = "fastsafe"

    def __init__(
        self,
        model: str,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int | Literal["auto"] = "auto",
        adapters: str | None = None,
        strict: bool = True,
        quantize: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Check the checkpoint's files; no weights are loaded.

        Args:
            model: A path, a hub id, or the name of a source that has a checkpoint.
            device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"`` for a GPU if there is one.
            dtype: Type of the weights and activations.
            batch_size: Maximum number of rows computed together.
            adapters: How the engine applies adapters, ``"merged"`` or ``"mixed"``; None lets it
                choose.
            strict: Whether the engine gives a row the same bits in any batch.
            quantize: ``"nf4"`` makes the engine hold the base in 4 bits, for training and answers.
            chat_template_kwargs: Variables of the chat template, for training and answers.

        Raises:
            UsageError: A template variable is reserved or no JSON.
        """
        from fastsafe.io.checkpoint import Checkpoint
        from fastsafe.io.template_variables import check_variables
        from fastsafe.model.device import choose_device

        self._device = choose_device(device)
        self.path = hub.resolve(model)
        self.checkpoint = Checkpoint(self.path)
        self._variables = check_variables(chat_template_kwargs)
        self._linears = self._linear_modules()
        self.tokenizer = self._load_tokenizer()
        self._dtype = dtype
        self._batch_size = batch_size
        self._quantize = quantize
        self._engine_options: dict[str, Any] = {"adapters": adapters, "quantize": quantize}
        if not strict:
            self._engine_options["strict"] = False
        self.llm: Any = None  # the loaded engine; None before `load`
        self._loaded_adapters: dict[str, Path] = {}

    def _linear_modules(self) -> list[str]:
        from fastsafe.model.weights import linears

        return [
            f"model.layers.{layer}.{linear.module}"
            for layer in range(self.config.num_layers)
            for linear in linears(self.config)
        ]

    def _load_tokenizer(self) -> ChatTokenizer:
        from fastsafe.io.tokenizer import Tokenizer

        return Tokenizer.load(self.path).with_variables(self._variables)

    @cached_property
    def config(self) -> "ModelConfig":
        """Shape of the model, as the engine reads it."""
        from fastsafe.model.config import ModelConfig

        return ModelConfig.from_json(self.checkpoint.config(), str(self.path))

    @property
    def context(self) -> int | None:
        """Maximum number of tokens of a row, None where there is no limit; call ``load`` first."""
        return self.config.max_position_embeddings

    @cached_property
    def engine(self) -> Mapping[str, str]:
        """Everything but the rows that answers depend on: hashes, device, dtype, backend."""
        return {
            "checkpoint_sha256": self.checkpoint.sha256(),
            "tokenizer_sha256": _text_sha256(self.path),
            "device": self._device.partition(":")[0],
            "dtype": self._dtype,
            "backend": self.name,
            # where these are not set there is no key, so that older runs keep their identity
            **({"quantize": self._quantize} if self._quantize else {}),
            **(
                {"chat_template_kwargs": json.dumps(self._variables, sort_keys=True)}
                if self._variables
                else {}
            ),
        }

    def check_training(self, recipe: Recipe, objectives: Sequence[str | Mapping[str, Any]]) -> None:
        """Check a recipe's training settings, before anything is loaded or written.

        Raises:
            RecipeError: ``target_modules`` match no linear module, or settings exclude each other.
        """
        from fastsafe.model.peft import LoraConfig
        from fastsafe.train import TrainConfig

        training = recipe.training
        try:
            for objective in objectives:
                TrainConfig(**training.options(), objective=objective)
            LoraConfig(
                rank=training.rank, alpha=training.alpha, target_modules=training.target_modules
            ).modules(self._linears, "training")
        except (AdapterError, UsageError) as error:
            raise RecipeError(f"recipe {recipe.name}: {error}") from error

    def load(self) -> None:
        """Put the weights on the device; a second call does nothing."""
        if self.llm is None:
            self.llm = self._open(self.path)

    def _open(self, path: Path) -> Any:
        from fastsafe.engine import LLM

        return LLM(
            path,
            device=self._device,
            dtype=self._dtype,
            batch_size=self._batch_size,
            chat_template_kwargs=self._variables,
            **self._engine_options,
        )

    def facts(self) -> dict[str, Any]:
        """Return versions and settings for the manifest."""
        import torch

        import fastsafe._native as _native
        from fastsafe_kernels import choose_backend

        facts = {
            "model_path": str(self.path),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "instruction_set": _native.instruction_set(),
        }
        if self._device != "cpu" and torch.cuda.is_available():
            attention = choose_backend()
            facts["gpu"] = torch.cuda.get_device_name()
            facts["attention"] = f"{attention.name} {attention.version}"
        return facts | (self.llm.describe() if self.llm else {})

    def train(
        self,
        jobs: Sequence[Job],
        training: Training,
        out_dir: Path,
        on_step: OnStep,
        watch: Watch | None = None,
    ) -> dict[str, Trained]:
        """Fine-tune all jobs on the frozen base, monitor their drift, return outcomes by name."""
        from fastsafe.train import FinetuneJob, TrainConfig, TrainOptions

        self.load()
        options = training.options()
        readings: list[DriftReading] = []
        num_steps = 0

        def after_step(step: int, losses: Mapping[str, float]) -> None:
            nonlocal num_steps
            num_steps += len(losses)
            # jobs need not be at the same step: report the mean
            on_step(num_steps // len(jobs), sum(losses.values()) / len(losses))

        work = [
            FinetuneJob(
                job.name,
                list(job.rows),
                TrainConfig(**options, seed=job.seed, objective=job.objective),
            )
            for job in jobs
        ]
        monitor: dict[str, Any] = {}
        if watch:
            monitor["options"] = TrainOptions(monitor=watch.monitor(readings.append))
        results = self._finetune(self.llm, work, out_dir, after_step, **monitor)
        drift = {r.name: watch.rows(r, readings) if watch else () for r in results}
        return {
            r.name: Trained(r.adapter_dir, list(r.losses), r.error, drift[r.name]) for r in results
        }

    @property
    def _finetune(self) -> "Callable[..., Sequence[FinetuneResult]]":
        """The function that trains jobs; it takes the monitor as an option."""
        from fastsafe.train import finetune

        return finetune

    def generate(
        self,
        requests: Sequence[Request],
        adapters: Mapping[str, Path],
        sampling: Sampling,
        on_answer: OnAnswer,
    ) -> None:
        """Answer every request, all adapters in one batch.

        Where a prompt opens a thought, its opening mark is put in front of the answer's text: a
        reader of answers sees no prompt, and could not tell a thought that was cut from an answer.
        Each answer goes to ``on_answer`` when it is done, from any thread.
        A folder that holds a whole checkpoint is loaded and answers by itself, one after another;
        the base is unloaded first.
        """
        batches: dict[str | None, list[int]] = {None: []}
        for index, request in enumerate(requests):
            name = request.adapter
            is_checkpoint = name is not None and not is_adapter(adapters[name])
            batches.setdefault(name if is_checkpoint else None, []).append(index)
        with_base = batches.pop(None)
        if with_base:
            self.load()
            self.use({name: path for name, path in adapters.items() if is_adapter(path)})
            self._generate(self.llm, requests, with_base, sampling, on_answer)
        for name, indices in batches.items():
            self.release()
            bare = [request._replace(adapter=None) for request in requests]
            self._generate(self._open(adapters[str(name)]), bare, indices, sampling, on_answer)

    def _generate(
        self,
        llm: Any,
        requests: Sequence[Request],
        indices: Sequence[int],
        sampling: Sampling,
        on_answer: OnAnswer,
    ) -> None:
        from fastsafe.engine import Completion, SamplingParams

        options = sampling.model_dump()
        chosen = [requests[index] for index in indices]

        def on_result(index: int, completion: Completion) -> None:
            end = chosen[index].token_ids[-_MARK_TOKENS:]
            text = opened_thought(llm.tokenizer.decode(end, False)) + completion.text
            answer = Answer(text, completion.token_ids, completion.finish_reason)
            on_answer(indices[index], answer)

        llm.generate(
            [request.token_ids for request in chosen],
            [
                SamplingParams(**(options | {"max_tokens": request.max_tokens}), seed=request.seed)
                for request in chosen
            ],
            [request.adapter for request in chosen],
            on_result,
        )

    def change(self, defence: str, params: Mapping[str, Any], adapter: Path, out_dir: Path) -> None:
        """Apply a defence to a trained adapter and write the new adapter or checkpoint."""
        from fastsafe.io import hub
        from fastsafe.safety.defences import apply_posthoc, defences

        chosen = defences()[defence]
        folders = {name: hub.resolve(params[name]) for name in chosen.needs}
        apply_posthoc(chosen, adapter, self.path, out_dir, **{**params, **folders})

    def release(self) -> None:
        """Unload the weights, for judges to have the memory; ``load`` loads them again."""
        self.llm = None
        self._loaded_adapters = {}

    def use(self, adapters: Mapping[str, Path]) -> None:
        """Load these adapters, and unload all others."""
        loaded = self._loaded_adapters
        for name in [name for name in loaded if loaded[name] != adapters.get(name)]:
            self.llm.unload_adapter(name)
            del loaded[name]
        for name, path in adapters.items():
            if name not in loaded:
                self.llm.load_adapter(path, name)
                loaded[name] = path


def _text_sha256(folder: Path) -> str:
    """Hash the names and contents of the files that decode and end answers."""
    total = hashlib.sha256()
    for name in TEXT_FILES:
        if (folder / name).is_file():
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()
