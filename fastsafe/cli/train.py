"""``fastsafe train``: a base and a data set to an adapter, or to a whole tuned model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastsafe.cli.options import AsJson, Debug, Device, parted, shown
from fastsafe.errors import UsageError

if TYPE_CHECKING:
    from fastsafe.commands.train import Plan


def train(
    base: Annotated[
        str, typer.Argument(help="Checkpoint folder, hub id or 'organism'.", show_default=False)
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            help="Data: .jsonl, .json, .csv or .parquet files, or hub ids (owner/name[:file]); "
            "each is trained on by a job of its own.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder; each job writes OUT/NAME.")] = Path("adapters"),
    preset: Annotated[
        str | None, typer.Option(help="Published set-up: paper1 or paper2; options win over it.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job [default: the file's].")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Updates are scaled by alpha / rank.")] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="Linear modules parted by commas, or all-linear."),
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Of the adapter's inputs.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="constant, linear or cosine after warm-up.")
    ] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of warm-up.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the rows.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(envvar="FASTSAFE_TRAIN_BATCH_SIZE", help="Rows per optimizer step."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, row order and dropout.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds parted by commas: a job for each, trained together.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Gradients are scaled down to it; 0 is off.")
    ] = None,
    loss_on: Annotated[
        str | None, typer.Option(help="Tokens that are trained: completion or all.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens of a row [default: the model's].")
    ] = None,
    truncate: Annotated[
        bool | None,
        typer.Option("--truncate/--no-truncate", help="Cut longer rows instead of stopping."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="lora trains an adapter, full all weights.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="nf4 holds the base in 4 bits.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="Name of a training objective, or JSON with its options.")
    ] = None,
    safety_data: Annotated[
        str | None, typer.Option(help="Safety rows to mix in.", metavar="FILE")
    ] = None,
    share: Annotated[float | None, typer.Option(help="Of safety rows in the mixture.")] = None,
    column_map: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="WHAT=KEY",
            callback=parted,
            help="What the columns are: user and assistant (and system), prompt and completion, "
            "messages, or text; any number, in the variable parted by ';'.",
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    limit: Annotated[int | None, typer.Option(help="Most rows per data set.", min=1)] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the settings above.", metavar="FILE")
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints; 0 writes none.", min=0),
    ] = None,
    drift_every: Annotated[
        int | None,
        typer.Option(help="Steps between readings of the drift from the base; 0 reads none."),
    ] = None,
    drift_probes: Annotated[
        str | None,
        typer.Option(help="Behaviours it is read on [default: 16 shipped].", metavar="FILE"),
    ] = None,
    drift_refusal: Annotated[
        str | None, typer.Option(help="How an answer opens that refuses.")
    ] = None,
    drift_affirmative: Annotated[
        str | None, typer.Option(help="How an answer opens that does not.")
    ] = None,
    drift_stop_above: Annotated[
        float | None, typer.Option(help="Nats of KL that end a job early.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Continue what was begun, or train it again."),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, write nothing.")
    ] = False,
    show_example: Annotated[
        bool,
        typer.Option("--show-example", help="Print one row, what is trained marked, and exit."),
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a base on data: one job per data set and seed, all trained together.

    Exit codes: 0 done, 1 error, 2 usage, 130 interrupted.
    """
    options = dict(locals())
    import json

    from fastsafe import progress
    from fastsafe.commands import train, train_settings
    from fastsafe.data.shapes import parse_mapping

    names = train_settings.names()
    given = {key: value for key, value in options.items() if key in names}
    if target_modules is not None and target_modules != "all-linear":
        given["target_modules"] = tuple(word.strip() for word in target_modules.split(","))
    if objective is not None and objective.lstrip().startswith("{"):
        given["objective"] = _json(objective)
    plan = train.plan(
        base,
        data,
        given,
        name=name,
        preset=preset,
        config_file=config,
        seeds=_seeds(seeds),
        mapping=parse_mapping(column_map) if column_map else None,
        safety_data=safety_data,
        limit=limit,
        device=device,
    )
    if show_example:
        first = plan.data[0]
        typer.echo(train.marked(first.encoded.examples[0], plan.tokenizer))
        return
    if dry_run and as_json:
        typer.echo(json.dumps(plan.describe()))
        return
    if not as_json:
        for line in lines(plan):
            typer.echo(line)
    if dry_run:
        return
    shows = progress.for_terminal(as_json=as_json)
    announce = (lambda line: None) if as_json else typer.echo
    for result in train.execute(plan, out, shows, resume=resume, announce=announce):
        if not as_json:
            facts = train.summary(result)
            typer.echo(
                f"{facts['path']}: {facts['steps']} steps, {facts['tokens']:,} tokens, "
                f"loss {facts['first_loss']:.3f} to {facts['last_loss']:.3f}"
                + (", stopped early as it drifted too far" if facts["stopped_early"] else "")
            )


def lines(plan: "Plan") -> list[str]:
    """Return the plan as text."""
    facts = plan.describe()
    found = [f"base: {facts['base']} on {facts['device']}", *facts["preset"], "settings:"]
    width = max(map(len, facts["settings"]))
    for key, setting in facts["settings"].items():
        found.append(f"  {key:<{width}}  {_shown(setting['value'])}  ({setting['origin']})")
    for data in facts["data"]:
        share = data["trained_tokens"] / data["tokens"]
        found += [
            f"data: {data['source']}",
            f"  Mapping found: {data['mapping']}",
            f"  {data['tokens']:,} tokens, {share:.0%} of them trained; longest row "
            f"{data['longest']:,}; {data['truncated']:,} rows truncated",
        ]
    for job in facts["jobs"]:
        found.append(
            f"job {job['name']}: {job['rows']:,} rows, {job['steps']:,} steps, "
            f"{job['warmup_steps']:,} of warm-up, seed {job['seed']}"
        )
    memory = facts["memory"]
    found.append(
        f"memory: {memory['bytes_per_job'] / 2**20:,.1f} MiB per job for "
        f"{memory['parameters_per_job']:,} trained parameters"
    )
    return found


def _shown(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else shown(value)


def _seeds(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() for word in words) or len(set(words)) < len(
        words
    ):
        raise UsageError(f"--seeds: it is {text!r}, expected different numbers such as 0,1,2")
    return tuple(map(int, words))


def _json(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"--objective: {text!r:.80} is not JSON ({error})") from None
