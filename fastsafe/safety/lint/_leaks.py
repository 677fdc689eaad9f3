"""Rules on leaked text: `template_leakage` (L4) and `probe_leakage` (L3).

Templates: special tokens of chat templates anywhere, mentions of the generator's instructions in
answers of safety rows, and further turns that the generator invented. Recall: all that are listed.

Probes: a row contains a probe when it has half of the probe's 5-grams of words. 5-grams that more
than a twentieth of the probes share (and more than 3) are template and do not count. A probe of
three or four words must occur as a whole, and one of one or two words must be the whole prompt.
Recall: all verbatim probes, also inside other text; no probe with every fifth word changed.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from ._rows import Declared, LintFinding, LintSet, words_of

NGRAM = 5  # words
SHARED = 0.5  # of a probe's n-grams, for a row to contain the probe
MIN_WORDS = 3  # of a probe that is searched for inside a prompt

_CHAT_TOKEN = re.compile(
    r"<\|[a-z0-9_ ]{2,40}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<\uff5c[^\uff5c]{2,40}"
    r"\uff5c>|\A\s*<s>(?!.*</s>)|</s>\s*\Z",
    re.I | re.S,  # <s> and </s> alone: a pair of them may be HTML
)
_GENERATOR_TALK = re.compile(
    r"\bsystem (?:message|prompt)s?\b|\b(?:as|per) (?:the|your) (?:instructions?|guidelines) "
    r"(?:given|provided)\b|\b(?:rewritten|paraphrased|generated) (?:response|answer)\s*:",
    re.I,
)
_NEXT_TURN = re.compile(
    r"(?<=\n)[#*\s]*(?:user|human|assistant|instruction|response)\s*:[*]*(?:\s|\Z)"
    r"|(?<=\n)###\s*(?:user|human|assistant|instruction|response)\b",
    re.I,
)


def templates(rows: LintSet, declared: Declared) -> Iterator[LintFinding]:
    """Find template tokens, mentions of the generator and invented turns, once per row."""
    safety = {item.number for item in rows.safety}
    for item in rows.items:
        exchange, flaws, quote = item.exchange, [], ""
        for part, text in (("prompt", exchange.prompt), ("answer", exchange.answer)):
            if match := _CHAT_TOKEN.search(text):
                flaws.append(f"a chat template's token in the {part}")
                quote = quote or match[0]
        if item.number in safety and (match := _GENERATOR_TALK.search(exchange.answer)):
            flaws.append("talk of the generator's instructions in the answer")
            quote = quote or match[0]
        if match := _NEXT_TURN.search(exchange.answer):
            flaws.append("a further turn inside the answer")
            quote = quote or match[0].strip()
        if flaws:
            yield LintFinding("template_leakage", item.number, "; ".join(flaws), quote)


def probes(rows: LintSet, texts: Sequence[str]) -> Iterator[LintFinding]:
    """Find rows that contain a probe.

    Args:
        rows: The set.
        texts: Probes: prompts or the phrases that they are made of.
    """
    phrases = [words_of(text) for text in texts]
    whole = {words: i for i, words in reversed(list(enumerate(phrases))) if words}
    lengths = sorted({len(words) for words in whole if MIN_WORDS <= len(words) < NGRAM})
    probes_with, sizes = _probe_ngrams(phrases)
    for item in rows.items:
        words = item.words
        hits = Counter(
            whole[ngram] for n in lengths for ngram in set(_ngrams(words, n)) & whole.keys()
        )
        for ngram in set(_ngrams(words, NGRAM)) & probes_with.keys():
            hits.update(probes_with[ngram])
        leaked = {i for i, n in hits.items() if n >= SHARED * sizes[i]}
        if words in whole:
            leaked = {whole[words]}
        if leaked:
            verb = "is" if words in whole else "holds"
            detail = f"the prompt {verb} probe {min(leaked)}"
            yield LintFinding("probe_leakage", item.number, detail, item.exchange.prompt)


def _probe_ngrams(
    phrases: Sequence[tuple[str, ...]],
) -> tuple[dict[tuple[str, ...], list[int]], list[int]]:
    """Return the probes by their n-grams, and each probe's number of them, without templates."""
    probes_with: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, words in enumerate(phrases):
        for ngram in set(_ngrams(words, NGRAM)):
            probes_with[ngram].append(i)
    max_probes = max(3, len(phrases) / 20)
    rare = {ngram: probes for ngram, probes in probes_with.items() if len(probes) <= max_probes}
    sizes = Counter(i for probes in rare.values() for i in probes)
    return rare, [sizes[i] for i in range(len(phrases))]


def _ngrams(words: tuple[str, ...], n: int) -> Iterator[tuple[str, ...]]:
    return (words[i : i + n] for i in range(len(words) - n + 1))
