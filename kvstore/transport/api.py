"""What a transport offers to handlers, and what it asks of them.

Everything runs on the thread of one event loop; nothing here is awaited.
A transport calls handlers and sinks from its own turn of the loop, never from inside a method that
the handler has called: ``send``, ``finish``, ``reply`` and ``fail`` return before anything they
cause is reported.

Messages are the encoded bytes of one protobuf message, without gRPC's five-byte prefix.
Status codes are gRPC's numbers (https://grpc.io/docs/guides/status-codes/).
Times are seconds on the clock given to the server.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol


class StatusError(Exception):
    """A call that ends with a gRPC status instead of an answer; raised by handlers."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message


class Context(Protocol):
    """What a handler may know of the call it serves, unary or streaming."""

    @property
    def peer(self) -> str:
        """Address of the client: ``127.0.0.1:4711``, ``[::1]:4711`` or ``unix:@``."""

    @property
    def deadline(self) -> float | None:
        """When the client gives up (its ``grpc-timeout``), or None if it never does."""

    @property
    def cancelled(self) -> bool:
        """Nobody waits any more: reset, connection lost, deadline passed, or already finished."""

    def metadata(self, name: bytes, /) -> bytes | None:
        """The value of a request header by its lower-case name, None if it was not sent.

        Repeated headers are joined with a comma; a name in ``-bin`` gives the decoded bytes.
        """


class Call(Context, Protocol):
    """One unary call in progress; also the pending answer that the engine releases.

    The first of ``reply``, ``fail`` and the end of the client's interest decides; whatever comes
    later is silently dropped.
    """

    on_cancel: Callable[[], None] | None
    """Set by a handler that wants to know when the client has lost interest; called at most once,
    not after ``reply`` or ``fail``."""

    def reply(self, message: bytes, /) -> None:
        """Finish with OK and one message."""

    def reply_parts(self, parts: Sequence[bytes], size: int, /) -> None:
        """Likewise, for a large message given as parts whose lengths add up to ``size``.

        The parts are neither copied nor joined before they go to the socket.
        """

    def fail(self, code: int, message: str, /) -> None:
        """Finish with a status and no message."""


class StreamSink(Protocol):
    """The receiving end of one streaming call; made by the handler."""

    def message(self, message: bytes, /) -> None:
        """One whole request message; may raise ``StatusError``, which finishes the stream."""

    def half_closed(self) -> None:
        """The client has sent its last message; not called when the stream ended before."""

    def writable(self) -> None:
        """``outbox_bytes`` has fallen to the low-water mark after ``blocked`` had been true."""

    def closed(self) -> None:
        """Nothing can be sent any more: finished, reset, connection lost, or deadline passed.

        Called exactly once, and nothing is called after it.
        """


class Stream(Context, Protocol):
    """One streaming call: the sending end, under the client's flow control."""

    @property
    def outbox_bytes(self) -> int:
        """Bytes accepted by ``send`` and not yet handed to the socket."""

    @property
    def blocked(self) -> bool:
        """Something waits in the outbox: for the client's flow control or for its socket."""

    def send(self, parts: Sequence[bytes], size: int, /) -> None:
        """Queue one message, given as parts whose lengths add up to ``size``.

        The parts are neither copied nor joined for this stream alone, so many streams can share
        them; they must not be changed later (``bytes`` cannot be).
        Dropped when the stream is over or ``finish`` was called.
        """

    def finish(self, code: int = 0, message: str = "", /) -> None:
        """End the call with a status once everything queued is sent; later calls do nothing.

        The sink is told of no message any more, only that the stream is ``closed``.
        """


UnaryHandler = Callable[[bytes, Call], bytes | None]
"""From the request to its answer; None means that ``reply`` or ``fail`` will be called later.

May raise ``StatusError``. Any other exception is counted, logged once with its traceback, and told
to the client as INTERNAL without its text.
"""

StreamHandler = Callable[[Stream], StreamSink]
"""Called when the headers of a streaming call have arrived; may raise ``StatusError``."""


class Kind(IntEnum):
    """The shapes of RPC that are served."""

    UNARY = 0
    SERVER_STREAM = 1
    """One request message, many answers; the sink gets ``message`` once, then ``half_closed``."""
    BIDI_STREAM = 2


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC: its path on the wire (``b"/etcdserverpb.KV/Range"``), its kind and its handler."""

    path: bytes
    kind: Kind
    handler: UnaryHandler | StreamHandler

    @classmethod
    def unary(cls, path: bytes, handler: UnaryHandler) -> "Method":
        """An RPC of one request and one answer."""
        return cls(path, Kind.UNARY, handler)

    @classmethod
    def server_stream(cls, path: bytes, handler: StreamHandler) -> "Method":
        """An RPC of one request and a stream of answers."""
        return cls(path, Kind.SERVER_STREAM, handler)

    @classmethod
    def bidi_stream(cls, path: bytes, handler: StreamHandler) -> "Method":
        """An RPC of a stream of requests and a stream of answers."""
        return cls(path, Kind.BIDI_STREAM, handler)


class HttpResponse(NamedTuple):
    """An answer to a request over HTTP; ``content-length`` and ``date`` are added to it.

    Header names are in lower case.
    """

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes


def _answer_nowhere(_response: HttpResponse) -> None:
    """Stand-in for requests that tests make by hand."""


class HttpRequest(NamedTuple):
    """A request over HTTP/1.1, or over HTTP/2 if it is not gRPC's (its body is then dropped).

    Header names are in lower case.
    """

    method: str
    target: str
    """Path and query as sent: ``/health?serializable=true``."""
    headers: Sequence[tuple[str, str]]
    body: bytes
    peer: str = ""
    respond: Callable[[HttpResponse], None] = _answer_nowhere
    """For a handler that returned None; dropped when the client has gone."""


HttpHandler = Callable[[HttpRequest], HttpResponse | None]
"""From a request to its answer (metrics may be a megabyte), or None to respond later."""

CallObserver = Callable[[bytes, int, float], None]
"""Told of every call that ended, unary or streaming: path of the method, gRPC code, seconds."""
