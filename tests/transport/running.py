"""A server under test, in the test's own event loop."""

import asyncio
import gc
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvstore.transport.api import CallObserver
from kvstore.transport.connection import Http2Connection
from kvstore.transport.limits import Limits
from kvstore.transport.server import Server
from kvstore.transport.tls import Tls
from tests.transport.limits import TEST_LIMITS
from tests.transport.peer import PATIENCE
from tests.transport.service import Service


@dataclass
class Running:
    """A server, its service and what it reported."""

    server: Server
    service: Service
    port: int
    failures: list[str] = field(default_factory=list)
    handshakes: list[tuple[str, Exception]] = field(default_factory=list)
    """Those that failed: peer and error."""

    @property
    def connection(self) -> Http2Connection:
        """The only connection there is."""
        (connection,) = self.server._connections
        assert isinstance(connection, Http2Connection)
        return connection


def bound() -> socket.socket:
    """A socket on a free port."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.bind(("127.0.0.1", 0))
    return sock


@asynccontextmanager
async def serving(
    limits: Limits = TEST_LIMITS,
    *,
    tls: Tls | None = None,
    http1_only: bool = False,
    observer: CallObserver | None = None,
    expect_failures: bool = False,
) -> AsyncIterator[Running]:
    """A server with the test service; it must stop cleanly and hold nothing afterwards."""
    service = Service()
    failures: list[str] = []
    handshakes: list[tuple[str, Exception]] = []
    server = Server(
        methods=service.methods(),
        http_handler=service.handle_http,
        limits=limits,
        clock=time.monotonic,
        wall=time.time,
        on_failure=lambda what, error: failures.append(f"{what}: {error!r}"),
        observer=observer,
        on_handshake_failed=lambda peer, error: handshakes.append((peer, error)),
    )
    sock = bound()
    port = sock.getsockname()[1]
    server.listen(sock, tls=tls, http1_only=http1_only)
    try:
        yield Running(server, service, port, failures, handshakes)
    finally:
        await server.drain(0.0, message="server stopped")
    assert bool(failures) == expect_failures, failures
    stats = server.stats()
    assert (stats.connections, stats.calls, stats.request_bytes, stats.output_bytes) == (0, 0, 0, 0)


@asynccontextmanager
async def draining(running: Running, grace: float = 10.0) -> AsyncIterator[None]:
    """The server drains meanwhile, and has done so at the end; it is stopped by an exception."""
    task = asyncio.create_task(running.server.drain(grace, message="etcdserver: server stopped"))
    try:
        await asyncio.sleep(0)  # it has begun
        yield
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until something has become true."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


def living(*kinds: str) -> list[object]:
    """Objects of our classes that are alive, by their names; nothing is collected for it."""
    return [thing for thing in gc.get_objects() if type(thing).__name__ in kinds]
