"""Encode rows as training examples: token ids, and marks for those the loss is computed on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fastsafe.data.conversation import Row, is_turns, kind_of
from fastsafe.errors import DataError, TokenizerError

LossOn = Literal["completion", "all"]


class Encoder(Protocol):
    """Tokenizer methods that encoding needs; ``fastsafe.io.tokenizer.Tokenizer`` has them."""

    name: str
    eos_ids: tuple[int, ...]
    id_bound: int  # upper bound of token ids, exclusive

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation rendered by the chat template."""


@dataclass(frozen=True, slots=True)
class TrainExample:
    """One training sequence.

    Attributes:
        token_ids: The whole sequence, prompt first.
        trained: One mark per token: whether it is a target of the loss. The mark of the first
            token has no effect, as no token precedes it.
    """

    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]

    def row(self) -> dict[str, tuple[Any, ...]]:
        """Return a row that encodes to this example, whatever the tokenizer."""
        return {"token_ids": self.token_ids, "trained": self.trained}

    def cut(self, max_length: int, location: str = "row") -> "TrainExample":
        """Return the example cut to its first ``max_length`` tokens.

        Raises:
            DataError: No trained token is among them.
        """
        if not any(self.trained[1:max_length]):
            raise DataError(
                f"{location}: trained tokens are 0 among the first {max_length} of "
                f"{len(self.token_ids)}, expected an answer to train on; raise the maximum "
                "length or drop the row"
            )
        return TrainExample(self.token_ids[:max_length], self.trained[:max_length])


def encode_row(
    row: Row, tokenizer: Encoder, *, loss_on: LossOn = "completion", location: str = "row"
) -> TrainExample:
    """Encode one row as token ids with loss marks.

    - {"prompt", "completion"} as strings: the prompt with the tokenizer's special tokens, the
      completion without, then the end-of-text token. The completion and that token are trained.
    - {"prompt", "completion"} as token lists: exactly these tokens.
    - {"prompt", "completion"} as lists of turns: as {"messages"}, but answers in the prompt are not
      trained.
    - {"token_ids", "trained"}: exactly these tokens and marks.
    - {"messages"}: the tokens of the chat template. Each assistant turn is trained, from the end of
      the generation prompt to the end-of-turn token, included. If the template prints no such
      token, the end-of-text token is added after the last turn.
    - {"text"}: the text with the tokenizer's special tokens; all of it is trained.

    Args:
        row: The row.
        tokenizer: Tokenizer of the base model.
        loss_on: "all" trains every token of the row instead.
        location: Prefix of errors.

    Raises:
        DataError: The row is malformed, the chat template renders it inconsistently, or no token is
            trained.
    """
    kind = kind_of(row, location)
    try:
        if kind == "messages":
            ids, trained = _encode_messages(row["messages"], tokenizer, location)
        elif kind == "text":
            ids = tokenizer.encode(row["text"])
            trained = [True] * len(ids)
        elif kind == "tokens":
            ids, trained = list(row["token_ids"]), list(row["trained"])
            _check_ids(ids, tokenizer, location)
        elif is_turns(row["prompt"]):
            turns = [*row["prompt"], *row["completion"]]
            ids, trained = _encode_messages(turns, tokenizer, location, len(row["prompt"]))
        else:
            ids, trained = _encode_pair(row["prompt"], row["completion"], tokenizer, location)
    except TokenizerError as error:
        raise DataError(f"{location}: {error}") from error
    if loss_on == "all":
        trained = [True] * len(ids)
    if not any(trained[1:]):
        raise DataError(
            f"{location}: trained tokens are 0, expected an answer to train on; "
            "give the row an assistant turn, a completion or more text"
        )
    return TrainExample(tuple(ids), tuple(trained))


def _ended(ids: list[int], tokenizer: Encoder) -> list[int]:
    """Append the end-of-text token, unless an end token is there or the tokenizer has none."""
    ends = tokenizer.eos_ids
    return ids if not ends or (ids and ids[-1] in ends) else [*ids, ends[0]]


