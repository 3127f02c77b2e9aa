"""What storage must do: the interface that the engine needs and every backend fulfils.

A backend knows rows, not etcd. It holds three things:

- **revisions**, append-only: one row per change, ``(revision, sub, key, create_revision, version,
  lease, value)``. ``sub`` counts the changes inside one revision from 0. A tombstone has
  ``create_revision = version = lease = 0`` and an empty value. Rows leave only when compaction
  names them (``Batch.drops``).
- **leases**, on the home shard: ``(id, granted_ttl, remaining_ttl)``.
- one **fence row**: who owns the shard (``epoch``), the last committed revision (``tip``) and the
  compact revision.

Every batch commits all of its parts or none, and only if the fence row still shows ``epoch`` and
``tip_before``.

Callbacks (``done``) are called exactly once, on the thread of the event loop, never from inside the
call that took them unless the backend says so (the memory backend may be told to). No method blocks
the loop except as stated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from kvstore.errors import BackendError

Row = tuple[int, int, bytes, int, int, int, bytes]
"""(revision, sub, key, create_revision, version, lease, value)."""

IndexRow = tuple[int, int, bytes, int, int, int]
"""(revision, sub, key, create_revision, version, lease): a row without its value."""

RowId = tuple[int, int]
"""(revision, sub)."""


class Fence(NamedTuple):
    """A shard's identity and position, as found and raised by ``Backend.open``."""

    cluster_id: int
    """Non-zero; made when the store was created; unsigned 64 bit, as on the wire."""
    member_id: int
    """Non-zero; likewise."""
    shard: str
    """The shard's name in the configuration that created it."""
    epoch: int
    """The epoch that this process now holds; grows by one with every open."""
    tip: int
    """The last committed revision; 1 in a new store (etcd's revision of an empty store)."""
    compact_revision: int
    """The last compaction's revision; -1 in a new store, as in etcd."""


class LeaseRow(NamedTuple):
    """A lease as stored."""

    id: int
    granted_ttl: int
    """Seconds."""
    remaining_ttl: int
    """Seconds left at the last checkpoint; 0 when none was taken: the lease restarts with all of
    its TTL.
    """


@dataclass(slots=True)
class Batch:
    """What one commit carries."""

    epoch: int
    tip_before: int
    """The fence row's tip must be this."""
    tip: int
    """The fence row's tip becomes this: the last revision in ``rows``, or ``tip_before`` when there
    is none.
    """
    rows: list[Row] = field(default_factory=list)
    """In (revision, sub) order."""
    drops: list[RowId] = field(default_factory=list)
    """Rows to delete for ever; a row that is not there is no error (a crash may have split a
    compaction).
    """
    lease_puts: dict[int, LeaseRow] = field(default_factory=dict)
    lease_deletes: list[int] = field(default_factory=list)
    """Applied before ``lease_puts``."""
    compact_revision: int | None = None


class Outcome(Enum):
    """How a commit ended."""

    COMMITTED = "committed"
    """Durable, as the durability class says."""
    NOT_COMMITTED = "not committed"
    """Definitely nothing was stored (disk full, busy); the same batch may be tried again."""
    UNKNOWN = "unknown"
    """Stored or not: the backend must be asked again (``resolve``) before anything else."""
    FENCED = "fenced"
    """Another process owns the shard: this one must stop."""
    BROKEN = "broken"
    """Storage cannot be trusted any more (I/O error, corruption): this shard must stop for good."""


class CommitResult(NamedTuple):
    """The outcome and, unless committed, the reason for the operator."""

    outcome: Outcome
    reason: str = ""


class Sizes(NamedTuple):
    """Bytes on disk; in use excludes free pages."""

    total: int
    in_use: int


class Backend(Protocol):
    """One shard's storage. See the module's text for the rules."""

    on_broken: Callable[[str], None]
    """Called with the reason, on the thread of the event loop, when the shard is found BROKEN;
    whoever opens a backend sets it, for between two commits nobody would be told.
    """

    async def open(self) -> Fence:
        """Take the lock, check the schema (create or migrate it), raise the epoch durably, read the
        fence row.

        Raises ``BackendError`` with one clear line: locked by another process, not ours, newer
        schema, not writable, durability settings not in force. Nothing is changed when it raises.
        """

    async def load_index(self, sink: Callable[[list[IndexRow]], None]) -> None:
        """Hand every row without its value to ``sink``, in (revision, sub) order, in chunks of some
        thousand.
        """

    async def load_leases(self) -> list[LeaseRow]:
        """Every stored lease."""

    def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Commit ``batch``; one at a time: the next only after ``done``."""

    def resolve(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """After UNKNOWN: take the shard anew and say whether ``batch`` is stored (COMMITTED or
        NOT_COMMITTED).

        A backend that raises the epoch to do so keeps that to itself: ``Batch.epoch`` stays what
        ``open`` returned.
        """

    def read_values(
        self, ids: Sequence[RowId], done: Callable[[list[bytes | None] | BackendError], None]
    ) -> None:
        """The values of committed rows, in the order asked; None for a row that is not there.

        ``ReadsFullError`` when too many reads wait; any other error means that storage failed.
        """

    def read_rows(
        self, after: RowId, rows_max: int, done: Callable[[list[Row] | BackendError], None]
    ) -> None:
        """Up to ``rows_max`` rows greater than ``after`` in (revision, sub) order, values
        included. Errors as in ``read_values``.
        """

    def sizes(self) -> Sizes:
        """Bytes on disk as of the last commit or checkpoint; does not block."""

    def defragment(self, done: Callable[[BackendError | None], None]) -> None:
        """Give free space back to the file system; commits wait meanwhile."""

    async def close(self) -> None:
        """Finish what is under way, checkpoint, release the lock. Idempotent."""
