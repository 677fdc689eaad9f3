"""Read the rows of a data file strictly: a malformed row is an error that names its file and line.

Every command reads its data with this module: ``records`` goes by the suffix of the file,
``json_lines`` ignores it, and ``table`` reads tables that may lack a header. Rows are counted from
0, as in ``fastsafe lint --json``; a header and blank lines do not count.
"""

import csv
import gzip
import json
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from fastsafe.errors import DataError

MAX_FIELD_CHARS = 100 << 20  # the default of the csv module, 128 Ki, is less than a paper

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # what PowerShell's > and some editors write
_BOM = b"\xef\xbb\xbf"
_PACKED = (".gz", ".xz")

# names that pandas gives to columns without one, such as the index that it writes
_UNNAMED = re.compile(r"Unnamed: \d+(\.\d+)*|__index_level_\d+__|")
# keys under which a JSON object may hold the rows, as in SQuAD
_WRAPPERS = ("data", "rows", "train", "test", "examples", "instances")

_NON_SPACE = re.compile(r"\S")

_Numbered = tuple[int | None, Any]  # line where a value begins, None without lines, and the value


class Record(NamedTuple):
    """One row as the file holds it.

    Attributes:
        location: File and place, such as "train.jsonl: row 2, line 3", for errors.
        number: Line where the row begins, from 1; in Parquet its index, from 0.
        row: Values by key or column.
    """

    location: str
    number: int
    row: dict[str, Any]


def records(path: Path) -> Iterator[Record]:
    """Read the rows of a file by its suffix.

    - .jsonl, .ndjson: one object per line; blank lines are skipped.
    - .json: a list of objects, or objects one after another, such as one per line.
    - .csv, .tsv: a header, then texts, quoted as in RFC 4180; any line ends.
    - .parquet: columns become keys; needs pyarrow. Dates and times of a column become texts.

    Columns of tables without a name are dropped, such as the index that pandas writes.

    Args:
        path: Any of these, or one compressed as .gz or .xz. Text is UTF-8, with or without a
            byte-order mark.

    Raises:
        DataError: The file is missing or of an unknown type, or a row is malformed.
    """
    kind = suffix_of(path)
    if kind not in _READERS:
        raise DataError(
            f"{path}: file type is {kind or 'none'}, expected {', '.join(_READERS)}, or one of "
            "them as .gz or .xz; convert it"
        )
    return _read(path, kind)


def json_lines(path: Path) -> Iterator[Record]:
    """Read one object per line, whatever the name of the file.

    Raises:
        DataError: As `records`.
    """
    return _read(path, ".jsonl")


def table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Read the rows of a table as line and fields, the header included if there is one.

    Args:
        path: A .tsv file, or one with commas whatever its name.

    Raises:
        DataError: As `records`.
    """
    with _opened(path) as file:
        yield from _fields(file, path, "\t" if suffix_of(path) == ".tsv" else ",")


def text_lines(path: Path, *, fallback: str = "") -> Iterator[tuple[int, str]]:
    """Read the lines of a text file that are not blank, stripped, with their numbers from 1.

    Args:
        path: The file, also compressed.
        fallback: Encoding of lines that are not UTF-8; "" makes them an error.

    Raises:
        DataError: As `records`.
    """
    with _opened(path) as file:
        lines = _TextLines(file, path, fallback)
        for line in lines:
            if line.strip():
                yield lines.number, line.strip()


def suffix_of(path: Path) -> str:
    """Return the suffix of a data file in lower case, without that of its compression."""
    return Path(path.stem if path.suffix.lower() in _PACKED else path.name).suffix.lower()


def _read(path: Path, kind: str) -> Iterator[Record]:
    with _opened(path) as file:
        for index, (line, value) in enumerate(_READERS[kind](file, path)):
            number = index if line is None else line
            location = f"{path}: row {index}" + (f", line {line}" if line is not None else "")
            if not isinstance(value, dict):
                raise DataError(
                    f"{location}: row is {type(value).__name__}, expected an object with keys; "
                    "write one per row"
                )
            yield Record(location, number, value)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressed; failures to read it become errors that name it."""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            if file.peek(2)[:2] in _UTF_16:
                raise DataError(f"{path}: text is UTF-16, expected UTF-8; save it as UTF-8")
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error  # a decompressor's has none
        raise DataError(
            f"{path}: reading failed ({reason}), expected a whole file of rows; check the path, or "
            "replace the file"
        ) from error


def _lines(file: BinaryIO, path: Path) -> Iterator[_Numbered]:
    for number, line in enumerate(_split(file), start=1):
        if line.strip():
            yield number, _parse(line, f"{path}: line {number}")


