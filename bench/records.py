"""The raw records of one run: what was sent, what came back, and what the judges read.

Columnar tables, one Parquet file each, written once when a run ends and never changed: verdicts,
figures and reports are made from them and from ``run.json`` alone, which counts their rows.
Every generator process writes its own files (``ops.0.parquet``, ``ops.1.parquet``); readers take
all of a table together.

Times are microseconds of ``CLOCK_MONOTONIC`` minus the run's ``zero_us``, the start of its load, so
they are negative while the store is being filled. Revisions are etcd's. ``-1`` stands for
"there is none" in every integer column; ``0`` is a revision that means "absent" where it is the
revision of an object.
"""

import errno
import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

ROWS_PER_PIECE = 4096
"""Rows that a recorder keeps as tuples before it packs them into columns."""


_UNKEPT = frozenset({errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS})
"""What a disk says that takes no more."""


class Outcome(IntEnum):
    """How a call ended."""

    OK = 0
    CONFLICT = 1
    """A Txn whose comparison failed: nothing was written."""
    REFUSED = 2
    """An error that says that nothing was done."""
    UNKNOWN = 3
    """Timeout, connection lost, Unavailable, Cancelled, Internal, Unknown: done or not."""


class MessageKind(IntEnum):
    """What one message of a watch is."""

    CREATED = 0
    EVENTS = 1
    PROGRESS = 2
    CANCELED = 3


class EventType(IntEnum):
    """As on the wire."""

    PUT = 0
    DELETE = 1


@dataclass(frozen=True, slots=True)
class Table:
    """The columns of one table: names of integers, and of byte strings."""

    name: str
    integers: tuple[str, ...]
    binaries: tuple[str, ...] = ()
    times: tuple[str, ...] = ()
    """Which of the integers are times."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All names, in the order in which a row gives them."""
        return self.integers + self.binaries


OPS = Table(
    "ops",
    (
        "op",  # unique in the run; of a replay, shared by the keys that one call wrote
        "connection",  # unique in the run; a reconnection has another
        "actor",  # its index in the plan; -1: an apiserver or watcher on its own account
        "step",  # index in the actor; pages of one LIST and retries share it
        "attempt",  # 0, 1, ... of one step
        "verb",  # plan.Verb
        "due",  # when it should have been sent: intended start, for an attempt after the first the
        #         answer to the one before
        "sent",  # -1: never
        "done",  # -1: never answered, counted as a timeout; of an ADOPT that was never sent, since
        #          every candidate has an owner, a CONFLICT: when that was seen
        "outcome",  # Outcome
        "code",  # gRPC
        "expected",  # revision that a Txn compared with; 0: must be absent; -1: no comparison
        "revision",  # of the answer's header; -1: no answer
        "found",  # revision of the object that GET or a Txn's else-branch read; 0: absent; of a
        #           page of LIST: 1 if it said that more follow, 0 if not
        "digest",  # values.digest of what was written, or read by GET and READ_AT
        "lease",  # id that a put carried or that GRANT got; 0: none
        "ttl",  # seconds that GRANT asked for
        "count",  # what LIST and COUNT were told
        "at",  # revision that LIST and READ_AT asked for; 0: the newest
        "refusal",  # code with which the plan says it must be refused; 0: none
    ),
    ("role", "key", "message"),  # message: text of an error
    ("due", "sent", "done"),
)
ITEMS = Table(  # objects that LIST, GET and READ_AT showed
    "items", ("op", "mod", "create", "version", "lease", "digest"), ("key",)
)
WATCHES = Table(
    "watches",
    (
        "watch",  # unique in the run; what resumes on a new connection is a new watch
        "connection",
        "apiserver",  # -1: a watcher of its own
        "start",  # revision asked for; 0: from now
        "prev_kv",
        "progress",
        "no_put",
        "no_delete",
        "slow",  # events a second that it reads; 0: as fast as it can
        "fragment",
        "opened",
        "closed",
        "code",  # gRPC status of the stream's end; -1: open until the end of the run
    ),
    ("name", "key", "range_end", "message"),
    ("opened", "closed"),
)
MESSAGES = Table(
    "messages",
    ("watch", "message", "received", "kind", "revision", "compact_revision", "events", "fragment"),
    ("reason",),
    ("received",),
)
EVENTS = Table(
    "events",
    (
        "watch",
        "message",  # index in its watch
        "type",
        "mod",
        "create",
        "version",
        "lease",
        "digest",  # -1: a DELETE
        "prev_mod",  # -1: no prev_kv came
        "prev_create",
        "prev_version",
        "prev_digest",
    ),
    ("key",),
)
FINAL = Table(  # what a list of everything shows when the load is over and lag has drained
    "final", ("revision", "mod", "create", "version", "lease"), ("key", "value")
)
PRELOADED = Table("preloaded", ("mod", "digest"), ("key",))  # what existed before the load
SAMPLES = Table(  # of the server's processes and of the generator's, four times a second
    "samples",
    (
        "at",
        "server_cpu",  # microseconds since its start, over all processes; restarts add up
        "server_rss",  # bytes
        "server_written",  # bytes handed to the storage layer
        "disk",  # bytes of its data directory
        "generator_cpu",  # microseconds, all generator processes
        "generator_cpu_max",  # of the one that used most
    ),
    times=("at",),
)
INCIDENTS = Table(  # plan.Disturbance as they happened
    "incidents", ("at", "until", "trouble"), times=("at", "until")
)
NEVER_US = 1 << 60
"""An incident whose ``until`` is beyond that lasted: the server did not answer any more."""
TABLES = (OPS, ITEMS, WATCHES, MESSAGES, EVENTS, FINAL, PRELOADED, SAMPLES, INCIDENTS)


