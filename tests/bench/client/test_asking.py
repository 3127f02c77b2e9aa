"""Single calls before and after the load, and what is said of servers that are none."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bench.client import requests
from bench.client.asking import AskError, Asking, reach
from bench.run.ceiling import measure
from tests.bench.drive.world import World, living
from tests.bench.fake_etcd import FakeEtcd
from tests.transport.running import bound

KEYS = [b"/a/%d" % n for n in range(5)]


@asynccontextmanager
async def asking(world: World) -> AsyncIterator[Asking]:
    """A connection of its own to a world's store."""
    made = await reach(world.site.host, world.site.port, 0)
    try:
        yield made
    finally:
        made.close()


async def test_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version, count and contents, in pages of one revision, of a prefix or of everything."""
    monkeypatch.setattr("bench.client.asking._PAGE", 2)
    async with living() as world, asking(world) as made:
        for key in [*KEYS, b"/b"]:
            world.store.put(key, b"{}")
        world.store.after_range = lambda: world.store.put(b"/a/4", b"new")
        head = world.store.revision
        assert "3.6.0-fake" == await made.version()
        revision, found = await made.objects(b"/a/")
        assert (head, KEYS) == (revision, [kv.key for kv in found])
        assert b"{}" == found[4].value
        assert (6, world.store.revision) == await made.count(b"")
        assert 5 == (await made.count(b"/a/"))[0]
        assert [] == (await made.objects(b"/none"))[1]


async def test_a_refusal_is_an_error() -> None:
    """A call that ends with an error raises its code and text."""
    async with living() as world, asking(world) as made:
        world.store.refusals[requests.STATUS].append((7, "permission denied"))
        with pytest.raises(AskError, match="permission denied") as refused:
            await made.version()
        assert 7 == refused.value.code
        made.close()
        with pytest.raises(AskError, match="connection lost") as lost:
            await made.version()
        assert 14 == lost.value.code


async def test_leaving_waits_for_the_end() -> None:
    """Who has left has no connection any more, and may do so again."""
    async with living() as world:
        made = await reach(world.site.host, world.site.port, 0)
        await made.leave()
        assert made._connection.lost
        await made.leave()


@pytest.mark.parametrize("there", [False, True])
async def test_range_stream(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001 - a parameter
    """A server has RangeStream unless it says that it has not."""
    if not there:
        monkeypatch.setattr("tests.bench.drive.world.Store.methods", FakeEtcd.methods)
    async with living() as world, asking(world) as made:
        assert there == await made.has_range_stream(b"/a")


async def test_range_stream_of_nobody() -> None:
    """A server that goes away says nothing about what it has."""
    async with living() as world, asking(world) as made:
        world.store.after_range = lambda: made._connection.close(reset=True)
        with pytest.raises(AskError) as lost:
            await made.has_range_stream(b"/a")
        assert 14 == lost.value.code


async def test_nobody_listens() -> None:
    """A port without a server is told apart, by the system's words."""
    with bound() as sock:
        port = sock.getsockname()[1]
    with pytest.raises(AskError, match=r"cannot be reached: .*[Cc]onnect"):
        await reach("127.0.0.1", port, 0)


async def test_not_http2() -> None:
    """Somebody who answers in HTTP/1.1 is no server for us."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(AskError, match="does not speak HTTP/2"):
        await reach("127.0.0.1", port, 0)
    server.close()
    await server.wait_closed()


async def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who accepts connections and says nothing is given up."""
    monkeypatch.setattr("bench.client.asking.TIMEOUT", 0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(AskError, match="cannot be reached: no answer"),
    ):
        await reach("127.0.0.1", server.getsockname()[1], 0)


@pytest.mark.slow
async def test_reach_waits_for_a_server_that_starts() -> None:
    """A server that is not there yet, and then refuses a few calls, is reached when it serves."""
    async with living() as world:
        world.store.refusals[requests.STATUS].extend([(14, "etcdserver: not ready")] * 3)
        made = await reach(world.site.host, world.site.port, 10)
        assert "3.6.0-fake" == await made.version()
        made.close()
        assert 5 == len([path for path, _ in world.store.asked if path == requests.STATUS])


@pytest.mark.slow
async def test_ceiling() -> None:
    """The generator's ceiling is measured: calls are answered, and each costs something."""
    ceiling = await measure(0.3)
    assert ceiling.per_second > 500
    assert 5 < ceiling.cpu_us_per_call < 1000
