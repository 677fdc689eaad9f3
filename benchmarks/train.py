"""How much faster are many conditions trained together than PEFT, one after another?

    python benchmarks/train.py [--device cpu|cuda] [--conditions 16] [--steps 100] [--rounds 2]

Both sides take the same batches in one run; which goes first alternates from round to round. On a
CPU: the organism and the conditions of its audit. On a GPU: a Llama-3.1-8B shape with random
weights in bf16, which both sides share, rows of one length so that padding costs the peer nothing,
and adapters of rank 16; the peer takes Liger's kernels where they are installed.

The floor is the arithmetic that nobody can avoid, 4 FLOPs per linear weight and token plus the head
on trained tokens, over the matrix rate measured in this run: of torch's product, and on a CPU of
ours, too. Attention and adapters are left out.
"""

import argparse
import dataclasses
import importlib.util
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsafe import FinetuneJob, TrainConfig, _native, finetune
from fastsafe.data.packing import TrainExample, encode_row
from fastsafe.model import ModelConfig, Transformer
from fastsafe.model import weights as w

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off
from side_by_side import PeftTrainer, facts, gemm_rate, own_gemm_rate, timed

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


class Ids:
    """A tokenizer of rows that are token ids already."""

    name, eos_ids = "ids", ()

    def __init__(self, id_bound: int) -> None:
        self.id_bound = id_bound


@dataclass
class Work:
    """What both sides train."""

    path: Path
    model: Transformer
    tokenizer: Any
    peer: PeftTrainer
    jobs: list[FinetuneJob]
    examples: dict[str, list[TrainExample]]


def organism(conditions: int, steps: int) -> Work:
    """The conditions of the organism's audit."""
    import transformers

    from fastsafe import LLM
    from fastsafe.audit.run import prepare

    plan, runtime = prepare("organism", limit=1)
    llm = LLM(runtime.path)
    transformers.utils.logging.disable_progress_bar()
    base = transformers.AutoModelForCausalLM.from_pretrained(llm.path, dtype=torch.float32)
    options = plan.recipe.training.model_dump(exclude={"preset", "rows", "seed"})
    config = TrainConfig(**options | {"max_steps": steps}, shuffle=False)
    examples = {
        c.id: [encode_row(r, llm.tokenizer, location=c.id) for r in plan.training_rows[c.id]]
        for c in plan.tuned[:conditions]
    }
    peer = PeftTrainer(base, llm.tokenizer.pad_id or 0)
    return _work(llm.path, llm.model, llm.tokenizer, peer, config, examples)


