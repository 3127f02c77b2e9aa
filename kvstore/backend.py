"""What storage must do: the interface that the engine needs and every backend fulfils.

A backend knows rows, not etcd. It holds three things:

- **revisions**, append-only: one row per change, ``(revision, sub, key, create_revision, version,
  lease, value)``. ``sub`` counts the changes inside one revision from 0. A tombstone has
  ``create_revision = version = lease = 0`` and an empty value. Rows leave only when compaction
  names them (``Batch.drops``).
- one **fence row**: who owns the shard (``epoch``), the last committed revision (``tip``) and the
  compact revision.
- on the **home shard**, for all of them: leases ``(id, granted_ttl, remaining_ttl)``, the map of
  the shards as a text, a record of each shard as it was last seen, and **redo rows**: rows of
  other shards that a request over several shards has committed here and that are still on their
  way there.

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


class Cluster(NamedTuple):
    """Whose shards these are: made with the home shard, the same on all; non-zero, 64 bit."""

    cluster_id: int
    member_id: int


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
    """The last compaction's revision; -1 in a new store, as in etcd. Home's counts for all."""
    reserved: int = 0
    """On home: revisions up to here may have been issued; 0: none was ever reserved."""
    origin: str = ""
    """Which database this is, as the database system tells it, and changes when another takes its
    place (PostgreSQL: system identifier and timeline, with a slash between them); empty where
    nothing tells (SQLite).
    """


class ShardRecord(NamedTuple):
    """A shard as home last saw it."""

    shard: str
    """Its name."""
    tip: int
    """A shard that is behind this has lost what it had acknowledged."""
    origin: str


class HomeRows(NamedTuple):
    """What is stored on the home shard for all of them."""

    shard_map: str
    """Empty in a new store."""
    records: list[ShardRecord]
    redo: list[tuple[str, Row]]
    """(shard, row) in (revision, sub) order."""


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
    """The fence row's tip becomes this: at least the last revision in ``rows``, and ``tip_before``.
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
    reserved: int | None = None
    records: dict[str, ShardRecord] = field(default_factory=dict)
    """By name; each replaces the one of its shard."""
    redo: list[tuple[str, Row]] = field(default_factory=list)
    """(shard, row) in (revision, sub) order."""
    redo_drops: list[int] = field(default_factory=list)
    """Revisions whose redo rows go; one without any is no error."""
    shard_map: str | None = None


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
    on_out: Callable[[str], None]
    """Likewise, when the database is known to be out of reach; what is asked meanwhile waits or
    fails.
    """
    on_back: Callable[[], None]
    """Likewise, when it is within reach again, and still ours."""

    @property
    def origin(self) -> str:
        """As in the fence that ``open`` gave; another one when a copy that lacks nothing has since
        taken the place of the database.
        """

    async def open(self, cluster: Cluster | None = None, *, known: bool = False) -> Fence:
        """Take the lock, check the schema (create or migrate it), raise the epoch durably, read the
        fence row. ``cluster`` is None for the home shard, which makes its ids when it is new; the
        other shards get home's, and a new one takes them. One that is ``known`` has been there
        before, so that nothing is created.

        Raises ``UnreachableError`` when the database cannot be reached (the file of one that is
        known is not there, its disk fails), and ``BackendError`` with
        one clear line when it must not be used: locked by another process, not ours, of another
        cluster or name, newer schema, not writable, durability settings not in force. Nothing is
        changed when it raises.
        """

    async def load_index(self, sink: Callable[[list[IndexRow]], None]) -> None:
        """Hand every row without its value to ``sink``, in (revision, sub) order, in chunks of some
        thousand.
        """

    async def load_leases(self) -> list[LeaseRow]:
        """Every stored lease."""

    async def load_home(self) -> HomeRows:
        """What home keeps for all shards."""

    def lease_until(self) -> float:
        """Until when, on the monotonic clock, no other process can have taken the shard without
        this one's noticing (a commit notices by itself); ``math.inf`` where a lock says so.
        """

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
        """Finish what is under way, checkpoint, release the lock. Idempotent. A shard that is
        refused after it was opened is closed, and may be opened again.
        """
