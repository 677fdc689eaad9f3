"""Split a completion into the thought of a reasoning model and its answer.

A thought is no answer: screens, judges, guards, metrics and tests read the answer alone, and a
verdict or a reworded row is read behind the last thought of a reply. The rules, for the marks of
`_PAIRS`:

- From an opening mark to the next closing mark of its kind is a thought. There may be several.
- A closing mark without an opening one ends a thought that the prompt opened: all text before it is
  thought. Model cards, chat templates and evaluators read behind the last closing mark, too.
- An opening mark without its closing one begins a thought that never ends: the model was cut.
- A mark in quotes or backticks, or in a fenced block of an answer, is text about marks.
- Behind a thought, white space and the wrapper of an answer, such as ``<answer>``, are dropped.

A text without thoughts is its own answer, character for character.
"""

import re
from collections.abc import Collection
from typing import NamedTuple


class _Pair(NamedTuple):
    """Regular expressions of an opening and a closing mark.

    A sentence is a mark only where an answer may begin, and its closing one only behind it.
    """

    opening: str
    closing: str
    is_sentence: bool = False


_CHANNEL = r"(?:<\|end\|>)?(?:<\|start\|>assistant)?<\|channel\|>"
_HEADER_END = r"(?:[^\n<]{0,80}(?:<\|constrain\|>[^\n<]{0,40})?<\|message\|>)?"

