"""``fastsafe verify``: our runtime against transformers, on the user's own weights."""

from pathlib import Path
from typing import Annotated

import typer

from fastsafe.cli.options import EXIT_ERROR, AsJson, CheckpointName, Debug, Device, Dtype, fail


def verify(
    checkpoint: CheckpointName,
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT directory that both sides load.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = "float32",
    num_prompts: Annotated[
        int | None, typer.Option("--prompts", min=1, help="How many of the built-in prompts.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare logits, greedy tokens and chat template with transformers.

    transformers itself opens the checkpoint's tokenizer and chat template here.
    Exit codes: 0 equal within the derived tolerance, 1 different or an error, 2 usage.
    """
    import dataclasses
    import json

    from fastsafe.safety.sources import checkpoint_of
    from fastsafe.transformers_backend.verify import verify as compare

    found = compare(
        checkpoint_of(checkpoint),
        adapter=adapter,
        device=device,
        dtype=dtype,
        num_prompts=num_prompts,
    )
    if as_json:
        typer.echo(json.dumps({"equal": found.is_equal, **dataclasses.asdict(found)}))
    else:
        template = "with its chat template" if found.has_template else "without a chat template"
        typer.echo(f"prompts         {found.num_prompts}, {template}")
        typer.echo(f"logits          {found.logits_difference:.2g} of the largest apart")
        typer.echo(
            f"error           {found.error:.2g}, transformers' own {found.reference_error:.2g},"
            f" tolerance {found.tolerance:.2g}"
        )
        typer.echo(f"greedy tokens   {found.parted_rows} prompts part")
        for difference in found.differences:
            typer.echo(difference)
        typer.echo("verdict         " + ("equal" if found.is_equal else "different"))
    if not found.is_equal:
        fail(f"error: {checkpoint}: differs from transformers", EXIT_ERROR)
