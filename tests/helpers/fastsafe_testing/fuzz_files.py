"""Files of changed values for fuzzing: JSON, JSON lines, tables, Parquet and YAML."""

import csv
import datetime
import io
import json
import math
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastsafe_testing import fuzzing

Read = Callable[[Path], object]
Rng = random.Random


def json_lines(name: str, read: Read) -> fuzzing.Make:
    def make(folder: Path, rows: Any, rng: Rng) -> Callable[[], object]:
        path = folder / name
        each = rows if isinstance(rows, list) else [rows]
        path.write_bytes(b"\n".join(fuzzing.dumped(row, rng) for row in each))
        return partial(read, path)

    return make


def json_file(name: str, read: Read) -> fuzzing.Make:
    def make(folder: Path, value: Any, rng: Rng) -> Callable[[], object]:
        path = folder / name
        path.write_bytes(fuzzing.dumped(value, rng))
        return partial(read, path)

    return make


def table(name: str, read: Read) -> fuzzing.Make:
    def make(folder: Path, rows: Any, rng: Rng) -> Callable[[], object]:
        each = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        columns = list(dict.fromkeys(key for row in each for key in row))
        file = io.StringIO()
        writer = csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",")
        writer.writerow(columns)
        writer.writerows([table_cell(row.get(key)) for key in columns] for row in each)
        text = file.getvalue().encode(errors="surrogatepass")
        (folder / name).write_bytes(fuzzing.damaged(text, rng))
        return partial(read, folder / name)

    return make


def parquet(read: Read) -> fuzzing.Make:
    def make(folder: Path, rows: Any, rng: Rng) -> Callable[[], object]:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet as pq

        path = folder / "rows.parquet"
        odd = rng.choice(parquet_columns())
        try:
            whole = pa.Table.from_pylist([*rows, *rows][:2])
            at = rng.randrange(whole.num_columns + 1)
            whole = whole.slice(0, 2)
            if at < whole.num_columns and rng.random() < 0.8:
                whole = whole.set_column(at, whole.column_names[at], odd)
            else:
                whole = whole.append_column("odd", odd)
            pq.write_table(whole, path)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError):
            pq.write_table(pa.table({"text": ["a", "b"]}), path)  # a value that no column holds
        path.write_bytes(fuzzing.damaged(path.read_bytes(), rng))
        return partial(read, path)

    return make


def yaml_file(name: str, read: Read) -> fuzzing.Make:
    def make(folder: Path, value: Any, rng: Rng) -> Callable[[], object]:
        path = folder / name
        data = fuzzing.dumped(value, rng)
        if rng.random() < 0.3:
            with suppress(yaml.YAMLError, ValueError):  # a raw text is no value
                data = yaml.safe_dump(value, allow_unicode=True).encode(errors="surrogatepass")
        path.write_bytes(data)
        return partial(read, path)

    return make


def value(read: Callable[[Any], object]) -> fuzzing.Make:
    def make(folder: Path, given: Any, rng: Rng) -> Callable[[], object]:
        return partial(read, given)

    return make


def table_cell(value: Any) -> str:
    """Return a value as a cell of a table holds it."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, default=str) if isinstance(value, list | dict) else str(value)


def parquet_columns() -> list[Any]:
    """Return two-row columns of types that JSON lacks, some out of Python's range."""
    pa = pytest.importorskip("pyarrow")
    day = datetime.date(2020, 1, 1)
    return [
        *(pa.array([2**31 - 1, 0], pa.int32()).cast(pa.date32()), pa.array([day, None])),
        *(pa.array([2**62, 0]).cast(pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")),
        *(pa.array([2**62, 0]).cast(pa.duration(unit)) for unit in ("s", "ms", "us", "ns")),
        pa.array([2**62, 0]).cast(pa.timestamp("us", tz="Europe/Paris")),
        pa.array([10**30, 1], pa.decimal128(38, 0)),
        *(pa.array([b"\xff\xfe", b""]), pa.array([{}, {"a": 1}]), pa.array([[], [None]])),
        *(pa.array([None, None]), pa.array([math.nan, math.inf]), pa.array([True, None])),
        *(
            pa.array(["a", "b"]).dictionary_encode(),
            pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
        ),
        *(pa.array([2**64 - 1, 0], pa.uint64()), pa.array([1.5, None], pa.float16())),
    ]
