"""A whole store as JSON lines, and back: the same file from every database, to the byte.

The first line names format, service, epoch, head and how many lines of each section come; then the sections, each row a
line, each section in the order of its key; the last line has the number of lines and the SHA-256 of all bytes before
it. Positions are kept, with their gaps: checkpoints, tokens and consumers elsewhere go on as if nothing had happened.
Not in the file: who leads at the moment, or has the head of a parked key in hand, and projections' rows and
checkpoints, which are rebuilt from log and topics.

Instants are microseconds since 1970, ids hexadecimal. Bytes that are UTF-8 stand as text, others as base64 under the
column's name with `64`. A column that is null is left out. `meta`, `reply`, `envelope` and `details` are JSON in text,
exactly as stored.

Both directions can be broken off and begun again: what is whole in the file, or in the target, stays.
"""

from __future__ import annotations

import hashlib
import os
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pydantic_core import from_json, to_json

from eventstore.errors import EventStoreError

FORMAT = 1
BATCH_ROWS = 1000
BATCH_BYTES = 8 * 1024 * 1024
"""A batch is as many lines as fit into both, and at least one."""

Row = tuple[Any, ...]
"""A row's columns in the section's order: int, str (also ids, as hex), bytes or None."""
Told = Callable[[int, int], None]
"""Progress: lines done, lines in all."""


class StoreInUse(EventStoreError):
    """A worker leads, or a transaction is writing: what is exported now would be behind what the store goes on to."""


def in_use(service: str, led: Iterable[tuple[str, str]]) -> StoreInUse:
    what = ", ".join(f"{name} ({until})" for name, until in led)
    return StoreInUse(
        f"the store of {service} is in use: {what}; stop its workers first, or take a copy of one state with --online"
    )


class NotEmpty(EventStoreError):
    """The store that was to be filled holds something already. Nothing was written."""


class BadExport(EventStoreError):
    """The file is no whole export, or not the one that was begun with."""


@dataclass(frozen=True, slots=True)
class Section:
    """One kind of line. `key` are the first columns to sort by. `grows`: its rows are only added to, or the header says
    that they changed, so an export that was broken off goes on in the middle of it. `later`: older exports say
    nothing of it."""

    name: str
    columns: tuple[str, ...]
    key: int = 1
    blobs: frozenset[str] = frozenset()
    grows: bool = False
    later: bool = False


_MESSAGE = ("id", "type", "key", "topic", "time", "data", "meta")
_EVENT = ("position", "category", "stream", "version", *_MESSAGE)
_DATA = frozenset({"data"})

SECTIONS: tuple[Section, ...] = (
    Section("event", _EVENT, 1, _DATA, grows=True),
    Section("archived", _EVENT, 1, _DATA, grows=True),
    Section("outgoing", ("position", *_MESSAGE), 1, _DATA, grows=True),
    Section("stream", ("category", "id", "version", "archived_at"), 2, grows=True),
    Section(
        "claim", ("consumer", "message_id", "key", "state", "claimed_at", "reply", "reply_data"), 2,
        frozenset({"reply_data"}), grows=True,
    ),
    Section(
        "settled_letter",
        ("number", "consumer", "id", "failed_at", "key", "value", "details", "settled_at", "settled_as", "settled_by",
         "reason"),
        1, frozenset({"key", "value"}), grows=True,
    ),
    Section(
        "snapshot", ("category", "id", "version", "schema", "state", "made_at", "truncated_upto"), 2,
        frozenset({"state"}),
    ),
    Section("timer", ("consumer", "id", "key", "due_at", "shown_at", "envelope", "data"), 2, _DATA),
    Section("dead_letter", ("consumer", "id", "failed_at", "key", "value", "details"), 2, frozenset({"key", "value"})),
    Section("watermark", ("group", "topic", "partition", "offset"), 3),
    Section("lease", ("name", "token", "position")),
    Section("parked_key", ("consumer", "key", "since", "due_at", "token"), 2, later=True),
    Section(
        "parked",
        ("number", "consumer", "key", "message_id", "parked_at", "envelope", "data", "details", "record_key",
         "record_value", "failure"),
        1, frozenset({"data", "record_key", "record_value"}), later=True,
    ),
    Section("effect", ("consumer", "message_id", "token", "lease_until"), 2, later=True),
    Section("pause", ("group", "at", "by", "reason"), later=True),
)  # fmt: skip
BY_NAME: Mapping[str, Section] = {section.name: section for section in SECTIONS}


