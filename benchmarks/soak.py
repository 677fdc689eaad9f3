"""Do memory and speed stay flat over many prompts, and does Ctrl-C lose nothing?

The path of ``fastsafe generate``.

    python benchmarks/soak.py [--rows 100000] [--adapters 4] [--out rows.jsonl]

The organism answers prompts from one JSONL file into another. Every tenth of the rows prints the
rate over that tenth and the memory at its end. The JSON row says how both changed from the second
tenth to the last; the first pays for what is allocated once.

Then the command itself answers a fifth of the rows in a process of its own, is interrupted when it
has answered something, and is run again. The JSON row has its exit code, which is to be 130, how
long it took to drain, and how many answers differ from those above, which is to be none; the exit
code is 1 where one of them is not.
"""

import argparse
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fastsafe import FinetuneJob, SamplingParams, TrainConfig, finetune
from fastsafe.audit.backend.open import open_backend
from fastsafe.commands.generate import PromptFile, complete, identity_of, open_completions
from fastsafe.progress import Progress

MAX_TOKENS = 24
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


def read(path: Path) -> dict[str, str]:
    """Id -> answer; every line is whole, and no id is there twice."""
    rows = [json.loads(line) for line in path.open()]
    assert len({row["id"] for row in rows}) == len(rows), f"{path} has a row twice"
    return {row["id"]: json.dumps(row) for row in rows}


def interrupt(folder: Path, paths: Mapping[str, Path], rows: int) -> dict[str, Any]:
    """Interrupt the command over the first ``rows`` prompts, run it again, and compare."""
    with (folder / "prompts.jsonl").open() as whole, (folder / "few.jsonl").open("w") as few:
        few.writelines(islice(whole, rows))
    out = folder / "resumed.jsonl"
    call = "import sys; from fastsafe.cli import main; sys.argv[0] = 'fastsafe'; main()"
    words: Sequence[str | Path] = [
        *(sys.executable, "-c", call, "generate", "organism", folder / "few.jsonl"),
        *("--out", out, "--max-tokens", str(MAX_TOKENS)),
        *(word for name, path in paths.items() for word in ("--adapter", f"{name}={path}")),
    ]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    exit_code, seconds = process.wait(), time.perf_counter() - began
    kept = read(out)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    resumed, unbroken = read(out), read(folder / "out.jsonl")
    return {
        "interrupt_exit_code": exit_code,
        "interrupt_drain_s": seconds,
        "interrupt_rows_kept": len(kept),
        "interrupt_rows": len(resumed),
        "interrupt_differing": sum(
            resumed.get(str(i + 1)) != unbroken[str(i + 1)] for i in range(rows)
        ),
    }


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
    if options.rows < 10:
        parser.error(f"--rows: it is {options.rows}, expected at least 10")
    runtime = open_backend("fastsafe", "organism")
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
        prompts = PromptFile(folder / "prompts.jsonl", paths)
        params = SamplingParams(max_tokens=MAX_TOKENS)
        watch = Watch(max(1, options.rows // 10))
        identity = identity_of(runtime, paths, params, strict=True)
        with open_completions(folder / "out.jsonl", identity, runtime.facts()) as completions:
            done = complete(runtime.llm, prompts, completions, params, progress=watch)
        written = len(read(folder / "out.jsonl"))
        ended = interrupt(folder, paths, options.rows // 5)
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
        **ended,
    }
    line = json.dumps(row)
    print(line)
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    lost = options.rows - written + ended["interrupt_differing"]
    if lost or ended["interrupt_exit_code"] != 130:
        sys.exit(
            f"soak: {lost} rows differ, exit code {ended['interrupt_exit_code']}, expected 130"
        )


if __name__ == "__main__":
    main()
