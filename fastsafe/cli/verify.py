"""``fastsafe verify``: compare our runtime with transformers on the user's own weights."""

from typing import Annotated

import typer

from fastsafe.cli.options import (
    EXIT_ERROR,
    Adapters,
    AsJson,
    CheckpointName,
    ModelDevice,
    ModelDtype,
    adapter_paths,
    announce_loading,
    echo,
    fail,
)
from fastsafe.errors import UsageError


def verify(
    checkpoint: CheckpointName,
    adapter: Adapters = None,
    device: ModelDevice = "auto",
    dtype: ModelDtype = "float32",
    num_prompts: Annotated[
        int | None, typer.Option("--prompts", min=1, help="Number of built-in prompts to use.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare logits, tokens and chats with transformers.

    The tokenizer and chat template of the checkpoint are opened by transformers itself. With an
    adapter, both runtimes load it.

    Exit codes: 0 equal within the derived tolerance, 1 different, 2 any error.
    """
    announce_loading(checkpoint, as_json=as_json)
    import dataclasses
    import json

    from fastsafe.io import hub
    from fastsafe.transformers_backend.verify import verify as compare

    adapters = adapter_paths(adapter)
    if len(adapters) > 1:
        raise UsageError(
            f"--adapter: {len(adapters)} are given, expected at most one; verify one after another"
        )
    result = compare(
        hub.resolve(checkpoint),
        adapter=next(iter(adapters.values()), None),
        device=device,
        dtype=dtype,
        num_prompts=num_prompts,
    )
    if as_json:
        typer.echo(json.dumps({"equal": result.is_equal, **dataclasses.asdict(result)}))
    else:
        template = "with its chat template" if result.has_template else "without a chat template"
        echo(f"prompts         {result.num_prompts}, {template}")
        echo(f"logits          differ by {result.logits_difference:.2g} of the largest logit")
        echo(
            f"error           {result.error:.2g}, transformers' own {result.reference_error:.2g},"
            f" tolerance {result.tolerance:.2g}"
        )
        echo(f"greedy tokens   {result.parted_rows} prompts differ")
        for difference in result.differences:
            echo(difference)
        echo("verdict         " + ("equal" if result.is_equal else "different"))
    if not result.is_equal:
        fail(f"{checkpoint}: differs from transformers", EXIT_ERROR, as_json=as_json)
