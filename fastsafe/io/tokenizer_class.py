"""What transformers' tokenizer classes put in the place of parts of tokenizer.json.

Four classes of transformers 5 rebuild the normalizer, the pre-tokenizer and the decoder from their
own code and take from tokenizer.json the vocabulary alone: a Llama checkpoint has other tokens
behind a special token than its tokenizer.json says. Every other class uses the file as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

_SPACE = "\u2581"

_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The class of a family whose config names none; None: the file as it is. Families that are absent
# use the file whatever class their config names.
_FAMILY_CLASS = {
    "": None,
    "llama": None,
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
}


class ClassRules(NamedTuple):
    """What else holds for a class that rebuilds its parts.

    Attributes:
        defaults: Its named tokens, for names that no file has.
        map_has_flags: Whether flags of tokens in special_tokens_map.json are read.
    """

    defaults: Mapping[str, str]
    map_has_flags: bool = True


def apply_class(
    backend: tokenizers.Tokenizer, fields: Mapping[str, Any], model_type: str
) -> "ClassRules | None":
    """Change ``backend`` as transformers' class for this checkpoint does.

    Args:
        backend: The tokenizer of tokenizer.json.
        fields: tokenizer_config.json.
        model_type: Of config.json; "" without one.

    Returns:
        Further rules of a class that rebuilds its parts, None for others.
    """
    name = _class_name(backend, fields.get("tokenizer_class"), model_type)
    if name not in _CLASSES or not isinstance(backend.model, tokenizers.models.BPE):
        return None
    rebuild, rules = _CLASSES[name]
    model = backend.model
    model.dropout = None
    model.ignore_merges = False
    rebuild(backend, fields)
    return rules


def _class_name(backend: tokenizers.Tokenizer, declared: Any, model_type: str) -> str | None:
    """Choose as ``AutoTokenizer`` does."""
    if model_type not in _FAMILY_CLASS:
        return None
    if model_type == "qwen2":  # transformers trusts no other class here
        return "Qwen2Tokenizer"
    if not isinstance(declared, str):
        return _FAMILY_CLASS[model_type]
    name = declared.removesuffix("Fast")
    return None if name == "LlamaTokenizer" and _is_byte_level(backend) else name


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
    return any(b'"ByteLevel"' in part.__getstate__() for part in parts if part is not None)


def _llama(backend: tokenizers.Tokenizer, fields: Mapping[str, Any]) -> None:
    prefix = fields.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if fields.get("legacy") else "first"
    backend.model.fuse_unk = backend.model.byte_fallback = True
    backend.model.unk_token = None
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
    backend.decoder = _metaspace_decoder(strip=prefix)


def _gemma(backend: tokenizers.Tokenizer, fields: Mapping[str, Any]) -> None:
    unknown = fields.get("unk_token", "<unk>")
    unknown = unknown.get("content") if isinstance(unknown, dict) else unknown
    backend.model.fuse_unk = backend.model.byte_fallback = True
    backend.model.unk_token = unknown if isinstance(unknown, str) else None
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = _metaspace_decoder(strip=False)


def _qwen2(backend: tokenizers.Tokenizer, fields: Mapping[str, Any]) -> None:
    backend.model.fuse_unk = backend.model.byte_fallback = False
    backend.model.unk_token = None
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(_adds_prefix_space(fields), use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()


def _gpt2(backend: tokenizers.Tokenizer, fields: Mapping[str, Any]) -> None:
    backend.model.fuse_unk = backend.model.byte_fallback = False
    backend.model.unk_token = None
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(_adds_prefix_space(fields))
    backend.decoder = decoders.ByteLevel()


def _adds_prefix_space(fields: Mapping[str, Any]) -> bool:
    return bool(fields.get("add_prefix_space"))


def _metaspace_decoder(strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *([decoders.Strip(" ", 1)] if strip else [])])


_END = "<|endoftext|>"
_CLASSES: dict[
    str, tuple[Callable[[tokenizers.Tokenizer, Mapping[str, Any]], None], ClassRules]
] = {
    "LlamaTokenizer": (
        _llama,
        ClassRules({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}),
    ),
    "GemmaTokenizer": (
        _gemma,
        ClassRules(
            {
                "unk_token": "<unk>",
                "bos_token": "<bos>",
                "eos_token": "<eos>",
                "pad_token": "<pad>",
                "mask_token": "<mask>",
            }
        ),
    ),
    "Qwen2Tokenizer": (
        _qwen2,
        ClassRules({"unk_token": _END, "eos_token": _END, "pad_token": _END}, map_has_flags=False),
    ),
    "GPT2Tokenizer": (
        _gpt2,
        ClassRules({"unk_token": _END, "bos_token": _END, "eos_token": _END}),
    ),
}
