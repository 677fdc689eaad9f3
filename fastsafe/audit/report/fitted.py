"""Tables that fit a terminal of any width and never cut a cell."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

_LONG_WORD = 9  # letters; a narrow heading hyphenates longer words


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        heading: Text of the heading; it wraps at spaces.
        cells: One text per row.
        is_label: Whether the column names the rows; such columns come first.
        wraps: Whether a cell may take several lines, broken at spaces.
        style: Rich style of the cells.
    """

    heading: str
    cells: Sequence[str | Text]
    is_label: bool = False
    wraps: bool = False
    style: str = ""

    def fit(self, *, is_narrow: bool) -> tuple[str, int]:
        """Return the heading, in lines, and the number of terminal columns that all text needs.

        Args:
            is_narrow: Whether cells that can wrap do, and the heading hyphenates longer words.
        """
        lines = [line for cell in self.cells for line in str(cell).split("\n")]
        words = self.heading.split()
        if is_narrow:
            if self.wraps:
                lines = [word for line in lines for word in line.split()]
            room = max(map(cell_len, (*lines, _LONG_WORD * " ")))
            words = [part for word in words for part in _hyphenated(word, room)]
        width = max(map(cell_len, (*lines, *words)))
        return "\n".join(_lines(words, width)), width


def fitted(
    columns: Sequence[Column], width: int, sections: Collection[int] = ()
) -> Iterator["RenderableType"]:
    """Yield a table at most ``width`` columns wide.

    Where one table is too wide, headings are hyphenated and cells wrapped; then the columns are
    parted into several tables that repeat the labels; then every row becomes a list.

    Args:
        columns: Columns of equal length, labels first.
        width: Columns of the terminal.
        sections: Rows before which a blank line stands.
    """
    labels = [column for column in columns if column.is_label]
    values = [column for column in columns if not column.is_label]
    for is_narrow, gap in ((False, 2), (True, 2), (True, 1)):
        if _width(columns, gap, is_narrow=is_narrow) <= width:
            yield _table(columns, gap, sections, is_narrow=is_narrow)
            return
    parts = _parts(labels, values, width)
    for number, part in enumerate(parts):
        if number:
            yield Text("")
        yield _table([*labels, *part], 1, sections, is_narrow=True)
    if not parts:
        yield from _lists(labels, values)


def _hyphenated(word: str, room: int) -> list[str]:
    """Return the parts of a word, broken where it is longer than ``room``.

    Example:
        >>> _hyphenated("summarization", 9), _hyphenated("over-refusal", 9), _hyphenated("code", 9)
        (['summari-', 'zation'], ['over-', 'refusal'], ['code'])
    """
    if len(word) <= room:
        return [word]
    if "-" in word:
        first, _, rest = word.partition("-")
        return [f"{first}-", *_hyphenated(rest, room)]
    middle = round(len(word) / 2) + 1
    return [f"{word[:middle]}-", word[middle:]]


def _lines(words: Sequence[str], width: int) -> list[str]:
    """Return words in lines of at most ``width``; a hyphenated word keeps its line end."""
    lines: list[str] = []
    for word in words:
        if lines and not lines[-1].endswith("-") and cell_len(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _width(columns: Sequence[Column], gap: int, *, is_narrow: bool) -> int:
    widths = [column.fit(is_narrow=is_narrow)[1] for column in columns]
    return sum(widths) + gap * (len(widths) - 1)


def _parts(
    labels: Sequence[Column], values: Sequence[Column], width: int
) -> list[Sequence[Column]]:
    """Return the values by table; none where a table has no room for labels and a value."""
    parts: list[list[Column]] = [[]]
    for column in values:
        if _width([*labels, column], 1, is_narrow=True) > width:
            return []
        if _width([*labels, *parts[-1], column], 1, is_narrow=True) > width:
            parts.append([])
        parts[-1].append(column)
    # tables of similar widths are easier to read than a full one and a rest
    share = -(-len(values) // len(parts))
    even = [values[i : i + share] for i in range(0, len(values), share)]
    if all(_width([*labels, *part], 1, is_narrow=True) <= width for part in even):
        return even
    return list(parts)


def _table(
    columns: Sequence[Column], gap: int, sections: Collection[int], *, is_narrow: bool
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
    for column in columns:
        heading, width = column.fit(is_narrow=is_narrow)
        table.add_column(
            Text(heading),
            width=width,
            justify="left" if column.is_label else "right",
            style=column.style,
            vertical="top",
            no_wrap=not column.wraps,
        )
    for row, cells in enumerate(zip(*(column.cells for column in columns), strict=True)):
        if row in sections:
            table.add_row()
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    return table


def _lists(labels: Sequence[Column], values: Sequence[Column]) -> Iterator[Text]:
    for row in range(len(values[0].cells)):
        names = [str(column.cells[row]).strip() for column in labels]
        yield Text(", ".join(filter(None, names)), style="bold")
        for column in values:
            if value := " ".join(str(column.cells[row]).split()):
                yield Text(f"  {column.heading}: {value}")
