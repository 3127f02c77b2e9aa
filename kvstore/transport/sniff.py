"""The first bytes of a connection say what it speaks.

HTTP/2 begins with a preface of 24 bytes (RFC 9113 section 3.4), which no HTTP/1.1 request has.
The bytes are held until they differ from the preface or are all of it.
"""

import asyncio
from collections.abc import Callable
from typing import cast

from kvstore.transport.frames import PREFACE
from kvstore.transport.streams import Host

Maker = Callable[[], asyncio.Protocol]


class Sniffer(asyncio.Protocol):
    """A connection that has not said yet what it speaks."""

    def __init__(self, host: Host, *, http2: Maker, http1: Maker) -> None:
        self._host = host
        self._http2 = http2
        self._http1 = http1
        self._transport: asyncio.Transport | None = None
        self._seen = b""
        self._made_at = host.clock()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first bytes."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass

    def data_received(self, data: bytes) -> None:
        """Decide, or wait for more."""
        seen = self._seen = self._seen + data
        if len(seen) < len(PREFACE) and PREFACE.startswith(seen):
            return
        if seen.startswith(PREFACE):
            self._become(self._http2(), seen[len(PREFACE) :])
        else:
            self._become(self._http1(), seen)

    def _become(self, protocol: asyncio.Protocol, data: bytes) -> None:
        """Hand the connection over."""
        transport = self._transport
        assert transport is not None
        self._transport = None
        self._seen = b""
        self._host.closed(self)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if data:
            protocol.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Gone before it said anything."""
        self._transport = None
        self._host.closed(self)

    def tick(self, now: float) -> None:
        """Close a connection that says nothing."""
        if now - self._made_at > self._host.limits.preface_timeout:
            self._host.refused("preface_timeout")
            self.abort()

    def drain(self) -> None:
        """Nothing is under way."""
        self.abort()

    def close(self) -> None:
        """Likewise."""
        self.abort()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()