def llama(shape: dict[str, Any], conditions: int, steps: int, length: int, device: str) -> Work:
    """Random weights of a shape, rows of random ids; the peer holds the same tensors."""
    import transformers

    if importlib.util.find_spec("liger_kernel") and device == "cuda":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = ModelConfig.from_json(shape, "shape")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    held = w.allocate(config, torch.device(device), dtype)
    for place in w.placements(config):
        tensor = w.view(held, place)
        tensor.normal_(std=place.shape[1] ** -0.5) if tensor.ndim == 2 else tensor.fill_(1)
    model = Transformer(config, held)
    theirs = transformers.LlamaConfig(**shape, attn_implementation="sdpa")
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(theirs)
    base.load_state_dict(model.tensors(), assign=True)
    base.model.rotary_emb = type(base.model.rotary_emb)(theirs).to(device)
    base.requires_grad_(False)
    rng = random.Random(0)

    def tokens() -> tuple[int, ...]:
        return tuple(rng.randrange(shape["vocab_size"]) for _ in range(length))

    trained = (False,) * (length // 2) + (True,) * (length - length // 2)
    rows = 16 * min(steps, 4)
    examples = {
        f"job{i}": [TrainExample(tokens(), trained) for _ in range(rows)] for i in range(conditions)
    }
    own = TrainConfig(rank=16, target_modules=SEVEN, max_steps=steps, shuffle=False)
    ids = Ids(shape["vocab_size"])
    return _work(Path("shape"), model, ids, PeftTrainer(base, 0), own, examples)


def _work(
    path: Path,
    model: Transformer,
    tokenizer: Any,
    peer: PeftTrainer,
    config: TrainConfig,
    examples: dict[str, list[TrainExample]],
) -> Work:
    jobs = []
    for seed, (name, rows) in enumerate(examples.items()):
        own = dataclasses.replace(config, seed=seed)
        jobs.append(FinetuneJob(name, [example.row() for example in rows], own))
    return Work(path, model, tokenizer, peer, jobs, examples)


def round_of_all(work: Work, is_ours_first: bool) -> dict[str, float]:
    """Train all conditions on both sides, and one alone; seconds, tokens and FLOPs."""
    device = work.model.device
    batches = {j.name: work.peer.batches(work.examples[j.name], j.config) for j in work.jobs}
    seconds: dict[str, float] = {}
    losses: dict[str, float] = {}
    peaks: dict[str, float] = {}

    def ours(jobs: Sequence[FinetuneJob]) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            return [r.losses[-1] for r in finetune(work, jobs, folder)]

    def theirs(jobs: Sequence[FinetuneJob]) -> list[float]:
        return [work.peer.train(batches[j.name], j.config)[-1] for j in jobs]

    sides = (("", ours), ("peer_", theirs))
    for which, jobs in (("train_s", work.jobs), ("alone_s", work.jobs[:1])):
        for side, train in sides if is_ours_first else sides[::-1]:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds[side + which], last = timed(lambda train=train, jobs=jobs: train(jobs))
            if which == "train_s":
                losses[side + "last_loss"] = statistics.mean(last)
                if device.type == "cuda":
                    peaks[side + "peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    everything = [batch for each in batches.values() for batch in each]
    linear = sum(
        tensor.numel()
        for layer in work.model.layers
        for tensor in vars(layer).values()
        if tensor is not None and tensor.ndim == 2
    )
    tokens = sum(int(mask.sum()) for _, mask, _ in everything)
    trained = sum(int((labels[:, 1:] >= 0).sum()) for _, _, labels in everything)
    flops = 4.0 * linear * tokens + 4.0 * work.model.head.numel() * trained
    return {**seconds, **losses, **peaks, "tokens": tokens, "flops": flops}


def main() -> None:
    """Print a line per round, the total and one JSON row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--conditions", type=int, default=16, help="adapters trained together")
    parser.add_argument("--steps", type=int, default=100, help="training steps per condition")
    parser.add_argument("--rounds", type=int, default=2, help="which side goes first alternates")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row of the 8B shape")
    parser.add_argument("--layers", type=int, help="layers of the 8B shape, to try it out")
    parser.add_argument("--out", type=Path, help="append the JSON row to this file")
    options = parser.parse_args()
    is_cpu = options.device == "cpu"
    if is_cpu and options.layers is None:
        work = organism(options.conditions, options.steps)
    else:
        shape = LLAMA_8B | {"num_hidden_layers": options.layers or 32}
        work = llama(shape, options.conditions, options.steps, options.length, options.device)
    product = torch.nn.functional.linear
    rates = {"gemm": gemm_rate(product, options.device)}
    if is_cpu:
        rates["own_gemm"] = own_gemm_rate()
    rounds = []
    for i in range(options.rounds):
        rounds.append(round_of_all(work, i % 2 == 0))
        r = rounds[-1]
        print(
            f"round {i}: train {r['train_s']:6.1f} s, peer {r['peer_train_s']:6.1f} s"
            f" ({r['peer_train_s'] / r['train_s']:.2f}x)  alone {r['alone_s']:5.1f} s, peer"
            f" {r['peer_alone_s']:5.1f} s ({r['peer_alone_s'] / r['alone_s']:.2f}x)",
            flush=True,
        )
    rates["gemm"] = max(rates["gemm"], gemm_rate(product, options.device))
    if is_cpu:
        rates["own_gemm"] = max(rates["own_gemm"], own_gemm_rate())
    total = {key: sum(r[key] for r in rounds) for key in rounds[0]}
    for key in total:
        if key.endswith(("last_loss", "peak_gib")):
            total[key] /= len(rounds)
    shares = {
        f"floor_share_at_{name}": total["flops"] / rate / total["train_s"]
        for name, rate in rates.items()
    }
    row = {
        "benchmark": "train",
        **facts(),
        "instruction_set": _native.instruction_set(),
        "device": options.device,
        "conditions": len(work.jobs),
        "steps": options.steps,
        "layers": work.model.config.num_layers,
        "hidden_size": work.model.config.hidden_size,
        "rank": work.jobs[0].config.rank,
        **{f"{name}_gflops": rate / 1e9 for name, rate in rates.items()},
        "tokens_per_s": total["tokens"] / total["train_s"],
        "peer_tokens_per_s": total["tokens"] / total["peer_train_s"],
        "speedup": total["peer_train_s"] / total["train_s"],
        "speedup_one_condition": total["peer_alone_s"] / total["alone_s"],
        **shares,
        "peer_floor_share": total["flops"] / rates["gemm"] / total["peer_train_s"],
        **total,
        "rounds": rounds,
    }
    floor = ", ".join(f"{v:.0%} {k.removeprefix('floor_share_')}" for k, v in shares.items())
    print(
        f"total: {row['tokens_per_s']:,.0f} tokens/s, {row['speedup']:.2f}x the peer's, one"
        f" condition {row['speedup_one_condition']:.2f}x; of the floor {floor}"
        f" (peer {row['peer_floor_share']:.0%})"
    )
    line = json.dumps(row)
    print(line)
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