def _split(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file with their ends, which may also be lone carriage returns."""
    first = True
    for line in file:
        yield from (line.removeprefix(_BOM) if first else line).splitlines(keepends=True)
        first = False


def _values(file: BinaryIO, path: Path) -> Iterator[_Numbered]:
    """Yield the rows of one JSON list, or values that follow each other."""
    content = file.read().removeprefix(_BOM)
    try:
        rows = _parse(content, str(path))
    except DataError as error:
        yield from _concatenated(content, path, error)
        return
    if isinstance(rows, list):
        yield from ((None, row) for row in rows)
        return
    wrapper = next((k for k in _WRAPPERS if isinstance(rows, dict) and _is_rows(rows.get(k))), None)
    if wrapper:
        raise DataError(
            f"{path}: content is one object with a list of rows under {wrapper!r}, expected that "
            "list alone; write [row, row, ...], or one row per line in a .jsonl file"
        )
    if not isinstance(rows, dict):
        raise DataError(
            f"{path}: content is {type(rows).__name__}, expected a list of rows; "
            "write [row, row, ...], or one row per line in a .jsonl file"
        )
    yield 1, rows


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _concatenated(content: bytes, path: Path, error: DataError) -> Iterator[_Numbered]:
    """Yield JSON values that follow each other.

    Raises:
        DataError: ``error``, where not even the first value is one.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise error from None
    if not text.strip():
        raise error
    end, line, is_first = 0, 1, True
    while found := _NON_SPACE.search(text, end):
        begin = found.start()
        line += text.count("\n", end, begin)
        try:
            _, end = json.JSONDecoder().raw_decode(text, begin)
        except (ValueError, RecursionError):
            if is_first:
                raise error from None
            end = len(text)
        yield line, _parse(text[begin:end].encode(), f"{path}: line {line}")
        line += text.count("\n", begin, end)
        is_first = False


def _parse(data: bytes, location: str) -> Any:
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite
        )
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{location}: content is not JSON ({ascii(str(error))[1:-1][:160]}), expected one "
            "object in UTF-8; correct or remove it"
        ) from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key appears twice")
    return row


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


def _table_rows(delimiter: str, file: BinaryIO, path: Path) -> Iterator[_Numbered]:
    header: list[str] | None = None
    for number, fields in _fields(file, path, delimiter):
        if header is None:
            header = fields
            _check_header(header, delimiter, f"{path}: line {number}")
        elif len(fields) != len(header):
            raise DataError(
                f"{path}: line {number}: fields are {len(fields)}, expected {len(header)} as in "
                "the header; quote fields that hold delimiters or newlines"
            )
        else:
            row = zip(header, fields, strict=True)
            yield (
                number,
                {name: field for name, field in row if not _UNNAMED.fullmatch(name.strip())},
            )


def _check_header(header: list[str], delimiter: str, location: str) -> None:
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        raise DataError(
            f"{location}: header has columns {', '.join(header)!a:.200}, expected different names;"
            " rename them"
        )
    other = next((mark for mark in ";\t,|" if mark != delimiter and mark in "".join(header)), None)
    if other and len(header) == 1:
        raise DataError(
            f"{location}: header is {header[0]!a:.80}, whose columns {other!r} separates, expected "
            f"{delimiter!r}; save it with {delimiter!r}"
            + (", or call the file .tsv" if other == "\t" else "")
        )


def _fields(file: BinaryIO, path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the fields of each row with the number of its first line; blank lines are skipped."""
    lines = _TextLines(file, path)
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    while True:
        first = lines.number + 1
        limit = csv.field_size_limit(MAX_FIELD_CHARS)  # global to the process: restored at once
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise lines.error(f"is not CSV ({error}), expected fields as in RFC 4180") from None
        finally:
            csv.field_size_limit(limit)
        if fields is None:
            return
        if fields:
            yield first, fields


class _TextLines:
    """Lines of a table as text, with the number of the last one read."""

    def __init__(self, file: BinaryIO, path: Path, fallback: str = "") -> None:
        self._file = file
        self._path = path
        self._fallback = fallback
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for line in _split(self._file):
            self.number += 1
            if b"\0" in line:
                raise self.error("has a NUL character, expected text")
            try:
                yield line.decode()
            except UnicodeDecodeError:
                if not self._fallback:
                    raise self.error("is not UTF-8") from None
                yield line.decode(self._fallback)

    def error(self, problem: str) -> DataError:
        """Return an error about the current line."""
        return DataError(f"{self._path}: line {self.number} {problem}; correct or remove it")


def _parquet_rows(file: BinaryIO, path: Path) -> Iterator[_Numbered]:
    try:
        from pyarrow import ArrowException, RecordBatch, parquet, string, types
    except ImportError:
        raise DataError(
            f"{path}: reading parquet needs pyarrow; run `pip install '.[report]'` in the clone of "
            "fastsafe or convert the file to .jsonl"
        ) from None
    index = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            # Python has no dates before year 1 or beyond 9999, Parquet has
            names = batch.schema.names
            if len(set(names)) < len(names):
                raise ValueError("two columns have one name")
            named = {
                name: column.cast(string()) if types.is_temporal(column.type) else column
                for name, column in zip(names, batch.columns, strict=True)
                if not _UNNAMED.fullmatch(name)
            }
            for row in RecordBatch.from_pydict(named).to_pylist() if named else ():
                yield None, row
                index += 1
    except (ArrowException, OverflowError, ValueError) as error:
        raise DataError(
            f"{path}: parquet cannot be read from row {index} on "
            f"({ascii(str(error))[1:-1][:160]}), expected a whole file; write it again"
        ) from None


_READERS: dict[str, Callable[[BinaryIO, Path], Iterator[_Numbered]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _values,
    ".csv": partial(_table_rows, ","),
    ".tsv": partial(_table_rows, "\t"),
    ".parquet": _parquet_rows,
}
