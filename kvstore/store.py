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

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from kvstore.backend import IndexRow, Row
from kvstore.commit import Commits
from kvstore.config import StoreConfig
from kvstore.counts import Counts
from kvstore.errors import (
    CompactedError,
    CrossShardError,
    FutureRevisionError,
    KeyNotFoundError,
    LeaseNotFoundError,
)
from kvstore.fetch import Fetch, Fetched, Holds
from kvstore.history import Entry, History
from kvstore.index import Index, Place
from kvstore.kv import frame_key_value, frame_tombstone, value_of
from kvstore.listeners import Hub, Leases
from kvstore.range import SORT_VALUE, Item, RangeQuery, RangeRead
from kvstore.recent import RecentValues
from kvstore.shard import HOME, ShardMap
from kvstore.txn import (
    DeleteRange,
    DeleteResult,
    NeedValuesError,
    Put,
    PutResult,
    RangeResult,
    Result,
    Txn,
    TxnResult,
    can_write,
    decide,
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
        self.history = History()
        self.revision = commits.durable
        self.compact_revision = -1
        self.holds = Holds()
        self.counts = Counts()
        self._leases = leases
        self._hub = hub
        self._config = config
        self._recent = RecentValues(config.recent_bytes_max, self._safe)
        self._at_hand: Mapping[Entry, bytes] = {}
        self._rows: list[Row] = []
        self._size = 0
        commits.on_durable = hub.advance

    # -- loading -----------------------------------------

    def load_rows(self, rows: Iterable[IndexRow]) -> list[tuple[int, int]]:
        """Take stored changes in order, at start; returns rows that compaction left behind."""
        index, history, compacted = self.index, self.history, self.compact_revision
        left: list[tuple[int, int]] = []
        for mod, sub, key, create, version, lease in rows:
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
                self._leases.attach(lease, key)
        return left

    # -- reading -----------------------------------------

    def shards_of(self, key: bytes, end: bytes | None) -> tuple[int, ...]:
        """The shards that a key or range touches."""
        return self.shards.of_range(key, end)

    def pin(self, query: RangeQuery, shards: Sequence[int]) -> int:
        """The revision that ``query`` sees; raises CompactedError or FutureRevisionError."""
        revision = query.revision
        if revision <= 0:
            return self.commits.visible(shards) if query.serializable else self.commits.durable
        if revision > self.commits.durable:
            raise FutureRevisionError
        if revision < self.compact_revision:
            raise CompactedError
        return revision

    def read(self, query: RangeQuery, at: int) -> RangeRead:
        """Begin to read ``query`` at revision ``at``."""
        self.counts.ranges += 1
        return RangeRead(
            self.index,
            self.history,
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
        return None if older is None else Item(key, older, self._recent.get(older))

    def version_before(self, key: bytes, revision: int) -> Entry | None:
        """The version that the change of ``key`` at ``revision`` replaced; None if there was none
        or it is compacted.
        """
        return self.index.at(key, revision - 1)

    def framed(self, key: bytes, entry: Entry) -> bytes | None:
        """The framed KeyValue of a version, tombstones included; None when it must be fetched."""
        if entry[3] == 0:
            return frame_tombstone(key, entry[0])
        recent = self._recent.get(entry)
        return recent if recent is not None else self.index.head_value(key, entry)

    def fetch(
        self,
        pairs: Sequence[tuple[bytes, Entry]],
        done: Callable[[Fetched], None],
    ) -> None:
        """Read the framed KeyValues of committed versions from storage, in the order asked.

        None stands for a version that compaction removed meanwhile. A row that is missing for any
        other reason is corruption: ``done`` gets CorruptError, and the shard must not be trusted. A
        storage failure gives StoppedError, too many reads at once TooManyRequestsError.
        """
        self.counts.values_read += len(pairs)
        Fetch(self, pairs, done).start()

    def cache(self, key: bytes, entry: Entry, framed: bytes) -> None:
        """Keep a fetched value for later, within the budget."""
        if self.index.head(key) == entry:
            self.index.cache_value(key, entry, framed)
            self._evict()
        else:
            self._recent.keep(entry, framed)

    # -- writing -----------------------------------------

    def put(self, op: Put) -> PutResult:
        """Execute a put. Raises what ``check_put`` raises, or NeedValuesError."""
        shard = self.shards.of(op.key)
        self.commits.check_room(shard)
        self._check_lease(op)  # before the key, as in etcd; in a Txn it is the other way round
        self._check_put(op)
        result = self._apply_put(op, self.revision + 1, 0)
        self._issue(shard)
        return result

    def with_values(
        self, values: Mapping[Entry, bytes], execute: Callable[[], OutcomeT]
    ) -> OutcomeT:
        """Run ``execute`` with values at hand that attempts before were in need of
        (NeedValuesError), wherever they are now.
        """
        self._at_hand = values
        try:
            return execute()
        finally:
            self._at_hand = {}

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
        if len(shards) > 1:
            raise CrossShardError
        self.commits.check_room(shards[0])
        result = self._apply_delete(op, self.revision + 1, 0)
        if result.deleted:
            self._issue(shards[0])
            return result
        return result._replace(revision=self.head_of(shards))

    def delete_keys(self, keys: Iterable[bytes]) -> int:
        """Delete live keys of one shard in one revision, in key order; returns it, or 0 if none was
        live.
        """
        live = sorted(key for key in set(keys) if self.index.head(key) is not None)
        if not live:
            return 0
        shard = self.shards.of(live[0])
        for sub, key in enumerate(live):
            assert self.shards.of(key) == shard, "keys of one shard"
            self._apply_tombstone(key, self.revision + 1, sub)
        self.counts.deletes += len(live)
        self._issue(shard)
        return self.revision

    def txn(self, txn: Txn) -> tuple[TxnResult, int]:
        """Execute a Txn; returns its result and the revision of its header.

        Nothing is changed when it raises: a StoreError, or NeedValuesError when values that decide
        are not in memory.
        """
        shards = self.shards_of_txn(txn)
        if can_write(txn):
            if len(shards) > 1:
                raise CrossShardError
            self.commits.check_room(shards[0])
        path = decide(txn, self._head_items)
        taken = list(path)
        head = self.head_of(shards)
        self._check(txn, iter(taken), head)
        sub = [0]
        result = self._apply(txn, iter(taken), head, sub)
        self.counts.txns += len(result.results) > 1
        if sub[0]:
            self._issue(shards[0])
            return result, self.revision
        return result, head

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

    # -- checks -----------------------------------------

    def _check_put(self, op: Put) -> None:
        found = self.index.find(op.key) if op.ignore_value or op.ignore_lease else None
        if found is None and (op.ignore_value or op.ignore_lease):
            raise KeyNotFoundError
        self._check_lease(op)
        if found is not None and op.ignore_value and found[0].values[found[1]] is None:
            entry = found[0].entries[found[1]]
            if entry not in self._at_hand:
                raise NeedValuesError([(op.key, entry)])

    def _check_lease(self, op: Put) -> None:
        if op.lease and not self._leases.exists(op.lease):
            raise LeaseNotFoundError

    def _check(self, txn: Txn, taken: Iterable[bool], head: int) -> None:
        """Refuse what could fail on the taken path, before anything is applied."""
        steps = iter(taken)
        for op in txn.success if next(steps) else txn.failure:
            match op:
                case Put():
                    self._check_put(op)
                case RangeQuery():
                    self._check_range(op, head)
                case Txn():
                    self._check(op, steps, head)
                case _:
                    pass

    # -- applying -----------------------------------------

    def _apply(self, txn: Txn, taken: Iterable[bool], head: int, sub: list[int]) -> TxnResult:
        """Run the taken branch. ``sub`` counts the changes so far, in place."""
        revision = self.revision + 1
        steps = iter(taken)
        succeeded = next(steps)
        results: list[Result] = []
        for op in txn.success if succeeded else txn.failure:
            match op:
                case Put():
                    results.append(self._apply_put(op, revision, sub[0]))
                    sub[0] += 1
                case RangeQuery():
                    results.append(self._apply_range(op, revision if sub[0] else head))
                case DeleteRange():
                    deleted = self._apply_delete(op, revision, sub[0])
                    sub[0] += deleted.deleted
                    results.append(deleted if sub[0] else deleted._replace(revision=head))
                case Txn():
                    results.append(self._apply(op, steps, head, sub))
                case None:
                    raise KeyNotFoundError
        return TxnResult(succeeded, results)

    def _read_now(self, query: RangeQuery, head: int) -> RangeRead:
        """Read all of a range at once, inside a Txn whose head is ``head``."""
        at = query.revision if query.revision > 0 else head
        read = RangeRead(self.index, self.history, query, at=at, head=head, step_keys=1 << 30)
        while not read.done:
            read.step()
        if read.sorts_by_value():
            pairs = zip(read.keys, read.entries, strict=True)
            at_hand = self._at_hand
            read.values = [at_hand.get(entry) or self.framed(key, entry) for key, entry in pairs]
        return read

    def _check_range(self, query: RangeQuery, head: int) -> None:
        if query.revision > head:
            raise FutureRevisionError
        if 0 < query.revision < self.compact_revision:
            raise CompactedError
        if query.sort_target == SORT_VALUE:
            read = self._read_now(query, head)
            missing = [(read.keys[i], read.entries[i]) for i in read.missing()]
            if missing:
                raise NeedValuesError(missing)

    def _apply_range(self, query: RangeQuery, head: int) -> RangeResult:
        self.counts.ranges += 1
        read = self._read_now(query, head)
        read.finish()
        return RangeResult(head, read)

    def _apply_put(self, op: Put, revision: int, sub: int) -> PutResult:
        place = self.index.place(op.key)
        _, chunk, at, live = place
        value, lease = op.value, op.lease
        if not live:
            self._set(place, op.key, value, lease, revision, sub)
            return PutResult(revision, None)
        previous, framed = chunk.entries[at], chunk.values[at]
        if framed is None:
            framed = self._at_hand.get(previous)
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
        _, chunk, at, live = place
        if live:
            previous: Entry | None = chunk.entries[at]
            framed_before = chunk.values[at]
            assert previous is not None, "a live key has a version"
            create, version, lease_before = previous[2], previous[3] + 1, previous[4]
            if framed_before is not None:
                self._recent.keep(previous, framed_before)
        else:
            previous = framed_before = None
            create, version, lease_before = revision, 1, 0
        self.counts.puts += 1
        entry = (revision, sub, create, version, lease)
        framed = frame_key_value(key, create, revision, version, value, lease)
        self.index.put_at(place, key, entry, framed)
        self.history.append(key, entry)
        self._rows.append((revision, sub, key, create, version, lease, value))
        self._size += len(key) + len(value) + ROW_OVERHEAD
        if lease != lease_before:
            self._move_lease(key, lease_before, lease)
        self._hub.record(self.shards.of(key), key, entry, framed, previous, framed_before)

    def _apply_delete(self, op: DeleteRange, revision: int, sub: int) -> DeleteResult:
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
        chunk, at = found
        previous, framed_before = chunk.entries[at], chunk.values[at]
        if framed_before is not None:
            self._recent.keep(previous, framed_before)
        entry = (revision, sub, 0, 0, 0)
        self.index.delete(key, entry)
        self.history.append(key, entry)
        self._rows.append((revision, sub, key, 0, 0, 0, b""))
        self._size += len(key) + ROW_OVERHEAD
        if previous[4]:
            self._leases.detach(previous[4], key)
        replaced: Entry | None = previous
        framed_replaced = framed_before
        if previous[0] == revision:  # put by the same Txn: watchers see what was there before it
            replaced = self.index.older_at(key, revision - 1)
            framed_replaced = None if replaced is None else self._recent.get(replaced)
        tombstone = frame_tombstone(key, revision)
        self._hub.record(self.shards.of(key), key, entry, tombstone, replaced, framed_replaced)
        return Item(key, previous, framed_before)

    def _move_lease(self, key: bytes, before: int, after: int) -> None:
        if before:
            self._leases.detach(before, key)
        if after:
            self._leases.attach(after, key)

    def _issue(self, shard: int) -> None:
        """Hand the rows just applied to their shard; the revision counter moves on."""
        self.revision += 1
        self.commits.append(shard, self._rows, self._size)
        self._rows = []
        self._size = 0
        if self.index.value_bytes > self._config.cache_bytes_max:
            self._evict()

    # -- memory -----------------------------------------

    def _evict(self) -> None:
        self.index.evict(self._config.cache_bytes_max, self._safe())

    def _safe(self) -> int:
        """Everything up to this revision is in storage."""
        return self.commits.visible(self.shards.all)

    def _head_items(self, key: bytes, end: bytes | None) -> list[Item]:
        """Live items of a range, for compares."""
        if end is None:
            item = self.get(key, self.revision)
            items = [item] if item is not None else []
        else:
            items = [
                Item(*item)
                for chunk, low, high in self.index.slices(key, end)
                for item in zip(
                    chunk.keys[low:high],
                    chunk.entries[low:high],
                    chunk.values[low:high],
                    strict=True,
                )
            ]
        if self._at_hand:
            items = [
                item if item.framed else item._replace(framed=self._at_hand.get(item.entry))
                for item in items
            ]
        return items
