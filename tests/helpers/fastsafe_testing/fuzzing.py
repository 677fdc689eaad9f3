"""Type-directed fuzzing: change places of a valid value, and check what its reader makes of it.

A case is a pair of seed and number: it is made again from these alone. A reader accepts a value or
raises a `FastsafeError` of one short sentence in printable characters that names the file.
"""

import copy
import json
import math
import os
import random
import signal
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastsafe.errors import FastsafeError, printable

CASES = int(os.environ.get("FUZZ_CASES", "1000"))  # of all readers together
SEED = os.environ.get("FUZZ_SEED", "0")
MAX_MESSAGE_CHARS = 800  # a list of the tensors that do not fit needs as many
ODD = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control a terminal, reverse a line, or have no UTF-8
JOINERS = "\u200c\u200d"
SECONDS_PER_CASE = 20  # only what hangs takes as long

Path_ = tuple[Any, ...]  # keys and indices from the top of a value


class Raw(str):
    """Text that is written into a file as it is, such as a number beyond floats or a YAML tag."""

    __slots__ = ()


TEXTS: tuple[str, ...] = (
    *("", " ", "\n", "a\nb\r\nc", "\0", "\x1b[31mred\x1b[0m", "\x85\u2028line", "\u202eabc", "1"),
    *("\ud800", "true", "null", "nan", "1e400", "../../etc/passwd", "/dev/null", "%s{0}{{ x }}"),
    *("<|im_end|>", "(a+)+$", "(?i)x", "[", "\\", "x" * 5000, "\N{COMBINING ACUTE ACCENT}" * 50),
    *("=1+1", "\N{FULLWIDTH DIGIT ONE}", "\N{ARABIC-INDIC DIGIT THREE}", "-1", "0x10", "1_0"),
)
NUMBERS: tuple[Any, ...] = (
    *(True, False, 0, 1, -1, 7, 255, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 2**70),
    *(-(2**63), 10**400, -(10**400), 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf),
)
NESTED: tuple[Any, ...] = (
    *([], {}, [[]], [None], [{}], {"": 0}, {"a": {"b": None}}, ["a", 1], [1, 2, 3], ["a", "a"]),
    *({"type": []}, {"type": "text", "text": 1}, [{"role": []}], {"content": None}, [0] * 300),
)
JSON_RAW = ("1e400", "-1e400", "1E-400", "1.0e5", "-0", "9" * 5000, '"\\ud800"', '"\\u0000"')
YAML_RAW = (
    *("!!bool x", '!!int ""', "!!int x", "!!float x", "!!timestamp x", "!!map x", "!!set {a}"),
    *("!!binary '%%'", "!!null x", "!!omap [1]", "!!pairs [1]", "!!python/name:os.system x"),
    *("2024-13-45", "2024-01-01", "2024-01-01 10:00:00 +99:99", "0b2", "0o9", "0x1F", "1_000"),
    *(".nan", ".inf", "190:20:30", "&a [*a]", "*b", "{[a]: b}", "{{a: b}: c}", "{a: 1, a: 2}"),
    *("<<", "{<<: 1}", "{<<: [1]}", "!x y", "! 1", "@", "`", "1e400", "9" * 5000, '"\\x00"', "~"),
)


def places(value: Any, above: Path_ = ()) -> Iterator[Path_]:
    """Yield the path of every place in a value, the whole one first."""
    yield above
    inner = value.items() if isinstance(value, dict) else enumerate(value) if is_list(value) else ()
    for key, item in inner:
        yield from places(item, (*above, key))


def is_list(value: Any) -> bool:
    return isinstance(value, list)


@dataclass(frozen=True)
class Change:
    """One change of a value.

    Attributes:
        kind: replace, delete, rename, repeat, wrap, append or swap.
        path: Place of the change.
        value: What is put there; for a rename the key, for a swap the path of the other place.
    """

    kind: str
    path: Path_
    value: Any = None

    def apply(self, whole: Any) -> Any:
        """Return the value with this change; one that an earlier change made void is left out."""
        if not self.path:
            return {"replace": self.value, "wrap": [whole]}.get(self.kind, whole)
        try:
            above = whole
            for key in self.path[:-1]:
                above = above[key]
            self._change(whole, above, self.path[-1])
        except (KeyError, IndexError, TypeError, AttributeError):
            pass
        return whole

    def _change(self, whole: Any, above: Any, key: Any) -> None:
        item = above[key]
        if self.kind == "replace":
            above[key] = copy.deepcopy(self.value)
        elif self.kind == "delete":
            del above[key]
        elif self.kind == "rename":
            above[self.value] = above.pop(key)
        elif self.kind == "repeat":
            above[key] = [copy.deepcopy(item), copy.deepcopy(item)]
        elif self.kind == "wrap":
            above[key] = {str(self.value): item} if isinstance(self.value, str) else [item]
        elif self.kind == "append":
            above[key] = (
                [*item, self.value] if is_list(item) else {**item, str(self.value)[:80]: self.value}
            )
        elif self.kind == "swap":
            for step in self.value:
                whole = whole[step]
            above[key] = copy.deepcopy(whole)


KINDS = ("replace",) * 6 + ("delete", "rename", "repeat", "wrap", "append", "swap")


def payload(rng: random.Random, raw: Sequence[str]) -> Any:
    """Draw what replaces a value: of another type, out of range, or hostile."""
    pools: list[Sequence[Any]] = [TEXTS, NUMBERS, NESTED, (None,)]
    if raw:
        pools.append([Raw(text) for text in raw])
    return copy.deepcopy(rng.choice(rng.choice(pools)))


