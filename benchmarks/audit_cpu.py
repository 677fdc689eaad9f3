"""How much faster is the organism's audit than transformers + PEFT, one condition after another?

    python benchmarks/audit_cpu.py [--tasks 4] [--steps 100] [--limit 100] [--out rows.jsonl]

Both sides do the same work in one run, in rounds of one task (its four conditions), training in
alternating order and generation ours first:
the same batches for training, the same prompts for generation, and for generation the same
adapters, so that the tokens can be compared. The peer is tuned: fused AdamW, adapters merged
before generation, prompts sorted by length, and the best of several batch sizes.

The floor is the arithmetic that nobody can avoid, over the matrix rate measured in this run, once
of torch's product, which the peer uses, and once of ours:
training 4 FLOPs per linear weight and token plus the head on trained tokens, generation 2 FLOPs
per linear weight and token plus the head on generated tokens. Attention and adapters are left out.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastsafe import LLM, FinetuneJob, SamplingParams, TrainConfig, _native, finetune
from fastsafe.audit.plan.make_plan import BASE, Plan
from fastsafe.audit.run import prepare
from fastsafe.data.packing import encode_row

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off
from side_by_side import PeftTrainer, facts, gemm_rate, own_gemm_rate, timed


class Peer(PeftTrainer):
    """transformers + PEFT, one condition at a time."""

    def __init__(self, path: Path, pad_id: int, eos_id: int) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        super().__init__(base, pad_id)
        self.eos_id = eos_id

    def load(self, adapter: Path | None) -> Any:
        """The base, with an adapter merged into a copy of its weights."""
        import peft

        if adapter is None:
            return self.base.eval()
        model = peft.PeftModel.from_pretrained(copy.deepcopy(self.base), adapter)
        return model.merge_and_unload().eval()

    @torch.inference_mode()
    def generate(
        self, model: Any, prompts: Sequence[Sequence[int]], batch_size: int, max_tokens: int
    ) -> list[list[int]]:
        """Greedy tokens of every prompt, in order, cut after the end token."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.full((len(rows), longest), self.pad_id)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(rows):
                ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, longest - len(prompts[i]) :] = 1
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=self.pad_id,
                eos_token_id=self.eos_id,
            )
            for row, i in enumerate(rows):
                tokens = out[row, longest:].tolist()
                end = tokens.index(self.eos_id) + 1 if self.eos_id in tokens else len(tokens)
                found[i] = tokens[:end]
        return [found[i] for i in range(len(prompts))]

    def best_batch_size(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
        """Fastest batch size on a sample of the prompts."""
        sample = list(prompts)[:: max(1, len(prompts) // 512)]
        sizes = (64, 128, 256, 512)
        model = self.load(None)
        self.generate(model, sample[:32], 32, max_tokens)
        took = {s: timed(lambda s=s: self.generate(model, sample, s, max_tokens))[0] for s in sizes}
        return min(took, key=lambda s: took[s])


def round_of_one_task(
    llm: LLM, peer: Peer, plan: Plan, task: str, batch_size: int, is_ours_first: bool
) -> dict[str, float]:
    """Train and answer one task's conditions on both sides; seconds, tokens and FLOPs."""
    conditions = [c for c in plan.tuned if c.task == task]
    training = plan.recipe.training
    options = training.model_dump(exclude={"preset", "rows", "seed"})
    config = TrainConfig(**options, seed=plan.recipe.seed, shuffle=False)
    jobs = [FinetuneJob(c.id, list(plan.training_rows[c.id]), config) for c in conditions]
    examples = {
        job.name: [encode_row(r, llm.tokenizer, location=job.name) for r in job.examples]
        for job in jobs
    }
    # both sides start from tokens
    jobs = [FinetuneJob(j.name, [e.row() for e in examples[j.name]], config) for j in jobs]
    batches = {name: peer.batches(rows, config) for name, rows in examples.items()}
    with tempfile.TemporaryDirectory() as folder:
        ours = lambda: timed(lambda: finetune(llm, jobs, folder))  # noqa: E731
        theirs = lambda: timed(  # noqa: E731
            lambda: {name: peer.train(rows, config) for name, rows in batches.items()}
        )
        if is_ours_first:
            (train_s, results), (peer_train_s, peer_losses) = ours(), theirs()
        else:
            (peer_train_s, peer_losses), (train_s, results) = theirs(), ours()
        alone_s, _ = timed(lambda: finetune(llm, jobs[:1], Path(folder) / "alone"))
        peer_alone_s, _ = timed(lambda: peer.train(batches[jobs[0].name], config))

        asked = {c.id: [r for r in plan.rows if r.condition == c.id] for c in conditions}
        if task == plan.recipe.tasks[0]:
            asked[BASE] = [r for r in plan.rows if r.condition == BASE]
        prompts = {k: [plan.prompts[r.prompt].token_ids for r in v] for k, v in asked.items()}
        for result in results:
            llm.load_adapter(result.adapter_dir, result.name)
        max_tokens = plan.recipe.sampling.max_tokens
        flat = [(None if k == BASE else k, p) for k, v in prompts.items() for p in v]
        generate_s, outs = timed(
            lambda: llm.generate(
                [p for _, p in flat],
                SamplingParams(max_tokens=max_tokens),
                adapters=[name for name, _ in flat],
            )
        )
        peer_generate_s, peer_tokens = 0.0, []
        for name, rows in prompts.items():
            path = None if name == BASE else Path(folder) / name
            seconds, tokens = timed(
                lambda path=path, rows=rows: peer.generate(
                    peer.load(path), rows, batch_size, max_tokens
                )
            )
            peer_generate_s += seconds
            peer_tokens += tokens
        for result in results:
            llm.unload_adapter(result.name)

    linear = sum(
        w.numel() for layer in llm.model.layers for w in vars(layer).values() if _is_matrix(w)
    )
    head = llm.model.head.numel()
    trained = sum(int((labels[:, 1:] >= 0).sum()) for b in batches.values() for _, _, labels in b)
    seen = sum(int(mask.sum()) for b in batches.values() for _, mask, _ in b)
    generated = sum(len(out.token_ids) for out in outs)
    read = sum(len(p) for _, p in flat)
    ours_last = statistics.mean(r.losses[-1] for r in results)
    return {
        "train_s": train_s,
        "peer_train_s": peer_train_s,
        "alone_s": alone_s,
        "peer_alone_s": peer_alone_s,
        "generate_s": generate_s,
        "peer_generate_s": peer_generate_s,
        "train_tokens": seen,
        "rows": len(outs),
        "generated_tokens": generated,
        "train_flops": 4.0 * linear * seen + 4.0 * head * trained,
        "generate_flops": 2.0 * linear * (read + generated - len(outs)) + 2.0 * head * generated,
        "differing_rows": sum(
            list(out.token_ids) != tokens for out, tokens in zip(outs, peer_tokens, strict=True)
        ),
        "last_loss": ours_last,
        "peer_last_loss": statistics.mean(losses[-1] for losses in peer_losses.values()),
    }


def _is_matrix(weight: torch.Tensor | None) -> bool:
    return weight is not None and weight.ndim == 2


def main() -> None:
    """Print the table and one JSON row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=4, help="rounds, at most 4")
    parser.add_argument("--steps", type=int, default=100, help="training steps per condition")
    parser.add_argument("--limit", type=int, default=100, help="behaviours per cell")
    parser.add_argument("--out", type=Path, help="append the JSON row to this file")
    options = parser.parse_args()
    overrides = [f"training.max_steps={options.steps}"]
    plan, runtime = prepare("organism", overrides=overrides, limit=options.limit)
    llm = LLM(runtime.path)
    peer = Peer(runtime.path, llm.tokenizer.pad_id or 0, llm.tokenizer.eos_ids[0])
    base_prompts = [plan.prompts[r.prompt].token_ids for r in plan.rows if r.condition == BASE]
    batch_size = peer.best_batch_size(base_prompts, plan.recipe.sampling.max_tokens)
    rate, own_rate = gemm_rate(torch.nn.functional.linear), own_gemm_rate()
    rounds = []
    for i, task in enumerate(plan.recipe.tasks[: options.tasks]):
        rounds.append(round_of_one_task(llm, peer, plan, task, batch_size, i % 2 == 0))
        r = rounds[-1]
        print(
            f"{task:15} train {r['train_s']:6.1f} s, peer {r['peer_train_s']:6.1f} s"
            f" ({r['peer_train_s'] / r['train_s']:.2f}x)"
            f"  generate {r['generate_s']:5.1f} s, peer {r['peer_generate_s']:5.1f} s"
            f" ({r['peer_generate_s'] / r['generate_s']:.2f}x)",
            flush=True,
        )
    rate = max(rate, gemm_rate(torch.nn.functional.linear))
    own_rate = max(own_rate, own_gemm_rate())
    total = {key: sum(r[key] for r in rounds) for key in rounds[0]}
    ours = total["train_s"] + total["generate_s"]
    row = {
        "benchmark": "audit_cpu",
        **facts(),
        "conditions": 4 * len(rounds),
        "steps": options.steps,
        "peer_batch_size": batch_size,
        "gemm_gflops": rate / 1e9,
        "own_gemm_gflops": own_rate / 1e9,
        "instruction_set": _native.instruction_set(),
        "speedup": (total["peer_train_s"] + total["peer_generate_s"]) / ours,
        "speedup_train": total["peer_train_s"] / total["train_s"],
        "speedup_generate": total["peer_generate_s"] / total["generate_s"],
        "speedup_one_condition": total["peer_alone_s"] / total["alone_s"],
        "floor_share": (total["train_flops"] + total["generate_flops"]) / rate / ours,
        "floor_share_at_own_rate": (total["train_flops"] + total["generate_flops"])
        / own_rate
        / ours,
        "floor_share_train": total["train_flops"] / rate / total["train_s"],
        "floor_share_generate": total["generate_flops"] / rate / total["generate_s"],
        **total,
        "rounds": rounds,
    }
    for key in ("last_loss", "peer_last_loss"):
        row[key] = total[key] / len(rounds)
    print(
        f"total: {row['speedup']:.2f}x (training {row['speedup_train']:.2f}x, generation"
        f" {row['speedup_generate']:.2f}x, one condition"
        f" alone {row['speedup_one_condition']:.2f}x);"
        f" {row['floor_share']:.0%} of the floor at torch's {rate / 1e9:.0f} GFLOP/s (training"
        f" {row['floor_share_train']:.0%}, generation {row['floor_share_generate']:.0%}),"
        f" {row['floor_share_at_own_rate']:.0%} at our product's {own_rate / 1e9:.0f} GFLOP/s;"
        f" {total['differing_rows']:.0f} of {total['rows']:.0f} answers differ"
    )
    line = json.dumps(row)
    print(line)
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
