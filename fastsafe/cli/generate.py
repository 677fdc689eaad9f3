"""``fastsafe generate``: the completions of a file of prompts."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastsafe.cli.options import (
    EXIT_INTERRUPTED,
    AsJson,
    BatchSize,
    CheckpointName,
    Computes,
    Debug,
    Device,
    Dtype,
    Quantize,
    batch_size_of,
    parted,
)
from fastsafe.errors import UsageError

# How long rows that are being computed may go on after Ctrl-C.
GRACE_S = 3.0


Applied = Literal["auto", "merged", "mixed"]  # how adapters are applied


def generate(
    checkpoint: CheckpointName,
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS",
            help='JSONL of {"prompt"} or {"messages"}, with "adapter" and "id" if there is one.',
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSONL of completions; resumed if there.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            callback=parted,
            help="PEFT directory that rows may name; any number, in the variable parted by ';'.",
        ),
    ] = None,
    backend: Computes = "fastsafe",
    batch_size: BatchSize = "auto",
    adapters: Annotated[Applied, typer.Option(help="How adapters are applied.")] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each completion.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    min_p: Annotated[float, typer.Option(min=0, max=1)] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            callback=parted,
            help="Text that ends a completion; any number, in the variable parted by ';'.",
        ),
    ] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Of each token.")] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Give up equal bits in any batch for speed.")
    ] = False,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = "float32",
    quantize: Annotated[Quantize | None, typer.Option(help="nf4 holds the base in 4 bits.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Complete prompts with a model and its adapters; run again to resume.

    Exit codes: 0 done, 1 error, 2 usage, 130 interrupted.
    """
    from fastsafe import progress
    from fastsafe.audit.backend.on_engine import ModelRuntime
    from fastsafe.commands import generate

    paths = _adapter_paths(adapter or [])
    asked = generate.PromptFile(prompts, paths)
    is_own = backend == "fastsafe"
    if not is_own and (fast or adapters != "auto"):
        raise UsageError(
            "--fast and --adapters: they are of the backend fastsafe, expected neither with"
            f" --backend {backend}; leave them out"
        )
    from fastsafe.engine import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
        logprobs=logprobs,
    )
    runtime = ModelRuntime(
        checkpoint,
        device=device,
        dtype=dtype,
        batch_size=batch_size_of(batch_size),
        backend=backend,
        adapters=None if adapters == "auto" else adapters,
        strict=not fast,
        quantize=quantize,
    )
    runtime.load()
    runtime.use(paths)
    identity = generate.identity_of(runtime, paths, params, strict=is_own and not fast)
    shown = progress.for_terminal(as_json=as_json)
    with (
        generate.open_completions(out, identity, runtime.facts()) as completions,
        _draining() as drain,
    ):
        done = generate.complete(
            runtime.llm, asked, completions, params, progress=shown, is_stopping=drain.is_asked
        )
        if drain.is_asked():
            # though the last row ended in time: who stops a script expects it to stop
            raise KeyboardInterrupt
    shown.event("generated", **vars(done))
    if not as_json:
        typer.echo(f"{asked.count} completions in {out}")


class _Drain:
    """First Ctrl-C or SIGTERM: what is computed may finish for a while. Second: the end."""

    def __init__(self) -> None:
        self._asked = False

    def is_asked(self) -> bool:
        """Whether nothing new should begin."""
        return self._asked

    def ask(self, signum: int, frame: object) -> None:
        """Handle Ctrl-C and SIGTERM."""
        if self._asked:
            # every answer that was reported is in the file already
            os._exit(EXIT_INTERRUPTED)
        self._asked = True
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)
        typer.echo(f"stopping within {GRACE_S:.0f} seconds; again to stop at once", err=True)

    def end(self, signum: int, frame: object) -> None:
        """Handle the end of the grace."""
        raise KeyboardInterrupt


@contextmanager
def _draining() -> Iterator[_Drain]:
    drain = _Drain()
    handlers = {signal.SIGINT: drain.ask, signal.SIGTERM: drain.ask, signal.SIGALRM: drain.end}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield drain
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _adapter_paths(words: list[str]) -> dict[str, Path]:
    """Read the values of --adapter."""
    found: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.strip().partition("=")
        if not (name and equals and path):
            raise UsageError(f"--adapter: it is {word!r}, expected NAME=PATH")
        if name in found:
            raise UsageError(f"--adapter: {name!r} is given twice, expected each name once")
        found[name] = Path(path)
    return found
