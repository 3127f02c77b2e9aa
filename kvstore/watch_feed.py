"""The feed of the synced watchers whose ranges touch one set of shards.

    changes applied      4   5   6   7   8   9      recorded in ``fresh`` as they are applied
    visible up to                6                  min(frontiers of the shards, durable)
    position             4                          synced watchers have everything up to here

``advance`` moves the position to what is visible: takes the changes in between out of ``fresh``,
finds the groups that want them, encodes a group's events once per variant and sends them to each
watcher. A watcher is synced when it needs nothing at or below the position; watchers that do
(older start, client behind) read the history up to the position and then join: no gap, no overlap.

**Held.** An update whose previous value is not in memory holds the feed (not its watchers one by
one) until storage has answered, if a watcher wants previous values; changes stay in order.

**Missing.** Changes that were applied before the feed existed, or did not fit into ``fresh``, are
not in it. When they become visible, all watchers of the feed read the history instead.

**Giving way.** What piled up behind a stuck shard or a hold is sent in several turns of the loop;
between them the position is simply behind what is visible.

A shard that is stuck keeps ``visible`` of all sets that include it where it is, and nothing else:
sets without it have their own feed.
"""

from bisect import bisect_right, insort
from collections import deque
from typing import TYPE_CHECKING

from kvstore.errors import StoreError
from kvstore.fetch import Fetched
from kvstore.history import Entry
from kvstore.watch_groups import Group, Groups, State, Watcher
from kvstore.watch_message import FRAGMENTS, Body, Change, bodies, encode

if TYPE_CHECKING:
    from kvstore.watch import WatchHub


_TURN_COST = 4_000
"""Changes, and events made of them, after which other work gets its turn (about 4 ms); what a
commit usually brings is less and is sent at once."""


