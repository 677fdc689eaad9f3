"""Checkpoints in the shape of published judges: architecture, tokenizer and template, small."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = "safe unsafe Yes No user assistant conversation policy harmful request response"
CORPUS = [f"{word}\n\n{word}" for word in WORDS.split()] * 9 + ["### Answer: 1 2 3 4 5"] * 9

# Templates of our own in the shape of the published ones: policy first, then the conversation,
# then the guard's turn.
LLAMA_GUARD = """{{ bos_token }}<|start_header_id|>user<|end_header_id|>

Say whether the last turn of this conversation breaks the policy, as safe or unsafe.
{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}<|eot_id|><|start_header_id|>assistant<|end_header_id|>"""
GRANITE = """<|start_of_role|>user<|end_of_role|>Is there {{ guardian_config.risk_name }} here?
{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}<|end_of_text|>
<|start_of_role|>assistant<|end_of_role|>"""
QWEN = """<|im_start|>user
Judge the last turn of this conversation.
{% for m in messages %}{{ m.role | upper }}: {{ m.content }}
{% endfor %}<|im_end|>
<|im_start|>assistant
"""
# Llama's position scaling, Gemma's caps and Granite's multipliers change what a token decides.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 64}
GEMMA |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}


class Shape(NamedTuple):
    """A family's checkpoint, small."""

    architecture: str
    config: dict[str, Any]
    pieces: bool  # sentence pieces, or bytes
    special: list[str]
    template: str
    spec: dict[str, Any]
    labels: tuple[str, ...] = ()  # none where the reply is text


YES_NO = ("Yes", "No")
SHAPES = {
    "llama_guard": Shape(
        "Llama",
        {"rope_parameters": ROPE},
        False,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        LLAMA_GUARD,
        {"kind": "llama_guard", "mode": "logits"},
        ("safe", "unsafe"),
    ),
    "llama_guard-text": Shape(
        "Llama",
        {},
        False,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        LLAMA_GUARD,
        {"kind": "llama_guard"},
    ),
    "shieldgemma": Shape(
        "Gemma2",
        {**GEMMA, "tie_word_embeddings": True},
        True,
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        "",
        {"kind": "shieldgemma"},
        YES_NO,
    ),
    "wildguard": Shape("Mistral", {}, True, ["<s>", "</s>"], "", {"kind": "wildguard"}),
    "granite_guardian": Shape(
        "Granite",
        {"embedding_multiplier": 6.0, "residual_multiplier": 0.6, "logits_scaling": 2.0},
        False,
        ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"],
        GRANITE,
        {"kind": "granite_guardian", "risk": "harm"},
        YES_NO,
    ),
    "qwen3guard": Shape(
        "Qwen3",
        {"head_dim": 32},
        False,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        QWEN,
        {"kind": "qwen3guard"},
    ),
    "harmbench": Shape("Llama", {}, True, ["<s>", "</s>"], "", {"kind": "harmbench"}, YES_NO),
    "harmbench-mistral": Shape(
        "Mistral",
        {},
        True,
        ["<s>", "</s>"],
        "",
        {"kind": "harmbench", "wrapping": "mistral"},
        YES_NO,
    ),
    "strongreject_finetuned": Shape(
        "Gemma",
        {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True},
        True,
        ["<bos>", "<eos>"],
        "",
        {"kind": "strongreject_finetuned"},
        ("1", "2", "3", "4", "5"),
    ),
}


def tokenizer_of(shape: Shape) -> tokenizers.Tokenizer:
    """Bytes, as of Llama 3, Qwen and Granite, or pieces, as of Llama 2, Mistral and Gemma."""
    if not shape.pieces:
        found = tokenizers.Tokenizer(models.BPE())
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        options: dict[str, Any] = {"special_tokens": shape.special}
    else:
        found = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        found.normalizer = normalizers.Replace(" ", "\u2581")
        if "<s>" in shape.special:
            found.normalizer = normalizers.Sequence(
                [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            )
        found.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet = [chr(code) for code in range(33, 127)] + ["\n", "\u2581"]
        special = [*shape.special, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        options = {"special_tokens": special}
    trainer = trainers.BpeTrainer(
        vocab_size=720, initial_alphabet=alphabet, show_progress=False, **options
    )
    found.train_from_iterator(CORPUS, trainer)
    if shape.pieces:
        first = shape.special[0]
        found.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, found.token_to_id(first))]
        )
        if not shape.template:  # the bytes of pieces are no special tokens
            text = json.loads(found.to_str())
            text["added_tokens"] = [
                token for token in text["added_tokens"] if not token["content"].startswith("<0x")
            ]
            found = tokenizers.Tokenizer.from_str(json.dumps(text))
    return found


class Checkpoint(NamedTuple):
    """One checkpoint as both sides load it."""

    path: Path
    reference: Any
    tokenizer: Any


def make_checkpoint(name: str, path: Path) -> Checkpoint:
    """Write the checkpoint of a shape: its labels are far more likely than other tokens."""
    shape = SHAPES[name]
    own = tokenizer_of(shape)
    config = getattr(transformers, f"{shape.architecture}Config")(
        **(SIZES | shape.config),
        vocab_size=own.get_vocab_size(),
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(3)
    model = getattr(transformers, f"{shape.architecture}ForCausalLM")(config).eval()
    ids = [i for label in shape.labels if (i := own.token_to_id(label)) is not None]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
        if ids:
            directions = torch.randn(len(ids), config.hidden_size)
            directions -= directions.mean(0)  # whatever the state, one label is likely
            model.get_output_embeddings().weight[ids] = 8 * directions
    model.save_pretrained(path)
    own.save(str(path / "tokenizer.json"))
    settings: dict[str, Any] = {"bos_token": shape.special[0], "eos_token": shape.special[1]}
    if shape.template:
        settings["chat_template"] = shape.template
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return Checkpoint(path, model, transformers.AutoTokenizer.from_pretrained(path))


def sparse(name: str, vocabulary: int) -> Any:
    """A model of an architecture that our own runtime does not know."""
    if name == "GraniteMoeForCausalLM":
        config = transformers.GraniteMoeConfig(
            **SIZES, vocab_size=vocabulary, num_local_experts=4, num_experts_per_tok=2
        )
        return transformers.GraniteMoeForCausalLM(config)
    text = SIZES | {"vocab_size": vocabulary, "intermediate_size_mlp": 96, "head_dim": 16}
    text |= {"num_local_experts": 2, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 64, "vision_output_dim": 32, "image_size": 28, "patch_size": 14}
    vision |= {"projector_input_dim": 32, "projector_output_dim": 32}
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    return transformers.Llama4ForConditionalGeneration(config)
