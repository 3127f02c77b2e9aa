"""The lean client's twin over grpc.aio, for ``--client grpcio``: does the lean one measure right?

Its calls cost five times as much, so it is for rates at which that does not matter: latencies of
both clients must then differ by no more than that cost. What grpcio does not offer is missing: a
connection cannot be ended by RST, and a stream that is read slowly is one whose messages are not
taken, which its window follows only roughly.

As with the lean client, a connection is made, used and lost once.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import count

import grpc

from bench.client.connection import SMALL_WINDOW_BYTES, WINDOW_BYTES, Answered, Sink
from bench.clock import now_us

_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a TCP connection of its own
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)
_CANCELLED, _DEADLINE_EXCEEDED, _UNAVAILABLE = 1, 4, 14
_PREFIX_BYTES = 5


class _Exchange:
    """One call or stream that is not over."""

    __slots__ = ("answered", "cancel", "deadline_us", "granted", "outgoing", "sink", "unread")

    def __init__(self, answered: Answered | None, sink: Sink | None, deadline_us: int) -> None:
        self.answered = answered
        self.sink = sink
        self.deadline_us = deadline_us
        self.cancel: Callable[[], object] = lambda: None
        self.outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()
        """Messages to send; None ends them. Its sender asks for progress a few times a second."""
        self.unread = 0
        """Bytes that a slow sink was given and has not granted again."""
        self.granted = asyncio.Event()


class GrpcioConnection:
    """See ``bench.client.connection.Connection``."""

    def __init__(
        self,
        authority: str,
        on_ready: Callable[[], None],
        on_lost: Callable[[], None],
        *,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._window_bytes = window_bytes
        self._channel = grpc.aio.insecure_channel(
            authority, options=[*_OPTIONS, ("grpc.http2.lookahead_bytes", window_bytes)]
        )
        self._unary: dict[bytes, grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]] = {}
        self._exchanges: dict[int, _Exchange] = {}
        self._numbers = count(1)
        self._group: asyncio.TaskGroup | None = None
        self._following: asyncio.Task[None] | None = None
        self._ready = self._closing = False
        self.received_us = 0
        self.lost = False

    async def connect(self, host: str, port: int, group: asyncio.TaskGroup) -> None:
        """Raises ``OSError`` if nobody listens; tasks of the connection are the group's."""
        self._group = group
        state = self._channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                await self._channel.close()
                raise ConnectionRefusedError(f"{host}:{port}")
            await self._channel.wait_for_state_change(state)
            state = self._channel.get_state()
        self._following = group.create_task(self._follow())
        self._ready = True
        self._on_ready()

    async def _follow(self) -> None:
        """Note when the connection is lost."""
        await self._channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        self._closing = True
        await self._channel.close()
        self._lose()

    def _lose(self) -> None:
        if self.lost:
            return
        self.lost = True
        for number in list(self._exchanges):
            self._end(number, _UNAVAILABLE, "connection lost")
        self._on_lost()

    @property
    def usable(self) -> bool:
        """It is connected, and nobody has said goodbye."""
        return self._ready and not self._closing

    @property
    def calls(self) -> int:
        """Exchanges in progress."""
        return len(self._exchanges)

    def call(self, path: bytes, message: bytes, answered: Answered, timeout_us: int) -> None:
        """Send a unary call; ``answered`` is called once, whatever happens. Needs ``usable``."""
        assert self._group is not None
        method = self._unary.get(path)
        if method is None:
            method = self._unary[path] = self._channel.unary_unary(path.decode())
        call = method(message, timeout=timeout_us / 1e6)
        number = next(self._numbers)
        exchange = self._exchanges[number] = _Exchange(answered, None, now_us() + timeout_us)
        exchange.cancel = call.cancel
        self._group.create_task(self._ask(number, call))

    async def _ask(self, number: int, call: "grpc.aio.UnaryUnaryCall[bytes, bytes]") -> None:
        try:
            message = await call
        except grpc.aio.AioRpcError as error:
            self._end(number, error.code().value[0], error.details() or "")
        except asyncio.CancelledError:
            self._end(number, _UNAVAILABLE, "connection lost")
            raise
        else:
            self._end(number, 0, "", message)

    def open(
        self, path: bytes, message: bytes, sink: Sink, *, end: bool = False, timeout_us: int = 0
    ) -> int:
        """Begin a stream with its first message; gives its number. Needs ``usable``."""
        assert self._group is not None
        number = next(self._numbers)
        exchange = self._exchanges[number] = _Exchange(None, sink, 0)
        if timeout_us:
            exchange.deadline_us = now_us() + timeout_us
        exchange.outgoing.put_nowait(message)
        if end:
            exchange.outgoing.put_nowait(None)
        method: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        method = self._channel.stream_stream(path.decode())
        call = method(_messages(exchange), timeout=timeout_us / 1e6 if timeout_us else None)
        exchange.cancel = call.cancel
        self._group.create_task(self._read(number, exchange, sink, call))
        return number

    async def _read(
        self,
        number: int,
        exchange: _Exchange,
        sink: Sink,
        call: "grpc.aio.StreamStreamCall[bytes, bytes]",
    ) -> None:
        """Give a stream's messages to its sink, no faster than it grants credit."""
        slow = self._window_bytes <= SMALL_WINDOW_BYTES
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                assert isinstance(message, bytes)
                if number not in self._exchanges:
                    return
                self.received_us = now_us()
                exchange.unread += len(message) + _PREFIX_BYTES
                sink.message(message, self.received_us)
                while slow and exchange.unread >= self._window_bytes:
                    exchange.granted.clear()
                    await exchange.granted.wait()
            code = await call.code()
            self._end(number, code.value[0], await call.details() or "")
        except grpc.aio.AioRpcError as error:
            self._end(number, error.code().value[0], error.details() or "")
        except asyncio.CancelledError:
            self._end(number, _UNAVAILABLE, "connection lost")
            raise

    def send(self, stream: int, message: bytes) -> None:
        """One more message of a stream; nothing if it is over."""
        exchange = self._exchanges.get(stream)
        if exchange is not None:
            exchange.outgoing.put_nowait(message)

    def grant(self, stream: int, size: int) -> None:
        """A sink that reads slowly has read so much."""
        exchange = self._exchanges.get(stream)
        if exchange is not None:
            exchange.unread -= size
            exchange.granted.set()

    def cancel(self, stream: int) -> None:
        """Give a stream up; its sink is told that it was cancelled."""
        self._give_up(stream, _CANCELLED, "cancelled by the client")

    def expire(self, now: int) -> None:
        """End the calls whose time is up; grpcio does so by itself, a little earlier or later."""
        for number, exchange in list(self._exchanges.items()):
            if exchange.deadline_us and exchange.deadline_us <= now:
                self._give_up(number, _DEADLINE_EXCEEDED, "the benchmark's timeout")

    def _give_up(self, number: int, code: int, text: str) -> None:
        exchange = self._exchanges.get(number)
        if exchange is not None:
            self._end(number, code, text)
            exchange.cancel()

    def _end(self, number: int, code: int, text: str, message: bytes = b"") -> None:
        """An exchange is over, if it is not already."""
        exchange = self._exchanges.pop(number, None)
        if exchange is None:
            return
        self.received_us = now_us()
        exchange.outgoing.put_nowait(None)
        exchange.granted.set()
        if exchange.answered is not None:
            exchange.answered(code, message, text)
        elif exchange.sink is not None:
            exchange.sink.ended(code, text)

    def close(self, *, reset: bool = False) -> None:
        """End the connection."""
        if self._closing or self._group is None:
            return
        self._closing = True
        self._group.create_task(self._shut())

    async def _shut(self) -> None:
        if self._following is not None:
            self._following.cancel()
        await self._channel.close()
        self._lose()


async def _messages(exchange: _Exchange) -> AsyncIterator[bytes]:
    """What a stream sends, until it is over."""
    while (message := await exchange.outgoing.get()) is not None:
        yield message
