"""``fastsafe judge``: the answers of a run before other judges; nothing is generated again."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fastsafe.cli.audit import finish, settings_of
from fastsafe.cli.options import AsJson, Debug, Device, ShowCompletions


def judge(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            envvar="FASTSAFE_RECIPE",
            help="Take the judges, guards and thresholds of this recipe [default: the run's].",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A.B=C",
            help="Set judges, guards or thresholds [env var: FASTSAFE_SET, parted by ';'].",
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option(envvar="FASTSAFE_DEVICE", help="Where judges that are models run.")
    ] = Device.CPU,
    as_json: AsJson = False,
    show_completions: ShowCompletions = False,
    debug: Debug = False,
) -> None:
    """Judge the answers of a run again, or by others; verdicts that are there stay.

    Exit codes: 0 done, 1 error, 2 usage, 3 too few answers could be judged, 130 interrupted.
    """
    from fastsafe.audit import progress, run

    done = run.judge(
        run_dir,
        recipe,
        overrides=overrides or settings_of(os.environ.get("FASTSAFE_SET", "")),
        device=device.value,
        api_keys=os.environ,
        show_completions=show_completions,
        progress=progress.for_terminal(as_json=as_json),
    )
    finish(done, as_json)
