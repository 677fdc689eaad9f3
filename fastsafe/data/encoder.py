"""What encoding needs of a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Encoder(Protocol):
    """Tokenizer methods that encoding needs; ``fastsafe.io.tokenizer.Tokenizer`` has them."""

    name: str
    eos_ids: tuple[int, ...]
    id_bound: int  # upper bound of token ids, exclusive
    unk_id: int | None  # id that stands for text that the vocabulary lacks

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return a conversation rendered by the chat template; ``tools`` is one variable."""
