"""The CUDA side of generate.py: an 8B Llama shape with random weights, rank-16 adapters.

Prompts are random tokens of ragged lengths, every row generates the same number of tokens: right
for speed and memory, of no meaning for answers. Decoding is timed as the difference of 129 tokens
and 1, so that prefill cancels. Beside ours run merge-then-run on the same engine and PEFT's mixed
batch, both on the ragged rows.
"""

import argparse
import importlib.util
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastsafe import LLM
from fastsafe.io import safetensors
from fastsafe.model import ModelConfig, Transformer
from fastsafe.model.peft import LoraConfig, write_dir

Work = Mapping[str, Any]

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def make_work(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """An 8B Llama shape with random weights, rank-16 adapters on all linear modules."""
    import tokenizers

    config = ModelConfig.from_json(LLAMA_8B, "8b")
    path = folder / "model"
    path.mkdir()
    model = Transformer.random(config, dtype=torch.bfloat16)
    tensors = {name: tensor.contiguous() for name, tensor in model.tensors().items()}
    safetensors.write(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(LLAMA_8B))
    words = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(
        str(path / "tokenizer.json")
    )
    (path / "tokenizer_config.json").write_text("{}")
    lora = LoraConfig(rank=16, alpha=32.0, target_modules="all-linear")
    adapters = {}
    for i in range(options.adapters):
        torch.manual_seed(i)
        weights = {}
        for name, slot in model.slots().items():
            weights[f"{name}.lora_A.weight"] = torch.randn(16, slot.in_features).bfloat16() / 64
            weights[f"{name}.lora_B.weight"] = (
                torch.randn(slot.end - slot.begin, 16).bfloat16() / 99
            )
        adapters[f"a{i}"] = str(folder / f"a{i}")
        write_dir(folder / f"a{i}", lora, weights)
    dice = random.Random(0)
    lengths = [dice.randrange(40, 400) for _ in range(options.probes)]
    return {
        "model": str(path),
        "dtype": "bfloat16",
        "adapters": adapters,
        "prompts": [dice.choices(range(1000, 100000), k=n) for n in lengths],
        "max_tokens": 128,
        "pad": 0,
        "eos": 1,
    }


def figures(work: Work, run_ours: Callable[..., Any], ragged: Sequence[Any]) -> dict[str, Any]:
    """Ours: decoding, the price of adapters and of determinism, a ragged audit, loading."""
    names = list(work["adapters"])
    options: dict[str, Any] = {"device": "cuda", "dtype": work["dtype"]}
    LLM(work["model"], **options)
    begin = time.perf_counter()
    llm = LLM(work["model"], **options)
    torch.cuda.synchronize()
    loaded_s = time.perf_counter() - begin
    size = sum(p.numel() * p.element_size() for p in llm.model.parameters())
    found: dict[str, Any] = {"load_gb_per_s": size / loaded_s / 1e9}
    prompts = [random.Random(i).choices(range(1000, 100000), k=236) for i in range(1024)]
    base = [(None, prompt) for prompt in prompts]
    spread = [(names[i * len(names) // 1024], prompt) for i, prompt in enumerate(prompts)]

    def decode_rate(engine: LLM, rows: Any) -> float:
        """Tokens per second beyond the first of each row, best of three."""
        run_ours(engine, rows, work, 2)
        best = 0.0
        for _ in range(3):
            first, whole = (run_ours(engine, rows, work, n)["seconds"] for n in (1, 129))
            best = max(best, 128 * len(rows) / (whole - first))
        return best

    def with_adapters(engine: LLM) -> LLM:
        for name in names:
            engine.load_adapter(work["adapters"][name], name)
        return engine

    found["decode_tokens_per_s"] = decode_rate(llm, base)
    with_adapters(llm)
    found["decode_64_adapters_tokens_per_s"] = decode_rate(llm, spread)
    found["lora_tax"] = 1 - found["decode_64_adapters_tokens_per_s"] / found["decode_tokens_per_s"]
    run_ours(llm, ragged[:64], work, 2)
    mixed = run_ours(llm, ragged, work)
    found["describe"] = llm.describe()
    del llm
    torch.cuda.empty_cache()
    fast = LLM(work["model"], **options, strict=False)
    found["decode_fast_tokens_per_s"] = decode_rate(fast, base)
    found["strict_cost"] = 1 - found["decode_tokens_per_s"] / found["decode_fast_tokens_per_s"]
    del fast
    torch.cuda.empty_cache()
    llm = with_adapters(LLM(work["model"], **options, adapters="merged"))
    run_ours(llm, ragged[:64], work, 2)
    merged = run_ours(llm, ragged, work)
    found["ragged_mixed_s"], found["ragged_merged_s"] = mixed["seconds"], merged["seconds"]
    found["merged_over_mixed"] = merged["seconds"] / mixed["seconds"]
    found["ragged_tokens_per_s"] = sum(map(len, mixed["tokens"])) / mixed["seconds"]
    found["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def run(folder: Path, work: Work, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Our figures, and PEFT's mixed batch on the same ragged rows where it is installed."""
    row = measure("gpu", folder)
    row |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    if importlib.util.find_spec("peft"):
        few = dict(work) | {"prompts": work["prompts"][:4]}  # four per adapter: it is slow
        (folder / "work.json").write_text(json.dumps(few))
        peer = measure("peer_mixed", folder)
        row["peer_mixed_tokens_per_s"] = peer["generated_tokens"] / peer["seconds"]
        row["peer_mixed_batch_size"] = peer["batch_size"]
        row["speedup_over_peer_mixed"] = row["ragged_tokens_per_s"] / row["peer_mixed_tokens_per_s"]
    return row
