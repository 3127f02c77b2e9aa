"""The watch hub: changes in, as the store applies them; events out, to all who watch.

    store ──record──> feeds ──advance──> groups ──> watchers ──> outboxes of client streams
                                                      │  ^
                                             client behind, older start
                                                      v  │
                                                history (catch-up)

A client's stream (``WatchStream``) holds watchers. Each watcher belongs to the **feed** of the
shards that its range touches (``watch_feed``), is either synced there or reads the history
(``watch_catch_up``), and is in one place at a time (``watch_groups.State``).

What a watcher may rely on, in etcd's words: ordered, unique, atomic (a revision is never split over
responses unless it asked for fragments), complete, resumable, bookmarkable; and loud: when
compaction overtakes it, it is cancelled with the compact revision. Nothing is sent before it is
durable: a feed's position never exceeds ``commits.visible`` of its shards.

**Progress.** A progress notification at R promises that every event up to R was sent. Requested for
a whole stream it is the smallest position of the stream's feeds, sent only if all its watchers are
synced and R is not below anything already sent; else nothing, as in etcd, and the client asks
again. A request costs the number of feeds, not of watchers: kube-apiserver asks every 100 ms.

Everything here is synchronous. ``call_soon`` is the only thing asked of an event loop: run a
function later, after other work, never inside the call.
"""

from collections.abc import Callable, Iterable
from random import Random
from typing import NamedTuple

from kvstore.clock import Clock
from kvstore.config import WatchConfig
from kvstore.errors import CompactedError, TimedOutError, TooManyRequestsError
from kvstore.history import Entry
from kvstore.kv import Header
from kvstore.store import Store
from kvstore.watch_catch_up import CatchUp
from kvstore.watch_feed import Feed
from kvstore.watch_groups import NO_END, State, Watcher
from kvstore.watch_message import (
    CANCELED,
    CREATED,
    INVALID_WATCH_ID,
    Change,
    Outbox,
    cancel_reason,
    watch_id_field,
)

EMPTY_RANGE = "mvcc: watcher range is empty"
DUPLICATE_ID = "mvcc: duplicate watch ID provided on the WatchStream"
"""Texts of etcd's ``server/storage/mvcc/watcher.go``; they travel in cancel_reason only."""

_JITTER = 0.1
"""Progress is due after its interval, give or take this part, so that it does not come in waves."""


class Watch(NamedTuple):
    """A client's request to watch."""

    key: bytes
    end: bytes | None
    """None: ``key`` alone; ``b"\\0"``: no upper bound."""
    start_revision: int = 0
    """The first revision wanted; 0: from now on."""
    watch_id: int = 0
    """0: the stream chooses."""
    wants: int = 0
    """Flags of ``watch_message``."""
    progress_notify: bool = False


