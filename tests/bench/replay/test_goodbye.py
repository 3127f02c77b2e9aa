"""A server that says goodbye finishes what it has accepted, while new calls go elsewhere."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hyperframe.frame import GoAwayFrame

from bench.client.connection import Connection
from bench.replay.player import Line
from bench.replay.proxy import Address, Upstream
from tests.bench.client.far import PATH, Far, Taking
from tests.transport.peer import message
from tests.transport.running import eventually


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[int, list[Far]]]:
    """A server with as many connections as are wanted; gives its port, and them."""
    made: list[Far] = []

    def far() -> Far:
        made.append(Far({}, renew=True))
        return made[-1]

    server = await asyncio.get_running_loop().create_server(far, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], made
    finally:
        for one in made:
            one.transport.abort()
        server.close()


async def given(upstream: Upstream) -> Connection:
    """The connection for a call that begins now."""
    found: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
    upstream.use(found.set_result)
    connection = await found
    assert connection is not None
    return connection


async def test_a_client_of_the_proxy_goes_on_elsewhere() -> None:
    """The call that was accepted is answered, its stream goes on, the next has a new connection."""
    async with listening() as (port, made), asyncio.TaskGroup() as group:
        upstream = Upstream(0, Address("127.0.0.1", port), group, lambda _: None)
        old = await given(upstream)
        sink = Taking()
        stream = old.open(PATH, b"", sink)
        await eventually(lambda: stream in made[0].headers)
        made[0].frame(GoAwayFrame(0, last_stream_id=stream))
        await eventually(lambda: not old.usable)
        new = await given(upstream)
        assert new is not old
        made[0].begin(stream)
        made[0].data(stream, message(b"shown"))
        await eventually(lambda: sink.messages == [b"shown"])
        made[0].end(stream)
        await eventually(lambda: old.lost)
        assert sink.ends == [(0, "")]
        assert new.usable
        upstream.close()
        await eventually(lambda: new.lost)


async def test_a_replayed_client_goes_on_elsewhere() -> None:
    """Likewise; calls on both connections are still the replay's to time out and to close."""
    async with listening() as (port, made):
        line = Line("127.0.0.1", port)
        assert await line.connect(0)
        old = line.connection
        assert old is not None
        stream = old.open(PATH, b"", Taking())
        await eventually(lambda: stream in made[0].headers)
        made[0].frame(GoAwayFrame(0, last_stream_id=stream))
        await eventually(lambda: line.connection is None)
        assert await line.connect(1)
        assert line.connection is not old
        assert line.open() == [old, line.connection]
        for connection in line.open():
            connection.close()
        await eventually(lambda: not line.open())
