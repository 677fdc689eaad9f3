"""Audit one tuned model against its base: no training, no run directory.

Both answer the probes of a recipe, and its first judge reads the answers. Prompts, sampling and
judging are those of ``fastsafe audit``, so that the rates are comparable.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fastsafe.audit.backend.completer import CheckpointCompleter
from fastsafe.audit.backend.on_engine import EngineBackend
from fastsafe.audit.backend.protocol import Answer, Request
from fastsafe.audit.plan.checks import check_recipe
from fastsafe.audit.plan.conditions import BASE
from fastsafe.audit.plan.make_plan import make_plan
from fastsafe.audit.plan.panel import make_panel
from fastsafe.audit.recipe.load import load
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.audit.sources.registry import source_of
from fastsafe.safety.judges import Item, judge_all
from fastsafe.safety.stats.rates import answered, paired_change, rate, refused
from fastsafe.safety.verdict import Verdict

# (kind, format, system prompt) -> behaviour -> verdict
Verdicts = dict[tuple[str, str, str], dict[str, Verdict]]

# No training rows, mitigations or utility rows are needed here.
_PROBES_ONLY = ("utility_rows=0", "mitigations=[none]", "training.rows=1")
_RATES = (("harmful", "answer_rate", answered), ("benign", "over_refusal_rate", refused))


class SpotCheck:
    """The probes of a recipe and the base's verdicts on them, which are computed once."""

    def __init__(
        self,
        base: str,
        recipe: str | Path | Recipe = "organism",
        *,
        limit: int | None = 20,
        device: str = "cpu",
    ) -> None:
        """Render the probes; the base is loaded at the first check.

        Args:
            base: Checkpoint folder, hub id, or the name of a source that has a checkpoint.
            recipe: Recipe whose formats, behaviours, system prompts, sampling and judge are used.
            limit: Maximum number of behaviours per format.
            device: Device that generates; the base takes memory there beside a model in training.

        Raises:
            FastsafeError: The recipe or the base is not valid.
        """
        probes = load(recipe, overrides=_PROBES_ONLY, changes={"model": base})
        self._recipe = probes.limited(limit)
        variants = check_recipe(self._recipe)
        self._device = device
        self._base = self._backend(base)
        source = source_of(self._recipe, partial(CheckpointCompleter, device=device))
        panel = make_panel(self._recipe, variants, device=device)
        self._plan = make_plan(
            self._recipe, variants, source, self._base.tokenizer, self._base.engine, panel
        )
        self._rows = [row for row in self._plan.rows if row.condition == BASE]
        self._verdicts_of_base: Verdicts | None = None

    @property
    def base(self) -> Path:
        """Folder of the base."""
        return self._base.path

    def adapter(self, path: str | Path) -> list[dict[str, Any]]:
        """Return the rates of the base with a PEFT adapter, one row per format and kind of probe.

        Returns:
            Rows of ``format``, ``system_prompt``, ``measure`` ("answer_rate" on harmful probes,
            "over_refusal_rate" on their benign twins), the fields of ``safety.metrics.Rate``,
            ``base_rate``, and the paired ``delta`` with its interval; a rate is None where nothing
            could be judged.

        Raises:
            AdapterError: The adapter is malformed or does not fit the base.
        """
        return self._compare(self._ask(self._base, {"tuned": Path(path)}))

    def model(self, path: str | Path) -> list[dict[str, Any]]:
        """Return the rates of a whole tuned checkpoint, as ``adapter`` does.

        Raises:
            CheckpointError: The checkpoint is malformed.
        """
        return self._compare(self._ask(self._backend(str(path)), {}))

    def _backend(self, model: str) -> EngineBackend:
        recipe = self._recipe
        return EngineBackend(
            model,
            device=self._device,
            dtype=recipe.dtype,
            quantize=recipe.quantize,
            chat_template_kwargs=recipe.chat_template_kwargs,
        )

    def _ask(self, backend: EngineBackend, adapters: Mapping[str, Path]) -> Verdicts:
        name = next(iter(adapters), None)
        prompts = [self._plan.prompts[row.prompt] for row in self._rows]
        requests = [
            Request(name, prompt.token_ids, row.seed, row.max_tokens)
            for row, prompt in zip(self._rows, prompts, strict=True)
        ]
        answers: dict[int, Answer] = {}
        backend.generate(requests, adapters, self._recipe.sampling, answers.__setitem__)
        items = [
            Item(
                key=str(i),
                prompt=prompt.text,
                completion=answers[i].text,
                harmful=row.kind == "harmful",
                format=row.part,
            )
            for i, (row, prompt) in enumerate(zip(self._rows, prompts, strict=True))
        ]
        judgements = judge_all(next(iter(self._plan.panel.judges.values())), items)
        verdicts: Verdicts = {}
        for i, row in enumerate(self._rows):
            is_error = answers[i].finish_reason == "error"  # the model gave no finite logits
            verdict = Verdict.NOT_JUDGED if is_error else judgements[i].verdict
            cell = verdicts.setdefault((row.kind, row.part, row.system_prompt), {})
            cell[row.item] = verdict
        return verdicts

    def _compare(self, tuned: Verdicts) -> list[dict[str, Any]]:
        if self._verdicts_of_base is None:
            self._verdicts_of_base = self._ask(self._base, {})
        rows = []
        for kind, measure, has in _RATES:
            for cell, after in tuned.items():
                if cell[0] != kind:
                    continue
                before = self._verdicts_of_base[cell]
                change = asdict(paired_change(before, after, has))
                deltas = {
                    name.replace("ci", "delta_ci"): change[name] if change["n_pairs"] else None
                    for name in ("delta", "ci_low", "ci_high")
                }
                where = {"format": cell[1], "system_prompt": cell[2], "measure": measure}
                base = {"base_rate": rate(before.values(), has).rate}
                rows.append(where | asdict(rate(after.values(), has)) | base | deltas)
        return rows
