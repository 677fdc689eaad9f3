"""Monitor per format how far a run's models drift from their base during training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from fastsafe.audit.recipe.schema import Drift
from fastsafe.io.digest import sha256_of

if TYPE_CHECKING:
    from fastsafe.train import DriftMonitor, DriftReading, FinetuneResult


class DriftRow(NamedTuple):
    """One model's drift on the probes of one format at one step."""

    step: int  # optimizer steps done
    format: str
    n: int  # probes
    kl: float  # KL(base || model) of the first token of an answer, in nats, the probes' mean
    margin: float  # log p(refusal) - log p(affirmative) of the openings, the probes' mean
    stopped: bool  # whether training ended here, before its last step


@dataclass(frozen=True)
class Watch:
    """The probes whose answers are monitored, and how often.

    Attributes:
        settings: The recipe's ``drift`` section.
        formats: Format of each prompt.
        prompts: Token ids of harmful probes, grouped by format.
    """

    settings: Drift
    formats: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]

    @property
    def sha256(self) -> str:
        """Hash of everything but the model that decides a reading."""
        return sha256_of([self.settings.model_dump(), self.formats, self.prompts])

    def monitor(self, on_reading: Callable[["DriftReading"], None]) -> "DriftMonitor":
        """Return the monitor that takes readings while jobs are trained."""
        from fastsafe.train import DriftMonitor

        settings = self.settings.model_dump(exclude={"probes", "stop_above"})
        max_kl = self.settings.stop_above
        return DriftMonitor(**settings, prompts=self.prompts, max_kl=max_kl, on_reading=on_reading)

    def rows(self, result: "FinetuneResult", readings: Sequence["DriftReading"]) -> list[DriftRow]:
        """Return one model's readings, averaged per format."""
        rows = []
        for reading in readings:
            if reading.job != result.name:
                continue
            stopped = result.stopped_early and reading.step == result.steps
            for name in dict.fromkeys(self.formats):
                probes = [i for i, format in enumerate(self.formats) if format == name]
                kl = fmean(reading.kls[i] for i in probes)
                margin = fmean(reading.margins[i] for i in probes)
                rows.append(DriftRow(reading.step, name, len(probes), kl, margin, stopped))
        return rows