class WatchHub:
    """All watchers of the server. ``count[state]`` is how many there are; see the module's text."""

    def __init__(
        self,
        header: Header,
        *,
        clock: Clock,
        random: Random,
        config: WatchConfig,
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self.header = header
        self.random = random
        self.config = config
        self.call_soon = call_soon
        self.store: Store
        self.catch_up = CatchUp(self)
        self.streams: dict[WatchStream, None] = {}
        self.count = [0] * len(State)
        self.events_sent = 0
        self._clock = clock
        self._feeds: dict[tuple[int, ...], Feed] = {}
        self._of_shard: dict[int, list[Feed]] = {}
        self._blocked: dict[WatchStream, None] = {}
        self._progress_due: dict[WatchStream, float] = {}
        self._progress_next = 0.0

    def bind(self, store: Store) -> None:
        """Say whose changes these are; before anything else."""
        self.store = store

    # -- what the store tells ----------------------------------------------------------------------

    def record(
        self,
        shard: int,
        key: bytes,
        entry: Entry,
        framed: bytes,
        previous: Entry | None,
        previous_framed: bytes | None,
    ) -> None:
        """A change was applied, in order; ``previous_framed`` is None when it is not in memory."""
        feeds = self._of_shard.get(shard)
        if feeds:
            change: Change = (key, entry, framed, previous, previous_framed)
            for feed in feeds:
                feed.record(change)

    def advance(self) -> None:
        """A frontier moved: send what has become visible."""
        for feed in list(self._feeds.values()):
            feed.advance()

    def compacted(self) -> None:
        """The compact revision moved: watchers of clients that do not read learn it now."""
        self.catch_up.compacted()
        behind = self.store.compact_revision
        for stream in list(self._blocked):
            for watcher in [w for w in stream.blocked if w.next < behind]:
                self.unblock(watcher)

    def tick(self) -> None:
        """Send progress that is due, and try again what could not be done; called often."""
        self.catch_up.tick()
        for feed in list(self._feeds.values()):
            feed.tick()
        for stream in list(self._blocked):
            if stream.outbox.outbox_bytes <= self.config.outbox_bytes_max:
                stream.writable()
        now = self._clock.monotonic()
        if self._progress_due and now >= self._progress_next:
            for stream, due in self._progress_due.items():
                if now >= due:
                    stream.notify_progress()
                    self._progress_due[stream] = self._due_after(now)
            self._progress_next = min(self._progress_due.values())

    # -- what clients' streams ask -----------------------------------------------------------------

    def open(self, outbox: Outbox) -> "WatchStream":
        """A new client's stream, which sends through ``outbox``; its ``close`` ends it."""
        stream = WatchStream(self, outbox)
        self.streams[stream] = None
        return stream

    @property
    def watchers(self) -> int:
        """Watchers of all streams, without those that are over."""
        return sum(self.count) - self.count[State.OVER]

    @property
    def unsynced(self) -> int:
        """Watchers that are behind: reading the history, or waiting for storage or a client."""
        return self.watchers - self.count[State.SYNCED] - self.count[State.WAITING]

    @property
    def feeds(self) -> Iterable[Feed]:
        """One for each set of shards that somebody watches."""
        return self._feeds.values()

    @property
    def pending(self) -> int:
        """Changes recorded and not yet sent to synced watchers."""
        return sum(feed.pending for feed in self._feeds.values())

    @property
    def lag(self) -> int:
        """Revisions between the last one issued and what the furthest-behind feed has sent; a feed
        of a missing shard is none: nobody knows what is new there.
        """
        frontier = self.store.commits.frontier
        positions = [each.position for each in self._feeds.values() if frontier(each.shards)]
        return self.store.revision - min(positions) if positions else 0

    # -- what streams, feeds and the catch-up share ------------------------------------------------

    def enter(self, watcher: Watcher) -> None:
        """Count a new watcher, which is in no place yet."""
        watcher.feed.watchers += 1
        self.count[watcher.state] += 1
        stream = watcher.stream
        stream.unready += 1
        stream.feeds[watcher.feed] = stream.feeds.get(watcher.feed, 0) + 1

    def move(self, watcher: Watcher, state: State) -> None:
        """Note what a watcher does now; whoever calls takes care of its place."""
        before = watcher.state
        self.count[before] -= 1
        self.count[state] += 1
        watcher.stream.unready += (before is State.SYNCED) - (state is State.SYNCED)
        watcher.state = state

    def leave(self, watcher: Watcher) -> None:
        """Take a watcher out of its place and its feed; it gets no more events."""
        if watcher.state is State.BLOCKED:
            self._release(watcher)
        feed, stream = watcher.feed, watcher.stream
        feed.leave(watcher)
        self.move(watcher, State.OVER)
        stream.feeds[feed] -= 1
        if not stream.feeds[feed]:
            del stream.feeds[feed]
        feed.watchers -= 1
        if not feed.watchers:
            del self._feeds[feed.shards]
            for shard in feed.shards:
                self._of_shard[shard].remove(feed)

    def forget(self, watcher: Watcher) -> None:
        """The last that is heard of a watcher: it is no longer one of its stream's."""
        if watcher.state is not State.OVER:
            self.leave(watcher)
        self.count[State.OVER] -= 1
        watcher.stream.unready -= 1

    def end(self, watcher: Watcher, fields: bytes) -> None:
        """Tell a watcher that it is over; its id stays taken until it is cancelled, as in etcd."""
        self.leave(watcher)
        watcher.stream.say(self.header.at(0), watcher.id_field, fields)

    def block(self, watcher: Watcher) -> None:
        """Its client has too much unread."""
        self.move(watcher, State.BLOCKED)
        watcher.stream.blocked[watcher] = None
        self._blocked[watcher.stream] = None

    def unblock(self, watcher: Watcher) -> None:
        """Go on."""
        self._release(watcher)
        self.catch_up.add(watcher)

    def _release(self, watcher: Watcher) -> None:
        stream = watcher.stream
        del stream.blocked[watcher]
        if not stream.blocked:
            del self._blocked[stream]

    def feed(self, key: bytes, end: bytes | None) -> Feed:
        """The feed of the shards that a range touches, made if there is none."""
        shards = self.store.shards_of(key, end)
        feed = self._feeds.get(shards)
        if feed is None:
            feed = self._feeds[shards] = Feed(self, shards)
            for shard in shards:
                self._of_shard.setdefault(shard, []).append(feed)
        return feed

    def expect_progress(self, stream: "WatchStream") -> None:
        """A watcher of ``stream`` wants to hear of progress now and then."""
        if stream not in self._progress_due:
            due = self._due_after(self._clock.monotonic())
            self._progress_due[stream] = due
            self._progress_next = min(self._progress_next, due) if self._progress_next else due

    def closed(self, stream: "WatchStream") -> None:
        """A stream is gone, and its watchers with it."""
        del self.streams[stream]
        self._progress_due.pop(stream, None)

    def _due_after(self, now: float) -> float:
        return now + self.config.progress_interval * self.random.uniform(1 - _JITTER, 1 + _JITTER)


class WatchStream:
    """The watchers of one client's stream, and what is said about them.

    ``unready`` counts watchers that are not synced, ended ones included; ``feeds`` counts those by
    feed that have not ended. Progress never goes below ``shown``, the highest revision that a
    watcher was promised or sent on its own, nor below what the feeds have sent.
    """

    def __init__(self, hub: WatchHub, outbox: Outbox) -> None:
        self.outbox = outbox
        self.watchers: dict[int, Watcher] = {}
        self.blocked: dict[Watcher, None] = {}
        self.feeds: dict[Feed, int] = {}
        self.unready = 0
        self.shown = 0
        self._hub = hub
        self._next_id = 0
        self._control_bytes = 0

    def create(self, watch: Watch) -> None:
        """Start to watch, and answer: created, or created and canceled with a reason.

        Raises ``TooManyRequestsError`` when the client does not read its answers, TimedOutError
        when another process may know of later revisions; nothing of the watch has been begun then.
        """
        hub = self._hub
        reason = self._refusal(watch)
        commits = hub.store.commits
        durable = commits.durable
        if commits.leased and commits.lease_lapsed():
            raise TimedOutError
        head = hub.header.at(durable)
        if reason:
            invalid = watch_id_field(INVALID_WATCH_ID)
            self.answer(head, invalid, CREATED + CANCELED + cancel_reason(reason))
            return
        watch_id = watch.watch_id or self._take_id()
        self.answer(head, watch_id_field(watch_id), CREATED)
        feed = hub.feed(watch.key, watch.end)
        watcher = Watcher(self, feed, watch_id, watch.key, watch.end, watch.wants)
        watcher.next = watch.start_revision or durable + 1
        watcher.due = watch.start_revision or durable
        self.watchers[watch_id] = watcher
        hub.enter(watcher)
        if watch.progress_notify:
            watcher.progress_notify = True
            hub.expect_progress(self)
        feed.settle(watcher)

    def cancel(self, watch_id: int) -> None:
        """Stop a watch, and say so; an unknown id is ignored. Raises ``TooManyRequestsError``."""
        watcher = self.watchers.pop(watch_id, None)
        if watcher is not None:
            self._hub.forget(watcher)
            head = self._hub.header.at(self._hub.store.commits.durable)
            self.answer(head, watcher.id_field, CANCELED)

    def request_progress(self) -> None:
        """Say how far all watchers are; nothing if that cannot be said."""
        if self.unready or not self.watchers or self._full():
            return
        revision = min(feed.position for feed in self.feeds)
        if revision >= max(self.shown, *(feed.shown for feed in self.feeds)):
            self.shown = revision
            self.say(self._hub.header.at(revision), watch_id_field(INVALID_WATCH_ID), b"")

    def notify_progress(self) -> None:
        """Progress is due: tell those who want it and have heard nothing since last time."""
        if self._full():
            return
        for watcher in self.watchers.values():
            if not watcher.progress_notify:
                continue
            if watcher.quiet and watcher.state is State.SYNCED:
                position = watcher.feed.position
                self.shown = max(self.shown, position)
                self.say(self._hub.header.at(position), watcher.id_field, b"")
            watcher.quiet = True

    def writable(self) -> None:
        """The client has read on: its blocked watchers go on."""
        for watcher in list(self.blocked):
            self._hub.unblock(watcher)

    def close(self) -> None:
        """Nothing can be sent any more: forget all watchers."""
        watchers, self.watchers = self.watchers, {}
        for watcher in watchers.values():
            self._hub.forget(watcher)
        self._hub.closed(self)

    def answer(self, head: bytes, id_field: bytes, fields: bytes) -> None:
        """Answer a request; raises ``TooManyRequestsError`` if too many answers are unread."""
        if not self._full():
            self._control_bytes = 0
        else:
            self._control_bytes += len(head) + len(id_field) + len(fields)
            if self._control_bytes > self._hub.config.control_bytes_max:
                raise TooManyRequestsError
        self.say(head, id_field, fields)

    def say(self, head: bytes, id_field: bytes, fields: bytes) -> None:
        """Send a response without events."""
        self.outbox.send((head, id_field, fields), len(head) + len(id_field) + len(fields))

    def _full(self) -> bool:
        return self.outbox.outbox_bytes > self._hub.config.outbox_bytes_max

    def _refusal(self, watch: Watch) -> str:
        """Why a watch cannot be, in etcd's order of checks; empty if it can."""
        config = self._hub.config
        if watch.start_revision < 0:
            return CompactedError.text
        if watch.end is not None and watch.end != NO_END and watch.end <= watch.key:
            return EMPTY_RANGE
        if watch.watch_id in self.watchers and watch.watch_id:
            return DUPLICATE_ID
        full = len(self.watchers) >= config.watchers_per_stream_max
        if full or sum(self._hub.count) >= config.watchers_max:
            return TooManyRequestsError.text
        return ""

    def _take_id(self) -> int:
        """The next number that is not taken."""
        while self._next_id in self.watchers:
            self._next_id += 1
        self._next_id += 1
        return self._next_id - 1
