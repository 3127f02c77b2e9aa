"""The hash of all changes up to a revision: what HashKV answers.

It is etcd's own (``server/storage/mvcc/hash.go`` of 3.6), so a copy of etcd's history, revision by
revision, hashes to the same number: crc32c over ``key``, then for each change in revision order its
key in etcd's store (``revision_sub``, 8 bytes big-endian each, ``t`` behind a tombstone) and its
KeyValue. Of the changes up to the last compaction only those count that a read at the revision
asked for sees, however far the removal of the others has come.

Rows are read in chunks that end after some bytes, so other requests go on meanwhile; the rows up to
the revision do not change. A compaction meanwhile changes what counts: then it starts again.
With several shards their rows follow one another, shard by shard.

crc32c comes from google-crc32c, which is C: in Python it would take minutes for a gigabyte, and the
standard library has only the other CRC-32.
"""

from collections.abc import Callable
from struct import pack
from typing import NamedTuple

import google_crc32c

from kvstore.answers import Then
from kvstore.backend import Row, RowId
from kvstore.errors import (
    BackendError,
    CompactedError,
    FutureRevisionError,
    ReadsFullError,
    StoppedError,
    StoreError,
    TimedOutError,
    TooManyRequestsError,
    UnreachableError,
)
from kvstore.kv import frame_key_value, varint
from kvstore.store import Store

_BUCKET = b"key"
"""etcd hashes the name of its bucket first."""

CHUNK_BYTES = 1024 * 1024
"""Read at a time, as far as the size of the rows before tells; a few ms of work."""
CHUNK_ROWS_MAX = 500
RESTARTS_MAX = 3
"""Times that a compaction may interfere; then Unavailable, request timed out."""


class HashResult(NamedTuple):
    """A hash and what it covers."""

    hash: int
    """crc32c, unsigned 32 bit."""
    compact_revision: int
    """The compaction it takes into account; -1 before the first."""
    revision: int
    """The last revision it covers."""


class KeyValueHash:
    """One computation; it ends early once ``cancelled()`` is true.

    ``done`` is called once, with the result or the error that ended it.
    """

    def __init__(
        self,
        store: Store,
        revision: int,
        *,
        done: Callable[[HashResult | StoreError], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._store = store
        self._explicit = revision != 0
        self._revision = revision or store.commits.durable
        self._done = done
        self._cancelled = cancelled
        self._restarts = 0
        self._compacted = -1
        self._some_live = False
        self._crc = 0
        self._shard = 0
        self._after: RowId = (0, 0)
        self._rows_next = 1

    def start(self) -> None:
        """Wait until the revision is durable everywhere, then read."""
        store = self._store
        if self._explicit and 0 < self._revision < store.compact_revision:
            self._done(CompactedError())
        elif self._revision > store.commits.durable:
            self._done(FutureRevisionError())
        else:
            then = Then(lambda error: self._done(error) if error else self._begin())
            store.commits.when_visible(store.shards.all, self._revision, then)

    def _begin(self) -> None:
        store = self._store
        self._compacted = store.compact_revision
        history = store.history_of(store.shards.all)
        born_since = history.births(b"", b"\0", self._revision)
        self._some_live = store.index.live > born_since
        self._crc = google_crc32c.value(_BUCKET)
        self._shard = 0
        self._after = (0, 0)
        self._read()

    def _read(self) -> None:
        backend = self._store.commits.queues[self._shard].backend
        backend.read_rows(self._after, self._rows_next, self._take)

    def _take(self, rows: list[Row] | BackendError) -> None:
        """Add a chunk; ask for the next one, or the next shard's, or be done."""
        if self._cancelled():
            self._done(TimedOutError())
        elif isinstance(rows, BackendError):
            self._done(_refusal(rows))
        elif self._store.compact_revision != self._compacted:
            self._start_again()
        elif rows and rows[-1][0] <= self._revision:
            self._add(rows)
            self._after = rows[-1][:2]
            self._read()
        else:
            self._add([row for row in rows if row[0] <= self._revision])
            self._shard += 1
            self._after = (0, 0)
            if self._shard < self._store.shards.count:
                self._read()
            else:
                self._done(HashResult(self._crc, self._compacted, self._revision))

    def _add(self, rows: list[Row]) -> None:
        parts = [_encoded(row) for row in rows if self._counts(row)]
        chunk = b"".join(parts)
        self._crc = google_crc32c.extend(self._crc, chunk)
        average = max(64, sum(len(row[6]) for row in rows) // max(1, len(rows)))
        self._rows_next = max(1, min(CHUNK_ROWS_MAX, CHUNK_BYTES // average))

    def _counts(self, row: Row) -> bool:
        """Changes after the last compaction, and those before it that a read sees.

        When a read sees nothing at all, etcd counts what a read at the compaction sees.
        """
        mod, sub, key = row[:3]
        if mod > self._compacted:
            return True
        at = self._revision if self._some_live else self._compacted
        seen = self._store.index.at(key, at)
        return seen is not None and seen[:2] == (mod, sub)

    def _start_again(self) -> None:
        if self._explicit and self._revision < self._store.compact_revision:
            self._done(CompactedError())
        elif self._restarts == RESTARTS_MAX:
            self._done(TimedOutError())
        else:
            self._restarts += 1
            self._begin()


def _refusal(error: BackendError) -> StoreError:
    """What becomes of a computation whose rows cannot be read."""
    if isinstance(error, ReadsFullError):
        return TooManyRequestsError()
    return TimedOutError() if isinstance(error, UnreachableError) else StoppedError()


def _encoded(row: Row) -> bytes:
    """A change as etcd stores it: key, then value."""
    mod, sub, key, create, version, lease, value = row
    place = pack(">qcq", mod, b"_", sub)
    if version == 0:
        return b"%bt\x0a%b%b" % (place, varint(len(key)), key)
    framed = frame_key_value(key, create, mod, version, value, lease)
    start = 1
    while framed[start] & 0x80:
        start += 1
    return place + framed[start + 1 :]
