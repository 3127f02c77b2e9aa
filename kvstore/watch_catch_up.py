"""How a watcher that is behind catches up: from the history, a bounded step at a time.

A step of a watcher reads changes after what it has, up to its feed's position, encodes them up to
``response_bytes`` and sends them. Values come from memory, else from storage: the step then sends
what it can, asks, and goes on when the answer is there. In the step that reaches the position the
watcher becomes synced.

Watchers take steps in turn, one each; a turn of the hub ends after a bounded number of changes, and
the next one follows after other work of the loop. So ten thousand watchers that resume at once
delay requests by no more than one turn, and a long history starves no other watcher.

A watcher that compaction has overtaken is told so and is over: before every step and after every
read of storage the compact revision is looked at again. A client that does not read blocks its own
watchers only; nothing is read or encoded for them until it does.
"""

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from kvstore.errors import StoreError
from kvstore.fetch import Fetched
from kvstore.history import SCAN_CHANGES, Entry
from kvstore.watch_groups import State, Watcher
from kvstore.watch_message import (
    FRAGMENTS,
    NO_DELETE,
    NO_PUT,
    PREVIOUS,
    Change,
    bodies,
    compacted,
    encode,
)

if TYPE_CHECKING:
    from kvstore.watch import WatchHub

STEP_COST = 10
"""What a step costs beside its changes, in changes: finding its place, and sending."""

_LOOKS_PER_CHANGE = 16
"""Changes of others that are passed over at the cost of one that is sent."""


class Piece(NamedTuple):
    """What a step found: changes whose values are at hand, and what must be fetched to go on."""

    changes: list[Change]
    up_to: int
    """All changes up to this revision are in ``changes``."""
    needed: list[tuple[bytes, Entry]]
    cost: int
    """In changes."""


class CatchUp:
    """See the module's text. ``fetching`` counts watchers that wait for storage."""

    def __init__(self, hub: "WatchHub") -> None:
        self._hub = hub
        self._config = hub.config
        self._queue: deque[Watcher] = deque()
        self._starved: deque[Watcher] = deque()
        self._failed: list[Watcher] = []
        self._scheduled = False
        self.fetching = 0

    def add(self, watcher: Watcher) -> None:
        """A watcher, in no place, has something to read."""
        self._hub.move(watcher, State.QUEUED)
        self._queue.append(watcher)
        self._schedule()

    def tick(self) -> None:
        """Let those try again for whom storage failed."""
        failed, self._failed = self._failed, []
        for watcher in failed:
            if watcher.state is State.FAILED:
                self.add(watcher)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._hub.call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        budget = self._config.catch_up_changes
        while self._queue and budget > 0:
            watcher = self._queue.popleft()
            if watcher.state is State.QUEUED:
                budget -= self._step(watcher)
        self._end_starvation()
        if self._queue:
            self._schedule()

    def _end_starvation(self) -> None:
        """Let as many go on as may fetch now; whoever does not need to leaves it to the next."""
        free = self._config.catch_up_fetches_max - self.fetching
        while free > 0 and self._starved:
            watcher = self._starved.popleft()
            if watcher.state is State.STARVED:
                self.add(watcher)
                free -= 1

    def _step(self, watcher: Watcher) -> int:
        """One step; returns its cost, in changes."""
        hub, feed = self._hub, watcher.feed
        if watcher.next < hub.store.compact_revision:
            hub.end(watcher, compacted(hub.store.compact_revision))
            return STEP_COST
        if watcher.outbox.outbox_bytes > self._config.outbox_bytes_max:
            hub.block(watcher)
            return STEP_COST
        piece = self._read(watcher, feed.position)
        if piece.up_to >= watcher.next:
            self._send(watcher, piece)
            watcher.fetched = None
        if piece.needed:
            self._fetch(watcher, piece.needed)
        else:
            feed.settle(watcher)
        return piece.cost

    # -- reading -----------------------------------------------------------------------------------

    def _read(self, watcher: Watcher, position: int) -> Piece:
        """Changes that the watcher wants, complete revisions, up to about ``response_bytes``."""
        limit = self._config.catch_up_changes
        after = watcher.next - 1
        history = self._hub.store.history
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
            if lacking and not needed:
                needed_from = revision
            needed += lacking
            changes.append(change)
            size += len(change[2]) + len(change[4] or b"")
        if needed:
            up_to = needed_from - 1
            changes = [change for change in changes if change[1][0] < needed_from]
        return Piece(changes, up_to, needed, cost)

    def _with_values(
        self, watcher: Watcher, key: bytes, entry: Entry
    ) -> tuple[Change, list[tuple[bytes, Entry]]]:
        """The change with what is at hand of its values, and those that are not."""
        store, fetched = self._hub.store, watcher.fetched or {}
        lacking: list[tuple[bytes, Entry]] = []
        framed = fetched.get(entry) or store.framed(key, entry)
        if framed is None:
            lacking.append((key, entry))
        previous, framed_previous = None, None
        if watcher.wants & PREVIOUS and entry[3] != 1 and entry[0] > store.compact_revision:
            previous = store.version_before(key, entry[0])
            if previous is not None:
                framed_previous = fetched.get(previous) or store.framed(key, previous)
                if framed_previous is None:
                    lacking.append((key, previous))
        return (key, entry, framed or b"", previous, framed_previous), lacking

    def _send(self, watcher: Watcher, piece: Piece) -> None:
        """Send the events of ``piece``; the header is how far the watcher's feed is."""
        events = encode(piece.changes, watcher.wants, {})
        fragment_bytes = self._config.fragment_bytes if watcher.wants & FRAGMENTS else 0
        head = self._hub.header.at(watcher.feed.position)
        for body in bodies(events, self._config.response_bytes, fragment_bytes):
            for data in body.pieces:
                size = len(head) + len(watcher.id_field) + len(data)
                watcher.outbox.send((head, watcher.id_field, data), size)
            watcher.quiet = False
            watcher.stream.shown = max(watcher.stream.shown, body.last)
            self._hub.events_sent += body.events
        watcher.next = piece.up_to + 1

    # -- values from storage -----------------------------------------------------------------------

    def _fetch(self, watcher: Watcher, needed: list[tuple[bytes, Entry]]) -> None:
        if self.fetching >= self._config.catch_up_fetches_max:
            self._hub.move(watcher, State.STARVED)
            self._starved.append(watcher)
            return
        self.fetching += 1
        self._hub.move(watcher, State.FETCHING)
        entries = [entry for _, entry in needed]
        self._hub.store.fetch(needed, lambda found: self._fetched(watcher, entries, found))

    def _fetched(self, watcher: Watcher, entries: list[Entry], found: Fetched) -> None:
        self.fetching -= 1
        self._end_starvation()
        if watcher.state is not State.FETCHING:
            return
        if isinstance(found, StoreError):
            self._hub.move(watcher, State.FAILED)
            self._failed.append(watcher)
            return
        if watcher.fetched is None:
            watcher.fetched = {}
        watcher.fetched.update(zip(entries, found, strict=True))
        self.add(watcher)
