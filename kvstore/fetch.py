"""Fetching values from storage: for answers, watchers and decisions whose values are not in memory.

A fetch is protected from compaction: rows that compaction leaves behind on a shard are dropped only
after every read of that shard that began before has ended (``Holds``). A fetch over several shards
reads each by itself, so that one whose reads hang keeps nothing of the others.

A read that fails is tried again, READ_ATTEMPTS_MAX times in all. A shard that then still does not
read, or that lacks a row which must be there, cannot be trusted and is given up
(``Commits.give_up``): without that, whoever needs the value would wait for ever. Not so while its
database is only out of reach, nor of a row that another server may have dropped, because home's
lease may have run out: the request is then told that it timed out.
A read that is refused because too many wait says nothing of the shard; its request is refused
(``TooManyRequestsError``), and watchers ask again at the next tick.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from kvstore.errors import (
    BackendError,
    CorruptError,
    ReadsFullError,
    StoppedError,
    StoreError,
    TimedOutError,
    TooManyRequestsError,
    UnreachableError,
)
from kvstore.history import Entry
from kvstore.kv import frame_key_value

if TYPE_CHECKING:
    from kvstore.store import Store

READ_ATTEMPTS_MAX = 10
"""Times that values are asked for before their shard is given up."""

READ_RETRY_SECONDS = 0.1
"""Between those."""

Fetched = list[bytes | None] | StoreError
"""Framed KeyValues in the order asked (None: compacted meanwhile), or why there are none."""


class Holds:
    """Reads that may still fetch what compaction would drop: drops wait for those of the same shard
    that began before them.

    A hold is a number from ``begin``; ``end`` gives it back.
    """

    def __init__(self) -> None:
        self._held: defaultdict[int, OrderedDict[int, None]] = defaultdict(OrderedDict)
        self._next = 1

    def begin(self, shard: int) -> int:
        """Start to hold what ``shard`` has."""
        hold = self._next
        self._next += 1
        self._held[shard][hold] = None
        return hold

    def end(self, shard: int, hold: int) -> None:
        """Stop holding."""
        del self._held[shard][hold]

    def now(self) -> int:
        """A mark: holds smaller than it began before it."""
        return self._next

    def passed(self, shard: int, mark: int) -> bool:
        """Have all holds of ``shard`` that began before ``mark`` ended?"""
        held = self._held[shard]
        return not held or next(iter(held)) >= mark


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
        self._holds: dict[int, int] = {}
        """By shard, of those that have not answered."""

    def start(self) -> None:
        """Ask; ``done`` is called at once if everything is in memory after all."""
        by_shard: dict[int, list[int]] = {}
        for i, (key, entry) in enumerate(self._pairs):
            framed = self._store.framed(key, entry)
            if framed is not None:
                self._found[i] = framed
            else:
                by_shard.setdefault(self._store.shards.of(key), []).append(i)
        self._holds = {shard: self._store.holds.begin(shard) for shard in by_shard}
        if not by_shard:
            self._finish()
        for shard, places in by_shard.items():
            self._store.counts.values_read[shard] += len(places)
            self._ask(shard, places, 1)

    def _ask(self, shard: int, places: list[int], attempt: int) -> None:
        queue = self._store.commits.queues[shard]
        if queue.broken or queue.missing:
            self._end(shard, StoppedError() if queue.broken else TimedOutError())
            return
        ids = [(self._pairs[i][1][0], self._pairs[i][1][1]) for i in places]
        queue.backend.read_values(ids, lambda values: self._got(shard, places, attempt, values))

    def _got(
        self, shard: int, places: list[int], attempt: int, values: list[bytes | None] | BackendError
    ) -> None:
        if not isinstance(values, BackendError):
            lacking = [i for i, value in zip(places, values, strict=True) if self._lacks(i, value)]
            commits = self._store.commits
            if lacking and commits.leased and commits.lease_lapsed():
                self._end(shard, TimedOutError())  # who has the shard by now may have compacted
            elif lacking:
                mod, sub, *_ = self._pairs[lacking[0]][1]
                self._give_up(shard, f"row {sub} of revision {mod} is missing", CorruptError())
            else:
                self._end(shard)
        elif isinstance(values, ReadsFullError):
            self._end(shard, TooManyRequestsError())
        elif isinstance(values, UnreachableError) or self._store.commits.queues[shard].away:
            self._end(shard, TimedOutError())
        elif attempt < READ_ATTEMPTS_MAX:
            again = partial(self._ask, shard, places, attempt + 1)
            self._store.commits.call_later(READ_RETRY_SECONDS, again)
        else:
            self._give_up(shard, str(values), StoppedError())

    def _lacks(self, i: int, value: bytes | None) -> bool:
        """Take a value that was read; true if there is none although there must be."""
        key, entry = self._pairs[i]
        if value is None:
            index = self._store.index
            return index.head(key) == entry or entry in index.older(key)
        mod, _, create, version, lease = entry
        framed = frame_key_value(key, create, mod, version, value, lease)
        self._found[i] = framed
        self._store.cache(key, entry, framed)
        return False

    def _give_up(self, shard: int, reason: str, error: StoreError) -> None:
        self._store.commits.give_up(shard, reason)
        self._end(shard, error)

    def _end(self, shard: int, error: StoreError | None = None) -> None:
        """One shard's part is over."""
        self._error = error or self._error
        self._store.holds.end(shard, self._holds.pop(shard))
        if not self._holds:
            self._finish()

    def _finish(self) -> None:
        self._done(self._error if self._error is not None else self._found)
