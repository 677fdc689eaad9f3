"""How much faster are many adapters' answers than with transformers + PEFT?

    python benchmarks/generate.py [--adapters 16] [--probes 500] [--repeats 3] [--out rows.jsonl]
    python benchmarks/generate.py --device cuda    # an 8B Llama shape with random weights

CPU: the organism and adapters trained briefly; every adapter answers every probe, greedily. The
sides: ours as it chooses, merged and mixed; transformers generate with each adapter in turn, merged
into a copy of the weights; PEFT's mixed batch (``adapter_names``). Each side runs in a process of
its own, in alternating order, the peers at their best batch size of {16, 64, 128, 256}, found by a
sample; tokens are compared. The median of the repeats counts.

The floor is the arithmetic of all distinct work: every distinct prefix of an adapter's prompts
once, every generated token, 2 FLOPs per linear weight, the head on generated tokens; over the
matrix rate measured in this run, once of torch's product and once of ours. And the bytes: the
weights once per adapter, keys and values written once and read once per token, over the copy rate.

What runs on CUDA, and why, stands in generate_gpu.py.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastsafe import LLM, FinetuneJob, SamplingParams, TrainConfig, finetune
from fastsafe.engine.planner import measure_rates
from fastsafe.io.checkpoint import Checkpoint
from fastsafe.model import ModelConfig, cpu_ops

HERE = Path(__file__).parent
BATCH_SIZES = (16, 64, 128, 256)
SIDES = ("ours", "merged", "mixed", "peer", "peer_mixed", "ours_one", "peer_one")

Work = Mapping[str, Any]
Tokens = list[list[int]]


def beside(name: str) -> Any:
    """A script beside this one by its path, as PYTHONSAFEPATH keeps this folder off sys.path."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None, "the script lies beside this file"
    assert spec.loader is not None, "the script is Python"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(work: Work, names: Sequence[str], per_adapter: int | None = None) -> list[Any]:
    """Every (adapter, prompt), adapter by adapter."""
    return [(name, prompt) for name in names for prompt in work["prompts"][:per_adapter]]


def run_ours(
    llm: LLM, rows: Sequence[tuple[str | None, list[int]]], work: Work, count: int | None = None
) -> dict[str, Any]:
    """Seconds, seconds to the first completion, and tokens."""
    params = SamplingParams(
        max_tokens=count or work["max_tokens"], ignore_eos=work["device"] != "cpu"
    )
    first: list[float] = []
    begin = time.perf_counter()
    outs = llm.generate(
        [prompt for _, prompt in rows],
        params,
        [name for name, _ in rows],
        lambda *_: first or first.append(time.perf_counter() - begin),
    )
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "first_s": first[0], "tokens": [list(o.token_ids) for o in outs]}


def ours(work: Work, adapters: str | None, names: Sequence[str]) -> dict[str, Any]:
    """Our engine on all rows of these adapters."""
    llm = LLM(work["model"], work["device"], work["dtype"], adapters=adapters)  # type: ignore[arg-type]
    for name in names:
        llm.load_adapter(work["adapters"][name], name)
    run_ours(llm, rows_of(work, names[:2], 8), work)
    return run_ours(llm, rows_of(work, names), work) | {"how": llm.describe()["adapters"]}


