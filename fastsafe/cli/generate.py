"""``fastsafe generate``: complete a file of prompts."""

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
    ComputeBackend,
    ModelDevice,
    ModelDtype,
    Quantize,
    TemplateVariables,
    batch_size_of,
    template_variables,
)
from fastsafe.errors import UsageError

GRACE_S = 3.0  # time for running rows to finish after Ctrl-C

Applied = Literal["auto", "merged", "mixed"]  # how adapters are applied


def generate(
    checkpoint: CheckpointName,
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS",
            help='JSONL of {"prompt"} or {"messages"}, optionally with "adapter" and "id".',
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSONL of completions; an existing one is resumed.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="PEFT directory that rows may name."),
    ] = None,
    backend: ComputeBackend = "fastsafe",
    batch_size: BatchSize = "auto",
    adapters: Annotated[Applied, typer.Option(help="How adapters are applied.")] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="Length limit of completions.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 decodes greedily.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 keeps all tokens.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="1 keeps all tokens.")] = 1.0,
    min_p: Annotated[float, typer.Option(min=0, max=1, help="0 keeps all tokens.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a completion.")] = None,
    logprobs: Annotated[bool, typer.Option(help="Write token logprobs.")] = False,
    fast: Annotated[
        bool, typer.Option(help="Faster, but the bits of a completion vary with its batch.")
    ] = False,
    device: ModelDevice = "cpu",
    dtype: ModelDtype = "float32",
    quantize: Annotated[Quantize | None, typer.Option(help="nf4 holds the base in 4 bits.")] = None,
    chat_template_kwarg: TemplateVariables = None,
    as_json: AsJson = False,
) -> None:
    """Complete prompts with a model and its adapters. Run the same command again to resume.

    Exit codes: 0 done, 1 error, 2 usage, 130 interrupted.
    """
    from fastsafe import progress
    from fastsafe.audit.backend.open import open_backend
    from fastsafe.commands import generate

    paths = _adapter_paths(adapter or [])
    prompt_file = generate.PromptFile(prompts, paths)
    is_native = backend == "fastsafe"
    if not is_native and (fast or adapters != "auto"):
        raise UsageError(
            "--fast and --adapters: only the backend fastsafe has them, expected neither with"
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
    runtime = open_backend(
        backend,
        checkpoint,
        device=device,
        dtype=dtype,
        batch_size=batch_size_of(batch_size),
        adapters=None if adapters == "auto" else adapters,
        strict=not fast,
        quantize=quantize,
        chat_template_kwargs=template_variables(chat_template_kwarg or ()),
    )
    runtime.load()
    runtime.use(paths)
    identity = generate.identity_of(runtime, paths, params, strict=is_native and not fast)
    display = progress.for_terminal(as_json=as_json)
    with (
        generate.open_completions(out, identity, runtime.facts()) as completions,
        _draining() as drain,
    ):
        done = generate.complete(
            runtime.llm,
            prompt_file,
            completions,
            params,
            progress=display,
            is_stopping=lambda: drain.is_asked,
        )
        if drain.is_asked:
            # even if the last row finished in time: a script that is stopped must not go on
            raise KeyboardInterrupt
    display.event("generated", **vars(done))
    if not as_json:
        typer.echo(f"{prompt_file.count} completions in {out}")


class _Drain:
    """Handles Ctrl-C and SIGTERM: the first lets running rows finish, the second exits at once.

    Attributes:
        is_asked: Whether to start no further rows.
    """

    is_asked = False

    def ask(self, signum: int, frame: object) -> None:
        """Handle Ctrl-C and SIGTERM."""
        if self.is_asked:
            # every completion that was reported is in the file already
            os._exit(EXIT_INTERRUPTED)
        self.is_asked = True
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)
        typer.echo(f"stopping within {GRACE_S:.0f} seconds; again to stop at once", err=True)


@contextmanager
def _draining() -> Iterator[_Drain]:
    drain = _Drain()
    # the default handler of Ctrl-C raises KeyboardInterrupt, also at the end of the grace period
    at_end = signal.default_int_handler
    handlers = {signal.SIGINT: drain.ask, signal.SIGTERM: drain.ask, signal.SIGALRM: at_end}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield drain
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _adapter_paths(words: list[str]) -> dict[str, Path]:
    """Parse the values of --adapter."""
    adapters: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.strip().partition("=")
        if not (name and equals and path):
            raise UsageError(f"--adapter: it is {word!r}, expected NAME=PATH")
        if name in adapters:
            raise UsageError(f"--adapter: {name!r} is given twice, expected each name once")
        adapters[name] = Path(path)
    return adapters
