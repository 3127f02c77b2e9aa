"""Watchers of the simulation, of one shard and of several, and what they must be sent, by the log.

A ``Watcher`` outlives processes: when its server is gone it watches again, from behind the last
revision that it knows everything of, as kube-apiserver does. What it gets must be the log's changes
of its range: in order, each once, complete revisions, nothing left out; or word that compaction
has overtaken it, if it has. A revision that has been promised gets no further change.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore.backend import Row
from kvstore.errors import TimedOutError
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb
from kvstore.transport.api import StatusError
from tests.sim_requests import Clients, pairs, shown

if TYPE_CHECKING:
    from kvstore.transport.api import StreamSink
    from tests.sim_process import Process

PATH = "Watch/Watch"
ALL_WATCHERS = -1
PROGRESS = pb.WatchRequest(progress_request=pb.WatchProgressRequest()).SerializeToString()


class Watcher:
    """One range that somebody watches, whichever server is there."""

    def __init__(self, key: bytes, end: bytes, *, previous: bool) -> None:
        self.key = key
        self.end = end
        self.previous = previous
        self.position = 0
        """Everything up to this revision is known; 0: it has not begun."""
        self.first = 0
        """The revision that it began behind."""
        self.seen: list[Row] = []
        self.asked_at = 0
        """The highest revision shown to anyone when it was asked for."""
        self.created = False
        self.over = False
        """Compaction has overtaken it."""


class Stream:
    """One client's stream to one process, with watchers of its own."""

    peer = "test"
    deadline = None
    cancelled = False
    blocked = False

    def __init__(self, clients: Clients, process: "Process", watchers: list[Watcher]) -> None:
        self.clients = clients
        self.process = process
        self.watchers = watchers
        self.outbox_bytes = 0
        self.reading = True
        self.finished = False
        self.sink: StreamSink = process.stream(PATH, self)
        for number, watcher in enumerate(watchers, start=1):
            if not self.finished:
                self._watch(number, watcher)

    def metadata(self, name: bytes, /) -> bytes | None:
        """None is sent."""
        return None

    def finish(self, code: int = 0, message: str = "", /) -> None:
        """The server ends the stream."""
        self.finished = True

    def send(self, parts: Sequence[bytes], size: int, /) -> None:
        """The server's response."""
        message = b"".join(parts)
        assert len(message) == size
        if self.finished:
            return
        if not self.reading:
            self.outbox_bytes += size
        self._judge(pb.WatchResponse.FromString(message))

    def ask_progress(self) -> None:
        """Ask how far all watchers are."""
        if not self.finished:
            self.sink.message(PROGRESS)

    def stop_reading(self) -> None:
        """What it is sent piles up."""
        self.reading = False

    def read(self) -> None:
        """Read everything, and from now on."""
        if not self.reading:
            self.reading = True
            self.outbox_bytes = 0
            if not self.finished:
                self.sink.writable()

    def _watch(self, number: int, watcher: Watcher) -> None:
        watcher.created = False
        if watcher.over:
            watcher.over = False  # its client lists, and watches from there
            watcher.position = self.clients.seen
            watcher.first = watcher.position
            watcher.seen.clear()
        watcher.asked_at = self.clients.seen
        create = pb.WatchCreateRequest(
            key=watcher.key,
            range_end=watcher.end,
            prev_kv=watcher.previous,
            start_revision=watcher.position + 1 if watcher.position else 0,
            watch_id=number,
            progress_notify=True,
        )
        try:
            self.sink.message(pb.WatchRequest(create_request=create).SerializeToString())
        except StatusError as error:
            assert error.message == TimedOutError.text
            self.finished = True  # as the transport does

    # -- the oracle --------------------------------------------------------------------------------

    def _judge(self, response: pb.WatchResponse) -> None:
        clients = self.clients
        revision = response.header.revision
        assert revision <= clients.log.tip, "shown before it was durable"
        clients.counts["watch responses"] += 1
        if response.watch_id == ALL_WATCHERS:
            for watcher in self.watchers:
                assert watcher.created, "progress is for those who have begun"
                self._progress(watcher, revision)
            return
        watcher = self.watchers[response.watch_id - 1]
        assert not watcher.over, "nothing follows the end"
        if response.created:
            self._created(watcher, response)
        elif response.canceled:
            self._cancelled(watcher, response)
        elif response.events:
            self._events(watcher, response.events)
            assert revision >= watcher.position
            clients.seen = max(clients.seen, watcher.position)
        else:
            self._progress(watcher, revision)

    def _created(self, watcher: Watcher, response: pb.WatchResponse) -> None:
        revision = response.header.revision
        assert not response.canceled, response.cancel_reason
        assert not watcher.created
        assert revision >= watcher.asked_at, "what was shown stays seen"
        watcher.created = True
        if not watcher.position:
            watcher.position = watcher.first = revision
        self.clients.seen = max(self.clients.seen, revision)

    def _cancelled(self, watcher: Watcher, response: pb.WatchResponse) -> None:
        compacted = response.compact_revision
        assert watcher.created
        assert watcher.position + 1 < compacted <= self.clients.compaction_sent, "overtaken"
        watcher.over = True
        self.clients.counts["watchers overtaken"] += 1

    def _events(self, watcher: Watcher, events: Sequence[kv_pb2.Event]) -> None:
        last = events[-1].kv.mod_revision
        rows = self._changes(watcher, last)
        assert watcher.created
        assert len(events) == len(rows), "all changes of complete revisions, and each once"
        for event, row in zip(events, rows, strict=True):
            assert pairs([event.kv]) == shown([row]), "the log's next change"
            assert (event.type == kv_pb2.Event.DELETE) == (row[4] == 0)
            if watcher.previous:
                self._previous(event, row)
        watcher.seen += rows
        watcher.position = last
        self.clients.counts["events"] += len(rows)
        shards = {self.clients.world.shards.of(row[2]) for row in rows if row[0] == last}
        self.clients.counts["events over several shards"] += len(shards) > 1

    def _previous(self, event: kv_pb2.Event, row: Row) -> None:
        log = self.clients.log
        before = log.at(row[2], row[0] - 1)
        if event.HasField("prev_kv"):
            assert before is not None
            assert pairs([event.prev_kv]) == shown([before])
        else:
            assert before is None or row[0] <= self.clients.compaction_sent, "prev_kv is there"

    def _progress(self, watcher: Watcher, revision: int) -> None:
        if watcher.over:
            return
        assert revision >= watcher.position or revision + 1 >= watcher.first, "progress goes on"
        assert not self._changes(watcher, revision), "everything up to there was sent"
        watcher.position = max(watcher.position, revision)
        self.clients.seen = max(self.clients.seen, revision)
        self.clients.counts["progress"] += 1

    def _changes(self, watcher: Watcher, up_to: int) -> list[Row]:
        return self.clients.log.changes(watcher.key, watcher.end, watcher.position, up_to)


def check_complete(clients: Clients, watcher: Watcher, *, tip: int) -> None:
    """All is calm: a watcher has had exactly the log's changes, and no late one among them."""
    if watcher.over or not watcher.position:
        return
    expected = clients.log.changes(watcher.key, watcher.end, watcher.first, tip)
    assert watcher.seen == expected, "the watcher has had all of it"