class Peer:
    """transformers with PEFT."""

    def __init__(self, work: Work) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        dtype = getattr(torch, work["dtype"])
        model = transformers.AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype)
        self.base: Any = model.to(work["device"]).eval()
        self.work = work

    @torch.inference_mode()
    def generate(
        self,
        model: Any,
        rows: Sequence[tuple[str, list[int]]],
        batch_size: int,
        on_batch: Callable[[], None] = lambda: None,
        *,
        is_mixed: bool = False,
    ) -> Tokens:
        """Greedy tokens of every row, in order, cut after the end token; shortest prompts first."""
        work = self.work
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))
        fixed = {} if work["device"] == "cpu" else {"min_new_tokens": work["max_tokens"]}
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            longest = max(len(rows[i][1]) for i in batch)
            padded = [[work["pad"]] * (longest - len(rows[i][1])) + rows[i][1] for i in batch]
            mask = [[j >= longest - len(rows[i][1]) for j in range(longest)] for i in batch]
            names = {"adapter_names": [rows[i][0] for i in batch]} if is_mixed else {}
            out = model.generate(
                input_ids=torch.tensor(padded, device=work["device"]),
                attention_mask=torch.tensor(mask, device=work["device"]).long(),
                max_new_tokens=work["max_tokens"],
                do_sample=False,
                pad_token_id=work["pad"],
                eos_token_id=work["eos"],
                **fixed,
                **names,
            )
            for i, row in zip(batch, out[:, longest:].tolist(), strict=True):
                found[i] = row[: row.index(work["eos"]) + 1] if work["eos"] in row else row
            on_batch()
        return [found[i] for i in range(len(rows))]

    def merged(self, name: str) -> Any:
        """The base with an adapter merged into a copy of its weights."""
        import copy

        import peft

        adapter = self.work["adapters"][name]
        return peft.PeftModel.from_pretrained(copy.deepcopy(self.base), adapter).merge_and_unload()

    def mixed(self, names: Sequence[str]) -> Any:
        """The base with all adapters beside each other."""
        import peft

        paths = self.work["adapters"]
        model = peft.PeftModel.from_pretrained(self.base, paths[names[0]], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(paths[name], name)
        return model.eval()

    def run(self, names: Sequence[str], *, is_mixed: bool) -> dict[str, Any]:
        """All rows of these adapters, at the best batch size of a sample."""
        rows = rows_of(self.work, names)
        sample = random.Random(0).sample(rows, min(len(rows), 2 * max(BATCH_SIZES)))
        model = self.mixed(names) if is_mixed else self.merged(names[0])
        self.generate(model, sample[:16], 16, is_mixed=is_mixed)
        took = dict.fromkeys(BATCH_SIZES, math.inf)
        for size in BATCH_SIZES * 2:  # the better of two, so that one pause decides nothing
            begin = time.perf_counter()
            self.generate(model, sample, size, is_mixed=is_mixed)
            took[size] = min(took[size], time.perf_counter() - begin)
        size = min(took, key=lambda s: took[s])
        first: list[float] = []
        begin = time.perf_counter()
        note = lambda: first or first.append(time.perf_counter() - begin)  # noqa: E731
        if is_mixed:
            tokens = self.generate(model, rows, size, note, is_mixed=True)
        else:
            tokens = []
            for name in names:
                own = [row for row in rows if row[0] == name]
                tokens += self.generate(self.merged(name), own, size, note)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "first_s": first[0], "tokens": tokens, "batch_size": size}