def changes(value: Any, rng: random.Random, raw: Sequence[str] = ()) -> list[Change]:
    """Draw one to three changes of a value."""
    known = list(places(value))
    drawn = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        kind, path = rng.choice(KINDS), rng.choice(known)
        new = (
            rng.choice(known)
            if kind == "swap"
            else rng.choice((*TEXTS, 1, None, True))
            if kind in ("rename", "wrap")
            else payload(rng, raw)
        )
        drawn.append(Change(kind, path, new))
    return drawn


def dumped(value: Any, rng: random.Random) -> bytes:
    """Return a value as JSON, raw texts as they are; now and then bytes of it are damaged."""
    raw: list[str] = []

    def marked(item: Any) -> Any:
        if isinstance(item, Raw):
            raw.append(item)
            return f"<raw {len(raw) - 1}>"
        if isinstance(item, dict):
            return {str(key): marked(inner) for key, inner in item.items()}
        return [marked(inner) for inner in item] if is_list(item) else item

    text = json.dumps(marked(value), ensure_ascii=rng.random() < 0.7, default=str)
    for number, words in enumerate(raw):
        text = text.replace(f'"<raw {number}>"', words)
    return damaged(text.encode(errors="surrogatepass"), rng)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return the data, one time in ten cut short or with a byte inserted, doubled or changed."""
    if not data or rng.random() < 0.9:
        return data
    at = rng.randrange(len(data))
    odd = rng.choice((b"\0", b"\xff", b"\r", b"\n", b'"', b"\xef\xbb\xbf", b"\x1b", b",", b"{"))
    return rng.choice(
        (data[:at], data[:at] + odd + data[at:], data[:at] + odd + data[at + 1 :], data + data[:at])
    )


Make = Callable[[Path, Any, random.Random], Callable[[], object]]


@dataclass(frozen=True)
class Reader:
    """A reader of untrusted input.

    Attributes:
        name: For reports.
        seeds: Valid values that the changes start from.
        make: Puts a changed value into an empty folder and returns the call that reads it.
        names: Text that each message must hold, such as the file's name.
        raw: Texts that its syntax knows and JSON values do not hold.
        per_mille: Cases of this reader in a thousand of all readers.
        is_changed: Whether the valid values are changed; False leaves that to ``make``.
    """

    name: str
    seeds: Sequence[Any]
    make: Make
    names: str = ""
    raw: Sequence[str] = ()
    per_mille: int = 50
    is_changed: bool = True


@dataclass(frozen=True)
class Fault:
    """What is wrong with the answer of a reader."""

    kind: str  # equal for faults of one cause
    detail: str


@contextmanager
def bounded() -> Iterator[None]:
    """Raise TimeoutError in a block that hangs."""

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"reading took over {SECONDS_PER_CASE} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_CASE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fault_of(read: Callable[[], object], names: str) -> Fault | None:
    """Read, and say what is wrong with the error, or None."""
    try:
        with bounded():
            read()
    except FastsafeError as error:
        fault = message_fault(str(error), names)
        place = f" of {type(error).__name__} at {origin(error)}"
        return fault and Fault(fault.kind + place, fault.detail)
    except Exception as error:
        return Fault(f"{type(error).__name__} at {origin(error)}", f"{error!a:.300}")
    return None


def message_fault(message: str, names: str) -> Fault | None:
    """Check an error as the command line prints it: length, characters, and the file's name."""
    message = printable(" ".join(message.split()))
    odd = sorted({c for c in message if unicodedata.category(c) in ODD and c not in JOINERS})
    if odd:
        return Fault(f"characters {''.join(odd)!a}", f"{message!a:.300}")
    if len(message) > MAX_MESSAGE_CHARS:
        return Fault("long message", f"{len(message)} characters: {message!a:.300}")
    return None if names in message else Fault(f"message without {names}", f"{message!a:.300}")


def origin(error: BaseException) -> str:
    """Return the innermost place of fastsafe that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/fastsafe/" in frame.filename] or frames
    frame = ours[-1]
    return f"{frame.filename.rpartition('/fastsafe/')[2]} {frame.name}"


def changed(seed: Any, made: Sequence[Change]) -> Any:
    """Return a copy of a valid value with the changes."""
    value = copy.deepcopy(seed)
    for change in made:
        value = change.apply(value)
    return value


def run_case(reader: Reader, number: int, folder: Path) -> tuple[Fault, str] | None:
    """Make one case and read it; a fault comes back with the fewest changes that show it."""

    def fault(made: Sequence[Change], at: str) -> Fault | None:
        into = folder / at
        into.mkdir()
        writing = random.Random(f"{SEED} {reader.name} {number} writing")
        return fault_of(reader.make(into, changed(seed, made), writing), reader.names)

    rng = random.Random(f"{SEED} {reader.name} {number}")
    seed = rng.choice(reader.seeds)
    made = changes(seed, rng, reader.raw) if reader.is_changed else []
    found = fault(made, str(number))
    if found is None:
        return None
    for step, change in enumerate(tuple(made)):
        fewer = [other for other in made if other is not change]
        less = fault(fewer, f"{number}-{step}")
        if less is not None and less.kind == found.kind:
            made, found = fewer, less
    return found, "; ".join(f"{c.kind} {c.path!a} {c.value!a:.120}" for c in made) or "bytes"


def check(reader: Reader, folder: Path) -> None:
    """Run the cases of a reader; fails with one case, seed and changes for each kind of fault."""
    faults: dict[str, str] = {}
    for number in range(max(1, CASES * reader.per_mille // 1000)):
        result = run_case(reader, number, folder)
        if result is not None:
            fault, made = result
            faults.setdefault(fault.kind, f"case {number}: {made}\n    {fault.detail}")
    shown = "\n".join(f"- {kind}\n    {text}" for kind, text in faults.items())
    if faults:
        pytest.fail(f"{reader.name}, FUZZ_SEED={SEED}:\n{shown}", pytrace=False)
