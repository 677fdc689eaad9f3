"""Metrics over a test set: equal to the reference libraries, honest about what was not read."""

import sys
from collections.abc import Callable

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from fastsafe.errors import DataError, UsageError
from fastsafe.safety.stats.intervals import wilson
from fastsafe.safety.tasks import Measured, tasks
from fastsafe.safety.tasks._corpus import accuracy, bleu, chrf, macro_f1, resampled, rouge
from fastsafe.safety.tasks._metrics import final_number, option, yes_or_no
from fastsafe.safety.tasks.code import parse_rate, parses, source_of

PAIRS = [
    ("the red car is old", "the red car is very old"),
    ("a small boat on the river", "a little boat on the wide river"),
    ("nothing alike", "seven green bottles standing on a wall"),
    ("he paints the door of the house", "he paints the door of the house"),
    ("un café près d'ici", "un petit café près d'ici, au coin"),
] * 3


def test_bleu_and_chrf_are_sacrebleus() -> None:
    texts, references = map(list, zip(*PAIRS, strict=True))
    assert bleu(PAIRS).value == pytest.approx(
        sacrebleu.corpus_bleu(texts, [references]).score / 100, rel=1e-12
    )
    assert chrf(PAIRS).value == pytest.approx(
        sacrebleu.corpus_chrf(texts, [references]).score / 100, rel=1e-12
    )


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_mean_of_rouge_score(kind: str) -> None:
    scorer = RougeScorer([kind], use_stemmer=True)
    scores = [scorer.score(b, a)[kind].fmeasure for a, b in PAIRS]
    found = rouge(kind)(PAIRS)
    assert found.value == pytest.approx(sum(scores) / len(scores), rel=1e-12)
    assert found.n == len(PAIRS)


@pytest.mark.parametrize("metric", [bleu, chrf, rouge("rougeL")])
def test_intervals_hold_the_value_and_narrow(
    metric: Callable[[list[tuple[str, str]]], Measured],
) -> None:
    few, many = metric(PAIRS), metric(PAIRS * 8)
    assert few == metric(PAIRS), "the same answers always give the same interval"
    for found in (few, many):
        assert found.value is not None
        assert 0 <= found.ci_low < found.value < found.ci_high <= 1
    assert many.ci_high - many.ci_low < 0.6 * (few.ci_high - few.ci_low)


def test_an_interval_covers_as_often_as_it_says() -> None:
    """A percentile bootstrap of 60 rows covers some 94 %; below 87 of 100 has odds of 1 to 200."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(100):
        stats = np.stack([rng.beta(2, 3, 60), np.ones(60)], axis=1)
        found = resampled(stats, lambda sums: float(sums[0] / sums[1]))
        hits += found.ci_low <= 0.4 <= found.ci_high
    assert hits >= 87


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("abcx"), st.sampled_from("abc")), min_size=1))
def test_macro_f1_is_the_mean_of_f1_by_class(letters: list[tuple[str, str]]) -> None:
    pairs = [(f"{a})" if a != "x" else "unreadable", f"{b})") for a, b in letters]
    classes = {b for _, b in letters}
    scores = []
    for name in classes:
        tp = sum(a == b == name for a, b in letters)
        scores.append(2 * tp / sum((a == name) + (b == name) for a, b in letters))
    found = macro_f1(option)(pairs)
    assert found.value == pytest.approx(sum(scores) / len(scores))
    assert found.unparsed == sum(a == "x" for a, _ in letters)


def test_unread_answers_are_counted_and_never_right() -> None:
    pairs = [("A.", "A."), ("b", "A."), ("I think it is a boat", "A."), ("", "B.")]
    found = accuracy(option)(pairs)
    assert found == Measured(0.25, *wilson(1, 4), 4, unparsed=2)


def test_a_reference_without_an_answer_is_an_error() -> None:
    with pytest.raises(DataError, match="reference is 'boat', expected one that option reads"):
        accuracy(option)([("A.", "boat")])


@pytest.mark.parametrize("id", tasks())
def test_nothing_measured_is_no_number(id: str) -> None:
    for metric in tasks()[id].metrics.values():
        assert metric([]) == Measured(None, 0.0, 1.0, 0)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("6 * 7 = 42\n#### 42", "42"),
        ("#### $1,234.50\nQuestion: and then?\n#### 7", "1234.5"),
        ("####-3", "-3"),
        ("#### 10.0", "10"),
        ("#### 100", "100"),
        ("42", "42"),
        (" 42. \n", "42"),
        ("The answer is 42", None),
        ("42 apples", None),
        ("6*7", None),
        ("#### 6*7 = 42", "6"),
        ("#### **42**", "42"),
        ("####", None),
        ("\u0664\u0662", None),
        ("", None),
    ],
)
def test_final_number(text: str, wanted: str | None) -> None:
    assert final_number(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Yes", "yes"),
        ("no, it is not", "no"),
        ("**True**", "yes"),
        ("False.", "no"),
        ("Not at all", None),
        ("yesterday", None),
        ("It is: yes", None),
        ("", None),
    ],
)
def test_yes_or_no(text: str, wanted: str | None) -> None:
    assert yes_or_no(text) == wanted


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("Sure:\n```python\nx = 1\n\ny = 2\n```\nDone.\n```\nz\n```", "x = 1\n\ny = 2"),
        ("```python\nx = 1", "x = 1"),
        ("a ``` b", "a ``` b"),
    ],
)
def test_source_of(text: str, code: str) -> None:
    assert source_of(text) == code


def test_parse_rate_is_over_rows_whose_reference_is_python() -> None:
    pairs = [
        ("```python\nx = '\\d'\n```", "y = 1"),
        ("x = = 1", "y = 1"),
        ("I cannot help with that.", "y = 1"),
        ("SELECT 1 FROM t", "SELECT 2 FROM t"),
    ]
    assert parse_rate(pairs) == Measured(1 / 3, *wilson(1, 3), 3)


@pytest.mark.parametrize("text", ["", "# a comment alone", "x\0", "(" * 10_000])
def test_what_does_not_parse(text: str) -> None:
    assert not parses(text)


@pytest.mark.parametrize(
    ("module", "metric", "package"),
    [
        ("sacrebleu.metrics", bleu, "sacrebleu"),
        ("rouge_score.rouge_scorer", rouge("rougeL"), "rouge-score"),
    ],
)
def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, metric: Callable[..., Measured], package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UsageError, match=rf"{package} is not installed; run `pip install '\.\[metrics\]'"
    ):
        metric(PAIRS)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The answer is B, since it floats", "b"),
        ("The answer is B, a boat", "b"),
        ("The answer is A, B", None),
        ("The answer is A, B and C", None),
        ("Options: none", None),
        ("Option A, C or D", None),
    ],
)
def test_a_list_of_options_is_no_answer(text: str, wanted: str | None) -> None:
    assert option(text) == wanted
