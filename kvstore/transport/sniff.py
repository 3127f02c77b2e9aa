"""The first bytes of a connection say what it speaks.

HTTP/2 begins with a preface of 24 bytes (RFC 9113 section 3.4), which no HTTP/1.1 request has.
The bytes are held until they differ from the preface or are all of it.
"""

import asyncio
from typing import cast

from kvstore.transport.connection import Http2Connection
from kvstore.transport.frames import PREFACE
from kvstore.transport.host import Host, peer_name
from kvstore.transport.http1 import Http1Connection


class Sniffer(asyncio.Protocol):
    """A connection that has not said yet what it speaks."""

    waiting = 0
    calls = 0

    def __init__(self, host: Host, *, http1_only: bool) -> None:
        self._host = host
        self._http1_only = http1_only
        self._transport: asyncio.Transport | None = None
        self._seen = b""
        self.peer = ""
        self._made_at = host.clock()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first bytes."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass
        self.peer = peer_name(transport.get_extra_info("peername"))
        self._host.opened(self)

    def data_received(self, data: bytes) -> None:
        """Decide, or wait for more."""
        transport = self._transport
        assert transport is not None
        try:
            self._decide(transport, data)
        except Exception as error:  # noqa: BLE001 - a bug costs one connection, not all
            self._host.failed("connection failed", error)
            transport.abort()
            self._host.closed(self)

    def _decide(self, transport: asyncio.Transport, data: bytes) -> None:
        seen = self._seen = self._seen + data
        peer = self.peer
        if self._http1_only or not PREFACE.startswith(seen[: len(PREFACE)]):
            self._become(transport, Http1Connection(self._host, peer), seen)
        elif len(seen) >= len(PREFACE):
            self._become(transport, Http2Connection(self._host, peer), seen[len(PREFACE) :])

    def _become(
        self, transport: asyncio.Transport, protocol: asyncio.Protocol, data: bytes
    ) -> None:
        """Hand the connection over."""
        self._transport = None
        self._seen = b""
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        self._host.closed(self)
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

    def drain(self, code: int, message: str) -> None:
        """Nothing is under way."""
        self.abort()

    def close(self) -> None:
        """Likewise."""
        self.abort()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()
