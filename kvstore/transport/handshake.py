"""A connection during its TLS handshake.

The event loop offers the handshake as a coroutine, so each handshake is a task; the server owns it,
bounds its time, and ends it when it stops.
Nothing is read before the handshake begins.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from kvstore.transport.streams import Connection


class Doorkeeper(Protocol):
    """The server, as a connection in its handshake sees it."""

    def opened(self, connection: Connection, /) -> None:
        """One more connection."""

    def closed(self, connection: Connection, /) -> None:
        """The connection is gone, or has become another."""


class Door(asyncio.Protocol):
    """Stands for a connection until it can be read."""

    waiting = 0
    calls = 0

    def __init__(self, host: Doorkeeper, begin: Callable[["Door"], None]) -> None:
        self._host = host
        self._begin = begin
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Have the handshake begun."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass
        self.transport.pause_reading()
        self._host.opened(self)
        self._begin(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Gone before the handshake began."""
        self.transport = None
        self._host.closed(self)

    def passed(self) -> None:
        """The handshake is over, well or badly: another protocol has the connection, or nobody."""
        self.transport = None
        self._host.closed(self)

    def tick(self, now: float) -> None:
        """The handshake has its own time limit."""

    def drain(self, code: int, message: str) -> None:
        """Nothing is under way."""
        self.abort()

    def close(self) -> None:
        """Likewise."""
        self.abort()

    def abort(self) -> None:
        """Close at once."""
        if self.transport is not None:
            self.transport.abort()
