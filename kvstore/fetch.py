"""Fetching values from storage: for answers, watchers and decisions whose values are not in memory.

A fetch is protected from compaction: rows that compaction leaves behind are dropped only after
every fetch that began before has ended (``Holds``).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvstore.errors import BackendError, CorruptError, StoppedError, StoreError
from kvstore.history import Entry
from kvstore.kv import frame_key_value

if TYPE_CHECKING:
    from kvstore.store import Store

Fetched = list[bytes | None] | StoreError
"""Framed KeyValues in the order asked (None: compacted meanwhile), or why there are none."""


class Holds:
    """Reads that may still fetch what compaction would drop: drops wait for those that began before
    them.

    A hold is a number from ``begin``; ``end`` gives it back. ``oldest`` is the smallest one still
    held.
    """

    def __init__(self) -> None:
        self._held: OrderedDict[int, None] = OrderedDict()
        self._next = 1

    def begin(self) -> int:
        """Start to hold."""
        hold = self._next
        self._next += 1
        self._held[hold] = None
        return hold

    def end(self, hold: int) -> None:
        """Stop holding."""
        del self._held[hold]

    def now(self) -> int:
        """A mark: holds smaller than it began before it."""
        return self._next

    def passed(self, mark: int) -> bool:
        """Have all holds that began before ``mark`` ended?"""
        return not self._held or next(iter(self._held)) >= mark


class Fetch:
    """One ``Store.fetch``: asks each shard's backend, frames what comes back, keeps the order."""

    def __init__(
        self,
        store: "Store",
        pairs: Sequence[tuple[bytes, Entry]],
        done: Callable[[Fetched], None],
    ) -> None:
        self._store = store
        self._pairs = pairs
        self._done = done
        self._found: list[bytes | None] = [None] * len(pairs)
        self._error: StoreError | None = None
        self._hold = store.holds.begin()
        self._left = 0

    def start(self) -> None:
        """Ask; ``done`` is called at once if everything is in memory after all."""
        by_shard: dict[int, list[int]] = {}
        for i, (key, entry) in enumerate(self._pairs):
            framed = self._store.framed(key, entry)
            if framed is not None:
                self._found[i] = framed
            else:
                by_shard.setdefault(self._store.shards.of(key), []).append(i)
        self._left = len(by_shard)
        if not by_shard:
            self._finish()
        for shard, places in by_shard.items():
            ids = [(self._pairs[i][1][0], self._pairs[i][1][1]) for i in places]
            backend = self._store.commits.queues[shard].backend
            backend.read_values(ids, lambda values, at=places: self._got(at, values))  # type: ignore[misc]

    def _got(self, places: list[int], values: list[bytes | None] | BackendError) -> None:
        if isinstance(values, BackendError):
            self._error = StoppedError()
        else:
            for i, value in zip(places, values, strict=True):
                self._place(i, value)
        self._left -= 1
        if self._left == 0:
            self._finish()

    def _place(self, i: int, value: bytes | None) -> None:
        key, entry = self._pairs[i]
        if value is not None:
            mod, _, create, version, lease = entry
            framed = frame_key_value(key, create, mod, version, value, lease)
            self._found[i] = framed
            self._store.cache(key, entry, framed)
        elif self._store.index.at(key, entry[0]) == entry:
            self._error = CorruptError()

    def _finish(self) -> None:
        self._store.holds.end(self._hold)
        self._done(self._error if self._error is not None else self._found)
