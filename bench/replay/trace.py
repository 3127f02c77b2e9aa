"""The file of a recording: one Parquet file, a row for everything that happened, in order.

    kind       of a call                      bytes                      besides
    OBJECTS    before all calls               RangeResponse: a page of what was there
    BEGIN      its headers came               the request, if unary      path, timeout, leader
    UP         a message of the client        that message
    HALF_CLOSE the client's last one was sent
    DOWN       a message of the server        that message
    END        answered, refused, or ended    the answer, if unary       code, text
    CANCEL     the client gave it up

A unary call is a BEGIN and an END; a stream has UPs and DOWNs between. ``at`` is in microseconds
since the recording began: of what clients send, when the proxy had it; of answers, when the proxy
sent them on. Rows are written as they happen, so their order is that of the times and says, on one
connection, which answers a client had when it sent a request. A call that had neither END nor
CANCEL was open when the recording ended.

The file grows by groups of rows, so that what is held in memory is bounded; it has the name that
was asked for only once it is whole.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq

from bench.client.asking import reason

FORMAT = "kvstore-bench trace"
VERSION = 1
GROUP_ROWS_MAX = 16_384
GROUP_BYTES_MAX = 4 << 20
"""Of messages held before they are written; writing them holds up the proxy for some ten
milliseconds, as one row group."""
_KEY = b"kvstore-bench"
_MAGIC = b"PAR1"
"""Both ends of a Parquet file that is whole."""


class TraceError(Exception):
    """A recording or a trace cannot go on; one line."""


class Kind(IntEnum):
    """What happened; see the module's text."""

    OBJECTS = 0
    BEGIN = 1
    UP = 2
    HALF_CLOSE = 3
    DOWN = 4
    END = 5
    CANCEL = 6


class Row(NamedTuple):
    """One happening."""

    at: int
    kind: Kind
    connection: int
    """Of the client, counted from 0; -1: none."""
    call: int
    """Counted from 0; -1: none."""
    path: bytes = b""
    timeout_us: int = 0
    """That the client gave the call; 0: none."""
    leader: bool = False
    """The client wanted a server that has a leader (``hasleader``)."""
    code: int = 0
    text: str = ""
    message: bytes = b""


class About(TypedDict):
    """What is known of a recording beside its rows."""

    format: str
    version: int
    started: str
    """ISO 8601, UTC."""
    upstream: str
    """The version that it told."""
    revision: int
    """Of the store when the recording began."""
    scrubbed: bool


class Summary(TypedDict):
    """What is known of it when it has ended."""

    calls: int
    connections: int
    rows: int
    duration_us: int
    error: str
    """Why it ended by itself; empty: it was told to."""


_SCHEMA = pa.schema(
    [
        ("at", pa.int64()),
        ("kind", pa.int8()),
        ("connection", pa.int32()),
        ("call", pa.int64()),
        ("path", pa.binary()),
        ("timeout_us", pa.int64()),
        ("leader", pa.bool_()),
        ("code", pa.int16()),
        ("text", pa.string()),
        ("message", pa.binary()),
    ]
)
assert tuple(_SCHEMA.names) == Row._fields


class TraceWriter:
    """Writes a trace; ``close`` makes it whole. Raises ``TraceError`` when the file cannot be."""

    def __init__(self, path: Path, about: About) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._rows: list[Row] = []
        self._bytes = 0
        self._last = 0
        self._failure = ""
        self.rows = 0
        if path.exists():
            raise TraceError(f"{path} exists, and what was recorded is never overwritten")
        schema = _SCHEMA.with_metadata({_KEY: json.dumps(about).encode()})
        try:
            self._file = pq.ParquetWriter(
                self._part,
                schema,
                compression="zstd",
                use_dictionary=["path", "text"],
                write_page_checksum=True,
            )
        except OSError as error:
            raise TraceError(f"{path} cannot be written: {reason(error)}") from error

    @property
    def held(self) -> tuple[int, int]:
        """Rows and bytes of messages that are in memory only."""
        return len(self._rows), self._bytes

    def add(self, row: Row) -> None:
        """One more; ``at`` is never before that of the row before it."""
        assert row.at >= self._last, (row.at, self._last)
        self._last = row.at
        self._rows.append(row)
        self._bytes += len(row.message)
        self.rows += 1
        if len(self._rows) >= GROUP_ROWS_MAX or self._bytes >= GROUP_BYTES_MAX:
            self._flush()

    def _flush(self) -> None:
        columns = list(zip(*self._rows, strict=True)) or [()] * len(_SCHEMA)
        self._rows.clear()
        self._bytes = 0
        arrays = [pa.array(c, type_) for c, type_ in zip(columns, _SCHEMA.types, strict=True)]
        try:
            self._file.write_batch(pa.record_batch(arrays, schema=self._file.schema))
        except OSError as error:
            self._failure = f"{self._path} cannot be written: {reason(error)}"
            raise TraceError(self._failure) from error

    def close(self, summary: Summary) -> None:
        """Write the rest, and give the file its name.

        Nothing is left if that fails, or anything did before: a file of this format that lacks a
        part or its end cannot be read.
        """
        try:
            self._finish(summary)
        except TraceError:
            self.discard()
            raise
        except OSError as error:
            self.discard()
            raise TraceError(f"{self._path} cannot be written: {reason(error)}") from error

    def _finish(self, summary: Summary) -> None:
        if self._failure:
            raise TraceError(self._failure)
        if self._rows:
            self._flush()
        self._file.add_key_value_metadata({_KEY + b" end": json.dumps(summary).encode()})
        self._file.close()
        self._part.replace(self._path)

    def discard(self) -> None:
        """There is nothing to keep."""
        with suppress(OSError):  # nothing of the file is wanted
            self._file.close()
        self._part.unlink(missing_ok=True)


def _instead_of_trace(path: Path) -> str:
    """What a file is that cannot be read as one."""
    with path.open("rb") as file:
        begun = file.read(len(_MAGIC)) == _MAGIC
    return "a recording that was not finished" if begun else "not a recording of kvstore-bench"


class Trace:
    """A trace that was written; raises ``TraceError`` if the file is none."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno:
                raise TraceError(f"{path} cannot be read: {reason(error)}") from error
            raise TraceError(f"{path} is {_instead_of_trace(path)}") from error
        self._path = path
        said: Mapping[bytes, bytes] = self._file.metadata.metadata or {}
        if _KEY not in said:
            raise TraceError(f"{path} is not a recording of kvstore-bench")
        self.about: About = json.loads(said[_KEY])
        if self.about["version"] != VERSION:
            raise TraceError(f"{path} is of version {self.about['version']}, not {VERSION}")
        end: dict[str, Any] = json.loads(said.get(_KEY + b" end", b"{}"))
        self.summary = cast("Summary", end)

    def __iter__(self) -> Iterator[Row]:
        """All rows, group by group."""
        for group in range(self._file.num_row_groups):
            try:
                table = self._file.read_row_group(group)
            except (OSError, pa.ArrowException) as error:
                raise TraceError(f"{self._path} is damaged in its part {group}") from error
            columns = [table.column(name).to_pylist() for name in Row._fields]
            for at, kind, *rest in zip(*columns, strict=True):
                yield Row(at, Kind(kind), *rest)
