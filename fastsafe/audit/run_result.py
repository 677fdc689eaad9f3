"""The result of an audit, as a script or a notebook takes it."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

from fastsafe.audit.results.schema.run import Results


@dataclass(frozen=True)
class Run:
    """A run directory and its results.

    Attributes:
        path: The run directory.
        results: The content of ``results.json``, schema ``fastsafe.results/1``.
    """

    path: Path
    results: Results

    @property
    def is_covered(self) -> bool:
        """Whether every cell has enough judged answers for the recipe's threshold."""
        run = self.results["run"]
        return bool(run["coverage"] >= run["coverage_threshold"])

    def __repr__(self) -> str:
        run = self.results["run"]
        state = "finished" if run["finished_at"] else "not finished"
        count = len(self.results["conditions"])
        return f"Run({str(self.path)!r}, {count} conditions, {state})"

    def _repr_html_(self) -> str:
        """Return the table as a notebook shows it."""
        return f"<pre>{escape(self.table())}</pre>"

    def table(self, width: int = 120) -> str:
        """Return the terminal table as plain text, at most ``width`` columns wide."""
        from fastsafe.audit.report import table_text

        return table_text(self.results, width)
