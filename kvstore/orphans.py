"""Keys whose lease is gone: they die before anyone sees them.

A lease ends after its keys, durably; but those on a shard that was missing then are not known, and
a crash may come before the shard does. So whoever loads a shard's keys looks whether the lease of
each is there, and deletes the others, one revision per lease, before the shard is served.
Those of a lease on several shards wait for their turn as any such request does (``barrier``), so
that many leases share one.

A lease that was granted anew meanwhile, with the id of one that has ended, does not take over its
keys: no key can have been attached to it before it was granted. (A restart forgets when that was:
a shard that is still missing then may bring keys that the new lease takes over.)
"""

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Protocol

from kvstore.barrier import Barrier
from kvstore.commit import Commits
from kvstore.errors import HeldError, StoreError

ORPHANS_STEP = 2_000
"""Keys of a returning shard deleted before other work has its turn (10 ms)."""


class Store(Protocol):
    """What deletes them; see ``kvstore.store``."""

    @property
    def commits(self) -> Commits:
        """The road to storage."""

    @property
    def barrier(self) -> Barrier:
        """Where a request over several shards waits for its turn."""

    def shards_of(self, key: bytes, end: bytes | None) -> tuple[int, ...]:
        """The shards that a key or range touches."""

    def check_room(self, shards: Sequence[int]) -> None:
        """Raise what keeps a write to ``shards`` from executing now."""

    def delete_keys(self, keys: Iterable[bytes]) -> int:
        """Delete live keys in one revision."""


class Orphans:
    """Those that were found, by lease, in the shards loaded so far."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keys: dict[int, set[bytes]] = {}
        self._waiting: set[int] = set()
        """Leases whose keys wait for their turn."""

    def add(self, lease: int, key: bytes) -> None:
        """``key`` was attached to ``lease``, which is not there."""
        self._keys.setdefault(lease, set()).add(key)

    def discard(self, lease: int, key: bytes) -> None:
        """``key`` no longer belongs to ``lease``."""
        if lease in self._keys:
            self._keys[lease].discard(key)

    def claim(self, lease: int) -> set[bytes] | None:
        """The keys of ``lease``, which is there after all; None: it has none."""
        return self._keys.pop(lease, None)

    def delete(self, but: Collection[int] = ()) -> bool:
        """Delete them all, as far as there is room, except those on the shards ``but``; are there
        more?

        Called before serving, and again once commits have moved on while it is true.
        """
        more = False
        for lease, orphans in sorted(self._keys.items()):
            keys = [key for key in orphans if self._shards((key,))[0] not in but]
            if keys and lease not in self._waiting:
                self._try(lease, keys)
            more = more or not orphans.isdisjoint(keys)
            if not orphans:
                del self._keys[lease]
        return more

    def _try(self, lease: int, keys: Collection[bytes]) -> None:
        """Delete ``keys`` now, in their turn, or not yet."""

        def in_turn() -> None:
            self._waiting.discard(lease)
            with suppress(StoreError):
                self._store.check_room(shards)
                self._store.delete_keys(keys)

        shards = self._shards(keys)
        try:
            self._store.check_room(shards)
            self._store.delete_keys(keys)  # which discards them here
        except HeldError:
            self._waiting.add(lease)
            self._store.barrier.run(shards, in_turn, lambda _: self._waiting.discard(lease), 0)
        except StoreError:
            return

    def delete_of(self, shard: int) -> bool:
        """Delete some of those on a shard that serves nobody yet, if its queue has room; are there
        more?
        """
        room = ORPHANS_STEP
        for lease, orphans in list(self._keys.items()):
            keys = [key for key in orphans if self._shards((key,)) == (shard,)]
            if keys and (room <= 0 or self._is_full(shard)):
                return True
            self._store.delete_keys(keys)  # which discards them here
            room -= len(keys)
            if not orphans:
                del self._keys[lease]
        return False

    def _is_full(self, shard: int) -> bool:
        """As for writes, which ``check_room`` would refuse there anyway."""
        queue, config = self._store.commits.queues[shard], self._store.commits.config
        return queue.rows >= config.queue_rows_max or queue.size >= config.queue_bytes_max

    def _shards(self, keys: Collection[bytes]) -> tuple[int, ...]:
        """The shards of ``keys``."""
        return tuple(sorted({self._store.shards_of(key, None)[0] for key in keys}))
