"""Pieces of the history, encoded for watchers that catch up, and shared among those alike.

A piece is what one step of a watcher sends: complete revisions, about ``response_bytes`` at most.
It does not end anywhere, but before the roundest revision that it reaches (the one divisible by the
highest power of two), so that watchers of one range whose clients fell behind at different places
soon ask for the same pieces. With at most 50 revisions in a piece:

    watcher A   from 3    [3-31] [32-63] [64-95] [96-127] [128-159] [160-191] ...
    watcher B   from 40          [40-63] [64-95] [96-127] [128-159] [160-191] ...

Near the position, where pieces are short, they end before a multiple of GRID, and what is left
after the last multiple is sent as it is, to that watcher alone.

Other pieces are kept for those who come later, up to ``shared_bytes_max``, the oldest going first.
A hundred slow clients of one range then cost the encoding of one, and their outboxes hold the same
bytes. What is kept never changes; only compaction takes something away (previous values), and then
all is forgotten.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvstore.history import SCAN_CHANGES, Entry
from kvstore.watch_groups import Watcher
from kvstore.watch_message import (
    FRAGMENTS,
    NO_DELETE,
    NO_PUT,
    PREVIOUS,
    Body,
    Change,
    bodies,
    encode,
)

if TYPE_CHECKING:
    from kvstore.watch import WatchHub

STEP_COST = 10
"""What a step costs beside its changes, in changes: finding its place, and sending."""

_LOOKS_PER_CHANGE = 16
"""Changes of others that are passed over at the cost of one that is sent."""

_GRID = 16
"""Revisions; what is rounder than this is worth ending a short piece for."""

_OVERHEAD = 512
"""Bytes that a kept piece counts beside its events: most of some histories is empty."""

_Place = tuple[bytes, bytes | None, int, int]
"""(key, end, wants, first revision)."""


class Piece(NamedTuple):
    """What a step of a watcher sends, and what it must read from storage to go on."""

    bodies: Sequence[Body]
    up_to: int
    """All the watcher wants up to this revision is in ``bodies``."""
    needed: Sequence[tuple[bytes, Entry]]
    cost: int
    """In changes."""


class Pieces:
    """See the module's text."""

    def __init__(self, hub: "WatchHub") -> None:
        self._hub = hub
        self._config = hub.config
        self._shared: OrderedDict[_Place, tuple[Piece, int]] = OrderedDict()
        self._shared_bytes = 0

    def next_for(self, watcher: Watcher, position: int) -> Piece:
        """The next piece for a watcher, which has something to read up to ``position``."""
        place = (watcher.key, watcher.end, watcher.wants, watcher.next)
        shared = self._shared.get(place)
        if shared is not None:
            return shared[0]
        changes, up_to, needed, cost = self._read(watcher, position)
        end = watcher.next
        if not needed:
            end = _round_end(end, up_to + 1, short=up_to == position)
        rounded = end > watcher.next
        if rounded:
            up_to = end - 1
            changes = [change for change in changes if change[1][0] <= up_to]
        fragment_bytes = self._config.fragment_bytes if watcher.wants & FRAGMENTS else 0
        events = encode(changes, watcher.wants, {})
        cut = bodies(events, self._config.response_bytes, fragment_bytes)
        piece = Piece(cut, up_to, needed, cost)
        if rounded and (watcher.next % _GRID == 0 or up_to - watcher.next < _GRID):
            self._share(place, piece._replace(cost=STEP_COST))
        return piece

    def forget(self) -> None:
        """Something of the history was compacted."""
        self._shared.clear()
        self._shared_bytes = 0

    def _share(self, place: _Place, piece: Piece) -> None:
        size = _OVERHEAD + sum(len(data) for body in piece.bodies for data in body.pieces)
        self._shared[place] = piece, size
        self._shared_bytes += size
        while self._shared_bytes > self._config.shared_bytes_max:
            _, (_, size) = self._shared.popitem(last=False)
            self._shared_bytes -= size

    def _read(
        self, watcher: Watcher, position: int
    ) -> tuple[list[Change], int, list[tuple[bytes, Entry]], int]:
        """Changes with their values, up to which revision, what lacks to go on, and the cost."""
        limit = self._config.catch_up_changes
        after = watcher.next - 1
        history = self._hub.store.history_of(watcher.feed.shards)
        found, up_to = history.changes(watcher.key, watcher.end, after, position, limit)
        looked = min(up_to - after, SCAN_CHANGES)
        cost = STEP_COST + len(found) + looked // _LOOKS_PER_CHANGE
        changes: list[Change] = []
        needed: list[tuple[bytes, Entry]] = []
        size = needed_from = 0
        for key, entry in found:
            if watcher.wants & (NO_PUT if entry[3] else NO_DELETE):
                continue
            revision = entry[0]
            if changes and size >= self._config.response_bytes and revision != changes[-1][1][0]:
                up_to = changes[-1][1][0]
                break
            if len(needed) >= self._config.catch_up_fetch_rows and revision != needed_from:
                break
            change, lacking = self._with_values(watcher, key, entry)
            if change is None:
                continue
            if lacking and not needed:
                needed_from = revision
            needed += lacking
            changes.append(change)
            size += len(change[2]) + len(change[4] or b"")
        if needed:
            up_to = needed_from - 1
            changes = [change for change in changes if change[1][0] < needed_from]
        return changes, up_to, needed, cost

    def _with_values(
        self, watcher: Watcher, key: bytes, entry: Entry
    ) -> tuple[Change | None, list[tuple[bytes, Entry]]]:
        """The change with what is at hand of its values, and those that are not.

        None for a put whose value storage no longer has: compaction took it, because the same Txn
        deleted the key again and the compact revision is that of the Txn. Of such a revision etcd,
        too, keeps the last change of a key only (``server/storage/mvcc/key_index.go``).
        """
        store, fetched = self._hub.store, watcher.fetched or {}
        lacking: list[tuple[bytes, Entry]] = []
        framed = fetched[entry] if entry in fetched else store.framed(key, entry)
        if framed is None and entry in fetched:
            assert entry[0] <= store.compact_revision, "only compaction takes a value"
            return None, lacking
        if framed is None:
            lacking.append((key, entry))
        previous, framed_previous = None, None
        if watcher.wants & PREVIOUS and entry[3] != 1 and entry[0] > store.compact_revision:
            previous = store.version_before(key, entry[0])
            if previous is not None:
                framed_previous = fetched.get(previous) or store.framed(key, previous)
                if framed_previous is None and previous not in fetched:
                    lacking.append((key, previous))
        return (key, entry, framed or b"", previous, framed_previous), lacking


def _round_end(start: int, end: int, *, short: bool) -> int:
    """The roundest number after ``start`` and up to ``end``; ``short``: the last multiple of GRID,
    which may be before ``start``.
    """
    if short:
        return end // _GRID * _GRID
    bits = (start ^ end).bit_length() - 1
    return end >> bits << bits
