"""The watches of one replayed stream, as rows of WATCHES, MESSAGES and EVENTS."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from google.protobuf.message import DecodeError

from bench.client.heard import DELETE, event_row, kind_of, message_row
from bench.clock import now_us
from bench.records import MessageKind, Recorder
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb
from kvstore.transport import grpc

CANCELED = 1
"""gRPC's code; of a watch that has ended while its stream goes on."""
_ALL = -1
"""Id in an answer to a request for progress: it is of every watch of the stream."""

Shown = Callable[[bytes, int], None]
"""Key and revision of a put that a watch showed."""


class _Watch:
    """One watch."""

    def __init__(self, number: int, request: pb.WatchCreateRequest) -> None:
        self.number = number
        self.request = request
        self.opened_us = now_us()
        self.messages = 0
        self.seen = 0
        """The revision up to which everything has come."""


class WatchStream:
    """A ``Sink`` of watch responses."""

    def __init__(
        self,
        connection: int,
        client: int,
        numbers: Iterator[int],
        recorders: Mapping[str, Recorder],
        shown: Shown,
    ) -> None:
        """``connection`` is the replay's, ``client`` the number of the recorded one."""
        self._connection = connection
        self._client = client
        self._numbers = numbers
        self._recorders = recorders
        self._shown = shown
        self._asked: deque[_Watch] = deque()
        """Created in this order."""
        self._open: dict[int, _Watch] = {}
        self._ids: list[asyncio.Future[int]] = []
        """Of each creation: the id that the server gave."""
        self.over = False

    # What the client does.

    def create(self, request: pb.WatchCreateRequest) -> None:
        """One more watch is asked for."""
        self._asked.append(_Watch(next(self._numbers), request))
        self._ids.append(asyncio.get_running_loop().create_future())

    def created(self, order: int) -> "asyncio.Future[int] | None":
        """The id of the watch that was created as the n-th; None: that was not asked for."""
        return self._ids[order] if order < len(self._ids) else None

    @property
    def behind(self) -> int | None:
        """The revision up to which every watch that is open has come; None: none is open."""
        return min((watch.seen for watch in self._open.values()), default=None)

    # What the server sends.

    def message(self, message: bytes, received_us: int, /) -> None:
        """One WatchResponse; what is none ends the stream as INTERNAL, as it does another call."""
        if self.over:
            return
        try:
            answer = pb.WatchResponse.FromString(message)
        except DecodeError as error:
            self.ended(grpc.INTERNAL, str(error))
            return
        if answer.created and self._asked:
            watch = self._asked.popleft()
            self._open[answer.watch_id] = watch
            made = next(future for future in self._ids if not future.done())
            made.set_result(answer.watch_id)
        if answer.watch_id == _ALL and not answer.created and not answer.canceled:
            for watch in self._open.values():
                self._take(watch, answer, received_us)
            return
        found = self._open.get(answer.watch_id)
        if found is not None:
            self._take(found, answer, received_us)
            if answer.canceled:
                del self._open[answer.watch_id]
                self._close(found, CANCELED, answer.cancel_reason)

    def _take(self, watch: _Watch, answer: pb.WatchResponse, received_us: int) -> None:
        revision, events = answer.header.revision, answer.events
        number = watch.messages
        watch.messages = number + 1
        kind = kind_of(answer)
        row = message_row(watch.number, number, received_us, kind, answer)
        self._recorders["messages"].add(*row)
        for event in events:
            self._event(watch, number, event)
        if kind == MessageKind.PROGRESS or (
            kind == MessageKind.CREATED and not watch.request.start_revision
        ):
            watch.seen = max(watch.seen, revision)

    def _event(self, watch: _Watch, message: int, event: kv_pb2.Event) -> None:
        kv = event.kv
        value = None if event.type == DELETE else kv.value
        self._recorders["events"].add(*event_row(watch.number, message, event, kv.key, value))
        watch.seen = max(watch.seen, kv.mod_revision)
        if value is not None:
            self._shown(kv.key, kv.mod_revision)

    def ended(self, code: int, text: str, /) -> None:
        """The stream is over, and with it all its watches."""
        self.over = True
        for watch in (*self._open.values(), *self._asked):
            self._close(watch, code, text)
        self._open.clear()
        self._asked.clear()
        for future in self._ids:
            if not future.done():
                future.cancel()

    def finish(self) -> None:
        """Record the watches that are open still."""
        if not self.over:
            self.ended(-1, "")

    def _close(self, watch: _Watch, code: int, text: str) -> None:
        request = watch.request
        self._recorders["watches"].add(
            watch.number,
            self._connection,
            self._client,
            request.start_revision,
            request.prev_kv,
            request.progress_notify,
            pb.WatchCreateRequest.NOPUT in request.filters,
            pb.WatchCreateRequest.NODELETE in request.filters,
            0,
            request.fragment,
            watch.opened_us,
            now_us(),
            code,
            b"client %d" % self._client,
            request.key,
            request.range_end,
            text.encode(),
        )
