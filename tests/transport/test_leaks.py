"""What is over is freed at once, by counting references: the collector is run by others, rarely."""

import asyncio
import gc

import pytest
from hyperframe.frame import RstStreamFrame, SettingsFrame

from tests.transport.peer import connected
from tests.transport.running import eventually, living, serving
from tests.transport.service import PATH

CALLS = ("UnaryCall", "StreamCall", "Transfer", "Outbox", "Inbox", "Chat", "Count", "Tap")
CONNECTIONS = ("Http2Connection", "Streams", "Output", "Blocks", "Sniffer", "Http1Connection")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The loop of production; debug mode keeps more alive."""
    return ("asyncio", {"use_uvloop": True})


async def test_calls_and_connections_are_freed_without_the_collector() -> None:
    """Calls that were answered, refused, reset or lost, and their connections, leave no cycles."""
    gc.collect()
    held = living(*CALLS, *CONNECTIONS)  # by other tests, whose failures and fuzzers keep some
    before = set(map(id, held))
    gc.disable()
    try:
        async with serving() as running:
            settings = {SettingsFrame.INITIAL_WINDOW_SIZE: 1000}
            async with connected(running.port, settings=settings) as peer:
                for name in ("Echo", "Later", "Twice", "Nothing"):
                    await peer.call(PATH + name, b"x")
                await peer.call(PATH + "Fail", b"fail x")
                await peer.call(PATH + "Size", b"50000")
                await peer.call(PATH + "Parts", b"50 1000")
                await peer.call(PATH + "Count", b"10 1000")
                await peer.answer(peer.start(PATH + "Chat", b"x"))
                reset = [peer.start(PATH + name, b"50000") for name in ("Never", "Size", "Chat")]
                await eventually(lambda: bool(running.service.parked))
                peer.send(*(RstStreamFrame(sid, 8) for sid in reset))
                await peer.settle()
                assert [x for x in living(*CALLS) if id(x) not in before] == []
                peer.start(PATH + "Never", b"x")
                peer.start(PATH + "Chat")
                peer.start(PATH + "Size", b"50000")
                await peer.settle()
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            await reader.read()
            writer.close()
            await eventually(lambda: running.server.stats().connections == 0)
            del peer
            await asyncio.sleep(0)
            assert [x for x in living(*CALLS, *CONNECTIONS) if id(x) not in before] == []
    finally:
        gc.enable()
