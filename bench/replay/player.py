"""Sends a script to a server: every act at its time, and never before what it may follow from.

Each recorded connection is one connection and one task, which takes its acts in turn. An act is due
at its recorded time divided by the speed, or when the answers that it waits for are there, if that
is later; latency counts from there. It waits for answers to the calls that were answered before it
on its connection; for the calls, on whatever connection, that gave it a revision it compares with
or a lease that it names, or that were faster than it; and, on a stream of watches, for those to be
created that were. It does not wait for events, which come in other pieces and at other times. A
call that gets no answer is over after the timeout, so nothing waits for longer than that.

What is not sent: calls that change who is a member, who leads, or who may log in. A unary call that
its client gave up is not given up again; its answer is recorded. A connection is open until the
end, whenever its client closed it. When it is lost, or the server has said goodbye on it, the next
act has a new one; what the server had accepted on the old one it may finish.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from itertools import count

from google.protobuf.message import Message

from bench.client.connection import Connection
from bench.clock import MICROSECONDS, now_us, wait_until
from bench.drive.site import NO_CONNECTION
from bench.records import Recorder
from bench.replay.calls import NO_LEASE, WITHHELD, Calls, Counts, Sending
from bench.replay.script import Act, Call, Script
from bench.replay.trace import Kind
from bench.replay.translation import Translation
from bench.replay.watching import WatchStream
from kvstore.pb import rpc_pb2 as pb
from kvstore.transport import grpc
from kvstore.transport.api import Kind as Shape

SWEEP_US = 50_000
SLICE_US = 500_000
"""After so long whoever waits for its time looks whether it is told to stop."""
CONNECT_TIMEOUT = 5.0
WATCHES = "watches to cancel"
LOST = "messages on streams that had ended"
CLOSE_US = MICROSECONDS
"""That connections have to close when all is over."""
_WITHHELD = frozenset(
    (
        *(f"Cluster/Member{what}" for what in ("Add", "Remove", "Update", "Promote")),
        *(f"Maintenance/{what}" for what in ("MoveLeader", "Downgrade", "Alarm")),
    )
)


def is_withheld(call: Call) -> bool:
    """Is it no call for a server under test?"""
    name = call.rpc.name.decode()
    return name in _WITHHELD or name.startswith("Auth/")


class Line:
    """One recorded connection: a connection of the replay, and another when that is of no use."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._made: list[Connection] = []
        """Those that are not lost; the last is the one for new calls."""
        self.number = -1

    @property
    def connection(self) -> Connection | None:
        """For calls that begin now; None: there is none."""
        return self._made[-1] if self._made and self._made[-1].usable else None

    async def connect(self, number: int) -> bool:
        """Make the connection; False: it cannot be had."""
        host, port = self._address
        settled = asyncio.Event()
        connection = Connection(f"{host}:{port}", settled.set, settled.set, lingers=True)
        self._made = [*self.open(), connection]
        self.number = number
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(CONNECT_TIMEOUT):
                loop = asyncio.get_running_loop()
                await loop.create_connection(lambda: connection, host, port)
                await settled.wait()
        if not connection.usable:
            connection.close()
        return connection.usable

    def open(self) -> list[Connection]:
        """Every connection that is not lost."""
        return [connection for connection in self._made if not connection.lost]


class Pieces:
    """The sink of a server's stream, which is one answer in pieces."""

    def __init__(self, player: "Player", connection: Connection, sending: Sending) -> None:
        self._player, self._connection, self._sending = player, connection, sending
        self._answers: list[bytes] = []
        self.until_us = now_us() + player.timeout_us
        self.stream = -1

    def message(self, message: bytes, received_us: int, /) -> None:
        """One piece."""
        self._answers.append(message)

    def ended(self, code: int, text: str, /) -> None:
        """All of it is there, or not."""
        self._player.pieces.discard(self)
        self._player.answered(self._connection, self._sending, code, self._answers, text)

    def expire(self, now: int) -> None:
        """Give up when the time is up."""
        if now >= self.until_us:
            self._connection.cancel(self.stream)


class Leases:
    """The sink of a stream of keep-alives; answers come in the order of requests."""

    def __init__(self, player: "Player", connection: Connection) -> None:
        self._player, self._connection = player, connection
        self.sent: list[Sending] = []
        self.over = False

    def message(self, message: bytes, received_us: int, /) -> None:
        """The next one is answered."""
        if self.sent:
            self._player.answered(self._connection, self.sent.pop(0), 0, [message], "")

    def ended(self, code: int, text: str, /) -> None:
        """What is unanswered stays so."""
        self.over = True
        for sending in self.sent:
            self._player.answered(self._connection, sending, code or grpc.CANCELLED, [], text)
        self.sent.clear()


