"""One system call for what one turn of the event loop sends over a connection.

uvloop sends each write at once, and on a loopback that is a third of what a call costs: the kernel
delivers to the server inside it. Answers come in groups, because servers commit in groups, and so
do the calls that follow them.
"""

import asyncio

FRAMES_MAX = 16
"""Joined at most, so that the first does not wait for long."""


class Writer:
    """The sending side of a transport."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._waiting: list[bytes] = []

    def write(self, raw: bytes) -> None:
        """Send at the end of this turn, or with the ``FRAMES_MAX``-th."""
        waiting = self._waiting
        if not waiting:
            self._loop.call_soon(self.flush)
        waiting.append(raw)
        if len(waiting) >= FRAMES_MAX:
            self.flush()

    def flush(self) -> None:
        """Send now; nothing more goes out of a transport that is closing."""
        if self._waiting and not self._transport.is_closing():
            self._transport.write(b"".join(self._waiting))
        self._waiting.clear()

    def close(self) -> None:
        """Send what waits, and end the connection."""
        self.flush()
        self._transport.close()
