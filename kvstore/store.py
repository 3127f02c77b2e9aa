"""The store: the only place that issues revisions and changes the index.

A request that executes is one synchronous call: check everything that can be refused, then apply.
Applying a change of one key means: the index gets the new head, the history one more change, the
lessor the key's lease, the watch hub the change, the open batch of the key's shard the row. The
rows of one revision are appended to their shard together.

What a call returns may rest on changes that are not durable yet. The caller (``rpc``) releases it
through ``commits.release`` (the ticket) or, for reads, through ``commits.when_visible`` (the pin);
see ``commit``.

Values that are no longer head and not yet old (uncommitted, or just replaced) wait in ``recent``.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from kvstore.answers import Answer, Joined, Refusal
from kvstore.backend import IndexRow, Row, RowId
from kvstore.barrier import Barrier
from kvstore.commit import Commits
from kvstore.config import StoreConfig
from kvstore.counts import Counts
from kvstore.errors import (
    CompactedError,
    FutureRevisionError,
    KeyNotFoundError,
    LeaseNotFoundError,
    StoppedError,
    StoreError,
)
from kvstore.execution import Execution
from kvstore.fetch import Fetch, Fetched, Holds
from kvstore.history import Entry, History, Log, MergedHistory
from kvstore.index import Index, Place
from kvstore.kv import frame_key_value, frame_tombstone, value_of
from kvstore.listeners import Hub, Leases
from kvstore.range import Item, RangeQuery, RangeRead
from kvstore.recent import RecentValues
from kvstore.shard import HOME, ShardMap
from kvstore.txn import (
    DeleteRange,
    DeleteResult,
    NeedValuesError,
    Put,
    PutResult,
    Txn,
    TxnResult,
    can_write,
    can_write_on,
    ranges_of,
)

OutcomeT = TypeVar("OutcomeT")

ROW_OVERHEAD = 64
"""Bytes that a row counts for the queue limits beside its key and value."""


class Store:
    """See the module's text. ``revision`` is the last one issued; it may not be durable yet."""

    def __init__(
        self, commits: Commits, shards: ShardMap, leases: Leases, hub: Hub, config: StoreConfig
    ) -> None:
        self.commits = commits
        self.shards = shards
        self.index = Index()
        self.histories = [History(commits.compact_revision) for _ in commits.queues]
        self.revision = commits.durable
        self.compact_revision = commits.compact_revision
        self._loaded: list[RowId] = [(0, 0) for _ in commits.queues]
        self.holds = Holds()
        self.counts = Counts(shards.count)
        self._leases = leases
        self._hub = hub
        self._config = config
        recent_bytes_max = config.recent_bytes_max // len(commits.queues)
        self._recent = [
            RecentValues(recent_bytes_max, partial(commits.visible, (queue.number,)))
            for queue in commits.queues
        ]
        self.at_hand: Mapping[Entry, bytes] = {}
        """Values fetched for the request that executes now."""
        self._rows: list[Row] = []
        self._size = 0
        self.barrier = Barrier(commits)
        commits.on_durable = hub.advance

    # -- loading -----------------------------------------

    def load_rows(self, shard: int, rows: Sequence[IndexRow]) -> list[RowId]:
        """Take stored changes of a shard in order, at start or while the others are served; returns
        rows that compaction left behind. A load that broke off may begin anew.

        A key of another shard is among those: it was this one's by an earlier map, and what is left
        of it here is superseded (``map_check``), whatever the shard has by now that owns it.
        """
        index, history, loaded = self.index, self.histories[shard], self._loaded[shard]
        compacted, left = history.floor, list[RowId]()
        fresh = rows[bisect_right(rows, loaded, key=_row_id) :]
        self.commits.queues[shard].stored += len(fresh)
        owner = self.shards.of
        for mod, sub, key, create, version, lease in fresh:
            if owner(key) != shard:
                left.append((mod, sub))
                continue
            entry = (mod, sub, create, version, lease)
            before = index.head(key)
            dropped = index.load(key, entry, compacted)
            if dropped:
                left += [(old[0], old[1]) for old in dropped]
            if mod >= compacted:
                history.append(key, entry)
            if before is not None and before[4]:
                self._leases.detach(before[4], key)
            if lease:
                self._leases.attach(lease, key, mod)
        if fresh:
            self._loaded[shard] = _row_id(fresh[-1])
        return left

    # -- reading -----------------------------------------

    def shards_of(self, key: bytes, end: bytes | None) -> tuple[int, ...]:
        """The shards that a key or range touches."""
        return self.shards.of_range(key, end)

    def history_of(self, shards: Sequence[int]) -> Log:
        """The changes of ``shards`` since the last compaction."""
        if len(shards) == 1:
            return self.histories[shards[0]]
        return MergedHistory([self.histories[shard] for shard in shards])

    def pin(self, query: RangeQuery, shards: Sequence[int]) -> int:
        """The revision that ``query`` sees; raises CompactedError or FutureRevisionError, and what
        ``commits.check_readable`` raises.
        """
        commits, revision = self.commits, query.revision
        head = commits.durable
        at = revision
        if revision <= 0:
            at = commits.visible(shards) if query.serializable else head
        commits.check_readable(shards, stale=query.serializable)
        if revision > head:
            raise FutureRevisionError
        if 0 < revision < self.compact_revision:
            raise CompactedError
        return at

    def read(self, query: RangeQuery, at: int) -> RangeRead:
        """Begin to read ``query`` at revision ``at``."""
        self.counts.ranges += 1
        shards = self.shards
        touched = shards.all if shards.count == 1 else shards.of_range(query.key, query.end)
        return RangeRead(
            self.index,
            self.history_of(touched),
            query,
            at=at,
            head=self.revision,
            step_keys=self._config.read_chunk_keys,
        )

    def get(self, key: bytes, at: int) -> Item | None:
        """The single ``key`` at revision ``at``."""
        found = self.index.find(key)
        if found is not None:
            chunk, position = found
            entry = chunk.entries[position]
            if entry[0] <= at:
                chunk.hot = True
                return Item(key, entry, chunk.values[position])
        if at >= self.revision:
            return None
        older = self.index.older_at(key, at)
        if older is None:
            return None
        return Item(key, older, self._recent[self.shards.of(key)].get(older))

    def version_before(self, key: bytes, revision: int) -> Entry | None:
        """The version that the change of ``key`` at ``revision`` replaced; None if there was none
        or it is compacted.
        """
        return self.index.at(key, revision - 1)

    def framed(self, key: bytes, entry: Entry) -> bytes | None:
        """The framed KeyValue of a version, tombstones included; None when it must be fetched."""
        if entry[3] == 0:
            return frame_tombstone(key, entry[0])
        recent = self._recent[self.shards.of(key)].get(entry)
        return recent if recent is not None else self.index.head_value(key, entry)

    def fetch(self, pairs: Sequence[tuple[bytes, Entry]], done: Callable[[Fetched], None]) -> None:
        """Read the framed KeyValues of committed versions from storage, in the order asked.

        None stands for a version that compaction removed meanwhile. A row that is missing for any
        other reason is corruption: ``done`` gets CorruptError, and the shard must not be trusted. A
        storage failure gives StoppedError, too many reads at once TooManyRequestsError.
        """
        Fetch(self, pairs, done).start()

    def cache(self, key: bytes, entry: Entry, framed: bytes) -> None:
        """Keep a fetched value for later, within the budget."""
        if self.index.head(key) == entry:
            self.index.cache_value(key, entry, framed)
            self._evict()
        else:
            self._recent[self.shards.of(key)].keep(entry, framed)

    # -- writing -----------------------------------------

    def put(self, op: Put) -> PutResult:
        """Execute a put. Raises what ``check_put`` raises, or NeedValuesError."""
        shard = self.shards.of(op.key)
        self.commits.check_room(shard)
        self._check_lease(op)  # before the key, as in etcd; in a Txn it is the other way round
        self.check_put(op)
        result = self.apply_put(op, self.revision + 1, 0)
        self._issue(shard)
        return result

    def with_values(
        self, values: Mapping[Entry, bytes], execute: Callable[[], OutcomeT]
    ) -> OutcomeT:
        """Run ``execute`` with values at hand that attempts before were in need of
        (NeedValuesError), wherever they are now.
        """
        self.at_hand = values
        try:
            return execute()
        finally:
            self.at_hand = {}

    def put_if(self, key: bytes, mod_revision: int, value: bytes, lease: int) -> int:
        """Put ``key`` if its mod_revision (0: not live) is as given, as kube-apiserver writes.

        Returns the revision, or 0 when nothing was done because the condition does not hold or
        the lease does not exist: a Txn then tells what there is to tell. Raises what
        ``commits.check_room`` raises.
        """
        place = self.index.place(key)
        _, chunk, at, live = place
        if mod_revision != (chunk.entries[at][0] if live else 0):
            return 0
        if lease and not self._leases.exists(lease):
            return 0
        shard = self.shards.of(key)
        self.commits.check_room(shard)
        self._set(place, key, value, lease, self.revision + 1, 0)
        self._issue(shard)
        return self.revision

    def delete_range(self, op: DeleteRange) -> DeleteResult:
        """Execute a delete; without a live key in the range nothing is issued."""
        shards = self.shards_of(op.key, op.end)
        self.check_room(shards)
        result = self.apply_delete(op, self.revision + 1, 0)
        if result.deleted:
            self._issue_on(shards)
            return result
        return result._replace(revision=self.head_of(shards))

    def delete_keys(self, keys: Iterable[bytes]) -> int:
        """Delete live keys in one revision, in key order; returns it, or 0 if none was live.
        ``check_room`` of their shards has just been asked.
        """
        live = sorted(key for key in set(keys) if self.index.head(key) is not None)
        if not live:
            return 0
        for sub, key in enumerate(live):
            self._apply_tombstone(key, self.revision + 1, sub)
        self.counts.deletes += len(live)
        self._issue_on({self.shards.of(key) for key in live})
        return self.revision

    def txn(self, txn: Txn) -> tuple[TxnResult, int]:
        """Execute a Txn; returns its result and the revision of its header.

        Nothing is changed when it raises: a StoreError, or NeedValuesError when values that decide
        are not in memory.
        """
        shards = self.shards_of_txn(txn)
        writes = can_write(txn)
        over = writes and len(shards) > 1
        if over:
            self.barrier.check_room(shards)
        elif writes:
            self.commits.check_room(shards[0])
        else:
            self.commits.check_readable(shards)
        execution = Execution(self, self.head_of(shards))
        taken = execution.decide(txn)
        execution.check(txn, iter(taken))
        if over and can_write_on(txn, iter(taken)):
            self.barrier.check(shards)
        result = execution.apply(txn, iter(taken))
        self.counts.txns += len(result.results) > 1
        if execution.changes:
            self._issue_on(shards)
            return result, self.revision
        return result, execution.head

    def shards_of_txn(self, txn: Txn) -> tuple[int, ...]:
        """Every shard that the Txn's compares and branches touch."""
        if self.shards.count == 1:
            return self.shards.all
        touched = {shard for key, end in ranges_of(txn) for shard in self.shards_of(key, end)}
        return tuple(sorted(touched)) or (HOME,)

    def head_of(self, shards: Sequence[int]) -> int:
        """The revision that an answer without a change of its own carries: the head of what it
        looked at.
        """
        if self.shards.count == 1:
            return self.revision
        return max(self.commits.durable, *(self.commits.issued(shard) for shard in shards))

    def close(self) -> None:
        """The server stops: nothing more is issued, and who waits for it is refused."""
        self.commits.bar(StoppedError)
        self.barrier.close()

    # -- checks -----------------------------------------

    def check_room(self, shards: Sequence[int]) -> None:
        """Raise what keeps a write to ``shards`` from executing now: an UnreadyError."""
        if len(shards) == 1:
            self.commits.check_room(shards[0])
        else:
            self.barrier.check(shards)

    def check_put(self, op: Put) -> None:
        """Raise what keeps a put from being applied: StoreError or NeedValuesError."""
        found = self.index.find(op.key) if op.ignore_value or op.ignore_lease else None
        if found is None and (op.ignore_value or op.ignore_lease):
            raise KeyNotFoundError
        self._check_lease(op)
        if found is not None and op.ignore_value and found[0].values[found[1]] is None:
            entry = found[0].entries[found[1]]
            if entry not in self.at_hand:
                raise NeedValuesError([(op.key, entry)])

    def _check_lease(self, op: Put) -> None:
        if op.lease and not self._leases.exists(op.lease):
            raise LeaseNotFoundError(op.lease)

    def refuse(self, shards: Sequence[int], answer: Answer, error: StoreError) -> None:
        """Fail ``answer`` with ``error``, which was decided at the head of ``shards``, once all
        that it rests on is durable; the end of a lease is on home, and comes after its keys'.
        """
        refusal: Answer = Refusal(answer, error)
        if isinstance(error, LeaseNotFoundError):
            refusal = Joined(refusal, b"", 2)
            self._leases.after_absence(error.lease, refusal)
        self.commits.release(shards, refusal, b"")

    # -- applying -----------------------------------------

    def apply_put(self, op: Put, revision: int, sub: int) -> PutResult:
        """Apply a put that was checked, as change ``sub`` of ``revision``."""
        place = self.index.place(op.key)
        _, chunk, at, live = place
        value, lease = op.value, op.lease
        if not live:
            self._set(place, op.key, value, lease, revision, sub)
            return PutResult(revision, None)
        previous, framed = chunk.entries[at], chunk.values[at]
        if framed is None:
            framed = self.at_hand.get(previous)
        if op.ignore_value:
            assert framed is not None, "checked before"
            value = value_of(framed)
        if op.ignore_lease:
            lease = previous[4]
        self._set(place, op.key, value, lease, revision, sub)
        return PutResult(revision, Item(op.key, previous, framed) if op.prev_kv else None)

    def _set(
        self, place: Place, key: bytes, value: bytes, lease: int, revision: int, sub: int
    ) -> None:
        """The change itself: ``key`` at ``place`` gets a new version."""
        shard = self.shards.of(key)
        _, chunk, at, live = place
        if live:
            previous: Entry | None = chunk.entries[at]
            framed_before = chunk.values[at]
            assert previous is not None, "a live key has a version"
            create, version, lease_before = previous[2], previous[3] + 1, previous[4]
            if framed_before is not None:
                self._recent[shard].keep(previous, framed_before)
        else:
            previous = framed_before = None
            create, version, lease_before = revision, 1, 0
        self.counts.puts += 1
        entry = (revision, sub, create, version, lease)
        framed = frame_key_value(key, create, revision, version, value, lease)
        self.index.put_at(place, key, entry, framed)
        self.histories[shard].append(key, entry)
        self._rows.append((revision, sub, key, create, version, lease, value))
        self._size += len(key) + len(value) + ROW_OVERHEAD
        if lease != lease_before:
            self._move_lease(key, lease_before, lease)
        self._hub.record(shard, key, entry, framed, previous, framed_before)

    def apply_delete(self, op: DeleteRange, revision: int, sub: int) -> DeleteResult:
        """Apply a delete; its changes count from ``sub``."""
        self.counts.deletes += 1
        if op.end is None:
            keys = [op.key] if self.index.head(op.key) is not None else []
        else:
            keys = [
                key
                for chunk, low, high in self.index.slices(op.key, op.end)
                for key in chunk.keys[low:high]
            ]
        shown = [self._apply_tombstone(key, revision, sub + i) for i, key in enumerate(keys)]
        return DeleteResult(revision, len(keys), shown if op.prev_kv else ())

    def _apply_tombstone(self, key: bytes, revision: int, sub: int) -> Item:
        """Delete a live key; returns what it was."""
        found = self.index.find(key)
        assert found is not None, "only a live key is deleted"
        shard = self.shards.of(key)
        chunk, at = found
        previous, framed_before = chunk.entries[at], chunk.values[at]
        if framed_before is not None:
            self._recent[shard].keep(previous, framed_before)
        entry = (revision, sub, 0, 0, 0)
        self.index.delete(key, entry)
        self.histories[shard].append(key, entry)
        self._rows.append((revision, sub, key, 0, 0, 0, b""))
        self._size += len(key) + ROW_OVERHEAD
        if previous[4]:
            self._leases.detach(previous[4], key)
        replaced: Entry | None = previous
        framed_replaced = framed_before
        if previous[0] == revision:  # put by the same Txn: watchers see what was there before it
            replaced = self.index.older_at(key, revision - 1)
            framed_replaced = None if replaced is None else self._recent[shard].get(replaced)
        tombstone = frame_tombstone(key, revision)
        self._hub.record(shard, key, entry, tombstone, replaced, framed_replaced)
        return Item(key, previous, framed_before)

    def _move_lease(self, key: bytes, before: int, after: int) -> None:
        if before:
            self._leases.detach(before, key)
        if after:
            self._leases.attach(after, key, self.revision + 1)

    def _issue(self, shard: int) -> None:
        """Hand the rows just applied to their shard; the revision counter moves on."""
        self.revision += 1
        self.commits.append(shard, self._rows, self._size)
        self._rows = []
        self._size = 0
        if self.index.value_bytes > self._config.cache_bytes_max:
            self._evict()

    def _issue_on(self, shards: Collection[int]) -> None:
        """Likewise for a request that touched ``shards``: over several, home decides about all its
        rows at once.
        """
        if len(shards) == 1:
            self._issue(*shards)
            return
        parts: dict[int, list[Row]] = {}
        for row in self._rows:
            parts.setdefault(self.shards.of(row[2]), []).append(row)
        self.revision += 1
        self.commits.append_over(self.revision, parts, self._size)
        self._rows = []
        self._size = 0

    # -- memory -----------------------------------------

    def _evict(self) -> None:
        if self.shards.count == 1:
            self.index.evict(self._config.cache_bytes_max, self._safe())
        else:
            self.index.evict(self._config.cache_bytes_max, self.commits.durable, self._stored)

    def _safe(self) -> int:
        """Everything up to this revision is in storage."""
        return self.commits.visible(self.shards.all)

    def _stored(self, key: bytes, end: bytes | None) -> int:
        """Everything of a key or range is in storage up to this revision."""
        return self.commits.visible(self.shards_of(key, end))


def _row_id(row: IndexRow) -> RowId:
    return row[:2]
