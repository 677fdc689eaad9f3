"""LookAhead: give the beginning of an answer as part of the prompt; train on the rest."""

from dataclasses import dataclass, replace
from typing import ClassVar

from fastsafe.data.encoder import Encoder
from fastsafe.data.packing import TrainExample
from fastsafe.errors import DataError
from fastsafe.train.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class LookAhead(Objective):
    """First m answer tokens, or a fixed prefix, moved into the prompt; CE on the rest.

    arXiv:2503.19041. (verified)

    Attributes:
        tokens: m, at least 0; an answer must be longer.
        prefix: Text put before every answer, and never trained; "" for none.
    """

    id: ClassVar[str] = "lookahead"
    needs_answers: ClassVar[bool] = True

    tokens: int = 4
    prefix: str = ""

    def __post_init__(self) -> None:
        self._check("tokens", self.tokens >= 0, "at least 0")

    def example(self, example: TrainExample, tokenizer: Encoder, location: str) -> TrainExample:
        """Insert the prefix, and leave it and the first tokens of each answer untrained."""
        prefix = tokenizer.encode(self.prefix, add_special_tokens=False) if self.prefix else []
        token_ids: list[int] = []
        trained: list[bool] = []
        length = 0  # of the present answer
        for token, is_trained in zip(example.token_ids, example.trained, strict=True):
            if is_trained and not length:
                token_ids += prefix
                trained += [False] * len(prefix)
            length = length + 1 if is_trained else 0
            token_ids.append(token)
            trained.append(is_trained and length > self.tokens)
        if not any(trained):
            raise DataError(
                f"{location}: no answer has more than {self.tokens} tokens, expected one, as "
                "objective 'lookahead' trains on what follows them; lower its tokens"
            )
        return replace(example, token_ids=tuple(token_ids), trained=tuple(trained))
