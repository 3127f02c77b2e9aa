"""Our transport and grpcio's server, seen by the same client: handlers cannot tell, nor can it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc
import pytest

from kvstore.transport.grpcio_server import GrpcioServer
from tests.transport.limits import TEST_LIMITS
from tests.transport.peer import PATIENCE
from tests.transport.running import eventually, serving
from tests.transport.service import PATH, Service

RAW = {"request_serializer": bytes, "response_deserializer": bytes}
Seen = list[object]
Ends = list[tuple[bytes, int]]


@asynccontextmanager
async def ours(observed: Ends) -> AsyncIterator[tuple[Service, int]]:
    """Our server."""
    async with serving(
        observer=lambda path, code, _: observed.append((path, code)), expect_failures=True
    ) as running:
        yield running.service, running.port


@asynccontextmanager
async def theirs(observed: Ends) -> AsyncIterator[tuple[Service, int]]:
    """Grpcio's server."""
    service = Service()
    failures: list[str] = []
    server = GrpcioServer(
        methods=service.methods(),
        limits=TEST_LIMITS,
        clock=time.monotonic,
        on_failure=lambda what, _: failures.append(what),
        observer=lambda path, code, _: observed.append((path, code)),
    )
    port = await server.listen("127.0.0.1:0")
    await server.start()
    try:
        yield service, port
    finally:
        await server.drain(0.0, message="stopped")
    assert failures


Serving = Callable[[Ends], AbstractAsyncContextManager[tuple[Service, int]]]


def outcome(call: Callable[[], object]) -> object:
    """What a call gives, or its status."""
    try:
        return call()
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return error.code()  # the text is of whoever was first to see it, client or server
        return error.code(), error.details()


def conversation(port: int) -> Seen:
    """Everything that a client can ask for, with what it saw."""
    seen: Seen = []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:

        def unary(name: str, body: bytes, timeout: float = PATIENCE) -> None:
            method = channel.unary_unary(PATH + name, **RAW)
            metadata = (("token", "abc"), ("twice", "a"), ("twice", "b"), ("x-bin", b"\0\1"))
            seen.append(outcome(lambda: method(body, timeout=timeout, metadata=metadata)))

        for body in (b"", b"hello", b"x" * 1_000_000):
            unary("Echo", body)
            unary("Later", body)
        unary("Size", b"3000000")
        unary("Parts", b"500 1100")
        for how in ("raise", "fail", "crash"):
            unary("Fail", f"{how} text, 100 %, naïve".encode())
        unary("Twice", b"")
        for name in (b"token", b"twice", b"x-bin", b"missing"):
            unary("Metadata", name)
        unary("Never", b"", timeout=0.2)
        count = channel.unary_stream(PATH + "Count", **RAW)
        for body in (b"0 0", b"1 0", b"200 5000"):
            seen.append(outcome(lambda body=body: list(count(body, timeout=PATIENCE))))  # type: ignore[misc]
        chat = channel.stream_stream(PATH + "Chat", **RAW)
        for sent in ([], [b""], [b"%d" % i * 1000 for i in range(100)]):
            seen.append(outcome(lambda sent=sent: list(chat(iter(sent), timeout=PATIENCE))))  # type: ignore[misc]
        closed = channel.stream_stream(PATH + "Closed", **RAW)
        seen.append(outcome(lambda: list(closed(iter([]), timeout=PATIENCE))))
        tap = channel.stream_stream(PATH + "Tap", **RAW)
        for last in (b"refuse", b"crash"):
            sent = [b"one", last]
            seen.append(outcome(lambda sent=sent: list(tap(iter(sent), timeout=PATIENCE))))  # type: ignore[misc]
    return seen


async def converse(serving_with: Serving) -> tuple[Seen, Seen, Seen]:
    """What the client saw, what the sinks saw, and what the observer was told."""
    observed: Ends = []
    async with serving_with(observed) as (service, port):
        seen = await asyncio.to_thread(conversation, port)
        await eventually(lambda: all(tap.events[-1:] == ["closed"] for tap in service.taps))
        await eventually(lambda: service.cancelled == 1)
        await eventually(lambda: len(observed) == len(seen))
        sinks: Seen = [tap.events for tap in service.taps]
    # Who is first to see a deadline pass, client or server, is chance, and so is when.
    expired = (PATH.encode() + b"Never", 4)
    ends = sorted((expired[0], 1) if end == expired else end for end in observed)
    return seen, sinks, [*ends]


async def test_same_conversation() -> None:
    """Answers, statuses, what sinks are told and what is observed are the same."""
    one, other = await converse(ours), await converse(theirs)
    for mine, reference in zip(one, other, strict=True):
        assert len(mine) == len(reference)
        for a, b in zip(mine, reference, strict=True):
            assert a == b


@pytest.mark.parametrize("serving_with", [ours, theirs])
async def test_cancelled_stream(serving_with: Serving) -> None:
    """A client that cancels closes the sink, in either server."""
    async with serving_with([]) as (service, port):
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")

        def work() -> None:
            assert outcome(lambda: channel.unary_unary(PATH + "Fail", **RAW)(b"crash x")) == (
                grpc.StatusCode.INTERNAL,
                "internal error",
            )

            def requests() -> Iterator[bytes]:
                yield b"one"
                time.sleep(0.05)

            call = channel.stream_stream(PATH + "Tap", **RAW)(requests())
            time.sleep(0.2)
            call.cancel()

        with channel:
            await asyncio.to_thread(work)
            await eventually(lambda: [tap.events[-1:] for tap in service.taps] == [["closed"]])
            assert service.taps[0].events[0] == b"one"
