"""Reading a range at a revision: what etcd's Range does, in bounded steps.

A ``RangeQuery`` is what a client asked; a ``RangeRead`` carries it out at one revision P. The index
gives live keys whose head is not later than P directly; a later head is replaced by the older
version that P sees; keys that died after P come from the history. Between steps the index may
change: the read continues after the last key, at P, so the answer is the same as if it had been
taken at once. What may not happen in between is a compaction past P; the caller checks that after
every step.

Order of work is etcd's (``server/etcdserver/txn/range.go``): everything in the range if it must be
sorted or filtered, else ``limit`` keys; filters by mod and create revision; sort; cut to the limit.
``count`` is before filters and limit.
"""

from bisect import bisect_left
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

from kvstore.history import Entry, Log
from kvstore.index import Chunk, Index
from kvstore.kv import value_of

_LOOKUP_KEYS = 8
"""What finding one older version (2 us) counts, in keys that are only passed on."""

SORT_KEY, SORT_VERSION, SORT_CREATE, SORT_MOD, SORT_VALUE = range(5)
ORDER_NONE, ORDER_ASCEND, ORDER_DESCEND = range(3)


class RangeQuery(NamedTuple):
    r"""A Range request. ``end`` None is the single key, ``b"\\0"`` no upper bound; zero bounds mean
    none.
    """

    key: bytes
    end: bytes | None
    limit: int = 0
    revision: int = 0
    sort_order: int = ORDER_NONE
    sort_target: int = SORT_KEY
    serializable: bool = False
    keys_only: bool = False
    count_only: bool = False
    min_mod_revision: int = 0
    max_mod_revision: int = 0
    min_create_revision: int = 0
    max_create_revision: int = 0

    def filters(self) -> bool:
        """Are there bounds on revisions?"""
        return bool(
            self.min_mod_revision
            or self.max_mod_revision
            or self.min_create_revision
            or self.max_create_revision
        )

    def keeps(self, entry: Entry) -> bool:
        """Does ``entry`` pass the bounds?"""
        mod, _, create, _, _ = entry
        return not (
            (self.min_mod_revision and mod < self.min_mod_revision)
            or (self.max_mod_revision and mod > self.max_mod_revision)
            or (self.min_create_revision and create < self.min_create_revision)
            or (self.max_create_revision and create > self.max_create_revision)
        )

    def sorts(self) -> bool:
        """Must the keys be put into another order than their own?"""
        return self.sort_order == ORDER_DESCEND or self.sort_target != SORT_KEY


class Item(NamedTuple):
    """A key as read: its version, and the framed KeyValue or None when it must be fetched."""

    key: bytes
    entry: Entry
    framed: bytes | None


