"""How a watcher that is behind catches up: from the history, a bounded step at a time.

A step of a watcher sends the next piece of the history (``watch_pieces``), up to its feed's
position. Values come from memory, else from storage: the step then sends what it can, asks, and
goes on when the answer is there. In the step that reaches the position the watcher becomes synced.
How many watchers read a shard at once is bounded, and who needs values of several reads each by
itself: a shard whose reads hang keeps only those waiting that need something of it.

Watchers take steps in turn, one each; a turn of the hub ends after a bounded number of changes, and
the next one follows after other work of the loop. So ten thousand watchers that resume at once
delay requests by no more than one turn, and a long history starves no other watcher.

A watcher that compaction has overtaken is told so and is over: the floor of its shards' history is
looked at before every step and after every read of storage. A shard that was out keeps its history
from where it stood, so that its watchers go on from there. A client that does not read blocks its
own watchers only; nothing is read or encoded for them until it does.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from kvstore.errors import StoreError
from kvstore.fetch import Fetched
from kvstore.history import Entry
from kvstore.watch_groups import State, Watcher
from kvstore.watch_message import compacted
from kvstore.watch_pieces import STEP_COST, Piece, Pieces

if TYPE_CHECKING:
    from kvstore.watch import WatchHub


@dataclass(slots=True)
class _Reading:
    """A watcher that waits for its reads of storage, one of each shard that has what it needs."""

    watcher: Watcher
    left: int
    found: dict[Entry, bytes | None] = field(default_factory=dict)
    failed: bool = False


class CatchUp:
    """See the module's text. ``fetching`` counts watchers that wait for storage, by shard."""

    def __init__(self, hub: "WatchHub") -> None:
        self._hub = hub
        self._config = hub.config
        self._queue: deque[Watcher] = deque()
        self._starved: defaultdict[int, deque[Watcher]] = defaultdict(deque)
        """By shard: the first one found to be read by enough others."""
        self._failed: list[Watcher] = []
        self._scheduled = False
        self._pieces = Pieces(hub)
        self.fetching: defaultdict[int, int] = defaultdict(int)

    def add(self, watcher: Watcher) -> None:
        """A watcher, in no place, has something to read."""
        self._hub.move(watcher, State.QUEUED)
        self._queue.append(watcher)
        self._schedule()

    def compacted(self) -> None:
        """Something of the history is gone."""
        self._pieces.forget()

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
        for shard in self._starved:
            self._end_starvation(shard)
        if self._queue:
            self._schedule()

    def _end_starvation(self, shard: int) -> None:
        """Let as many go on as may fetch now; whoever does not need to leaves it to the next."""
        free = self._config.catch_up_fetches_max - self.fetching[shard]
        starved = self._starved[shard]
        while free > 0 and starved:
            watcher = starved.popleft()
            if watcher.state is State.STARVED:
                self.add(watcher)
                free -= 1

    def _step(self, watcher: Watcher) -> int:
        """One step; returns its cost, in changes."""
        hub, feed = self._hub, watcher.feed
        if watcher.next < hub.store.history_of(feed.shards).floor:
            hub.end(watcher, compacted(hub.store.compact_revision))
            return STEP_COST
        if watcher.outbox.outbox_bytes > self._config.outbox_bytes_max:
            hub.block(watcher)
            return STEP_COST
        piece = self._pieces.next_for(watcher, feed.position)
        if piece.up_to >= watcher.next:
            self._send(watcher, piece)
            watcher.fetched = None
        if piece.needed:
            self._fetch(watcher, piece.needed)
        else:
            feed.settle(watcher)
        return piece.cost

    def _send(self, watcher: Watcher, piece: Piece) -> None:
        """Send the events of ``piece``; the header is how far the watcher's feed is."""
        head = self._hub.header.at(watcher.feed.position)
        for body in piece.bodies:
            for data in body.pieces:
                size = len(head) + len(watcher.id_field) + len(data)
                watcher.outbox.send((head, watcher.id_field, data), size)
            watcher.quiet = False
            watcher.stream.shown = max(watcher.stream.shown, body.last)
            self._hub.events_sent += body.events
        watcher.next = piece.up_to + 1

    # -- values from storage -----------------------------------------------------------------------

    def _fetch(self, watcher: Watcher, needed: Sequence[tuple[bytes, Entry]]) -> None:
        store = self._hub.store
        parts: dict[int, list[tuple[bytes, Entry]]] = {}
        for pair in needed:
            parts.setdefault(store.shards.of(pair[0]), []).append(pair)
        for shard in parts:
            if self.fetching[shard] >= self._config.catch_up_fetches_max:
                self._hub.move(watcher, State.STARVED)
                self._starved[shard].append(watcher)
                return
        self._hub.move(watcher, State.FETCHING)
        reading = _Reading(watcher, left=len(parts))
        for shard, pairs in parts.items():
            self.fetching[shard] += 1
            entries = [entry for _, entry in pairs]
            store.fetch(pairs, partial(self._fetched, reading, shard, entries))

    def _fetched(self, reading: _Reading, shard: int, entries: list[Entry], found: Fetched) -> None:
        self.fetching[shard] -= 1
        self._end_starvation(shard)
        reading.left -= 1
        if isinstance(found, StoreError):
            reading.failed = True
        else:
            reading.found.update(zip(entries, found, strict=True))
        watcher = reading.watcher
        if reading.left or watcher.state is not State.FETCHING:
            return
        if reading.failed:  # nothing is kept: however many fail, memory does not grow with them
            self._hub.move(watcher, State.FAILED)
            self._failed.append(watcher)
        else:
            watcher.fetched = (watcher.fetched or {}) | reading.found
            self.add(watcher)