class Player:
    """One replay; ``run`` is the load, ``finish`` ends it."""

    def __init__(
        self,
        script: Script,
        translation: Translation,
        recorders: Mapping[str, Recorder],
        *,
        host: str,
        port: int,
        speed: float,
        timeout_us: int,
        stop: asyncio.Event,
    ) -> None:
        self._script, self._translation = script, translation
        self._recorders = recorders
        self._address = host, port
        self._speed = speed
        self.timeout_us = timeout_us
        self._stop = stop
        self.counts = Counts()
        self._calls = Calls(recorders, translation, self.counts)
        self._over: dict[int, int] = {}
        """Calls that are over, and when."""
        self._waiting: dict[int, list[asyncio.Event]] = {}
        self._lines: list[Line] = []
        self._numbers = count()
        self._watch_numbers = count()
        self.watches: dict[int, WatchStream] = {}
        """By call."""
        self._leases: dict[int, Leases] = {}
        self._streams: dict[int, tuple[Connection, int]] = {}
        """Of calls that are streams: where they are."""
        self.pieces: set[Pieces] = set()
        self.connections_failed = 0
        self._zero_us = 0
        self._pending = 0

    async def run(self, zero_us: int) -> None:
        """Every act, and the answers to it."""
        self._zero_us = zero_us
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(self._sweep()), group.create_task(self._heed_stop())]
            async with asyncio.TaskGroup() as clients:
                for acts in self._script.acts.values():
                    clients.create_task(self._follow(acts))
            end_us = now_us() + self.timeout_us + MICROSECONDS
            while self._pending and now_us() < end_us:
                await wait_until(now_us() + 10_000)
            for task in beside:
                task.cancel()

    @property
    def behind(self) -> int | None:
        """The revision up to which all open watches have come."""
        found = [stream.behind for stream in self.watches.values()]
        return min((revision for revision in found if revision is not None), default=None)

    def ask_progress(self) -> None:
        """Request progress on all streams of watches."""
        message = pb.WatchRequest(progress_request=pb.WatchProgressRequest()).SerializeToString()
        for call, stream in self.watches.items():
            if stream.behind is not None:
                connection, number = self._streams[call]
                connection.send(number, message)

    async def finish(self) -> None:
        """Record watches that are open and close all connections; what is unanswered stays so."""
        for stream in self.watches.values():
            stream.finish()
        reset = self._pending > 0  # a server that does not read would keep us from closing
        for connection in self._connections():
            connection.close(reset=reset)
        end_us = now_us() + CLOSE_US
        while any(self._connections()) and now_us() < end_us:
            await wait_until(now_us() + 1000)

    def _connections(self) -> list[Connection]:
        return [connection for line in self._lines for connection in line.open()]

    async def _sweep(self) -> None:
        while True:
            now = now_us()
            for connection in self._connections():
                connection.expire(now)
            for pieces in list(self.pieces):
                pieces.expire(now)
            await wait_until(now + SWEEP_US)

    async def _heed_stop(self) -> None:
        """Nobody waits for what will not be sent."""
        await self._stop.wait()
        for events in self._waiting.values():
            for event in events:
                event.set()

    # Acts.

    async def _follow(self, acts: list[Act]) -> None:
        line = Line(*self._address)
        self._lines.append(line)
        answered_us = 0
        for act in acts:
            due_us = self._zero_us + int(act.at / self._speed)
            for call in act.after:
                answered_us = max(answered_us, await self._end_of(call))
            ready_us = max(due_us, answered_us)
            request = self._request(act)
            if request is not None:
                needed = self._translation.needs(request)
                lost_to = self._translation.lost_to(act.call)
                for call in (*needed, *lost_to):
                    if call < act.call.number:
                        ready_us = max(ready_us, await self._end_of(call))
            while now_us() < due_us and not self._stop.is_set():
                await wait_until(min(due_us, now_us() + SLICE_US))
            if self._stop.is_set():
                return
            if line.connection is None and not await line.connect(next(self._numbers)):
                self.connections_failed += 1
            await self._do(line, act, request, ready_us)

    def _request(self, act: Act) -> Message | None:
        """What the act sends."""
        unary = act.call.rpc.kind is Shape.UNARY
        if act.kind != (Kind.BEGIN if unary else Kind.UP):
            return None
        request = act.call.rpc.request()
        request.ParseFromString(act.message)
        return request

    async def _end_of(self, call: int) -> int:
        """Wait until a call is over; gives when that was."""
        if call not in self._over and not self._stop.is_set():
            event = asyncio.Event()
            self._waiting.setdefault(call, []).append(event)
            await event.wait()
        return self._over.get(call, 0)

    def _mark(self, call: int) -> None:
        self._over[call] = now_us()
        for event in self._waiting.pop(call, ()):
            event.set()

    async def _do(self, line: Line, act: Act, request: Message | None, due_us: int) -> None:
        call = act.call
        if act.created and call.number in self.watches:
            made = self.watches[call.number].created(act.created - 1)
            if made is not None and not await self._until(made):
                return
        if is_withheld(call):
            if act.kind == Kind.BEGIN:
                self.counts.unsent[call.number] = WITHHELD
                self._mark(call.number)
        elif isinstance(request, pb.WatchRequest):
            self._watch(line, call, request)
        elif isinstance(request, pb.LeaseKeepAliveRequest):
            self._keep_alive(line, call, request, due_us)
        elif request is not None:
            self._call(line, call, request, due_us)
        elif call.number in self._streams:
            connection, stream = self._streams[call.number]
            if act.kind == Kind.HALF_CLOSE:
                connection.half_close(stream)
            elif act.kind == Kind.CANCEL:
                connection.cancel(stream)

    async def _until(self, made: "asyncio.Future[int]") -> bool:
        """Wait for a watch as long as for an answer; False: the replay is to stop."""
        end_us = now_us() + self.timeout_us
        while not made.done() and not self._stop.is_set() and (left_us := end_us - now_us()) > 0:
            await asyncio.wait((made,), timeout=min(left_us, SLICE_US) / MICROSECONDS)
        return made.done() or not self._stop.is_set()

    def _call(self, line: Line, call: Call, request: Message, due_us: int) -> None:
        sending = self._calls.sending(call, request, line.number, due_us)
        self._pending += 1
        connection = line.connection
        if connection is None:
            self.counts.unsent[call.number] = NO_CONNECTION
            self.answered(None, sending, grpc.UNAVAILABLE, [], NO_CONNECTION)
            return
        self.counts.begun.add(call.number)
        raw = sending.request.SerializeToString()
        if call.rpc.kind is Shape.UNARY:

            def answered(code: int, message: bytes, text: str) -> None:
                self.answered(connection, sending, code, [message], text)

            connection.call(call.rpc.path, raw, answered, self.timeout_us)
        else:
            pieces = Pieces(self, connection, sending)
            self.pieces.add(pieces)
            pieces.stream = connection.open(call.rpc.path, raw, pieces, end=True)
            self._streams[call.number] = connection, pieces.stream

    def answered(
        self,
        connection: Connection | None,
        sending: Sending,
        code: int,
        answers: list[bytes],
        text: str,
    ) -> None:
        """A call is over; ``connection`` is where it was sent."""
        done_us = connection.received_us if code == 0 and connection is not None else now_us()
        sending.answered(code, answers, text, done_us)
        self._pending -= 1
        self._mark(sending.call.number)

    def _watch(self, line: Line, call: Call, request: pb.WatchRequest) -> None:
        stream = self.watches.get(call.number)
        cancel = request.cancel_request if request.HasField("cancel_request") else None
        if cancel is not None and not _name(call, stream, cancel):
            self._translation.unmapped[WATCHES] += 1
            return
        if stream is not None and stream.over:
            self._translation.unmapped[LOST] += 1
            return
        connection = line.connection
        if stream is None and connection is None:
            self.counts.unsent[call.number] = NO_CONNECTION
            return
        begun = stream is not None
        if stream is None:
            stream = WatchStream(
                line.number, call.connection, self._watch_numbers, self._recorders, self._shown
            )
            self.watches[call.number] = stream
        if request.HasField("create_request"):
            self._translation.request(call.connection, request.create_request)
            stream.create(request.create_request)
        raw = request.SerializeToString()
        if begun:
            on, number = self._streams[call.number]
            on.send(number, raw)
        elif connection is not None:
            self.counts.begun.add(call.number)
            self._streams[call.number] = connection, connection.open(call.rpc.path, raw, stream)

    def _shown(self, key: bytes, revision: int) -> None:
        self._translation.shown(key, revision)

    def _keep_alive(
        self, line: Line, call: Call, request: pb.LeaseKeepAliveRequest, due_us: int
    ) -> None:
        connection = line.connection
        sending = self._calls.sending(call, request, line.number, due_us)
        if connection is None or not request.ID:
            self.counts.unsent[call.number] = NO_LEASE if connection is not None else NO_CONNECTION
            return
        self.counts.begun.add(call.number)
        self._pending += 1
        raw = request.SerializeToString()
        leases = self._leases.get(call.number)
        if leases is None or leases.over:
            leases = self._leases[call.number] = Leases(self, connection)
            leases.sent.append(sending)
            number = connection.open(call.rpc.path, raw, leases)
            self._streams[call.number] = connection, number
        else:
            leases.sent.append(sending)
            on, number = self._streams[call.number]
            on.send(number, raw)


def _name(call: Call, stream: WatchStream | None, cancel: pb.WatchCancelRequest) -> bool:
    """Name the watch to cancel as the server does; False: there is none."""
    if stream is None or cancel.watch_id not in call.created:
        return False
    made = stream.created(call.created.index(cancel.watch_id))
    if made is None or not made.done() or made.cancelled():
        return False
    cancel.watch_id = made.result()
    return True
