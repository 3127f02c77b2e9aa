"""List, then watch: how one client keeps itself informed of all keys with a prefix.

From a list at revision R the watch starts at R + 1; after a lost connection it resumes at the last
revision seen + 1, as etcd's client does, unless a disturbance said otherwise; canceled as
compacted, it lists again. Each of these is recorded, so that judges can follow it.
``seen`` is the revision up to which everything has been delivered: of the last event, of progress,
or of the list.
"""

from collections import deque
from collections.abc import Callable, Iterable
from random import Random

from bench import plan
from bench.client import requests
from bench.client.heard import DELETE, event_row, kind_of, message_row
from bench.clock import MICROSECONDS, now_us
from bench.drive.listing import Listing, Origin, Shown
from bench.drive.site import RECONNECT_US, Line, Site
from bench.records import MessageKind
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb

_PROGRESS = pb.WatchRequest(progress_request=pb.WatchProgressRequest()).SerializeToString()

Seen = Callable[[bytes, int, bytes | None], None]
"""Key, modification revision and value of a change; None: deleted."""


class Watching:
    """One watch over one line, for as long as the site lives. A ``Sink`` of its stream."""

    def __init__(
        self, site: Site, line: Line, watcher: plan.Watcher, apiserver: int, changed: Seen
    ) -> None:
        self.site = site
        self.line = line
        self.watcher = watcher
        self.seen = 0
        self.synced = False
        """It has been watching, or has had its list, since it began last."""
        self._apiserver = apiserver
        self._changed = changed
        self._next = -1 if watcher.start == plan.Start.NOW else 0
        """Revision to watch from when the line is up; 0: list, negative: from now."""
        self._told = False
        """``_next`` was decided by a disturbance."""
        self._listing = False
        self._stream = -1
        self._number = -1
        self._messages = 0
        self._opened: tuple[int, int, int] = (0, 0, 0)
        self._ended: tuple[int, bytes] = (-1, b"")
        self._slow: deque[bytes] = deque()
        """Messages that a slow reader has not read."""
        self._reading = False
        self._due_us = 0
        line.on_up = self._up

    # Beginning.

    def resume(self, at: int) -> None:
        """Begin at a revision (0: with a list) the next time that the line is up."""
        self._next = at
        self._told = True
        self.synced = False

    def come_back(self, trouble: plan.Disturbance, draw: Random) -> None:
        """Begin, after the connection is lost, as the disturbance says."""
        chance = draw.random() * 100
        if chance < trouble.resume:
            self.resume(self.seen + 1)
        elif chance < trouble.resume + trouble.stale:
            self.resume(1)
        else:
            self.resume(0)

    def drop(self, trouble: plan.Disturbance, draw: Random) -> None:
        """Lose a connection that is this watch's own."""
        self.come_back(trouble, draw)
        self.line.close(reset=draw.random() < 0.5)

    def _up(self) -> None:
        """Begin, unless it has: a line that came back and a timer may both ask for it."""
        if self._listing or self._stream >= 0:
            return
        self._due_us = now_us()
        self._told = False
        if self._next == 0:
            self._listing = True
            self._list()
        else:
            self._watch(max(self._next, 0))

    def _list(self) -> None:
        origin = Origin(-1, -1, b"apiserver.list" if self._apiserver >= 0 else b"watcher.list")
        shown: Shown = self._changed
        Listing(self.site, self.line, self.watcher.prefix, origin, self._listed, shown).begin(
            self._due_us
        )

    def _listed(self, revision: int) -> None:
        self._listing = False
        if revision > 0 and not self._told:
            self._watch(revision + 1)
            return
        if not self._told:
            self._next = 0
        self._again()

    def _again(self) -> None:
        """Begin once more, a moment later; a line that is down does so when it comes back."""
        if not self.site.stopping:
            self.site.ticker.at(now_us() + RECONNECT_US, self._retry)

    def _retry(self) -> None:
        if self.line.connection is not None and not self.site.stopping:
            self._up()

    def _watch(self, start: int) -> None:
        connection = self.line.connection
        self._next = start
        if connection is None:
            return
        watcher, site = self.watcher, self.site
        key = site.prefix + watcher.prefix
        filters = [
            *([pb.WatchCreateRequest.NOPUT] if watcher.no_put else []),
            *([pb.WatchCreateRequest.NODELETE] if watcher.no_delete else []),
        ]
        create = pb.WatchCreateRequest(
            key=key,
            range_end=requests.prefix_end(key),
            start_revision=start,
            prev_kv=watcher.prev_kv,
            progress_notify=watcher.progress,
            filters=filters,
        )
        self._number = next(site.numbers)
        self._messages = 0
        self._opened = (self.line.number, start, now_us())
        message = pb.WatchRequest(create_request=create).SerializeToString()
        self._stream = connection.open(requests.WATCH, message, self)
        self.synced = True
        if start:
            self.seen = start - 1

    @property
    def created(self) -> bool:
        """Its stream is open, and the server has answered on it."""
        return self._stream >= 0 and self._messages > 0

    # Receiving.

    def message(self, message: bytes, received_us: int) -> None:
        """One WatchResponse."""
        if self.watcher.events_per_second:
            self._slow.append(message)
            if not self._reading:
                self._reading = True
                self.site.ticker.at(max(now_us(), self._due_us), self._read_slowly)
            return
        self._take(message, received_us)

    def _read_slowly(self) -> None:
        """Take one message of a slow reader, and wait as long as its events are worth."""
        self._reading = False
        if not self._slow:
            return
        message = self._slow.popleft()
        events = self._take(message, now_us())
        connection = self.line.connection
        if connection is not None:
            connection.grant(self._stream, len(message) + 5)
        pause = max(events, 1) * MICROSECONDS // self.watcher.events_per_second
        self._due_us = now_us() + pause
        if self._slow:
            self._reading = True
            self.site.ticker.at(self._due_us, self._read_slowly)

    def _take(self, message: bytes, received_us: int) -> int:
        """Record a message and tell of its changes; gives the number of its events."""
        answer = pb.WatchResponse.FromString(message)
        revision = answer.header.revision
        events = answer.events
        number = self._messages
        self._messages = number + 1
        kind = kind_of(answer)
        row = message_row(self._number, number, received_us, kind, answer)
        self.site.recorders["messages"].add(*row)
        if events:
            self._events(number, events)
        if kind == MessageKind.PROGRESS:
            self.seen = max(self.seen, revision)
        elif kind == MessageKind.CREATED and self._opened[1] == 0:
            self.seen = revision
        elif kind == MessageKind.CANCELED:
            self._canceled(answer.compact_revision)
        self.site.head_revision = max(self.site.head_revision, revision, self.seen)
        return len(events)

    def _events(self, number: int, events: Iterable[kv_pb2.Event]) -> None:
        cut = len(self.site.prefix)
        add = self.site.recorders["events"].add
        watch = self._number
        changed = self._changed
        modified = 0
        for event in events:
            kv = event.kv
            key = kv.key[cut:]
            modified = kv.mod_revision
            value = None if event.type == DELETE else kv.value
            add(*event_row(watch, number, event, key, value))
            changed(key, modified, value)
        self.seen = max(self.seen, modified)

    def _canceled(self, compact_revision: int) -> None:
        """The server ended this watch; its stream is of no use to anybody else."""
        self.resume(0 if compact_revision else self.seen + 1)
        connection = self.line.connection
        if connection is not None:
            connection.cancel(self._stream)

    def ended(self, code: int, text: str) -> None:
        """The stream is over: canceled, or with its connection."""
        self._stream = -1
        self._slow.clear()
        self._record(code, text.encode())
        if not self._told and self.seen:
            self._next = self.seen + 1
        self._again()

    # Ending.

    def ask_progress(self) -> None:
        """Request progress on the stream, if there is one."""
        connection = self.line.connection
        if connection is not None and self._stream >= 0:
            connection.send(self._stream, _PROGRESS)

    def finish(self) -> None:
        """Record a watch that is still open."""
        if self._stream >= 0:
            self._stream = -1
            self._record(-1, b"")

    def _record(self, code: int, text: bytes) -> None:
        site, watcher = self.site, self.watcher
        connection, start, opened_us = self._opened
        site.recorders["watches"].add(
            self._number,
            connection,
            self._apiserver,
            start,
            watcher.prev_kv,
            watcher.progress,
            watcher.no_put,
            watcher.no_delete,
            watcher.events_per_second,
            0,
            opened_us,
            now_us(),
            code,
            watcher.name.encode(),
            watcher.prefix,
            requests.prefix_end(watcher.prefix),
            text,
        )
