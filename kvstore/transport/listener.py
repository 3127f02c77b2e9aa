"""A listening socket: accepts what comes, a bounded number each turn of the loop.

The event loop's own servers are not used because they give a TLS connection to nobody until its
handshake is over: connections could then be neither counted nor refused at once, nor could each
handshake have the certificates of its moment.

When the process has no descriptor left, accepting pauses; connections wait in the kernel's backlog
and those that do not fit there are dropped by it.
"""

import asyncio
import socket
from collections.abc import Callable

_BACKLOG = 4096
"""Connections that the kernel holds until they are accepted; above: dropped, retried."""
_ACCEPTED_PER_TURN = 64
_PAUSE_SECONDS = 0.1


class Listener:
    """Accepts connections on one socket and hands them on."""

    def __init__(
        self,
        sock: socket.socket,
        accepted: Callable[[socket.socket], None],
        exhausted: Callable[[OSError], None],
    ) -> None:
        """``sock`` is bound; ``exhausted`` is told when a connection could not be accepted."""
        self._sock = sock
        self._accepted = accepted
        self._exhausted = exhausted
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        sock.listen(_BACKLOG)
        self._loop.add_reader(sock, self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_PER_TURN):
            try:
                sock, _address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptors, or no memory for one
                self._exhausted(error)
                self._loop.remove_reader(self._sock)
                self._pause = self._loop.call_later(_PAUSE_SECONDS, self._resume)
                return
            sock.setblocking(False)
            self._accepted(sock)

    def _resume(self) -> None:
        self._loop.add_reader(self._sock, self._accept)

    def close(self) -> None:
        """Accept no more; who still waits in the backlog is refused by the kernel."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
