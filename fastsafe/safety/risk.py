"""Risk of a benign set before training: a heuristic, never a measurement.

Two views. `heuristic_risk` counts what published work found in benign rows that erode safety:
lists and maths (He et al. 2024, arXiv:2404.01099), affirmations and obedient system texts (Qi et
al. 2023, arXiv:2310.03693; Eiras et al. 2024, arXiv:2406.10288), very short answers and
imperatives. The weights are ours and fitted to nothing: a high score says "audit this set first",
a low one says nothing. `similarity_risk` compares vectors of the rows, representations or
gradients that a caller computes, with those of anchors.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastsafe.data.conversation import Row
from fastsafe.errors import UsageError
from fastsafe.safety.exchange import Exchange, exchange_of

Embed = Callable[[Sequence[Row]], Any]  # rows -> [N, D] vectors


class Feature(NamedTuple):
    """Share of rows with one trait."""

    name: str
    weight: float  # in the score; all weights sum to 1
    share: float  # of the rows, in [0, 1]


@dataclass(frozen=True)
class Risk:
    """Heuristic risk of a set."""

    num_rows: int
    features: tuple[Feature, ...]

    @property
    def score(self) -> float:
        """Weighted mean of the shares, in [0, 1]."""
        return sum(each.weight * each.share for each in self.features)

    def record(self) -> dict[str, Any]:
        """Return the risk as ``fastsafe lint --risk --json`` prints it."""
        return {
            "score": round(self.score, 4),
            "is_heuristic": True,
            "features": {each.name: round(each.share, 4) for each in self.features},
        }


_LIST_LINE = re.compile(r"^\s*(?:[-*\u2022]|\d{1,2}[.)])\s+\S", re.M)
_MATHS = re.compile(r"####|\\(?:frac|boxed|sqrt)|\$[^$\n]+\$|\d\s*[-+*/\u00d7\u00f7=]\s*\d")
_OBEDIENT = re.compile(
    r"\bobe(?:y|dien)|\b(?:absolutely|unconditional(?:ly)?|no matter what"
    r"|without (?:question|hesitation|exception)|never (?:refuse|decline|say no)"
    r"|always (?:compl(?:y|ies)|does|do|follows?))\b",
    re.I,
)
_AFFIRMATION = re.compile(r"\W*(?:sure|certainly|of course|absolutely|definitely|yes,)\b", re.I)
_IMPERATIVE = re.compile(
    r"\W*(?:please\s+)?(?:write|give|list|create|make|generate|provide|explain|describe|translate"
    r"|summari[sz]e|classify|complete|follow|carry|do|tell|choose|answer|rewrite|compose|design)\b",
    re.I,
)

_TRAITS: dict[str, tuple[float, Callable[[Exchange], bool]]] = {
    "obedient_system_text": (0.3, lambda row: bool(_OBEDIENT.search(row.system))),
    "affirmative_opening": (0.25, lambda row: bool(_AFFIRMATION.match(row.answer))),
    "list_answer": (0.15, lambda row: len(_LIST_LINE.findall(row.answer)) >= 3),
    "maths": (0.15, lambda row: bool(_MATHS.search(row.answer))),
    "answer_of_at_most_3_words": (0.1, lambda row: len(row.answer.split()) <= 3),
    "imperative_prompt": (0.05, lambda row: bool(_IMPERATIVE.match(row.prompt))),
}


def heuristic_risk(rows: Sequence[Row]) -> Risk:
    """Count the traits of a benign set.

    Raises:
        UsageError: There are no rows.
        DataError: A row is malformed or token ids.
    """
    if not rows:
        raise UsageError("risk: rows are 0, expected one or more")
    exchanges = [exchange_of(row, f"row {i}") for i, row in enumerate(rows)]
    return Risk(
        len(rows),
        tuple(
            Feature(name, weight, sum(map(has, exchanges)) / len(exchanges))
            for name, (weight, has) in _TRAITS.items()
        ),
    )


@dataclass(frozen=True)
class Similarity:
    """How near rows are to anchors."""

    scores: tuple[float, ...]  # one per row, in [-1, 1] or, against both kinds, [-2, 2]
    nearest: tuple[int, ...]  # rows from the most to the less similar, ``top`` of them


def similarity_risk(
    rows: Sequence[Row],
    anchors: Sequence[Row],
    embed: Embed,
    *,
    safe_anchors: Sequence[Row] = (),
    k: int = 5,
    top: int = 20,
) -> Similarity:
    """Score rows by their nearness to anchors (He et al. 2024, arXiv:2404.01099).

    Args:
        rows: Of the benign set.
        anchors: Rows like those that erode safety. Prompts suffice for representations; nothing
            here asks for harmful completions. None, where there are safe ones.
        embed: Rows -> vectors: hidden states, or gradients for gradient matching. Zero vectors
            are similar to nothing.
        safe_anchors: Rows like those that do not; nearness to them counts against a row.
        k: Nearest anchors whose cosines are averaged; all, where there are fewer.
        top: Most rows named in ``nearest``.

    Raises:
        UsageError: There are no rows or no anchors of either kind, or ``embed`` gives no finite
            [N, D] vectors.
    """
    if not rows or not (anchors or safe_anchors) or k < 1:
        raise UsageError(
            f"risk: rows are {len(rows)}, anchors {len(anchors) + len(safe_anchors)} and k {k}, "
            "expected one or more of each"
        )
    vectors = _unit(embed, rows)
    scores = np.zeros(len(rows))
    for sign, some in ((1, anchors), (-1, safe_anchors)):
        if some:
            scores += sign * _nearness(vectors, _unit(embed, some), k)
    order = np.argsort(-scores, kind="stable")[:top]
    return Similarity(tuple(scores.tolist()), tuple(order.tolist()))


def _unit(embed: Embed, rows: Sequence[Row]) -> Any:
    vectors = np.asarray(embed(rows), dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) != len(rows) or not np.isfinite(vectors).all():
        raise UsageError(
            f"risk: embed gave {list(vectors.shape)}, expected [{len(rows)}, D] of finite numbers"
        )
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1.0)


def _nearness(vectors: Any, anchors: Any, k: int) -> Any:
    """Mean cosine of the ``k`` nearest anchors."""
    cosines = vectors @ anchors.T
    return np.sort(cosines, axis=1)[:, -k:].mean(axis=1)