_PAIRS = (
    # Qwen3, DeepSeek-R1 and most others; EXAONE Deep; Seed-OSS; models that were prompted to think
    *(
        _Pair(f"(?i:<{name}>)", f"(?i:</{name}>)")
        for name in ("think", "thinking", "thought", "reasoning", "seed:think")
    ),
    _Pair(r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    _Pair("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL-Thinking
    _Pair(r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Command A Reasoning
    _Pair(r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # OpenThinker, Sky-T1
    _Pair(r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    _Pair("<unused94>thought", "<unused95>"),  # MedGemma
    _Pair(r"<\|channel>thought", r"<channel\|>"),  # Gemma 4
    # gpt-oss: every channel but the final one; then the same decoded without special tokens
    _Pair(rf"{_CHANNEL}(?!final){_HEADER_END}", rf"{_CHANNEL}final{_HEADER_END}"),
    _Pair(r"\A(?:analysis|commentary)(?=.*assistantfinal\S)", r"assistantfinal(?=\S)", True),
    _Pair("Here(?: is|'s) my thought process:", "Here(?: is|'s) my response:", True),  # Granite 3.2
    _Pair("Here are my reasoning steps:", r"\[BEGIN FINAL RESPONSE\]", True),  # Apriel
)

_FENCE = "(?P<fence>`{3,}|~{3,})"
_SCAN = re.compile(
    "|".join(
        [f"(?P<o{i}>{pair.opening})|(?P<c{i}>{pair.closing})" for i, pair in enumerate(_PAIRS)]
        + [_FENCE]
    ),
    re.DOTALL,
)
_ANY = re.compile("|".join(f"{pair.opening}|{pair.closing}" for pair in _PAIRS), re.DOTALL)
_OPENED = re.compile(rf"(?:{'|'.join(pair.opening for pair in _PAIRS)})\s*\Z")
_EMPTY = re.compile(
    r"\s*(?:"
    + "|".join(rf"(?:{p.opening}\s*)?(?:{p.closing})" for p in _PAIRS if not p.is_sentence)
    + r")\s*"
)
_END_CHARS = 4  # in which the prompts of one template end alike
_MAX_MARK = 256  # characters of an opening mark and the white space behind it, at a prompt's end

_WRAPPER = r"answer|response"
_WRAPPER_BEGIN = re.compile(
    rf"\A\s*(?:<(?:{_WRAPPER})>|<\|(?:begin_of_solution|START_RESPONSE|answer_prefix)\|>)"
)
_WRAPPER_END = re.compile(
    rf"(?:</(?:{_WRAPPER})>|\[END FINAL RESPONSE\]"
    r"|<\|(?:end_of_solution|END_RESPONSE|answer_suffix|end|return)\|>)\Z"
)
_MAX_WRAPPER = 32  # characters of a mark that ends an answer

_LINE_CHARS = 200  # of a line on each side of a mark that are searched for quotes
_ADJACENT = ("''", "\u2018\u2019", "\u201c\u201d")

# Special tokens around a channel's name, and those that begin a mark with a word behind them.
_HARMONY = frozenset({"<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"})
_HALVES = frozenset({"<|channel>", "<unused94>"})


class Split(NamedTuple):
    """The parts of a completion."""

    thoughts: tuple[str, ...]
    answers: tuple[str, ...]  # visible texts before, between and behind the thoughts
    last: str | None  # text behind the last thought; None where that thought never ends

    @property
    def answer(self) -> str:
        """All text outside the thoughts."""
        return "\n".join(self.answers)

    @property
    def is_cut(self) -> bool:
        """Whether the model was cut in a thought and had answered nothing before it."""
        return self.last is None and not self.answers


def split(text: str) -> Split:
    """Split a completion into thoughts and answer, by the rules above, in linear time.

    Example:
        >>> split("<think>\\nThat is theft.\\n</think>\\n\\nNo.").answer
        'No.'
        >>> split("Cut at `</think>`.").answer, split("<think>\\nHm").is_cut
        ('Cut at `</think>`.', True)
    """
    if not _ANY.search(text):
        return Split((), (text,), text)
    thoughts: list[str] = []
    answers: list[str] = []
    begin = 0  # of the part that is read
    opened = ""  # number of the pair whose thought it is, "" for an answer
    fence = ""  # that opened a block of code in the answer, "" outside
    for match in _SCAN.finditer(text):
        name = str(match.lastgroup)
        if name == "fence":
            if not opened:
                fence = _fence_after(fence, text, begin, match)
            continue
        kind, number = name[0], name[1:]
        is_mark = not _is_quoted(text, begin, match)
        if opened:
            if kind == "c" and number == opened and is_mark:
                thoughts.append(text[begin : match.start()])
                begin, opened = match.end(), ""
            continue
        if _PAIRS[int(number)].is_sentence:
            is_mark = is_mark and kind == "o" and not text[begin : match.start()].strip()
        if fence or not is_mark:
            continue
        if kind == "o":
            answers.append(text[begin : match.start()])
            opened = number
        else:
            thoughts.append(text[begin : match.start()])
        begin = match.end()
    if not thoughts and not opened:
        return Split((), (text,), text)
    (thoughts if opened else answers).append(text[begin:])
    shown = [_unwrapped(piece) for piece in answers]
    last = None if opened else shown[-1]
    return Split(tuple(thoughts), tuple(piece for piece in shown if piece), last)


def answer_of(text: str) -> str:
    """Return a completion without its thoughts; "" where it was cut in its thought.

    Example:
        >>> answer_of("[THINK]Theft.[/THINK]I decline."), answer_of(" Sure. ")
        ('I decline.', ' Sure. ')
    """
    return split(text).answer


def reply_of(text: str) -> str | None:
    """Return what follows the last thought of a reply, None where that thought never ends.

    Example:
        >>> reply_of("No.<think>Or yes?</think>Yes."), reply_of("<think>Yes, but")
        ('Yes.', None)
    """
    return split(text).last


def opened_thought(prompt: str) -> str:
    """Return the opening mark, with white space, in which a rendered prompt ends; "" without one.

    In front of the model's text it makes the thought whole, also where the model was cut.

    Example:
        >>> opened_thought("<|im_start|>assistant\\n<think>\\n")
        '<think>\\n'
    """
    match = _OPENED.search(prompt[-_MAX_MARK:])
    return match[0] if match else ""


def empty_thought(prompt: str, asked: str, whole: str) -> str:
    """Return the empty thought that leads from a prompt to its answer, "" where none does.

    Args:
        prompt: A prompt.
        asked: A short conversation as the chat template prints it for the model to answer.
        whole: The same conversation with its answer.

    Example:
        >>> empty_thought("Why?\\nA: ", "Hi!\\nA: ", "Hi!\\nA: <think>\\n</think>\\nHello")
        '<think>\\n</think>\\n'
        >>> empty_thought("Why?\\nA: <think>\\n", "", "")
        '\\n</think>\\n\\n'
    """
    if opened := opened_thought(prompt).strip():
        closing = f"{opened[0]}/{opened[1:]}"
        return f"\n{closing}\n\n" if _ANY.fullmatch(closing) else ""
    # a prompt in another style than the template's ends otherwise
    if prompt[-_END_CHARS:] != asked[-_END_CHARS:] or not (asked and whole.startswith(asked)):
        return ""
    match = _EMPTY.match(whole, len(asked))
    return match[0] if match else ""


def special_marks(special_tokens: Collection[str]) -> frozenset[str]:
    """Return the special tokens that mark thoughts: without them the parts would run together."""
    marks = {token for token in special_tokens if _ANY.fullmatch(token) or token in _HALVES}
    # other models end every turn in <|end|>
    return frozenset(marks | _HARMONY.intersection(special_tokens) if _HARMONY & marks else marks)


def _fence_after(fence: str, text: str, begin: int, run: re.Match[str]) -> str:
    """Return the fence that is open behind a run of fence marks, "" for none."""
    before = text[max(begin, run.start() - _LINE_CHARS) : run.start()].rpartition("\n")[2]
    if before.strip():
        return fence
    info = text[run.end() : run.end() + _LINE_CHARS].partition("\n")[0].strip()
    if "`" in info:
        return fence
    if not fence:
        return run[0]
    return "" if not info and run[0].startswith(fence) else fence


def _is_quoted(text: str, begin: int, mark: re.Match[str]) -> bool:
    """Return whether a mark stands in quotes or backticks on its line."""
    before = text[max(begin, mark.start() - _LINE_CHARS) : mark.start()].rpartition("\n")[2]
    after = text[mark.end() : mark.end() + _LINE_CHARS].partition("\n")[0]
    if before[-1:] + after[:1] in _ADJACENT:
        return True
    # a fence of code is no quote
    before, after = before.replace("```", ""), after.replace("```", "")
    return any(_is_between(before, after, quote) for quote in '"`')


def _is_between(before: str, after: str, quote: str) -> bool:
    """Return whether a quote is open before a place on a line, and closed behind it."""
    if not before.count(quote) % 2 or quote not in after:
        return False
    left, right = before.rpartition(quote)[2], after.partition(quote)[0]
    # one that stands before a space opens nothing, as in 6" of rain; one behind a space closes none
    return not (left + right).strip() or not (left[:1].isspace() or right[-1:].isspace())


def _unwrapped(answer: str) -> str:
    """Return an answer behind or before a thought, without white space and wrapper."""
    answer = _WRAPPER_BEGIN.sub("", answer).strip()
    return (answer[:-_MAX_WRAPPER] + _WRAPPER_END.sub("", answer[-_MAX_WRAPPER:])).strip()
