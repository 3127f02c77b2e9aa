"""The last second of a connection that we end while the peer still sends.

Closing a socket that holds unread bytes makes the kernel send a reset, and a reset may overtake our
last words (GOAWAY, 413) in the peer's kernel. So what comes is read and forgotten for a moment,
bounded in time by the owner's tick and in bytes here.
"""

import asyncio
from typing import Protocol

SECONDS = 1.0
_BYTES = 1 << 20


class Owner(Protocol):
    """The connection that has said its last words."""

    def connection_lost(self, exc: Exception | None, /) -> None:
        """It is closed."""


class Discard(asyncio.Protocol):
    """Reads and forgets."""

    def __init__(self, owner: Owner, transport: asyncio.Transport) -> None:
        self._owner = owner
        self._transport = transport
        self._room = _BYTES

    def data_received(self, data: bytes) -> None:
        """Forget it; too much of it ends the patience."""
        self._room -= len(data)
        if self._room < 0:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the owner."""
        self._owner.connection_lost(exc)


def linger(owner: Owner, transport: asyncio.Transport) -> None:
    """Stop listening to the peer of ``transport``; ``owner`` aborts it ``SECONDS`` later."""
    transport.set_protocol(Discard(owner, transport))
    transport.resume_reading()
    if transport.can_write_eof():
        transport.write_eof()
