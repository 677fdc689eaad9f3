"""Encode rows as training examples: token ids, and marks for those the loss is computed on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastsafe.data.answers import encode_answers
from fastsafe.data.conversation import Row, is_turns, kind_of
from fastsafe.data.encoder import Encoder
from fastsafe.data.turns import read_tools, read_turns
from fastsafe.errors import DataError, TokenizerError

LossOn = Literal["completion", "all"]


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
    - {"messages"}: the tokens of the chat template, see ``fastsafe.data.answers``. Each assistant
      turn is trained that no mark (``weight`` 0) excludes.
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
            ids, trained = _encode_turns(row, row["messages"], tokenizer, location, loss_on)
        elif kind == "text":
            ids = tokenizer.encode(row["text"])
            trained = [True] * len(ids)
        elif kind == "tokens":
            ids, trained = list(row["token_ids"]), list(row["trained"])
            _check_ids(ids, tokenizer, location)
        elif is_turns(row["prompt"]):
            turns, first = [*row["prompt"], *row["completion"]], len(row["prompt"])
            ids, trained = _encode_turns(row, turns, tokenizer, location, loss_on, first)
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


def _encode_turns(
    row: Row, raw: Sequence[Any], tokenizer: Encoder, location: str, loss_on: LossOn, first: int = 0
) -> tuple[list[int], list[bool]]:
    """Encode a conversation; answers from turn ``first`` on are trained."""
    turns = read_turns(raw, location)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= first]
    trained = [i for i in answers if turns[i].get("weight") != 0]
    if loss_on == "all" and len(trained) < len(answers):
        raise DataError(
            f"{location}: an answer is marked as not trained, and loss_on 'all' trains every token;"
            " drop the mark, or train completions"
        )
    return encode_answers(turns, trained, tokenizer, location, read_tools(row, location))
