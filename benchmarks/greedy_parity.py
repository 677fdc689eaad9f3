"""Do greedy answers on a real model equal transformers', token for token?

    python benchmarks/greedy_parity.py [--model smollm2] [--prompts 500] [--tokens 48]

Probes of five formats, harmful ones and their benign twins, are answered by both in fp32. Where two
answers part, their tokens' logits are computed by transformers in fp64: ``gap`` is how far apart
they are, ``rounding`` how far fp32 moves any logit of that step on either side. A gap below twice
that is a tie, which no fp32 runtime decides for the other. No answer is printed or kept.
"""

import argparse
import json
import platform
import time
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsafe import LLM, SamplingParams, _native
from fastsafe.io import hub
from fastsafe.safety.behaviours import seed_behaviours
from fastsafe.safety.formats import formats, seed_translator

FORMATS = ("plain", "code", "translation", "classification", "true_false")
BATCH = 25


def prompts(llm: LLM, count: int) -> list[list[int]]:
    """Return ``count`` probes and twins, spread over behaviours and formats, as chats."""
    translate = seed_translator()
    texts = [
        formats()[name].ask(behaviour, side, translate)
        for behaviour in seed_behaviours()
        for side in (True, False)
        for name in FORMATS
    ]
    chosen = [texts[i * len(texts) // count] for i in range(count)]
    return [llm.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in chosen]


def theirs(folder: Any, rows: list[list[int]], tokens: int) -> list[list[int]]:
    """Return transformers' greedy tokens, from batches padded on the left."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    ends = model.generation_config.eos_token_id
    answers: list[list[int]] = []
    for begin in range(0, len(rows), BATCH):
        batch = rows[begin : begin + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        for row in out[:, width:].tolist():
            answers.append(row[: row.index(ends) + 1] if ends in row else row)
    return answers


def parting(folder: Any, llm: LLM, cases: list[tuple[list[int], int, int]]) -> list[dict[str, Any]]:
    """Return the gap and the rounding of each (context, our token, their token)."""
    found = []
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    single = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for context, mine, other in cases:
        with torch.inference_mode():
            ids = torch.tensor([context])
            truth = exact(ids).logits[0, -1]
            sides = [single(ids).logits[0, -1].double(), llm.logits(context)[-1].double()]
        rounding = max((side - truth).abs().max().item() for side in sides)
        gap = (truth[mine] - truth[other]).abs().item()
        found.append({"gap": gap, "rounding": rounding, "is_tie": gap <= 2 * rounding})
    return found


def main() -> None:
    """Print one row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    folder = hub.resolve(options.model)
    llm = LLM(folder, device="cpu", dtype="float32")
    rows = prompts(llm, options.prompts)
    start = time.perf_counter()
    outs = llm.generate(rows, SamplingParams(max_tokens=options.tokens))
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    others = theirs(folder, rows, options.tokens)
    their_seconds = time.perf_counter() - start
    cases = []
    for row, out, other in zip(rows, outs, others, strict=True):
        mine = list(out.token_ids)
        at = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
        if at is not None:
            cases.append(([*row, *mine[:at]], mine[at], other[at]))
        elif len(mine) != len(other):
            raise SystemExit(f"an answer ends after {len(mine)} tokens, theirs after {len(other)}")
    result = {
        "model": options.model,
        "prompts": len(rows),
        "tokens": sum(len(out.token_ids) for out in outs),
        "parted": parting(folder, llm, cases),
        "seconds": round(seconds, 1),
        "their_seconds": round(their_seconds, 1),
        "machine": f"{platform.machine()}, {_native.instruction_set()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
