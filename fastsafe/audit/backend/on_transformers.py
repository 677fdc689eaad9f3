"""Train and generate for a run on transformers and PEFT, for models the engine does not know."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsafe.audit.backend.on_engine import EngineBackend
from fastsafe.audit.backend.protocol import ChatTokenizer
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.errors import RecipeError

if TYPE_CHECKING:
    from fastsafe.train import FinetuneResult


class TransformersBackend(EngineBackend):
    """transformers and PEFT over one checkpoint: one job after another, no drift monitor."""

    name = "transformers"

    def _linear_modules(self) -> list[str]:
        from fastsafe.transformers_backend.loading import linear_modules

        return linear_modules(self.path)

    def _load_tokenizer(self) -> ChatTokenizer:
        from fastsafe.transformers_backend.loading import load_tokenizer

        return load_tokenizer(self.path).with_variables(self._variables)

    @property
    def context(self) -> int | None:
        """Maximum number of tokens of a row, None where there is no limit; call ``load`` first."""
        return self.llm.max_positions  # type: ignore[no-any-return]

    def check_training(self, recipe: Recipe, objectives: Sequence[str | Mapping[str, Any]]) -> None:
        """Check a recipe's training settings; the drift monitor and method full are rejected.

        Raises:
            RecipeError: As for `EngineBackend.check_training`, or one of these two is set.
        """
        if recipe.drift or recipe.training.method == "full":
            raise RecipeError(
                f"recipe {recipe.name}: has {'drift' if recipe.drift else 'method full'}, which "
                f"backend {self.name!r} lacks; use backend fastsafe"
            )
        super().check_training(recipe, objectives)

    def _open(self, path: Path) -> Any:
        from fastsafe.transformers_backend import TransformersLLM

        return TransformersLLM(
            path,
            device=self._device,
            dtype=self._dtype,
            batch_size=self._batch_size,
            chat_template_kwargs=self._variables,
        )

    @property
    def _finetune(self) -> "Callable[..., Sequence[FinetuneResult]]":
        from fastsafe.transformers_backend import finetune

        return finetune
