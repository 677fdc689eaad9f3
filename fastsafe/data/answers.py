"""Find the answers of a conversation among the tokens that the chat template prints.

An answer begins where the prompt for it ends, and ends with its end-of-turn token, or where the
template goes on to the next turn. The template is a program and may print anything, so every answer
is looked up in the tokens found for it: a row whose answer is not among them is an error.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastsafe.data.encoder import Encoder
from fastsafe.data.turns import name_of
from fastsafe.errors import DataError

Turns = Sequence[Mapping[str, Any]]

# a thought that a prompt opens at its end, or opens and closes
_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>\s*(</\1>\s*)?\Z")
_THOUGHT_BEGIN = re.compile(r"<(?:think|thinking|thought|reasoning)>")
_THOUGHT_END = re.compile(r"</(?:think|thinking|thought|reasoning)>")


def encode_answers(
    messages: Turns,
    answers: Sequence[int],
    tokenizer: Encoder,
    location: str,
    tools: Sequence[Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """Encode a conversation by the chat template, and mark the tokens of its trained answers.

    Each answer is trained from the end of the generation prompt to the end-of-turn token, included.
    If the template prints no such token, the end-of-text token is added after the last turn. If the
    prompt opens a thought that finished turns lack, the last answer is trained behind that prompt,
    with its thought or an empty one.

    Args:
        messages: Turns as `read_turn` returns them.
        answers: Indices of the assistant's turns to train, in order.
        tokenizer: Tokenizer of the base model.
        location: Prefix of errors.
        tools: Functions that the template prints; None for none.

    Returns:
        Token ids, and a mark for each.

    Raises:
        DataError: The template does not print the conversation in a way that tells the tokens of
            every answer.
    """
    if messages[0]["role"] == "assistant":
        raise DataError(
            f"{location}: messages[0] is the assistant's, expected a system or user turn first; "
            "put the question before the answer"
        )
    conversation = _Conversation.render(messages, answers, tokenizer, location, tools)
    ids = list(conversation.ids)
    trained = [False] * len(ids)
    begin = len(ids)
    for turn in answers:
        begin = conversation.begin(turn)
        end = conversation.end(turn, begin)
        conversation.check(turn, begin, end)
        trained[begin:end] = [True] * (end - begin)
    ends = tokenizer.eos_ids
    is_last_trained = bool(answers) and answers[-1] == len(messages) - 1
    if is_last_trained and ends and set(ends).isdisjoint(ids[begin:]):
        return [*ids, ends[0]], [*trained, True]
    return ids, trained


@dataclass(frozen=True)
class _Conversation:
    """A rendered conversation and its tokens, in which answers are located."""

    messages: Turns
    text: str
    ids: Sequence[int]
    prompts: Mapping[int, str]  # of each answer that is trained
    tokenizer: Encoder
    location: str
    tools: Sequence[Any] | None

    @classmethod
    def render(
        cls,
        messages: Turns,
        answers: Sequence[int],
        tokenizer: Encoder,
        location: str,
        tools: Sequence[Any] | None,
    ) -> "_Conversation":
        """Render the conversation; where only its last turn is trained, behind the prompt for it.

        Raises:
            DataError: The template does not print the tools.
        """
        blank = cls(messages, "", (), {}, tokenizer, location, tools)
        text = blank.printed(messages)
        prompts = {turn: blank.printed(messages[:turn], True) for turn in answers}
        missing = [name for name in map(name_of, tools or ()) if name not in text]
        if missing:
            raise DataError(
                f"{location}: the chat template of {tokenizer.name} does not print the tool "
                f"{missing[0]!a:.60}, expected all tools of the row; drop the row or its tools"
            )
        parts = [text]
        if list(answers) == [len(messages) - 1]:
            parts = _split_behind_thought(prompts[answers[0]], text, messages[-1])
        ids = [token for part in parts for token in tokenizer.encode(part, False)]
        return cls(messages, "".join(parts), ids, prompts, tokenizer, location, tools)

    def printed(self, messages: Turns, add_generation_prompt: bool = False) -> str:
        """Return turns as the template prints them."""
        more = {"tools": self.tools} if self.tools else {}
        return self.tokenizer.render_chat(messages, add_generation_prompt, **more)

    def begin(self, turn: int) -> int:
        """Return the index of the first token of an answer, at which row and prompt part."""
        prompt = self.prompts[turn]
        if not self.text.startswith(prompt):
            thinks = _THOUGHT.search(prompt)
            problem = (
                "opens a thought in its prompt that a finished turn lacks"
                if thinks
                else "prints a conversation that does not begin with the prompt"
            )
            raise DataError(
                f"{self.location}: the chat template of {self.tokenizer.name} {problem} for "
                f"messages[{turn}], expected it to; train on rows whose last turn is their only "
                "answer, give other answers weight 0, or use prompt and completion as texts"
            )
        # a token may hold letters of both prompt and answer; it then belongs to the answer
        return self._common(prompt)

    def end(self, turn: int, begin: int) -> int:
        """Return the index after the last token of an answer, usually its end-of-turn token."""
        ends = self.tokenizer.eos_ids
        stops = [i + 1 for i in range(begin, len(self.ids)) if self.ids[i] in ends]
        if turn + 1 == len(self.messages):
            end = len(self.ids)
        else:
            so_far = self.printed(self.messages[: turn + 1])
            if not self.text.startswith(so_far):
                # a template may print earlier answers differently, such as without their
                # reasoning, or end the text after whichever turn is the last
                next_turn = self._next_turn(turn)
                stop = next((stop for stop in stops if stop <= next_turn), None)
                return stop or min(next_turn, self._common(so_far, is_ended=True))
            end = self._common(so_far)
        stops = [stop for stop in stops if stop <= end]
        if not stops:
            return end
        # a template may print more after the turn, even further end tokens; no model generates it
        end = stops.pop()
        while stops and not self.tokenizer.decode(self.ids[stops[-1] : end - 1], False).strip():
            end = stops.pop()
        return end

    def check(self, turn: int, begin: int, end: int) -> None:
        """Check that the tokens found for an answer hold its text, tool calls and reasoning.

        A template may drop the reasoning of an answer that others follow, as generation then does.

        Raises:
            DataError: They do not.
        """
        message = self.messages[turn]
        found = _squeezed(self.tokenizer.decode(self.ids[begin:end], False))
        *thoughts, answer = _THOUGHT_END.split(str(message.get("content") or ""))
        parts = [("answer", answer)]
        if turn + 1 == len(self.messages):
            thoughts = [_THOUGHT_BEGIN.sub("", thought) for thought in thoughts]
            thoughts.append(message.get("reasoning_content", ""))
            parts += [("reasoning", thought) for thought in thoughts]
        # through the tokenizer, which may change letters, or not know them
        held = [
            (name, self.tokenizer.decode(self.tokenizer.encode(text, False), False))
            for name, text in parts
        ]
        held += [("tool calls", name_of(call)) for call in message.get("tool_calls", ())]
        for name, text in held:
            if _squeezed(text) not in found:
                raise DataError(
                    f"{self.location}: the chat template of {self.tokenizer.name} does not print "
                    f"the {name} of messages[{turn}] as the row has it, expected the whole turn "
                    "before the next one; train on rows of one answer, or change the row"
                )

    def _next_turn(self, turn: int) -> int:
        """Return the index of the first token that depends on the turn after ``turn``."""
        later = dict(self.messages[turn + 1])
        content = str(later.get("content") or "")
        later["content"] = ("b" if content.lstrip().startswith("a") else "a") + content
        messages = [*self.messages[: turn + 1], later, *self.messages[turn + 2 :]]
        return self._common(self.printed(messages))

    def _common(self, text: str, *, is_ended: bool = False) -> int:
        """Return the number of tokens that the conversation and another text begin with.

        Args:
            text: The other text.
            is_ended: Whether its last end tokens do not count, as no turn follows there.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        while is_ended and ids and ids[-1] in self.tokenizer.eos_ids:
            ids.pop()
        pairs = zip(ids, self.ids, strict=False)
        shorter = min(len(ids), len(self.ids))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def _split_behind_thought(prompt: str, text: str, answer: Mapping[str, Any]) -> list[str]:
    """Return a conversation as it reads behind a prompt whose thought finished turns lack.

    Args:
        prompt: The prompt for the last turn.
        text: The whole conversation.
        answer: The last turn.

    Returns:
        The prompt, encoded by itself as in generation, and the rest; else the text as it is.
    """
    thought = _THOUGHT.search(prompt)
    if text.startswith(prompt) or not thought or not text.startswith(prompt[: thought.start()]):
        return [text]
    opening, closing = f"<{thought[1]}>", f"</{thought[1]}>"
    printed = text[thought.start() :].lstrip()
    if thought[2]:
        return [prompt, printed]
    if printed.startswith(opening):
        return [prompt, printed.removeprefix(opening).lstrip()]
    if closing in printed:
        return [text]  # the template prints the thought in a way of its own
    before = str(answer.get("content") or "").rpartition(closing)[0]
    words = answer.get("reasoning_content") or before.rpartition(opening)[2]
    return [prompt, f"{words.strip()}\n{closing}\n\n{printed}"]


def _squeezed(text: str) -> str:
    return "".join(text.split())