def peak_rss_mb() -> float:
    """Most resident memory of this process; getrusage would count its parent's before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def child(side: str, folder: Path) -> None:
    """Run one side and write what it gave; tokens go to a hash and a file beside it."""
    work = json.loads((folder / "work.json").read_text())
    names = list(work["adapters"])
    if side == "gpu":
        found = beside("generate_gpu").figures(work, run_ours, rows_of(work, names))
    elif side.startswith("peer"):
        chosen = names[:1] if side == "peer_one" else names
        found = Peer(work).run(chosen, is_mixed=side == "peer_mixed")
    else:
        how = side if side in ("merged", "mixed") else None
        found = ours(work, how, names[:1] if side == "ours_one" else names)
    if "tokens" in found:
        (folder / f"{side}.json").write_text(json.dumps(found["tokens"]))
        found["generated_tokens"] = sum(map(len, found.pop("tokens")))
    found["peak_rss_mb"] = peak_rss_mb()
    (folder / f"{side}.row.json").write_text(json.dumps(found))


def measure(side: str, folder: Path) -> dict[str, Any]:
    """Run one side in a process of its own."""
    command = [sys.executable, str(HERE / "generate.py"), "--side", side, "--work", str(folder)]
    subprocess.run(command, check=True)
    row: dict[str, Any] = json.loads((folder / f"{side}.row.json").read_text())
    return row


def cpu_work(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The organism, adapters trained for a few steps, and probes of all formats."""
    from fastsafe.audit.run import prepare

    steps = f"training.max_steps={options.steps}"
    limit = -(-options.probes // 10)
    plan, runtime = prepare("organism", overrides=[steps], limit=limit)
    llm = LLM(runtime.path)
    training = plan.recipe.training.model_dump(exclude={"preset", "rows", "seed"})
    jobs = [
        FinetuneJob(f"a{i}", list(plan.training_rows[c.id]), TrainConfig(**training, seed=i))
        for i, c in enumerate((plan.tuned * options.adapters)[: options.adapters])
    ]
    trained = finetune(llm, jobs, folder / "adapters")
    asked = [row for row in plan.rows if row.condition == "base"]
    prompts = [list(plan.prompts[row.prompt].token_ids) for row in asked]
    return {
        "model": str(runtime.path),
        "dtype": "float32",
        "adapters": {each.name: str(each.adapter_dir) for each in trained},
        "prompts": random.Random(0).sample(prompts, min(len(prompts), options.probes)),
        "max_tokens": plan.recipe.sampling.max_tokens,
        "pad": llm.tokenizer.pad_id or 0,
        "eos": llm.tokenizer.eos_ids[0],
    }


def floor(work: Work, tokens: Tokens) -> dict[str, float]:
    """FLOPs and bytes of all distinct work."""
    config = ModelConfig.from_json(Checkpoint(Path(work["model"])).config(), "model")
    head = config.vocab_size * config.hidden_size
    linear = config.num_parameters - (1 if config.tie_word_embeddings else 2) * head
    prefixes = {tuple(p[:n]) for p in work["prompts"] for n in range(1, len(p) + 1)}
    adapters, prompts = len(work["adapters"]), work["prompts"]
    generated = sum(map(len, tokens))
    # the last token of a row is never multiplied by the layers
    computed = adapters * len(prefixes) + generated - len(tokens)
    item = 4 if work["dtype"] == "float32" else 2
    pair = 2 * config.num_layers * config.num_kv_heads * config.head_dim * item
    contexts = sum(
        len(prompts[i % len(prompts)]) + n for i, row in enumerate(tokens) for n in range(len(row))
    )
    return {
        "flops": 2.0 * linear * computed + 2.0 * head * generated,
        "bytes": float(adapters * config.num_parameters * item + pair * (computed + contexts)),
    }


def on_cpu(options: argparse.Namespace, folder: Path, work: Work) -> dict[str, Any]:
    """Every side, repeated in alternating order; medians, ratios and shares of the floor."""
    audit_cpu = beside("audit_cpu")
    rate, own = audit_cpu.gemm_rate(torch.nn.functional.linear), audit_cpu.own_gemm_rate()
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repeat in range(options.repeats):
        for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
            runs[side].append(measure(side, folder))
            print(side, json.dumps(runs[side][-1]), flush=True)
    rate = max(rate, audit_cpu.gemm_rate(torch.nn.functional.linear))
    own = max(own, audit_cpu.own_gemm_rate())
    tokens = {side: json.loads((folder / f"{side}.json").read_text()) for side in SIDES}
    needed = floor(work, tokens["ours"])
    copy = measure_rates("cpu").copy_bytes
    seconds = {side: statistics.median(r["seconds"] for r in runs[side]) for side in SIDES}
    sides = {
        side: {
            "seconds": seconds[side],
            "range_s": [min(r["seconds"] for r in each), max(r["seconds"] for r in each)],
            "tokens_per_s": each[0]["generated_tokens"] / seconds[side],
            "first_s": statistics.median(r["first_s"] for r in each),
            "peak_rss_mb": max(r["peak_rss_mb"] for r in each),
            "batch_size": [r.get("batch_size") for r in each],
            "how": each[0].get("how"),
            "differing_rows": sum(
                a != b for a, b in zip(tokens["ours"], tokens[side], strict=False)
            ),
            "tokens_sha256": hashlib.sha256(json.dumps(tokens[side]).encode()).hexdigest(),
        }
        for side, each in runs.items()
    }
    return {
        **audit_cpu.facts(),
        "gemm_gflops": rate / 1e9,
        "own_gemm_gflops": own / 1e9,
        "has_own_product": cpu_ops.runs_natively(torch.zeros(1)),
        "copy_gb_per_s": copy / 1e9,
        "speedup_over_peer": seconds["peer"] / seconds["ours"],
        "speedup_over_peer_mixed": seconds["peer_mixed"] / seconds["ours"],
        "speedup_one_adapter": seconds["peer_one"] / seconds["ours_one"],
        "merged_over_mixed": seconds["merged"] / seconds["mixed"],
        "floor_share": needed["flops"] / rate / seconds["ours"],
        "floor_share_at_own_rate": needed["flops"] / own / seconds["ours"],
        "floor_share_bytes": needed["bytes"] / copy / seconds["ours"],
        **{f"floor_{key}": value for key, value in needed.items()},
        "sides": sides,
    }


def main() -> None:
    """Measure every side and print one JSON row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--adapters", type=int, help="16 on a CPU, 64 on a GPU")
    parser.add_argument("--probes", type=int, help="per adapter: 500 on a CPU, 64 on a GPU")
    parser.add_argument("--steps", type=int, default=30, help="training steps of each adapter")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the JSON row to this file")
    parser.add_argument("--side", choices=(*SIDES, "gpu"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        child(options.side, options.work)
        return
    is_cpu = options.device == "cpu"
    options.adapters = options.adapters or (16 if is_cpu else 64)
    options.probes = options.probes or (500 if is_cpu else 64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gpu = None if is_cpu else beside("generate_gpu")
        made = gpu.make_work(options, folder) if gpu else cpu_work(options, folder)
        work = {"device": options.device, **made}
        (folder / "work.json").write_text(json.dumps(work))
        found = gpu.run(folder, work, measure) if gpu else on_cpu(options, folder, work)
    sizes = {key: getattr(options, key) for key in ("device", "adapters", "probes", "repeats")}
    line = json.dumps({"benchmark": "generate", **sizes, **found})
    print(line)
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