class Feed:
    """See the module's text; ``position`` never goes back, ``watchers`` counts all of them."""

    def __init__(self, hub: "WatchHub", shards: tuple[int, ...]) -> None:
        self._hub = hub
        self._store = hub.store
        self._config = hub.config
        self.shards = shards
        self.watchers = 0
        self.position = self._store.commits.visible(shards)
        self.shown = 0
        """The last revision of which an event was sent to a group."""
        self._missing = self._store.revision
        self._fresh: deque[Change] = deque()
        self._fresh_bytes = 0
        self._groups = Groups(hub.random)
        self._waiting: list[tuple[int, int, Watcher]] = []
        self._numbers = 0
        self._batch: list[Change] = []
        self._batch_up_to = 0
        self._previous: dict[Entry, bytes | None] = {}
        self.reading: frozenset[int] = frozenset()
        """Shards from which previous values are being read; the feed is held meanwhile."""
        self._failed = False
        self._put_off = False

    @property
    def pending(self) -> int:
        """Changes recorded and not yet sent."""
        return len(self._fresh) + len(self._batch)

    # -- changes -----------------------------------------------------------------------------------

    def record(self, change: Change) -> None:
        """A change was applied; forget what is fresh if it does not fit."""
        self._fresh.append(change)
        self._fresh_bytes += _size(change)
        if (
            self._fresh_bytes > self._config.fresh_bytes_max
            or len(self._fresh) > self._config.fresh_changes_max
        ):
            self._missing = change[1][0]
            self._fresh.clear()
            self._fresh_bytes = 0

    def advance(self) -> None:
        """Send what has become visible; if that is much, the rest follows after other work."""
        visible = self._store.commits.visible(self.shards)
        cost = 0
        while not self.reading and (self._batch or self.position < visible):
            if cost >= _TURN_COST:
                self._put_off_rest()
                return
            if not self._batch and self.position < self._missing:
                self._skip(visible)
            else:
                if not self._batch:
                    self._take(visible)
                cost += self._deliver()

    def _put_off_rest(self) -> None:
        if self._put_off:
            return
        self._put_off = True

        def go_on() -> None:
            self._put_off = False
            if self.watchers:
                self.advance()

        self._hub.call_soon(go_on)

    def tick(self) -> None:
        """Ask storage again if it failed."""
        if self._failed:
            self._failed = False
            self.reading = frozenset()
            self.advance()

    def _take(self, visible: int) -> None:
        """Move a bounded number of complete revisions from ``fresh`` into the batch."""
        fresh, batch = self._fresh, self._batch
        while fresh and fresh[0][1][0] <= visible:
            revision = fresh[0][1][0]
            if len(batch) >= self._config.catch_up_changes and revision != batch[-1][1][0]:
                self._batch_up_to = batch[-1][1][0]
                return
            change = fresh.popleft()
            self._fresh_bytes -= _size(change)
            batch.append(change)
        self._batch_up_to = visible

    def _skip(self, visible: int) -> None:
        """Not everything that is visible now was recorded: all watchers read the history."""
        behind = [
            watcher
            for group in self._groups
            for like in group.variants.values()
            for watcher in like
        ]
        self._fall_behind(behind, self.position + 1)
        while self._fresh and self._fresh[0][1][0] <= visible:
            self._fresh_bytes -= _size(self._fresh.popleft())
        self._move(visible)

    def _deliver(self) -> int:
        """Send the batch, or hold it and fetch the previous values that it needs first; returns
        what that cost.
        """
        touched: dict[Group, list[Change]] = {}
        needed: dict[Entry, bytes] = {}
        find, previous_known = self._groups.find, self._previous
        for change in self._batch:
            key, _, _, previous, framed_previous = change
            for group in find(key):
                changes = touched.get(group)
                if changes is None:
                    touched[group] = [change]
                else:
                    changes.append(change)
                if (
                    framed_previous is None
                    and previous is not None
                    and group.wants_previous
                    and previous not in previous_known
                ):
                    framed = self._store.framed(key, previous)
                    if framed is None:
                        needed[previous] = key
                    else:
                        previous_known[previous] = framed
        if needed:
            self._fetch(needed)
            return 0
        cost = len(self._batch)
        for group, changes in touched.items():
            cost += len(changes) * len(group.variants)
            self._send(group, changes)
        self._batch.clear()
        self._previous.clear()
        self._move(self._batch_up_to)
        return cost

    def _send(self, group: Group, changes: list[Change]) -> None:
        config, header = self._config, self._hub.header
        for wants, like in list(group.variants.items()):
            fragment_bytes = config.fragment_bytes if wants & FRAGMENTS else 0
            events = encode(changes, wants, self._previous)
            for body in bodies(events, config.response_bytes, fragment_bytes):
                blocked = self._send_body(body, header.at(body.last), like)
                self._hub.events_sent += (len(like) - len(blocked)) * body.events
                if blocked:
                    self._fall_behind(blocked, body.first)

    def _send_body(self, body: Body, head: bytes, like: dict[Watcher, None]) -> list[Watcher]:
        """Send to each watcher whose client keeps up; returns the others."""
        blocked = []
        outbox_bytes_max = self._config.outbox_bytes_max
        *more, last = body.pieces
        size = len(head) + len(last)
        for watcher in like:
            outbox, id_field = watcher.outbox, watcher.id_field
            if outbox.outbox_bytes > outbox_bytes_max:
                blocked.append(watcher)
                continue
            for piece in more:
                outbox.send((head, id_field, piece), len(head) + len(id_field) + len(piece))
            outbox.send((head, id_field, last), size + len(id_field))
            watcher.quiet = False
        self.shown = body.last
        return blocked

    def _move(self, position: int) -> None:
        """Everything up to ``position`` was sent: those who waited for that may go on."""
        self.position = position
        waiting = self._waiting
        if waiting and waiting[0][0] <= position:
            end = bisect_right(waiting, position, key=_due)
            due = waiting[:end]
            del waiting[:end]
            for _, _, watcher in due:
                self.settle(watcher)

    # -- previous values from storage --------------------------------------------------------------

    def _fetch(self, needed: dict[Entry, bytes]) -> None:
        self.reading = frozenset(map(self._store.shards.of, needed.values()))
        entries = list(needed)
        pairs = [(key, entry) for entry, key in needed.items()]
        self._store.fetch(pairs, lambda found: self._fetched(entries, found))

    def _fetched(self, entries: list[Entry], found: Fetched) -> None:
        if isinstance(found, StoreError):
            self._failed = True
            return
        self._previous.update(zip(entries, found, strict=True))
        self.reading = frozenset()
        self.advance()

    # -- watchers ----------------------------------------------------------------------------------

    def settle(self, watcher: Watcher) -> None:
        """Put a watcher that is in no place where it belongs now."""
        position = self.position
        if watcher.due > position:
            self._wait(watcher)
        elif watcher.next <= position:
            self._hub.catch_up.add(watcher)
        else:
            assert watcher.next == position + 1, "a synced watcher needs what comes next"
            self._hub.move(watcher, State.SYNCED)
            watcher.stream.shown = max(watcher.stream.shown, watcher.due)
            self._groups.add(watcher)

    def leave(self, watcher: Watcher) -> None:
        """Take a watcher out of its place in this feed, if it is in one."""
        if watcher.state is State.SYNCED:
            self._groups.remove(watcher)
        elif watcher.state is State.WAITING:
            waiting = self._waiting
            at = bisect_right(waiting, (watcher.due, watcher.number), key=_place) - 1
            assert waiting[at][2] is watcher, "a waiting watcher is in the list"
            del waiting[at]

    def _wait(self, watcher: Watcher) -> None:
        self._hub.move(watcher, State.WAITING)
        self._numbers += 1
        watcher.number = self._numbers
        insort(self._waiting, (watcher.due, watcher.number, watcher), key=_place)

    def _fall_behind(self, watchers: list[Watcher], revision: int) -> None:
        """They need everything from ``revision`` on, and get it from the history."""
        for watcher in watchers:
            self._groups.remove(watcher)
            watcher.next = revision
            self._hub.catch_up.add(watcher)


def _size(change: Change) -> int:
    return len(change[2]) + len(change[4] or b"")


def _due(waiting: tuple[int, int, Watcher]) -> int:
    return waiting[0]


def _place(waiting: tuple[int, int, Watcher]) -> tuple[int, int]:
    return waiting[:2]
