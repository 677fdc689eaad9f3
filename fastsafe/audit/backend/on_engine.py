"""Trains and answers on a checkpoint, by the engine; loaded only when needed."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsafe.audit.backend.drift_watch import Watch
from fastsafe.audit.backend.protocol import Job, OnAnswer, OnStep, Reply, Request, Trained
from fastsafe.audit.plan.mitigation_variants import treatments
from fastsafe.audit.plan.rendering import ChatTokenizer
from fastsafe.audit.recipe.schema import Recipe, Sampling, Training
from fastsafe.audit.sources.registry import checkpoint_of
from fastsafe.errors import AdapterError, RecipeError, UsageError
from fastsafe.io.weight_folder import is_adapter

if TYPE_CHECKING:
    from fastsafe.model.config import ModelConfig

# The files beside the weights that render prompts, end answers and turn tokens into text.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


class ModelRuntime:
    """An engine and a trainer over one checkpoint: those of fastsafe, or transformers and PEFT."""

    def __init__(
        self,
        model: str,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int | Literal["auto"] = "auto",
        backend: str = "fastsafe",
        adapters: str | None = None,
        strict: bool = True,
        quantize: str | None = None,
    ) -> None:
        """Check the checkpoint's files; nothing is loaded to the device.

        Args:
            model: A path, a hub id, or the name of a source that has a checkpoint.
            device: ``"cpu"`` or ``"cuda"``.
            dtype: Of the weights and activations.
            batch_size: Most rows computed together.
            backend: ``"fastsafe"``, or ``"transformers"`` for architectures that it does not know.
            adapters: How fastsafe applies them, ``"merged"`` or ``"mixed"``; it chooses when None.
            strict: Whether fastsafe gives a row the same bits in any batch.
            quantize: ``"nf4"`` has fastsafe hold the base in 4 bits, for training and answers.

        Raises:
            UsageError: The backend is not installed, or cannot quantize.
            CheckpointError: The checkpoint is missing, malformed or refused.
            TokenizerError: Its tokenizer or chat template is.
        """
        from fastsafe.io.checkpoint import Checkpoint
        from fastsafe.io.tokenizer import Tokenizer

        self.path = checkpoint_of(model)
        self.checkpoint = Checkpoint(self.path)
        self._backend = backend
        if backend == "fastsafe":
            self._linears = self._own_linears()
            self._tokenizer = Tokenizer.load(self.path)
        elif quantize:
            raise UsageError(
                f"quantize: it is {quantize!r} with the backend {backend}, expected none; use the"
                " backend fastsafe"
            )
        else:
            from fastsafe.transformers_backend.loading import linear_modules, load_tokenizer

            self._linears = linear_modules(self.path)
            self._tokenizer = load_tokenizer(self.path)
        self._options: dict[str, Any] = {"adapters": adapters, "quantize": quantize}
        if not strict:
            self._options["strict"] = False
        self._device = device
        self._dtype = dtype
        self._batch_size = batch_size
        self._llm: Any = None
        self._loaded: dict[str, Path] = {}

    @property
    def tokenizer(self) -> ChatTokenizer:
        """Tokenizer and chat template of the checkpoint."""
        return self._tokenizer

    @cached_property
    def config(self) -> "ModelConfig":
        """Shape of the model, as fastsafe's own runtime reads it."""
        from fastsafe.model.config import ModelConfig

        return ModelConfig.from_json(self.checkpoint.config(), str(self.path))

    @property
    def context(self) -> int | None:
        """Most tokens of a row, None where the backend knows no bound; after ``load``."""
        if self._backend == "fastsafe":
            return self.config.max_position_embeddings
        return self._llm.max_positions  # type: ignore[no-any-return]

    def _own_linears(self) -> list[str]:
        from fastsafe.model.weights import linears

        return [
            f"model.layers.{layer}.{linear.module}"
            for layer in range(self.config.num_layers)
            for linear in linears(self.config)
        ]

    @property
    def llm(self) -> Any:
        """The engine once ``load`` was called."""
        return self._llm

    @cached_property
    def engine(self) -> Mapping[str, str]:
        """What answers depend on, beside the rows."""
        return {
            "checkpoint_sha256": self.checkpoint.sha256(),
            "tokenizer_sha256": _text_sha256(self.path),
            "device": self._device.partition(":")[0],
            "dtype": self._dtype,
            "backend": self._backend,
            # left out where there is none: what was answered before keeps its identity
            **({"quantize": quantize} if (quantize := self._options["quantize"]) else {}),
        }

    def check_training(self, recipe: Recipe) -> None:
        """Refuse training that cannot be done, before anything is loaded or written.

        Raises:
            RecipeError: ``target_modules`` match no linear module, the backend lacks the method
                or the drift monitor, or the method does not go with something else.
        """
        from fastsafe.model.peft import LoraConfig
        from fastsafe.train import TrainConfig

        training = recipe.training
        if self._backend != "fastsafe" and (recipe.drift or training.method == "full"):
            raise RecipeError(
                f"recipe {recipe.name}: has {'drift' if recipe.drift else 'method full'}, which "
                f"backend {self._backend!r} lacks; use backend fastsafe"
            )
        try:
            for treatment in treatments(recipe):
                TrainConfig(**training.options(), objective=treatment.objective)
            LoraConfig(
                rank=training.rank, alpha=training.alpha, target_modules=training.target_modules
            ).modules(self._linears, "training")
        except (AdapterError, UsageError) as error:
            raise RecipeError(f"recipe {recipe.name}: {error}") from error

    def load(self) -> None:
        """Put the weights on the device; a second call does nothing."""
        if self._llm is None:
            self._llm = self._opened(self.path)

    def _opened(self, path: Path) -> Any:
        where: dict[str, Any] = {
            "device": self._device,
            "dtype": self._dtype,
            "batch_size": self._batch_size,
        }
        if self._backend == "fastsafe":
            from fastsafe.engine import LLM

            return LLM(path, **where, **self._options)
        from fastsafe.transformers_backend import TransformersLLM

        return TransformersLLM(path, **where)

    def facts(self) -> dict[str, Any]:
        """Return versions and choices for the manifest."""
        import torch

        import fastsafe._native as _native
        from fastsafe_kernels import choose_backend

        found = {
            "model_path": str(self.path),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "instruction_set": _native.instruction_set(),
        }
        if self._device != "cpu" and torch.cuda.is_available():
            backend = choose_backend()
            found["gpu"] = torch.cuda.get_device_name()
            found["attention"] = f"{backend.name} {backend.version}"
        return found | (self._llm.describe() if self._llm else {})

    def train(
        self,
        jobs: Sequence[Job],
        training: Training,
        out_dir: Path,
        on_step: OnStep,
        watch: Watch | None = None,
    ) -> dict[str, Trained]:
        """Fine-tune all jobs on the frozen base, together unless the backend cannot."""
        from fastsafe.train import DriftReading, FinetuneJob, TrainConfig, TrainOptions, finetune

        self.load()
        options = training.options()
        readings: list[DriftReading] = []
        taken = 0

        def after_step(step: int, losses: Mapping[str, float]) -> None:
            nonlocal taken
            taken += len(losses)
            # jobs need not be at the same step: what each has done on average
            on_step(taken // len(jobs), sum(losses.values()) / len(losses))

        work = [
            FinetuneJob(
                job.name,
                list(job.rows),
                TrainConfig(**options, seed=job.seed, objective=job.objective),
            )
            for job in jobs
        ]
        if self._backend == "fastsafe":
            watched = TrainOptions(monitor=watch.monitor(readings.append) if watch else None)
            results = finetune(self._llm, work, out_dir, after_step, options=watched)
        else:
            from fastsafe.transformers_backend import finetune as with_peft

            results = with_peft(self._llm, work, out_dir, after_step)
        drift = {r.name: watch.rows(r, readings) if watch else () for r in results}
        return {
            r.name: Trained(r.adapter_dir, list(r.losses), r.error, drift[r.name]) for r in results
        }

    def generate(
        self,
        requests: Sequence[Request],
        adapters: Mapping[str, Path],
        sampling: Sampling,
        on_answer: OnAnswer,
    ) -> None:
        """Answer every request in one batch over all adapters.

        A folder that holds a checkpoint answers by itself, one after the other, and the base makes
        room for it.
        """
        places: dict[str | None, list[int]] = {None: []}
        for index, request in enumerate(requests):
            name = request.adapter
            whole = name is not None and not is_adapter(adapters[name])
            places.setdefault(name if whole else None, []).append(index)
        together = places.pop(None)
        if together:
            self.load()
            self.use({name: path for name, path in adapters.items() if is_adapter(path)})
            self._ask(self._llm, requests, together, sampling, on_answer)
        for name, alone in places.items():
            self.release()
            bare = [request._replace(adapter=None) for request in requests]
            self._ask(self._opened(adapters[str(name)]), bare, alone, sampling, on_answer)

    def _ask(
        self,
        llm: Any,
        requests: Sequence[Request],
        chosen: Sequence[int],
        sampling: Sampling,
        on_answer: OnAnswer,
    ) -> None:
        from fastsafe.engine import Completion, SamplingParams

        def on_result(index: int, completion: Completion) -> None:
            reply = Reply(completion.text, completion.token_ids, completion.finish_reason)
            on_answer(chosen[index], reply)

        options = sampling.model_dump()
        asked = [requests[index] for index in chosen]
        llm.generate(
            [request.token_ids for request in asked],
            [
                SamplingParams(**(options | {"max_tokens": request.max_tokens}), seed=request.seed)
                for request in asked
            ],
            [request.adapter for request in asked],
            on_result,
        )

    def change(self, defence: str, params: Mapping[str, Any], adapter: Path, out_dir: Path) -> None:
        """Write what a defence makes of a trained adapter; the checkpoint is the base."""
        from fastsafe.io import hub
        from fastsafe.safety.defences import apply_posthoc, defences

        chosen = defences()[defence]
        folders = {name: hub.resolve(params[name]) for name in chosen.needs}
        apply_posthoc(chosen, adapter, self.path, out_dir, **{**params, **folders})

    def release(self) -> None:
        """Give the device back; ``load`` takes it again."""
        self._llm = None
        self._loaded = {}

    def use(self, adapters: Mapping[str, Path]) -> None:
        """Have these adapters loaded, and no others."""
        for name in [name for name in self._loaded if self._loaded[name] != adapters.get(name)]:
            self._llm.unload_adapter(name)
            del self._loaded[name]
        for name, path in adapters.items():
            if name not in self._loaded:
                self._llm.load_adapter(path, name)
                self._loaded[name] = path


def _text_sha256(folder: Path) -> str:
    """Hash the names and contents of the files that decode and end answers."""
    total = hashlib.sha256()
    for name in TEXT_FILES:
        if (folder / name).is_file():
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()
