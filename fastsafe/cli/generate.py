"""``fastsafe generate``: complete prompts of a file, of standard input or of the command line."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastsafe.cli.options import (
    EXIT_INTERRUPTED,
    Adapters,
    AsJson,
    BatchSize,
    CheckpointName,
    ComputeBackend,
    ModelDevice,
    ModelDtype,
    Quantize,
    TemplateVariables,
    adapter_paths,
    announce_loading,
    batch_size_of,
    display,
    echo,
    remark,
    resumable,
    template_variables,
)
from fastsafe.errors import UsageError

if TYPE_CHECKING:
    from fastsafe.commands.generate import Completions
    from fastsafe.commands.prompt_rows import PromptSet

GRACE_S = 3.0  # time for running rows to finish after Ctrl-C

Applied = Literal["auto", "merged", "mixed"]  # how adapters are applied


def generate(
    checkpoint: CheckpointName,
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPTS",
            help='Texts; or a file of {"prompt"} or {"messages"}, optionally with "adapter" and '
            '"id", JSON lines or a table; or - for standard input, JSON lines or a text per line.',
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE|-",
            help="JSONL of completions, an existing one is resumed; - is standard output [default: "
            "the texts alone, on standard output].",
        ),
    ] = None,
    adapter: Adapters = None,
    every_adapter: Annotated[
        bool,
        typer.Option(
            help="Complete a row that names no adapter by the base and by every --adapter, as "
            "texts are."
        ),
    ] = False,
    raw: Annotated[
        bool,
        typer.Option(help="Complete texts as they stand, not as a user's turn of a conversation."),
    ] = False,
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
    with_prompts: Annotated[
        bool, typer.Option(help="Write the prompt into each completion's row.")
    ] = False,
    fast: Annotated[
        bool, typer.Option(help="Faster, but the bits of a completion vary with its batch.")
    ] = False,
    device: ModelDevice = "auto",
    dtype: ModelDtype = "float32",
    quantize: Quantize = None,
    chat_template_kwarg: TemplateVariables = None,
    as_json: AsJson = False,
) -> None:
    """Complete prompts with a model and its adapters.

    With --out FILE, run the same command again to resume.

    Exit codes: 0 done, 1 error, 2 usage, 130 interrupted.
    """
    announce_loading(checkpoint, as_json=as_json)
    from fastsafe.audit.backend.open import open_backend
    from fastsafe.commands import generate
    from fastsafe.commands.prompt_rows import file_of
    from fastsafe.io import atomic
    from fastsafe.progress import Progress

    paths = adapter_paths(adapter)
    file = file_of(prompts)
    prompt_set: PromptSet | None = generate.PromptFile(file, paths) if file else None
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
    if prompt_set is None:
        is_chat = runtime.tokenizer.chat_template is not None and not raw
        if not is_chat and not raw:
            remark(f"{checkpoint} has no chat template: texts are completed as they stand")
        prompt_set = _typed_prompts(prompts, paths, as_turns=is_chat)
    if every_adapter or (file is None and prompts != ["-"]):
        prompt_set.cross()
    path = Path(out) if out is not None and atomic.stream_of(out) is None else None
    with resumable(lambda: path is not None and path.exists()):
        runtime.load()
        runtime.use(paths)
        identity = generate.identity_of(runtime, paths, params, strict=is_native and not fast)
        opened: AbstractContextManager[Completions] = (
            generate.open_completions(path, identity, runtime.facts())
            if path
            else nullcontext(_on_stream(out, prompt_set, as_json=as_json))
        )
        # texts on a terminal show themselves how far the command is
        shown = display(as_json=as_json and path is not None) if out or as_json else Progress()
        with opened as completions, _draining() as drain:
            done = generate.complete(
                runtime.llm,
                prompt_set,
                completions,
                params,
                with_prompts=with_prompts,
                progress=shown,
                is_stopping=lambda: drain.is_asked,
            )
            if drain.is_asked:
                # even if the last row finished in time: a script that is stopped must not go on
                raise KeyboardInterrupt
    shown.event("generated", **vars(done))
    if path and not as_json:
        echo(f"{prompt_set.count} completions in {out}")


def _typed_prompts(words: list[str], adapters: dict[str, Path], *, as_turns: bool) -> "PromptSet":
    """Return the prompts of standard input, or those that the words are."""
    from fastsafe.commands import prompt_rows

    if words == ["-"]:
        rows = prompt_rows.stdin_records(sys.stdin.buffer.read(), as_turns=as_turns)
        return prompt_rows.PromptList("stdin", rows, adapters)
    rows = prompt_rows.text_records(words, "command line", as_turns=as_turns)
    return prompt_rows.PromptList("command line", rows, adapters)


def _on_stream(out: str | None, prompts: "PromptSet", *, as_json: bool) -> "Completions":
    """Return completions as texts on standard output, or as JSON lines on any stream."""
    from fastsafe.commands import generate
    from fastsafe.io import atomic

    if out is None and not as_json:
        return generate.CompletionTexts(prompts, echo)
    descriptor = atomic.stream_of(out or "-")
    if descriptor == 1:
        return generate.CompletionStream("stdout", partial(typer.echo, nl=False))
    assert descriptor is not None, "a path is opened as a file"
    return generate.CompletionStream(str(out), partial(atomic.write_through, descriptor))


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
        echo(f"stopping within {GRACE_S:.0f} seconds; again to stop at once", err=True)


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
