"""Both clients, lean and grpcio, against both servers, ours and grpcio: one behaviour."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc
import pytest

from bench.client.connection import SMALL_WINDOW_BYTES, WINDOW_BYTES, Connection
from bench.client.grpcio import GrpcioConnection
from bench.clock import now_us
from tests.bench.client.far import Answer, Taking
from tests.transport.peer import PATIENCE
from tests.transport.running import eventually, serving
from tests.transport.service import PATH

LONG_US = 20_000_000


@asynccontextmanager
async def ours() -> AsyncIterator[tuple[int, Callable[[], Awaitable[None]]]]:
    """Our transport with its test service; and how to cut it off."""
    async with serving() as running:

        async def cut() -> None:
            await running.server.drain(0.0, message="server stopped")

        yield running.port, cut


class _Echoing(grpc.GenericRpcHandler):
    """The part of the test service that these tests use, by grpcio."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """By the last part of the path."""
        name = details.method.rpartition("/")[2]
        if name == "Chat":
            return grpc.stream_stream_rpc_method_handler(lambda messages, _: messages)
        methods = {"Never": self._never, "Fail": _fail}
        return grpc.unary_unary_rpc_method_handler(methods.get(name, lambda message, _: message))

    def _never(self, message: bytes, _: object) -> bytes:
        self.over.wait(PATIENCE)
        return message


def _fail(message: bytes, context: "grpc.ServicerContext") -> bytes:
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, message.decode().partition(" ")[2])


@asynccontextmanager
async def grpcio() -> AsyncIterator[tuple[int, Callable[[], Awaitable[None]]]]:
    """A grpcio server; and how to cut it off."""
    handler = _Echoing()
    with ThreadPoolExecutor(8) as threads:
        options = [("grpc.max_receive_message_length", -1)]
        server = grpc.server(threads, handlers=[handler], options=options)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()

        async def cut() -> None:
            await asyncio.to_thread(server.stop(None).wait)

        try:
            yield port, cut
        finally:
            handler.over.set()
            await cut()


@pytest.fixture(scope="module")
def anyio_backend() -> object:
    """One loop for all: grpc.aio tells calls that were given up to whichever loop is there."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="module", autouse=True)
async def _loop() -> AsyncIterator[None]:
    """Keeps the loop, and leaves nothing behind for others."""
    yield
    gc.collect()
    await asyncio.sleep(0.5)


Serving = Callable[[], AbstractAsyncContextManager[tuple[int, Callable[[], Awaitable[None]]]]]
Making = type[Connection] | type[GrpcioConnection]


class Talk:
    """A connection with what it was told."""

    def __init__(self, make: Making, port: int, window_bytes: int) -> None:
        self.told: list[str] = []
        self.connection = make(
            f"127.0.0.1:{port}",
            lambda: self.told.append("ready"),
            lambda: self.told.append("lost"),
            window_bytes=window_bytes,
        )
        self.answers: dict[str, list[Answer]] = {}

    def call(self, name: str, body: bytes, timeout_us: int = LONG_US) -> list[Answer]:
        """A call of a method; its answers."""
        answers: list[Answer] = []

        def answered(code: int, raw: bytes, text: str) -> None:
            answers.append((code, raw, text))

        self.connection.call((PATH + name).encode(), body, answered, timeout_us)
        return answers

    async def answer(self, name: str, body: bytes, timeout_us: int = LONG_US) -> Answer:
        """The answer of a call."""
        answers = self.call(name, body, timeout_us)
        await eventually(lambda: bool(answers))
        assert len(answers) == 1
        return answers[0]


@asynccontextmanager
async def talking(
    make: Making, serve: Serving, window_bytes: int = WINDOW_BYTES
) -> AsyncIterator[tuple[Talk, Callable[[], Awaitable[None]]]]:
    """A connection that is ready; it is closed at the end, and told of everything once."""
    async with serve() as (port, cut), asyncio.TaskGroup() as group:
        talk = Talk(make, port, window_bytes)
        await talk.connection.connect("127.0.0.1", port, group)
        await eventually(lambda: talk.connection.usable)
        yield talk, cut
        talk.connection.close()
        await eventually(lambda: talk.connection.lost)
        assert ["ready", "lost"] == talk.told
        assert talk.connection.calls == 0


both = pytest.mark.parametrize("make", [Connection, GrpcioConnection], ids=["lean", "grpcio"])
servers = pytest.mark.parametrize("serve", [ours, grpcio], ids=["ours", "by-grpcio"])
pytestmark = pytest.mark.slow


@both
@servers
async def test_calls(make: Making, serve: Serving) -> None:
    """Answers, refusals with their texts, large messages both ways."""
    async with talking(make, serve) as (talk, _):
        assert (0, b"hello", "") == await talk.answer("Echo", b"hello")
        assert (0, b"", "") == await talk.answer("Echo", b"")
        large = bytes(range(256)) * 5000
        assert (0, large, "") == await talk.answer("Echo", large)
        assert (9, b"", "naïve %") == await talk.answer("Fail", "fail naïve %".encode())
        assert talk.connection.received_us <= now_us()