class Recorder:
    """Rows of one table, packed into columns as they come."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._rows: list[tuple[int | bytes, ...]] = []
        self._integers = [array("q") for _ in table.integers]
        self._binaries: list[list[bytes]] = [[] for _ in table.binaries]

    def __len__(self) -> int:
        return len(self._rows) + (len(self._integers[0]) if self._integers else 0)

    def add(self, *row: int | bytes) -> None:
        """One row: the values of ``table.columns`` in their order."""
        rows = self._rows
        rows.append(row)
        if len(rows) >= ROWS_PER_PIECE:
            self._pack()

    def _pack(self) -> None:
        if not self._rows:
            return
        columns = list(zip(*self._rows, strict=True))
        self._rows.clear()
        assert len(columns) == len(self.table.columns), self.table.name
        for values, column in zip(self._integers, columns, strict=False):
            values.extend(column)
        for binaries, column in zip(self._binaries, columns[len(self._integers) :], strict=True):
            binaries.extend(column)

    def write(self, folder: Path, part: int, zero_us: int = 0) -> None:
        """All rows as ``<table>.<part>.parquet``, times counted from ``zero_us``."""
        self._pack()
        arrays: list[pa.Array] = [
            self._since(name, values, zero_us)
            for name, values in zip(self.table.integers, self._integers, strict=True)
        ]
        arrays += [pa.array(values, pa.binary()).dictionary_encode() for values in self._binaries]
        table = pa.table(arrays, names=list(self.table.columns))
        file = folder / f"{self.table.name}.{part}.parquet"
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)

    def _since(self, name: str, values: "array[int]", zero_us: int) -> pa.Array:
        """One column of integers."""
        if not values:
            return pa.array([], pa.int64())
        column = np.frombuffer(values, dtype=np.int64)
        return pa.array(column - zero_us if name in self.table.times else column)


def write_all(recorders: Iterable[Recorder], folder: Path, part: int, zero_us: int) -> str:
    """Write each that can be written; gives why one of them could not, or nothing."""
    why = ""
    for recorder in recorders:
        try:
            recorder.write(folder, part, zero_us)
        except OSError as error:
            why = unkept(error)
    return why


def write_facts(folder: Path, facts: "Facts") -> str:
    """Write ``run.json``, whole or not at all; gives why it could not be written, or nothing."""
    file = folder / "run.json"
    try:
        file.write_text(json.dumps(facts, indent=1))
    except OSError as error:
        file.unlink(missing_ok=True)
        return unkept(error)
    return ""


def unkept(error: OSError) -> str:
    """In words, what a disk says that takes no more; any other error is raised again."""
    if error.errno not in _UNKEPT:
        raise error
    return os.strerror(error.errno).lower()


class Frame:
    """One table of a run, in memory: integers as numpy arrays, byte strings as codes.

    ``frame["mod"]`` is an array of int64; ``frame["key"]`` an array of codes, and
    ``frame.text("key")`` what they mean. Codes of one column name mean the same in every frame of
    one ``Records``, so that keys of different tables compare as integers.
    """

    def __init__(
        self,
        columns: dict[str, NDArray[np.int64]],
        dictionaries: Mapping[str, Sequence[bytes]],
    ) -> None:
        self._columns = columns
        self._dictionaries = dictionaries
        self.rows = len(next(iter(columns.values()))) if columns else 0

    def __getitem__(self, column: str) -> NDArray[np.int64]:
        return self._columns[column]

    def __len__(self) -> int:
        return self.rows

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return list(self._columns)

    def text(self, column: str) -> Sequence[bytes]:
        """Byte strings by their codes."""
        return self._dictionaries[column]

    def reorder(self, order: NDArray[Any]) -> None:
        """Bring the rows into another order, in place: two copies of a large table do not fit."""
        for name, column in self._columns.items():
            self._columns[name] = column[order]
        self.rows = len(order)

    def where(self, chosen: NDArray[Any]) -> "Frame":
        """The rows that a mask or an array of indices chooses, in its order."""
        return Frame({name: c[chosen] for name, c in self._columns.items()}, self._dictionaries)


class Facts(TypedDict):
    """``run.json``: what is known of one run beside its tables."""

    run: str
    """Its name, which every value carries."""
    storm: str
    preset: str
    parameters: dict[str, float]
    seed: int
    duration_us: int
    warm_up_us: int
    fingerprint: str
    """SHA-256 of the plan."""
    apiservers: int
    resources: list[str]
    """Prefixes that each apiserver watches."""
    target: str
    """Its name: ``ours``, ``etcd``."""
    command: str
    """That started it; empty if it was there already."""
    version: str
    """As the server tells it."""
    durability: str
    """``fsync per commit`` ...; runs of different classes are not compared."""
    repetition: int
    fsync_us: float
    """What a synced write of a page took just before the run, without a server; 0: not taken."""
    loopback_us: float
    """Likewise a byte there and back."""
    prefix: str
    """Put before every key; tables are without it."""
    zero_us: int
    """``CLOCK_MONOTONIC`` at the start of the load."""
    load_end_us: int
    """After zero, when the last step was answered or given up."""
    finished_us: int
    """After zero, when lag had drained, or was given up waiting for, and FINAL was read."""
    state: str
    """``COMPLETE``, or ``INCOMPLETE`` when it was stopped or the server went away."""
    processes: int
    """Generator processes."""
    client: str
    """``lean`` or ``grpcio``."""
    timeout_us: int
    """Of each call; an error counts as a latency of this."""
    connections_failed: int
    """Attempts to connect that failed, while the server was down on purpose or not."""
    steps: int
    """Intents of the plan."""
    final_revision: int
    """Of the list that FINAL is, which may have shown nothing; -1: it was never read."""
    reason: str
    """Why the run is INCOMPLETE, one line; empty otherwise, or if the user stopped it."""
    rows: NotRequired[dict[str, int]]
    """Of each file of records, so that a cut is noticed; older versions did not count."""


def row_counts(folder: Path) -> dict[str, int]:
    """Of each file of records; of one whose writer ended too early nothing is known."""
    counts = {}
    for file in sorted(folder.glob("*.parquet")):
        with suppress(pa.ArrowInvalid):
            counts[file.name] = int(pq.read_metadata(file).num_rows)
    return counts


class Records:
    """All tables of one run, read when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: Facts = json.loads((folder / "run.json").read_text())
        self._codes: dict[str, dict[bytes, int]] = {}
        self._frames: dict[str, Frame] = {}
        self._texts: dict[str, list[bytes]] = {}

    def frame(self, table: Table) -> Frame:
        """One table; empty if it was never written."""
        if table.name not in self._frames:
            self._frames[table.name] = self._read(table)
        return self._frames[table.name]

    def code(self, column: str, raw: bytes) -> int:
        """The code of a byte string in frames read so far; -1: it is in none."""
        return self._codes.get(column, {}).get(raw, -1)

    def _read(self, table: Table) -> Frame:
        files = sorted(self.folder.glob(f"{table.name}.*.parquet"))
        sources = [pq.ParquetFile(file, page_checksum_verification=True) for file in files]
        return Frame(
            {name: self._column(sources, name) for name in table.columns},
            {name: self._texts.setdefault(name, []) for name in table.binaries},
        )

    def _column(self, sources: Sequence[Any], name: str) -> NDArray[np.int64]:
        """One column of all files, and no more: a large table does not fit in memory twice."""
        parts = [np.empty(0, dtype=np.int64)]
        for source in sources:
            for chunk in source.read(columns=[name]).column(0).chunks:
                integers = chunk.type == pa.int64()
                parts.append(chunk.to_numpy() if integers else self._encode(name, chunk))
        return np.concatenate(parts)

    def _encode(self, column: str, chunk: pa.Array) -> NDArray[np.int64]:
        """Codes that mean the same in every table, of one dictionary-encoded chunk."""
        if not isinstance(chunk, pa.DictionaryArray):
            chunk = chunk.dictionary_encode()
        codes = self._codes.setdefault(column, {})
        texts = self._texts.setdefault(column, [])
        meaning = np.empty(len(chunk.dictionary), dtype=np.int64)
        for i, raw in enumerate(chunk.dictionary.to_pylist()):
            code = codes.get(raw)
            if code is None:
                code = codes[raw] = len(texts)
                texts.append(raw)
            meaning[i] = code
        indices: NDArray[np.int64] = chunk.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        return meaning[indices] if len(meaning) else indices
