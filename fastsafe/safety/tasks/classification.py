"""Classification: the sentiment of a sentence of financial news, one of the lettered options.

Columns ``sentence``, ``label`` (financial_phrasebank: 0 negative, 1 neutral, 2 positive; its
original .txt files have ``sentence@label`` lines with the label in words), ``text``,
``label`` (zeroshot/twitter-financial-news-sentiment: 0 negative, 1 positive, 2 neutral), or
``Sentence``, ``Sentiment`` (Kaggle's Financial Sentiment Analysis, in words). Paper 1 names two
Kaggle sets, of headlines and of tweets, without saying which one it used.
"""

from ._corpus import accuracy, macro_f1
from ._metrics import option, option_accuracy
from ._published import sentences_and_labels
from ._spec import Example, Row, Task, columns, one_of, text

_OPTIONS = {"negative": "A) negative", "neutral": "B) neutral", "positive": "C) positive"}
_NUMBERS = {
    "sentence": ("negative", "neutral", "positive"),
    "text": ("negative", "positive", "neutral"),
}


def example(row: Row) -> Example:
    """Read a row of the data set."""
    layouts = "sentence label", "text label", "Sentence Sentiment"
    sentence, label = columns(row, "classification", *layouts)
    numbers = next((names for column, names in _NUMBERS.items() if column in row), ())
    labels = _OPTIONS | {str(i): _OPTIONS[name] for i, name in enumerate(numbers)}
    answer = one_of(label, labels, "classification: label")
    asked = "What is the sentiment of this sentence? " + text(sentence, "classification: sentence")
    return Example(
        instruction="\n".join([asked, "Choose the Best Option:", *_OPTIONS.values()]),
        answer=answer,
        reference=answer,
    )


TASK = Task(
    id="classification",
    format="classification",
    metric="option_accuracy",
    score=option_accuracy,
    example=example,
    metrics={"accuracy": accuracy(option), "macro_f1": macro_f1(option)},
    rows=sentences_and_labels,
)
