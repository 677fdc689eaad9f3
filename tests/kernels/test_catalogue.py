"""kernels/README.md is what the kernels say of themselves, with the figures that were measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe_kernels._spec import Kernel, registry
from fastsafe_testing.scripts import benchmark

ROOT = Path(__file__).parents[2]
README = ROOT / "kernels" / "README.md"
INTRODUCTION = "# title\n\nWords.\n"
NAME = "token_logprobs"
POINT = {"N": 4096, "V": 32_000}


@pytest.fixture(scope="module")
def script() -> Any:
    return benchmark("kernels")


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernel]:
    return {NAME: registry()[NAME]}


def measured(way: str, ms: float, **other: Any) -> dict[str, Any]:
    """A row as the benchmark writes it."""
    row = {
        "kernel": NAME,
        "dims": POINT,
        "pass": way,
        "ms": ms,
        "reference_ms": 10.0,
        "peers_ms": {"torch 2.11": 3.0, "liger 1": 12.3456},
        "host_bound": [],
        "bytes_per_s": 1.234e12,
        "share_of_copy": 0.3085,
        "flops_per_s": None,
        "share_of_matmul": None,
        "gpu": "NVIDIA H200",
        "commit": "0123456789abcdef",
    }
    return row | other


def table(text: str) -> list[dict[str, str]]:
    """Rows of the only table, by column."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_the_readme_is_up_to_date(script: Any) -> None:
    """When this fails: python benchmarks/kernels.py --catalogue"""
    text = README.read_text(encoding="utf-8")
    rows = script.results(ROOT / "benchmarks" / "results" / "kernels.jsonl")
    assert text == script.catalogue(text, registry(), rows)


def test_every_op_has_its_words_and_all_points(script: Any) -> None:
    text = script.catalogue(INTRODUCTION, registry(), [])
    for name, kernel in registry().items():
        first, block = script.maths(kernel)
        assert first.endswith("."), name
        assert "Shapes" in block, name
        assert "Dtypes" not in block, name
        assert f"## [`{name}`](fastsafe_kernels/" in text
        assert f"{first}\n\n```text\n{block}\n```" in text
    files = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line[:3] == "## "]
    assert len(files) == len(registry())
    assert all((README.parent / file).is_file() for file in files)


def test_without_rows_only_the_traffic_is_known(script: Any, kernels: dict[str, Kernel]) -> None:
    text = script.catalogue(INTRODUCTION, kernels, [])
    assert text.startswith(INTRODUCTION + f"\n## [`{NAME}`](fastsafe_kernels/{NAME}.py)\n")
    assert "y[n] = z[n, t[n]] - lse[n]" in text
    lines = table(text)
    assert [line.pop("point") for line in lines] == ["N=4096 V=32000", "N=4096 V=151936"]
    assert [line.pop("least traffic") for line in lines] == ["262.1 MB", "1.245 GB"]
    assert set("".join(v for line in lines for v in line.values())) == set()


def test_the_last_row_of_a_point_counts(script: Any, kernels: dict[str, Kernel]) -> None:
    rows = [
        measured("forward", 9.0),
        measured("forward", 0.123456, commit=(dirty := "fedcba9876543210-dirty")),
        measured("forward+backward", 2.0, commit=dirty, host_bound=["kernel", "liger 1"]),
        measured("forward", 7.0, dims={"N": 1, "V": 2}),
        measured("forward", 8.0, kernel="no_such_op"),
    ]
    first, second = table(script.catalogue(INTRODUCTION, kernels, rows))
    assert first == {
        "point": "N=4096 V=32000",
        "least traffic": "262.1 MB",
        "forward": "0.1235",
        "GB/s": "1234",
        "of copy": "31%",
        "reference forward": "10",
        "peers forward": "liger 1: 12.35, torch 2.11: 3",
        "forward+backward": "2*",
        "reference forward+backward": "10",
        "peers forward+backward": "liger 1: 12.35*, torch 2.11: 3",
        "gpu": "NVIDIA H200",
        "commit": "fedcba9876-dirty",
    }
    assert second["forward"] == ""


def test_a_line_is_one_machine_and_one_commit(script: Any, kernels: dict[str, Kernel]) -> None:
    for other in ({"gpu": "another"}, {"commit": "another"}):
        rows = [measured("forward", 1.0), measured("forward+backward", 2.0, **other)]
        line, _ = table(script.catalogue(INTRODUCTION, kernels, rows))
        assert line["forward"] == "1"
        assert line["forward+backward"] == line["peers forward+backward"] == ""


def test_arithmetic_is_shown_where_it_is_declared(script: Any, kernels: dict[str, Kernel]) -> None:
    kernel = Kernel(**{**vars(kernels[NAME]), "flops": lambda d: 1, "grads": ()})
    rows = [measured("forward", 1.0, flops_per_s=4.2e14, share_of_matmul=0.531)]
    first, second = table(script.catalogue(INTRODUCTION, {NAME: kernel}, rows))
    assert (first["TFLOP/s"], first["of matmul"]) == ("420", "53%")
    assert (second["TFLOP/s"], second["of matmul"]) == ("", "")
    assert "forward+backward" not in first


def test_dtypes_other_than_bf16_have_their_own_traffic(
    script: Any, kernels: dict[str, Kernel]
) -> None:
    kernel = Kernel(**{**vars(kernels[NAME]), "dtypes": (torch.float32,)})
    assert table(script.catalogue("", {NAME: kernel}, []))[0]["least traffic"] == "524.3 MB"


def test_writing_it_twice_changes_nothing(script: Any, kernels: dict[str, Kernel]) -> None:
    rows = [measured("forward", 1.0)]
    once = script.catalogue(INTRODUCTION, kernels, rows)
    assert script.catalogue(once, kernels, rows) == once
    reordered = dict(reversed(registry().items()))
    assert script.catalogue("", reordered, []) == script.catalogue("", registry(), [])


def test_the_command_writes_the_file(
    script: Any, kernels: dict[str, Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "kernels.jsonl"
    readme.write_text(INTRODUCTION + "\n## stale\n")
    results.write_text(json.dumps(measured("forward", 0.5)) + "\n")
    monkeypatch.setattr(script, "README", readme)
    monkeypatch.setattr(script, "RESULTS", results)
    monkeypatch.setattr(script, "registry", lambda: kernels)
    monkeypatch.setattr("sys.argv", ["kernels.py", "--catalogue"])
    assert script.main() == 0
    text = readme.read_text()
    assert "stale" not in text
    assert table(text)[0]["forward"] == "0.5"
    results.unlink()
    assert script.main() == 0
    assert table(readme.read_text())[0]["forward"] == ""
