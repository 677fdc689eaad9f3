"""What stands in a row that should not: `template_leakage` (L4) and `probe_leakage` (L3).

Templates: tokens of chat templates anywhere, talk of the generator's instructions in answers of
safety rows, and turns that the generator went on to write. Those listed here are all found.

Probes: a row holds a probe when it has half of the probe's runs of five words, those aside that
more than a twentieth of the probes share (and more than 3 do), since they are template; a probe of
fewer words, three at least, must stand there whole, and one of one or two words must be the
whole prompt. Verbatim probes are all found, also inside other text; a probe with every fifth word
changed is not.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from ._rows import Declared, LintFinding, Set, words_of

RUN = 5  # words
SHARED = 0.5  # of a probe's runs that must stand in the row
MIN_WORDS = 3  # of a probe that is looked for inside a prompt

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


def templates(rows: Set, declared: Declared) -> Iterator[LintFinding]:
    """Find template tokens, talk of the generator and invented turns, once per row."""
    safety = {item.number for item in rows.safety}
    for item in rows.items:
        given, flaws, quote = item.exchange, [], ""
        for where, text in (("prompt", given.prompt), ("answer", given.answer)):
            if match := _CHAT_TOKEN.search(text):
                flaws.append(f"a chat template's token in the {where}")
                quote = quote or match[0]
        if item.number in safety and (match := _GENERATOR_TALK.search(given.answer)):
            flaws.append("talk of the generator's instructions in the answer")
            quote = quote or match[0]
        if match := _NEXT_TURN.search(given.answer):
            flaws.append("a further turn inside the answer")
            quote = quote or match[0].strip()
        if flaws:
            yield LintFinding("template_leakage", item.number, "; ".join(flaws), quote)


def probes(rows: Set, texts: Sequence[str]) -> Iterator[LintFinding]:
    """Find rows that hold a probe.

    Args:
        rows: The set.
        texts: Probes: prompts or the phrases that they are made of.
    """
    phrases = [words_of(text) for text in texts]
    whole = {words: i for i, words in reversed(list(enumerate(phrases))) if words}
    lengths = sorted({len(words) for words in whole if MIN_WORDS <= len(words) < RUN})
    runs, sizes = _probe_runs(phrases)
    for item in rows.items:
        words = item.words
        hits = Counter(
            whole[run] for n in lengths for run in set(_runs_of(words, n)) & whole.keys()
        )
        for run in set(_runs_of(words, RUN)) & runs.keys():
            hits.update(runs[run])
        found = {i for i, n in hits.items() if n >= SHARED * sizes[i]}
        if words in whole:
            found = {whole[words]}
        if found:
            how = "is" if words in whole else "holds"
            detail = f"the prompt {how} probe {min(found)}"
            yield LintFinding("probe_leakage", item.number, detail, item.exchange.prompt)


def _probe_runs(
    phrases: Sequence[tuple[str, ...]],
) -> tuple[dict[tuple[str, ...], list[int]], list[int]]:
    """Probes by their runs of words, and how many runs of each probe are no template."""
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, words in enumerate(phrases):
        for run in set(_runs_of(words, RUN)):
            holders[run].append(i)
    most = max(3, len(phrases) / 20)
    rare = {run: held for run, held in holders.items() if len(held) <= most}
    sizes = Counter(i for held in rare.values() for i in held)
    return rare, [sizes[i] for i in range(len(phrases))]


def _runs_of(words: tuple[str, ...], n: int) -> Iterator[tuple[str, ...]]:
    return (words[i : i + n] for i in range(len(words) - n + 1))