def _encode_pair(
    prompt: Any, completion: Any, tokenizer: Encoder, location: str
) -> tuple[list[int], list[bool]]:
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt)
        completion = _ended(tokenizer.encode(completion, add_special_tokens=False), tokenizer)
    ids = [*prompt, *completion]
    _check_ids(ids, tokenizer, location)
    return ids, [False] * len(prompt) + [True] * len(completion)


def _check_ids(ids: Sequence[int], tokenizer: Encoder, location: str) -> None:
    bad = next((token for token in ids if not 0 <= token < tokenizer.id_bound), None)
    if bad is not None:
        raise DataError(
            f"{location}: a token id is {bad}, expected 0 to {tokenizer.id_bound - 1}; "
            "encode the row with the tokenizer of this checkpoint"
        )


def _encode_messages(
    messages: Sequence[Mapping[str, Any]], tokenizer: Encoder, location: str, first: int = 0
) -> tuple[list[int], list[bool]]:
    """Encode a conversation; answers from turn ``first`` on are trained."""
    if messages[0]["role"] == "assistant":
        raise DataError(
            f"{location}: messages[0] is the assistant's, expected a system or user turn first; "
            "put the question before the answer"
        )
    text = tokenizer.render_chat(messages, add_generation_prompt=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = _Conversation(messages, text, ids, tokenizer, location)
    trained = [False] * len(ids)
    begin = len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and turn >= first:
            begin = whole.begin(turn)
            end = whole.end(turn, begin)
            trained[begin:end] = [True] * (end - begin)
    ends = set(tokenizer.eos_ids)
    if messages[-1]["role"] == "assistant" and ends and ends.isdisjoint(ids[begin:]):
        return [*ids, tokenizer.eos_ids[0]], [*trained, True]
    return ids, trained


@dataclass(frozen=True)
class _Conversation:
    """A rendered conversation and its tokens, in which answers are located."""

    messages: Sequence[Mapping[str, Any]]
    text: str
    ids: Sequence[int]
    tokenizer: Encoder
    location: str

    def begin(self, turn: int) -> int:
        """Return the index of the first token of an answer, at which row and prompt part."""
        prompt = self.tokenizer.render_chat(self.messages[:turn], add_generation_prompt=True)
        if not self.text.startswith(prompt):
            raise DataError(
                f"{self.location}: the chat template of {self.tokenizer.name} prints a "
                f"conversation that does not begin with the prompt for messages[{turn}], expected "
                "it to; train on rows of one answer, or on prompt and completion"
            )
        # a token may hold letters of both prompt and answer; it then belongs to the answer
        return _common_prefix(self.tokenizer.encode(prompt, add_special_tokens=False), self.ids)

    def end(self, turn: int, begin: int) -> int:
        """Return the index after the last token of an answer, usually its end-of-turn token."""
        ends = self.tokenizer.eos_ids
        stops = [i + 1 for i in range(begin, len(self.ids)) if self.ids[i] in ends]
        if turn + 1 == len(self.messages):
            end = len(self.ids)
        else:
            so_far = self.tokenizer.render_chat(self.messages[: turn + 1], False)
            if not self.text.startswith(so_far):
                # some templates print earlier answers differently, such as without their reasoning
                if stops:
                    return stops[0]
                raise DataError(
                    f"{self.location}: the chat template of {self.tokenizer.name} prints "
                    f"messages[{turn}] differently once others follow, expected the same or an "
                    "end-of-turn token; train on rows of one answer"
                )
            end = _common_prefix(self.tokenizer.encode(so_far, False), self.ids)
        stops = [stop for stop in stops if stop <= end]
        if not stops:
            return end
        # a template may print more after the turn, even further end tokens; no model generates it
        end = stops.pop()
        while stops and not self.tokenizer.decode(self.ids[stops[-1] : end - 1], False).strip():
            end = stops.pop()
        return end


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