@dataclass(frozen=True, slots=True)
class Header:
    """What a store held at one moment. `head` is the highest position drawn, `number` the highest of a parked message:
    by it, an export that goes on knows that claims have changed."""

    service: str
    epoch: int
    head: int
    counts: Mapping[str, int]
    number: int = 0

    @property
    def lines(self) -> int:
        return sum(self.counts.values())

    def line(self) -> bytes:
        counts = {section.name: self.counts[section.name] for section in SECTIONS}
        place = {"foldbus": FORMAT, "service": self.service, "epoch": self.epoch, "head": self.head}
        return to_json({**place, "number": self.number, **counts})

    @classmethod
    def parse(cls, line: bytes) -> Header:
        """Raises BadExport."""
        found = _parse(line, 1)
        if found.get("foldbus") != FORMAT:
            raise BadExport(f"the first line says format {found.get('foldbus')!r}; this code reads {FORMAT}")
        try:
            counts = {
                section.name: int(found.get(section.name, 0) if section.later else found[section.name])
                for section in SECTIONS
            }
            number = int(found.get("number", 0))  # older exports say nothing of it
            return cls(str(found["service"]), int(found["epoch"]), int(found["head"]), counts, number)
        except (KeyError, TypeError, ValueError) as error:
            raise BadExport(f"the first line is no header of format {FORMAT}: {error!r}") from error


class Source(Protocol):
    """One state of a store, whatever is written meanwhile."""

    async def header(self) -> Header: ...

    def rows(self, section: Section, *, after: Row | None) -> AsyncIterator[Sequence[Row]]:
        """In batches, by the section's key in the order of bytes, beginning after the key `after`."""
        ...


@dataclass(frozen=True, slots=True)
class Filled:
    """How far an import is: `lines` of the file (the header is one) are in the target, with this digest."""

    lines: int
    digest: str