@both
@servers
async def test_many_at_once(make: Making, serve: Serving) -> None:
    """Every call of many gets its own answer."""
    async with talking(make, serve) as (talk, _):
        calls = [talk.call("Echo", b"%d" % n) for n in range(300)]
        await eventually(lambda: all(calls))
        assert [[(0, b"%d" % n, "")] for n in range(300)] == calls


@both
@servers
async def test_timeouts(make: Making, serve: Serving) -> None:
    """A call that is not answered ends by its time, once, whoever notices first."""
    async with talking(make, serve) as (talk, _):
        code, _, _ = await talk.answer("Never", b"", 50_000)
        assert code == 4
        answers = talk.call("Never", b"", 10_000_000)
        talk.connection.expire(now_us() + 20_000_000)
        assert [4] == [code for code, _, _ in answers]
        assert (0, b"on", "") == await talk.answer("Echo", b"on")
        assert len(answers) == 1


@both
@servers
async def test_streams(make: Making, serve: Serving) -> None:
    """Messages of a stream come whole and in order; given up, its sink is told once."""
    sizes = [1, 0, 70_000, 5, 200_000]
    async with talking(make, serve) as (talk, _):
        sink = Taking()
        stream = talk.connection.open((PATH + "Chat").encode(), b"first", sink)
        for size in sizes:
            talk.connection.send(stream, bytes(size))
        await eventually(lambda: [5, *sizes] == list(map(len, sink.messages)))
        talk.connection.cancel(stream)
        talk.connection.send(stream, b"too late")
        assert [(1, "cancelled by the client")] == sink.ends
        assert (0, b"on", "") == await talk.answer("Echo", b"on")
        assert 1 == len(sink.ends)


@both
@servers
async def test_stream_that_the_client_ends(make: Making, serve: Serving) -> None:
    """A stream whose only message is its last ends with the server's status."""
    async with talking(make, serve) as (talk, _):
        sink = Taking()
        talk.connection.open((PATH + "Chat").encode(), b"only", sink, end=True)
        await eventually(lambda: bool(sink.ends))
        assert ([b"only"], [(0, "")]) == (sink.messages, sink.ends)


@both
@servers
async def test_slow_stream(make: Making, serve: Serving) -> None:
    """A sink that grants nothing is not given much; it gets the rest when it does."""
    async with talking(make, serve, SMALL_WINDOW_BYTES) as (talk, _):
        sink = Taking()
        stream = talk.connection.open((PATH + "Chat").encode(), b"", sink)
        for _ in range(20):
            talk.connection.send(stream, bytes(30_000))
        await eventually(lambda: len(sink.messages) >= 3)
        await talk.answer("Echo", b"x")
        assert len(sink.messages) <= 4
        read = 0
        while len(sink.messages) < 21:
            await eventually(lambda: len(sink.messages) > read)  # noqa: B023 - awaited here
            talk.connection.grant(stream, len(sink.messages[read]) + 5)
            read += 1


@both
@servers
async def test_lost(make: Making, serve: Serving) -> None:
    """When the server goes away calls and streams end once, as Unavailable."""
    async with talking(make, serve) as (talk, cut):
        sink = Taking()
        talk.connection.open((PATH + "Chat").encode(), b"", sink)
        answers = talk.call("Never", b"")
        await eventually(lambda: len(sink.messages) == 1)
        await cut()
        await eventually(lambda: talk.connection.lost and bool(answers) and bool(sink.ends))
        assert [14] == [code for code, _, _ in answers]
        assert [14] == [code for code, _ in sink.ends]
        assert not talk.connection.usable


@both
@servers
async def test_close(make: Making, serve: Serving) -> None:
    """Closed from this side, calls and streams end once, as Unavailable."""
    async with talking(make, serve) as (talk, _):
        sink = Taking()
        talk.connection.open((PATH + "Chat").encode(), b"", sink)
        answers = talk.call("Never", b"")
        talk.connection.close()
        assert not talk.connection.usable
        await eventually(lambda: bool(answers) and bool(sink.ends))
        assert ([14], [14]) == ([c for c, _, _ in answers], [c for c, _ in sink.ends])


@both
async def test_nobody_listens(make: Making) -> None:
    """A connection that cannot be made is an error of the system, and is told to nobody."""
    async with grpcio() as (port, cut), asyncio.TaskGroup() as group:
        await cut()
        talk = Talk(make, port, WINDOW_BYTES)
        with pytest.raises(OSError, match=r".+"):
            await talk.connection.connect("127.0.0.1", port, group)
        assert ([], False) == (talk.told, talk.connection.usable)
