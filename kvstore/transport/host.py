"""The server and its connections, as they see each other."""

from collections.abc import Callable
from typing import Protocol

from kvstore.transport.api import CallObserver, HttpHandler
from kvstore.transport.frames import ConnectionFault
from kvstore.transport.headers import Routes
from kvstore.transport.limits import Limits
from kvstore.transport.output import Output, Totals


def peer_name(name: object) -> str:
    """A socket's ``getpeername`` as handlers and logs show it."""
    if not isinstance(name, tuple):
        return "unix:@"
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def address_of(peer: str) -> str:
    """The address without the port; nothing for UNIX sockets."""
    address = peer.rpartition(":")[0]
    return "" if address == "unix" else address


class Connection(Protocol):
    """A connection, as the server sees it."""

    @property
    def peer(self) -> str:
        """Address and port of the client, as ``peer_name`` gives them."""

    @property
    def waiting(self) -> int:
        """Bytes of answers that the peer has not read."""

    @property
    def calls(self) -> int:
        """Calls in progress."""

    def tick(self, now: float, /) -> None:
        """Called several times a second."""

    def drain(self, code: int, message: str, /) -> None:
        """Finish what is under way, end streams with a status, then close."""

    def close(self) -> None:
        """Close once what was handed to the socket is on its way."""

    def abort(self) -> None:
        """Close at once."""


class Host(Protocol):
    """The server, as its connections see it."""

    limits: Limits
    routes: Routes
    http_handler: HttpHandler
    totals: Totals
    observer: CallObserver | None
    clock: Callable[[], float]
    greeting: bytes

    def wall(self) -> float:
        """Seconds since the Unix epoch, for ``date``."""

    def schedule(self, output: Output, /) -> None:
        """Flush ``output`` at the end of this turn of the loop."""

    def opened(self, connection: Connection, /) -> None:
        """One more connection, or the next state of one."""

    def closed(self, connection: Connection, /) -> None:
        """The connection is gone."""

    def failed(self, what: str, error: Exception, /) -> None:
        """Something of ours raised what it must not."""

    def refused(self, limit: str, /) -> None:
        """A limit was reached; for the counters."""

    def faulted(self, fault: ConnectionFault, /) -> None:
        """A connection ends with GOAWAY; for the counters."""