class Digest(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class Target(Protocol):
    """An empty store, or one that a broken-off import left. Until `finish` nobody else can open it."""

    async def begin(self, header: Header, filled: Filled) -> Filled:
        """Where to go on: `filled`, the header's own, when it is empty (it is now marked as being filled), what was
        written with the last rows otherwise. Raises NotEmpty."""
        ...

    async def write(self, section: Section, rows: Sequence[Row], filled: Filled) -> None:
        """Rows and progress together."""
        ...

    async def counts(self) -> Mapping[str, int]: ...

    async def finish(self) -> None: ...


# --- lines -----------------------------------------------------------------------------------------------------------


def encode(section: Section, row: Row) -> bytes:
    """One line, without its end."""
    found: dict[str, Any] = {"is": section.name}
    for name, value in zip(section.columns, row, strict=True):
        if value is None:
            continue
        if name in section.blobs:
            try:
                value = value.decode()
            except UnicodeDecodeError:
                name, value = f"{name}64", b64encode(value).decode()
        found[name] = value
    return to_json(found)


def decode(line: bytes, number: int) -> tuple[Section, Row]:
    """The inverse. Raises BadExport."""
    found = _parse(line, number)
    section = BY_NAME.get(found.get("is", ""))
    if section is None:
        raise BadExport(f"line {number} is {found.get('is')!r}, which this code does not know")
    get, blobs = found.get, section.blobs
    values: list[Any] = []
    for name in section.columns:
        value = get(name)
        if name in blobs:
            if value is not None:
                value = value.encode()
            elif (coded := get(f"{name}64")) is not None:
                value = b64decode(coded)
        values.append(value)
    return section, tuple(values)


def _parse(line: bytes, number: int) -> dict[str, Any]:
    try:
        found = from_json(line)
    except ValueError as error:
        raise BadExport(f"line {number} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadExport(f"line {number} is {type(found).__name__}, wanted an object")  # pyright: ignore[reportUnknownArgumentType]
    return found  # pyright: ignore[reportUnknownVariableType]


# --- export ----------------------------------------------------------------------------------------------------------


async def export_to(source: Source, out: BinaryIO, *, told: Told | None = None) -> Header:
    """Everything, from the first line to the last."""
    header = await source.header()
    writer = _Writer(out)
    writer.line(header.line())
    await _export(source, writer, header, SECTIONS, None, told)
    return header


async def export_file(source: Source, path: Path, *, told: Told | None = None) -> Header:
    """To a file, which is on the disk when this returns. A file that an earlier call left behind is gone on with: what
    cannot have changed since is kept, a half-written line at its end is written anew.

    Raises BadExport, changing nothing, when the file is something else, or when the store moved on since.
    """
    header = await source.header()
    with path.open("a+b") as file:
        kept = _kept(file, header)
        file.truncate(kept.size)
        file.seek(kept.size)
        writer = _Writer(file, kept.digest, kept.lines)
        if not kept.lines:
            writer.line(header.line())
        await _export(source, writer, header, kept.sections, kept.after, told)
        os.fsync(file.fileno())
    return header


class _Writer:
    def __init__(self, out: BinaryIO, digest: Digest | None = None, lines: int = 0) -> None:
        self._out, self._digest, self.lines = out, digest or hashlib.sha256(), lines

    def line(self, line: bytes) -> None:
        line += b"\n"
        self._digest.update(line)
        self._out.write(line)
        self.lines += 1

    def end(self) -> None:
        self._out.write(_end(self.lines, self._digest.hexdigest()))
        self._out.flush()


async def _export(
    source: Source, writer: _Writer, header: Header, sections: Sequence[Section], after: Row | None, told: Told | None
) -> None:
    for section in sections:
        async for rows in source.rows(section, after=after):
            for row in rows:
                writer.line(encode(section, row))
            if told is not None:
                told(writer.lines - 1, header.lines)
        after = None
    if writer.lines - 1 != header.lines:
        raise BadExport(
            f"the store has {header.lines} rows, the file got {writer.lines - 1}: somebody archived or truncated "
            "streams since it was begun; remove it to begin anew"
        )
    writer.end()


@dataclass(frozen=True, slots=True)
class _Kept:
    """What stays of a file: `size` bytes; and where to go on."""

    size: int
    lines: int
    digest: Digest
    sections: Sequence[Section]
    after: Row | None


def _kept(file: BinaryIO, header: Header) -> _Kept:
    """Up to the last whole line of the sections that only grow; their changes show in the header."""
    size = lines = at = 0
    after: Row | None = None
    digest = hashlib.sha256()
    for line in _lines(file):
        if not line.endswith(b"\n"):
            break
        if lines == 0:
            if line[:-1] != header.line():
                raise BadExport(
                    f"the file begins with {line[:300].decode(errors='replace').strip()!r}, an export of this store as "
                    f"it is now with {header.line().decode()!r}; nothing was written: remove the file to begin anew"
                )
        else:
            section, row = (None, ()) if _is_end(line) else decode(line, lines + 1)
            if section is None or not section.grows:
                at, after = next(n for n, one in enumerate(SECTIONS) if not one.grows), None
                break
            at, after = SECTIONS.index(section), row[: section.key]
        size += len(line)
        lines += 1
        digest.update(line)
    return _Kept(size, lines, digest, SECTIONS[at:], after)


def _end(lines: int, digest: str) -> bytes:
    return to_json({"is": "end", "lines": lines, "sha256": digest}) + b"\n"


def _is_end(line: bytes) -> bool:
    return line.startswith(b'{"is":"end",')


def _lines(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    return iter(file.readline, b"")


# --- import ----------------------------------------------------------------------------------------------------------


def check_file(path: Path) -> Header:
    """Reads it once. Raises BadExport unless it is whole, to the last byte."""
    with path.open("rb") as file:
        header, _ = _check(_lines(file))
    return header


async def import_lines(lines: Iterator[bytes], target: Target, *, service: str, told: Told | None = None) -> Header:
    """Fills an empty store; goes on where an earlier call with the same lines was broken off. The target holds exactly
    what the file does when this returns, and can be opened from then on, not before.

    Raises NotEmpty, and BadExport: another service's, another file than the one begun with, or one that is not whole
    (then what was written stays, to be gone on with from a better copy).
    """
    reader = _Reader(lines)
    header = Header.parse(reader.next())
    if header.service != service:
        raise BadExport(f"this is an export of service {header.service!r}, not of {service!r}; nothing was written")
    filled = await target.begin(header, Filled(reader.lines, reader.digest))
    while reader.lines < filled.lines:
        reader.next()
    if reader.digest != filled.digest:
        raise BadExport(
            f"this is not the file that the import was begun with: its first {filled.lines} lines differ; nothing was "
            "written"
        )
    batch: list[Row] = []
    batched: Section | None = None
    size = 0

    async def flush() -> None:
        nonlocal size
        if batched is not None and batch:
            await target.write(batched, batch, Filled(lines=before.lines, digest=before.digest))
            batch.clear()
            size = 0
            if told is not None:
                told(before.lines - 1, header.lines)

    before = Filled(reader.lines, reader.digest)
    while True:
        line = reader.next()
        ended = _is_end(line)
        section, row = (None, ()) if ended else decode(line, reader.lines)
        if section is not batched or len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
            await flush()
            batched = section
        if ended:
            break
        batch.append(row)
        size += len(line)
        before = Filled(reader.lines, reader.digest)
    reader.check_end(line)
    found = await target.counts()
    if found != header.counts:
        raise BadExport(
            f"the store holds {dict(found)} after {dict(header.counts)} were read: somebody else wrote to it"
        )
    await target.finish()
    return header


class _Reader:
    """Lines with their running digest."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._digest = hashlib.sha256()
        self._before = ""
        self.lines = 0

    def next(self) -> bytes:
        line = next(self._lines, b"")
        if not line.endswith(b"\n"):
            raise BadExport(
                f"the file ends within line {self.lines + 1}, before its last line: the export was broken off, or the "
                "copy; `foldbus store export` to the same file goes on with it"
            )
        if not _is_end(line):
            self._digest.update(line)
            self.lines += 1
        return line

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def check_end(self, line: bytes) -> None:
        if line != _end(self.lines, self.digest):
            raise BadExport(
                f"the last line is {line[:200].decode(errors='replace').strip()!r}, but {self.lines} lines with digest "
                f"{self.digest} came before it: the file was changed"
            )
        if next(self._lines, b""):
            raise BadExport("something comes after the last line")


def _check(lines: Iterator[bytes]) -> tuple[Header, int]:
    reader = _Reader(lines)
    header = Header.parse(reader.next())
    while not _is_end(line := reader.next()):
        pass
    reader.check_end(line)
    return header, reader.lines


__all__ = [
    "SECTIONS",
    "BadExport",
    "Filled",
    "Header",
    "NotEmpty",
    "Section",
    "Source",
    "StoreInUse",
    "Target",
    "check_file",
    "export_file",
    "export_to",
    "import_lines",
    "in_use",
]
