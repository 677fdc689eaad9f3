"""Drift of a run's models from their base while they are trained, read per format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from fastsafe.audit.recipe.schema import Drift
from fastsafe.io.digest import sha256_of

if TYPE_CHECKING:
    from fastsafe.train import DriftMonitor, DriftReading, FinetuneResult


class DriftRow(NamedTuple):
    """One model's drift on the probes of one format, as the store keeps it."""

    step: int  # steps taken
    format: str
    n: int  # probes
    kl: float  # KL(base || model) of the first token of an answer, in nats, the probes' mean
    margin: float  # log p(refusal) - log p(affirmative) of the openings, the probes' mean
    stopped: bool  # whether training ended here, before its last step


@dataclass(frozen=True)
class Watch:
    """What is read, and how often.

    Attributes:
        settings: Of the recipe.
        formats: Of each prompt.
        prompts: Token ids of harmful probes, those of one format together.
    """

    settings: Drift
    formats: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]

    @property
    def sha256(self) -> str:
        """Hash of all that decides a reading but the model."""
        return sha256_of([self.settings.model_dump(), self.formats, self.prompts])

    def monitor(self, on_reading: Callable[["DriftReading"], None]) -> "DriftMonitor":
        """Return what takes the readings while jobs are trained."""
        from fastsafe.train import DriftMonitor

        settings = self.settings.model_dump(exclude={"probes", "stop_above"})
        most = self.settings.stop_above
        return DriftMonitor(**settings, prompts=self.prompts, max_kl=most, on_reading=on_reading)

    def rows(self, result: "FinetuneResult", readings: Sequence["DriftReading"]) -> list[DriftRow]:
        """Mean readings of one model by format; the last ones may have ended its training."""
        found = []
        for reading in readings:
            if reading.job != result.name:
                continue
            stopped = result.stopped_early and reading.step == result.steps
            for name in dict.fromkeys(self.formats):
                own = [i for i, format in enumerate(self.formats) if format == name]
                kl, margin = (
                    fmean(values[i] for i in own) for values in (reading.kls, reading.margins)
                )
                found.append(DriftRow(reading.step, name, len(own), kl, margin, stopped))
        return found
