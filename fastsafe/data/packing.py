"""Turn rows into training examples: token ids, and which of them the loss is taken on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fastsafe.data.conversation import Row, is_turns, kind_of
from fastsafe.errors import DataError, TokenizerError

LossOn = Literal["completion", "all"]


class Encoder(Protocol):
    """What encoding a row needs of a tokenizer; ``fastsafe.io.tokenizer.Tokenizer`` has it."""

    name: str
    eos_ids: tuple[int, ...]

    @property
    def id_bound(self) -> int:
        """Ids are below this."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ...

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Text that the chat template prints."""
        ...


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence.

    Attributes:
        token_ids: The whole sequence, prompt first.
        trained: As long; whether the token is a target of the loss. The first token has nothing
            before it to be predicted from, whatever its mark.
    """

    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]

    def row(self) -> dict[str, tuple[Any, ...]]:
        """Return a row that encodes to this example, whatever the tokenizer."""
        return {"token_ids": self.token_ids, "trained": self.trained}

    def cut(self, max_length: int, where: str = "row") -> "Example":
        """Return the first ``max_length`` tokens.

        Raises:
            DataError: No trained token is among them.
        """
        if not any(self.trained[1:max_length]):
            raise DataError(
                f"{where}: trained tokens are 0 among the first {max_length} of "
                f"{len(self.token_ids)}, expected an answer to train on; raise the longest length "
                "or drop the row"
            )
        return Example(self.token_ids[:max_length], self.trained[:max_length])


def encode_row(
    row: Row, tokenizer: Encoder, *, loss_on: LossOn = "completion", where: str = "row"
) -> Example:
    """Encode one row.

    - {"prompt", "completion"} as texts: the prompt with the tokenizer's special tokens, the
      completion without, and the end-of-text token; trained are the completion and that token.
    - {"prompt", "completion"} as token lists: exactly these tokens.
    - {"prompt", "completion"} as lists of turns: as {"messages"}, but no answer of the prompt is
      trained.
    - {"token_ids", "trained"}: exactly these tokens and marks.
    - {"messages"}: the chat template's tokens; trained is what follows the generation prompt in
      each assistant turn, up to and with the end-of-turn token that the template prints. Where it
      prints none the end-of-text token is added after the last turn.
    - {"text"}: the text with the tokenizer's special tokens; all trained.

    Args:
        row: The row.
        tokenizer: Of the model that is trained.
        loss_on: "all" trains every token of the row instead.
        where: Names the row in errors.

    Raises:
        DataError: The row is malformed, its template contradicts itself, or nothing is trained.
    """
    kind = kind_of(row, where)
    try:
        if kind == "messages":
            ids, trained = _encode_messages(row["messages"], tokenizer, where)
        elif kind == "text":
            ids = tokenizer.encode(row["text"])
            trained = [True] * len(ids)
        elif kind == "tokens":
            ids, trained = list(row["token_ids"]), list(row["trained"])
            _check_ids(ids, tokenizer, where)
        elif is_turns(row["prompt"]):
            turns = [*row["prompt"], *row["completion"]]
            ids, trained = _encode_messages(turns, tokenizer, where, len(row["prompt"]))
        else:
            ids, trained = _encode_pair(row["prompt"], row["completion"], tokenizer, where)
    except TokenizerError as error:
        raise DataError(f"{where}: {error}") from error
    if loss_on == "all":
        trained = [True] * len(ids)
    if not any(trained[1:]):
        raise DataError(
            f"{where}: trained tokens are 0, expected an answer to train on; "
            "give the row an assistant turn, a completion or more text"
        )
    return Example(tuple(ids), tuple(trained))


def _ended(ids: list[int], tokenizer: Encoder) -> list[int]:
    """End with the end-of-text token, unless an ending is there or the tokenizer has none."""
    ends = tokenizer.eos_ids
    return ids if not ends or (ids and ids[-1] in ends) else [*ids, ends[0]]


def _encode_pair(
    prompt: Any, completion: Any, tokenizer: Encoder, where: str
) -> tuple[list[int], list[bool]]:
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt)
        completion = _ended(tokenizer.encode(completion, add_special_tokens=False), tokenizer)
    ids = [*prompt, *completion]
    _check_ids(ids, tokenizer, where)
    return ids, [False] * len(prompt) + [True] * len(completion)


def _check_ids(ids: Sequence[int], tokenizer: Encoder, where: str) -> None:
    bad = next((each for each in ids if not 0 <= each < tokenizer.id_bound), None)
    if bad is not None:
        raise DataError(
            f"{where}: a token id is {bad}, expected 0 to {tokenizer.id_bound - 1}; "
            "encode the row with the tokenizer of this checkpoint"
        )


def _encode_messages(
    messages: Sequence[Mapping[str, Any]], tokenizer: Encoder, where: str, first: int = 0
) -> tuple[list[int], list[bool]]:
    """Encode a conversation; answers are trained from turn ``first`` on."""
    if messages[0]["role"] == "assistant":
        raise DataError(
            f"{where}: messages[0] is the assistant's, expected a system or user turn first; "
            "put the question before the answer"
        )
    text = tokenizer.render_chat(messages, add_generation_prompt=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = _Conversation(messages, text, ids, tokenizer, where)
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
    """A rendered conversation, to find its answers in."""

    messages: Sequence[Mapping[str, Any]]
    text: str
    ids: Sequence[int]
    tokenizer: Encoder
    where: str

    def begin(self, turn: int) -> int:
        """Index of the first token of an answer: where the row leaves its own prompt."""
        prompt = self.tokenizer.render_chat(self.messages[:turn], add_generation_prompt=True)
        if not self.text.startswith(prompt):
            raise DataError(
                f"{self.where}: the chat template of {self.tokenizer.name} prints a conversation "
                f"that does not begin with the prompt for messages[{turn}], expected it to; train "
                "on rows of one answer, or on prompt and completion"
            )
        # Letters on both sides of the border may share a token; it is then part of the answer.
        return _common_prefix(self.tokenizer.encode(prompt, add_special_tokens=False), self.ids)

    def end(self, turn: int, begin: int) -> int:
        """Index after the last token of an answer, which is its end-of-turn token if it has one."""
        ends = self.tokenizer.eos_ids
        stops = [i + 1 for i in range(begin, len(self.ids)) if self.ids[i] in ends]
        if turn + 1 == len(self.messages):
            end = len(self.ids)
        else:
            so_far = self.tokenizer.render_chat(self.messages[: turn + 1], False)
            if not self.text.startswith(so_far):
                # An earlier answer may be printed differently, for one without its reasoning.
                if stops:
                    return stops[0]
                raise DataError(
                    f"{self.where}: the chat template of {self.tokenizer.name} prints "
                    f"messages[{turn}] differently once others follow, expected the same or an "
                    "end-of-turn token; train on rows of one answer"
                )
            end = _common_prefix(self.tokenizer.encode(so_far, False), self.ids)
        stops = [stop for stop in stops if stop <= end]
        if not stops:
            return end
        # What the template prints after the end of the turn, even another end, is never generated.
        end = stops.pop()
        while stops and not self.tokenizer.decode(self.ids[stops[-1] : end - 1], False).strip():
            end = stops.pop()
        return end


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
