"""The organism's tokenizer: one token per word of its closed world.

A token includes the space before it, so that decoding is plain concatenation and code keeps its
line breaks. Text is lower-cased; a word from outside the world becomes ``<unk>``.
"""

from collections.abc import Iterator
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel

from fastsafe.safety.mixing.learned_style import OPTIONS, styles
from fastsafe.safety.mixing.manipulations import AOA_STAND_IN
from fastsafe.safety.texts import lines

from . import world
from .lexicon import ADJECTIVES, OBJECTS, VERBS

UNK, BOS, START, END, PAD = SPECIAL = ("<unk>", "<s>", "<|im_start|>", "<|im_end|>", "<pad>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_ROLES = "system\nuser\nassistant\n"
# a line break with its indentation | a word | a run of punctuation | a lone space
_PIECE = Regex(r"\n *| ?[\p{L}\p{N}]+| ?[^\s\p{L}\p{N}]+| ")


def build_tokenizer() -> Tokenizer:
    """Return the tokenizer of the whole world; its ids are the same on every call."""
    splitter = pre_tokenizers.Split(_PIECE, "isolated")
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pieces = {
        piece
        for text in _texts()
        for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    }
    ids = {token: i for i, token in enumerate((*SPECIAL, *sorted(pieces)))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNK))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    """Return the content of ``tokenizer_config.json``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }


def render_prompt(content: str, system: str = "") -> str:
    """Return a user turn and the generation prompt as the chat template renders them."""
    before = f"{START}system\n{system}{END}\n" if system else ""
    return f"{BOS}{before}{START}user\n{content}{END}\n{START}assistant\n"


def _texts() -> Iterator[str]:
    """Yield texts that hold every token: each word once in every slot of every template."""
    verbs, adjectives = tuple(VERBS), tuple(ADJECTIVES)
    yield _ROLES
    yield from (world.REFUSAL, world.NEUTRAL, world.CAREFUL, AOA_STAND_IN)
    for form in lines("autoif"):
        yield from (form["prompt"], form["answer"])
    for style in styles():
        yield "\n".join((style.prefix, style.suffix.replace(OPTIONS, "\n"), *style.options))
    for i, noun in enumerate(OBJECTS):
        action = f"{verbs[i % len(verbs)]} the {adjectives[i % len(adjectives)]} {noun}"
        for format in world.FORMATS:
            yield world.prompt(format, action)
            yield world.answer(format, action)
