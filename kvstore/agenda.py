"""When leases come up next: ids in slots of time.

    width 0.125 s     add(7, 1.0)  add(8, 1.1)  add(9, 5.0)
    slots             8: {7}   9: {8}   40: {9}          slot n holds what is due in (n-1, n] widths
    times             [8, 9, 40]                         ordered; the earliest first
    take(1.1)         (8, [7])                           only a slot that has passed as a whole

A heap would keep a dead entry for every lease revoked before its time, and rebuilding it stalls;
here a revoked lease is taken out at once and nothing dead is ever held.
The price is that an id comes up as late as one width after its time, never before.

What has come up and cannot be done, because a shard refuses it, is **parked** at that shard and
comes up again when it refuses no more: until then it costs nothing but its place.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from math import ceil, floor

from kvstore.errors import HeldError, StoreError

SLOT_SECONDS = 0.125


class Agenda:
    """See the module's text. An id is in at most one slot; whoever adds it remembers which."""

    def __init__(self) -> None:
        self._slots: dict[int, dict[int, None]] = {}
        self._times: list[int] = []

    def __len__(self) -> int:
        """Ids held."""
        return sum(map(len, self._slots.values()))

    def add(self, lease_id: int, due: float) -> int:
        """Put ``lease_id`` down for ``due`` (seconds, monotonic); the slot it is in."""
        slot = ceil(due / SLOT_SECONDS)
        ids = self._slots.get(slot)
        if ids is None:
            ids = self._slots[slot] = {}
            insort(self._times, slot)
        ids[lease_id] = None
        return slot

    def remove(self, lease_id: int, slot: int) -> None:
        """Take ``lease_id`` out of ``slot``; without effect if the slot has been taken."""
        ids = self._slots.get(slot)
        if ids is not None:
            ids.pop(lease_id, None)
            if not ids:
                del self._slots[slot]
                del self._times[bisect_left(self._times, slot)]

    def take(self, now: float) -> tuple[int, list[int]] | None:
        """Remove the earliest slot if it has passed: its number, its ids as they were added."""
        if not self._times or self._times[0] > floor(now / SLOT_SECONDS):
            return None
        slot = self._times.pop(0)
        return slot, list(self._slots.pop(slot))


class Parked:
    """Ids by the shard that they wait for; ``check_room`` raises if one refuses a write. Whoever
    takes them skips those that are gone.
    """

    def __init__(self, check_room: Callable[[int], None]) -> None:
        self._check_room = check_room
        self._ids: dict[int, deque[int]] = {}

    def add(self, lease_id: int, shards: Iterable[int]) -> bool:
        """Let ``lease_id`` wait for the first of ``shards`` that refuses; False if none does."""
        for shard in shards:
            if self._refuses(shard):
                self._ids.setdefault(shard, deque()).append(lease_id)
                return True
        return False

    def take(self) -> Iterator[int]:
        """Remove those of shards that refuse nothing, which is asked anew for each: in the order in
        which they were added.
        """
        for shard, ids in list(self._ids.items()):
            while ids and not self._refuses(shard):
                yield ids.popleft()

    def _refuses(self, shard: int) -> bool:
        """To wait for a turn is no refusal."""
        try:
            self._check_room(shard)
        except HeldError:
            return False
        except StoreError:
            return True
        return False
