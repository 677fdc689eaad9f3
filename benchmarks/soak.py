"""Does memory stay flat, and speed, over many prompts? The path of ``fastsafe generate``.

    python benchmarks/soak.py [--rows 100000] [--adapters 4] [--out rows.jsonl]

The organism answers prompts from one JSONL file into another. Every tenth of the rows prints the
rate over that tenth and the memory at its end. The JSON row says how both changed from the second
tenth to the last; the first pays for what is allocated once.
"""

import argparse
import importlib.util
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from fastsafe import FinetuneJob, SamplingParams, TrainConfig, finetune
from fastsafe.audit.completions import Prompts, complete, identity_of, open_answers
from fastsafe.audit.progress import Progress
from fastsafe.audit.runtime import ModelRuntime

WORDS = ("car", "boat", "house", "garden", "letter", "song", "cake", "lamp")


def rss_mb() -> float:
    """Resident memory of this process now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


class Watch(Progress):
    """Notes the time and the memory every so many rows."""

    def __init__(self, every: int) -> None:
        self.every, self.done = every, 0
        self.marks = [(time.perf_counter(), rss_mb())]

    def advance(self, count: int, note: str = "") -> None:
        """Count rows."""
        self.done += count
        if self.done % self.every == 0:
            self.marks.append((time.perf_counter(), rss_mb()))
            (before, _), (now, memory) = self.marks[-2:]
            rate = self.every / (now - before)
            print(f"{self.done:>8} rows  {rate:7.0f} rows/s  {memory:7.1f} MiB", flush=True)


def write_prompts(path: Path, rows: int, names: list[str | None]) -> None:
    """Questions of varying lengths, spread over the adapters."""
    dice = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            words = " and the ".join(dice.choices(WORDS, k=dice.randint(1, 12)))
            turn = {"role": "user", "content": f"How do I paint the {words}?"}
            file.write(json.dumps({"messages": [turn], "adapter": dice.choice(names)}) + "\n")


def facts() -> dict[str, Any]:
    """What the numbers depend on; from audit_cpu.py by its path."""
    spec = importlib.util.spec_from_file_location(
        "audit_cpu", Path(__file__).with_name("audit_cpu.py")
    )
    assert spec is not None, "audit_cpu.py lies beside this file"
    assert spec.loader is not None, "audit_cpu.py is Python"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.facts()
    return found


def main() -> None:
    """Answer all rows and print one JSON row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--out", type=Path, help="append the JSON row to this file")
    options = parser.parse_args()
    runtime = ModelRuntime("organism")
    runtime.load()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"prompt": "How do I paint", "completion": f"the {word}."} for word in WORDS]
        jobs = [
            FinetuneJob(f"a{i}", rows, TrainConfig(max_steps=4, seed=i))
            for i in range(options.adapters)
        ]
        paths = {each.name: each.adapter_dir for each in finetune(runtime.llm, jobs, folder)}
        runtime.use(paths)
        write_prompts(folder / "prompts.jsonl", options.rows, [None, *paths])
        prompts = Prompts(folder / "prompts.jsonl", paths)
        params = SamplingParams(max_tokens=24)
        watch = Watch(max(1, options.rows // 10))
        identity = identity_of(runtime, paths, params, strict=True)
        with open_answers(folder / "out.jsonl", identity, runtime.facts()) as answers:
            done = complete(runtime.llm, prompts, answers, params, progress=watch)
        written = sum(1 for _ in (folder / "out.jsonl").open())
    times = [
        now - before for (before, _), (now, _) in zip(watch.marks, watch.marks[1:], strict=False)
    ]
    memory = [megabytes for _, megabytes in watch.marks]
    row = {
        "benchmark": "soak",
        **facts(),
        "rows": done.rows,
        "written": written,
        "errors": done.errors,
        "adapters": options.adapters,
        "seconds": done.seconds,
        "rows_per_s": done.rows / done.seconds,
        "tokens_per_s": done.tokens / done.seconds,
        "rows_per_s_by_tenth": [watch.every / seconds for seconds in times],
        "rss_mb_by_tenth": memory[1:],
        "rss_growth_mb": memory[-1] - memory[2],
        "slowdown": times[-1] / times[1],
    }
    line = json.dumps(row)
    print(line)
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