class RangeRead:
    """One read at revision ``at``: call ``step`` until ``done``, then ``finish``.

    ``keys``, ``entries`` and ``values`` are the answer, parallel; a value (framed KeyValue) is None
    when it must be fetched. ``count`` and ``more`` are etcd's. ``head`` is the last revision
    applied; ``step_keys`` how many keys one step looks at, fewer where older versions are shown.
    """

    def __init__(
        self,
        index: Index,
        history: Log,
        query: RangeQuery,
        *,
        at: int,
        head: int,
        step_keys: int,
    ) -> None:
        self.query = query
        self.at = at
        self.keys: list[bytes] = []
        self.entries: list[Entry] = []
        self.values: list[bytes | None] = []
        self.more = False
        self.done = query.count_only
        self._index = index
        self._step_keys = step_keys
        self._sorts = query.sorts()
        self._everything = query.filters() or (self._sorts and query.sort_order != ORDER_NONE)
        self._limit = 0 if self._everything else query.limit
        if self._limit and self._sorts:
            self._limit += 1  # a target without an order sorts the first keys only, as in etcd
        self._next = query.key
        self._deaths = history.deaths(query.end, at)
        self.count = index.count(query.key, query.end)
        if at < head:
            self.count -= history.births(query.key, query.end, at)

    def step(self) -> None:
        """Look at some more keys."""
        assert not self.done, "a read that is done has no further step"
        self._deaths.refresh(self._next)  # keys may have died since the last step
        budget = self._step_keys
        for chunk, low, high in self._index.slices(self._next, self.query.end):
            at = low
            while at < high and budget > 0 and not self._full():
                room = self._limit - len(self.keys) if self._limit else budget
                at, cost = self._pass(chunk, at, min(high, at + room, at + budget), budget)
                budget -= cost
            if self._full():
                break
            if budget <= 0:
                return
        if not self._full():
            dead, _ = self._deaths.take(None, 1 + budget // _LOOKUP_KEYS)
            self._take([], [], [], dead)
            if self._deaths.first() is not None and not self._full():
                self._next = dead[-1] + b"\0"
                return
        self._close()

    def _full(self) -> bool:
        return bool(self._limit) and len(self.keys) >= self._limit

    def _pass(self, chunk: Chunk, low: int, high: int, budget: int) -> tuple[int, int]:
        """Take the chunk's keys from ``low`` to ``high`` and those that died between them, fewer if
        that is too much; how far it came, and what it cost of ``budget``.
        """
        keys = chunk.keys
        dead, looked = self._deaths.take(keys[high - 1], 1 + budget // _LOOKUP_KEYS)
        first_left = self._deaths.first()
        if first_left is not None and first_left <= keys[high - 1]:
            high = bisect_left(keys, first_left, low, high)
        chunk.hot = True
        looked += self._take(keys[low:high], chunk.entries[low:high], chunk.values[low:high], dead)
        last = keys[high - 1] if high > low else dead[-1]
        self._next = max(last, dead[-1] if dead else last) + b"\0"
        return high, high - low + _LOOKUP_KEYS * looked

    def _take(
        self,
        keys: list[bytes],
        entries: list[Entry],
        values: list[bytes | None],
        dead: list[bytes],
    ) -> int:
        """Add what ``at`` sees of these keys, which are in order; how many older versions of live
        keys were looked up.
        """
        at = self.at
        if not dead and max(map(_MOD, entries), default=0) <= at:
            self.keys += keys
            self.entries += entries
            self.values += values
            return 0
        older_at = self._index.older_at
        looked_up = 0
        coming = dead[::-1]
        for key, entry, value in zip(keys, entries, values, strict=True):
            while coming and coming[-1] <= key:
                self._add_dead(coming.pop())
            if entry[0] <= at:
                self._add(key, entry, value)
            else:
                looked_up += 1
                older = older_at(key, at)
                if older is not None:
                    self._add(key, older, None)
        while coming:
            self._add_dead(coming.pop())
        return looked_up

    def _add(self, key: bytes, entry: Entry, value: bytes | None) -> None:
        self.keys.append(key)
        self.entries.append(entry)
        self.values.append(value)

    def _add_dead(self, key: bytes) -> None:
        """A key that died after ``at``."""
        if self._index.head(key) is None:  # else it was born again and the index shows it
            entry = self._index.older_at(key, self.at)
            if entry is not None:
                self._add(key, entry, None)

    def _close(self) -> None:
        self.done = True
        if not self._everything:
            limit = self._limit
            if limit:
                del self.keys[limit:], self.entries[limit:], self.values[limit:]
                self.more = len(self.keys) < self.count

    def missing(self) -> list[int]:
        """Positions whose values must be fetched for the answer; none if only keys are shown."""
        if (self.query.keys_only and not self.sorts_by_value()) or None not in self.values:
            return []
        return [i for i, value in enumerate(self.values) if value is None]

    def sorts_by_value(self) -> bool:
        """Must all values be there before ``finish``?"""
        return self.query.sort_target == SORT_VALUE and not self.query.count_only

    def finish(self) -> None:
        """Filter, sort and cut, where the query asks for it."""
        query = self.query
        if query.count_only or not (self._everything or self._sorts):
            return
        items = [
            item
            for item in zip(self.keys, self.entries, self.values, strict=True)
            if query.keeps(item[1])
        ]
        if query.sorts():
            items.sort(key=_SORT_BY[query.sort_target], reverse=query.sort_order == ORDER_DESCEND)
        self.more = bool(query.limit) and len(items) > query.limit
        if query.limit > 0:
            del items[query.limit :]
        self.keys = [item[0] for item in items]
        self.entries = [item[1] for item in items]
        self.values = [item[2] for item in items]


_Found = tuple[bytes, Entry, bytes | None]


def _value(item: _Found) -> bytes:
    assert item[2] is not None, "a sort by value has every value"
    return value_of(item[2])


_MOD = itemgetter(0)
_SORT_BY: dict[int, Callable[[_Found], bytes | int]] = {
    SORT_KEY: lambda item: item[0],
    SORT_VERSION: lambda item: item[1][3],
    SORT_CREATE: lambda item: item[1][2],
    SORT_MOD: lambda item: item[1][0],
    SORT_VALUE: _value,
}
