"""One Txn while it executes: which branches are taken, what is refused, what its operations do.

In that order: every compare is evaluated, then everything that could fail on the taken branches is
refused, then their operations are applied one after the other, which may no longer fail. A range
sees the head and the changes of the operations before it.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvstore.errors import CompactedError, FutureRevisionError, KeyNotFoundError
from kvstore.range import SORT_VALUE, Item, RangeQuery, RangeRead
from kvstore.txn import (
    DeleteRange,
    NeedValuesError,
    Put,
    RangeResult,
    Result,
    Txn,
    TxnResult,
    decide,
)

if TYPE_CHECKING:
    from kvstore.store import Store


class Execution:
    """See the module's text. ``head`` is the revision that the Txn's shards are at, ``changes`` the
    number of changes so far.
    """

    __slots__ = ("_revision", "_store", "changes", "head")

    def __init__(self, store: "Store", head: int) -> None:
        self._store = store
        self._revision = store.revision + 1
        self.head = head
        self.changes = 0

    def decide(self, txn: Txn) -> list[bool]:
        """The outcome of each Txn of the taken path. Raises NeedValuesError."""
        return list(decide(txn, self._items))

    def check(self, txn: Txn, taken: Iterator[bool]) -> None:
        """Raise what could fail on the taken path: StoreError or NeedValuesError."""
        for op in txn.success if next(taken) else txn.failure:
            match op:
                case Put():
                    self._store.check_put(op)
                case RangeQuery():
                    self._check_range(op)
                case Txn():
                    self.check(op, taken)
                case _:
                    pass

    def apply(self, txn: Txn, taken: Iterator[bool]) -> TxnResult:
        """Run the taken branches, which were checked."""
        store, revision = self._store, self._revision
        succeeded = next(taken)
        results: list[Result] = []
        for op in txn.success if succeeded else txn.failure:
            match op:
                case Put():
                    results.append(store.apply_put(op, revision, self.changes))
                    self.changes += 1
                case RangeQuery():
                    results.append(self._range(op))
                case DeleteRange():
                    deleted = store.apply_delete(op, revision, self.changes)
                    self.changes += deleted.deleted
                    results.append(
                        deleted if self.changes else deleted._replace(revision=self.head)
                    )
                case Txn():
                    results.append(self.apply(op, taken))
                case None:
                    raise KeyNotFoundError
        return TxnResult(succeeded, results)

    # -- ranges ------------------------------------------------------------------------------------

    def _check_range(self, query: RangeQuery) -> None:
        if query.revision > self.head:
            raise FutureRevisionError
        if 0 < query.revision < self._store.compact_revision:
            raise CompactedError
        if query.sort_target == SORT_VALUE:
            read = self._read(query, self.head)
            missing = [(read.keys[i], read.entries[i]) for i in read.missing()]
            if missing:
                raise NeedValuesError(missing)

    def _range(self, query: RangeQuery) -> RangeResult:
        head = self._revision if self.changes else self.head
        self._store.counts.ranges += 1
        read = self._read(query, head)
        read.finish()
        return RangeResult(head, read)

    def _read(self, query: RangeQuery, head: int) -> RangeRead:
        """Read all of a range at once, at its own revision or at ``head``."""
        store = self._store
        at = query.revision if query.revision > 0 else head
        history = store.history_of(store.shards_of(query.key, query.end))
        read = RangeRead(store.index, history, query, at=at, head=head, step_keys=1 << 30)
        while not read.done:
            read.step()
        if read.sorts_by_value():
            pairs = zip(read.keys, read.entries, strict=True)
            at_hand = store.at_hand
            read.values = [at_hand.get(entry) or store.framed(key, entry) for key, entry in pairs]
        return read

    def _items(self, key: bytes, end: bytes | None) -> list[Item]:
        """Live items of a range, for compares."""
        store = self._store
        if end is None:
            item = store.get(key, store.revision)
            items = [item] if item is not None else []
        else:
            items = [
                Item(*item)
                for chunk, low, high in store.index.slices(key, end)
                for item in zip(
                    chunk.keys[low:high],
                    chunk.entries[low:high],
                    chunk.values[low:high],
                    strict=True,
                )
            ]
        if store.at_hand:
            items = [
                item if item.framed else item._replace(framed=store.at_hand.get(item.entry))
                for item in items
            ]
        return items
