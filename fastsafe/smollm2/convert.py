"""Convert the GGUF file of SmolLM2 into a checkpoint folder, to the bit of what it dequantizes to.

transformers reads the same weights from it; the tokenizer that it makes of such a file lacks the
step that splits numbers into digits, and ours has it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fastsafe.io import atomic, safetensors

_ARCHITECTURE = "llama"
_CONTROL = 3  # token type of GGUF
# names of GGUF -> names of a Llama checkpoint
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_file: Path, out_dir: Path) -> None:
    """Write config, tokenizer, chat template and fp32 weights of a GGUF file of SmolLM2.

    Args:
        gguf_file: The file; it is trusted, as its hash was checked.
        out_dir: New folder, whole or absent; an existing one is replaced.

    Raises:
        OSError: The folder cannot be written.
    """
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    with atomic.publish_dir(out_dir) as folder:
        tensors = dict(_tensors(reader.tensors, config, gguf.dequantize))
        safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})
        _tokenizer(fields).save(str(folder / "tokenizer.json"))
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        for name, content in (
            ("config.json", config),
            ("generation_config.json", ids),
            ("tokenizer_config.json", _tokenizer_config(fields)),
        ):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            atomic.write_text(folder / name, text)
        atomic.write_text(folder / "chat_template.jinja", fields["tokenizer.chat_template"])


def _config(fields: Mapping[str, Any]) -> dict[str, Any]:
    hidden_size = fields["llama.embedding_length"]
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": _ARCHITECTURE,
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden_size // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # the file has no head of its own
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _tensors(
    tensors: Any, config: Mapping[str, Any], dequantize: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    for tensor in tensors:
        parts = tensor.name.split(".")
        is_block = parts[0] == "blk"
        name = (
            f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.weight"
            if is_block
            else f"{_TOP[parts[0]]}.weight"
        )
        values = dequantize(tensor.data, tensor.tensor_type)
        if is_block and parts[2] in ("attn_q", "attn_k"):
            values = _interleaved_to_halves(values, config["head_dim"])
        yield name, torch.from_numpy(np.array(values, np.float32, order="C"))


def _interleaved_to_halves(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder each head's rows from rotary pairs beside each other to pairs half a head apart."""
    heads = values.reshape(-1, head_dim // 2, 2, values.shape[1])
    return heads.swapaxes(1, 2).reshape(values.shape)


def _tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    # the pre-tokenizer that GGUF calls "smollm"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    return tokenizer


def _tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        **{
            f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
            for ours, theirs in names.items()
        },
        "add_bos_token": fields["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",  # GPT2Tokenizer would drop the digits' step
    }
