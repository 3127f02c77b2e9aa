"""A service that tests call: it echoes, waits, fails, floods, and keeps what it was given."""

import asyncio

from kvstore.transport.api import Call, HttpRequest, HttpResponse, Method, StatusError, Stream

PATH = "/test.Service/"
BROKEN = HttpResponse(200, [("x-snowman", "\N{SNOWMAN}")], b"")
"""What no protocol can say."""


class Chat:
    """A sink that echoes every message and finishes when the client does."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def message(self, message: bytes, /) -> None:
        """Echo."""
        self._stream.send([message], len(message))

    def half_closed(self) -> None:
        """The client is done, so are we."""
        self._stream.finish()

    def writable(self) -> None:
        """Echoes are not held back."""

    def closed(self) -> None:
        """Nothing to give back."""


class Tap:
    """A sink that writes down what it is told; the test does the sending."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.events: list[str | bytes] = []

    def message(self, message: bytes, /) -> None:
        """Write it down; some messages are refused."""
        if message == b"refuse":
            raise StatusError(9, "refused")
        if message == b"crash":
            raise ZeroDivisionError
        self.events.append(message)

    def half_closed(self) -> None:
        """Write it down."""
        self.events.append("half_closed")

    def writable(self) -> None:
        """Write it down."""
        self.events.append("writable")

    def closed(self) -> None:
        """Write it down."""
        self.events.append("closed")


class Count(Chat):
    """A server stream: asked for "N SIZE", sends N messages of SIZE bytes and finishes."""

    def message(self, message: bytes, /) -> None:
        """Send what was asked for."""
        count, size = map(int, message.split())
        for i in range(count):
            self._stream.send([b"%d" % i, bytes(size)], len(b"%d" % i) + size)


def echo(message: bytes, _call: Call) -> bytes:
    """The request."""
    return message


def size(message: bytes, _call: Call) -> bytes:
    """As many bytes as the request says."""
    return bytes(int(message))


def parts(message: bytes, call: Call) -> None:
    """Asked for "N SIZE", answer with N parts of SIZE bytes."""
    count, length = map(int, message.split())
    call.reply_parts([b"%c" % (i % 256) * length for i in range(count)], count * length)


def deadline(_message: bytes, call: Call) -> bytes:
    """When the client gives up."""
    return repr(call.deadline).encode()


def metadata(message: bytes, call: Call) -> bytes:
    """The header that the request names."""
    return call.metadata(message) or b""


def no_stats() -> bytes:
    """Until there is a server to ask."""
    return b""


class Service:
    """The handlers, and what they keep."""

    def __init__(self) -> None:
        self.parked: list[Call] = []
        """Calls of ``Never``."""
        self.cancelled = 0
        """Parked calls whose client lost interest."""
        self.taps: list[Tap] = []
        self.http: list[HttpRequest] = []
        self.stats = no_stats

    def methods(self) -> list[Method]:
        """What the service serves."""

        def path(name: str) -> bytes:
            return (PATH + name).encode()

        return [
            Method.unary(path("Echo"), echo),
            Method.unary(path("Later"), self.later),
            Method.unary(path("Never"), self.never),
            Method.unary(path("Size"), size),
            Method.unary(path("Parts"), parts),
            Method.unary(path("Fail"), self.fail),
            Method.unary(path("Twice"), self.twice),
            Method.unary(path("Metadata"), metadata),
            Method.unary(path("Deadline"), deadline),
            Method.server_stream(path("Count"), Count),
            Method.bidi_stream(path("Chat"), Chat),
            Method.bidi_stream(path("Tap"), self.tap),
            Method.bidi_stream(path("Closed"), self.closed),
        ]

    def later(self, message: bytes, call: Call) -> None:
        """Echo in the next turn of the loop."""
        asyncio.get_running_loop().call_soon(call.reply, message)

    def never(self, message: bytes, call: Call) -> None:
        """Keep the call."""
        self.parked.append(call)

        def cancelled() -> None:
            self.cancelled += 1
            self.parked.remove(call)

        call.on_cancel = cancelled

    def fail(self, message: bytes, call: Call) -> bytes | None:
        """Asked with "raise", "crash" or "fail" and a text, end the call that way."""
        how, _, text = message.decode().partition(" ")
        if how == "raise":
            raise StatusError(5, text)
        if how == "crash":
            raise ZeroDivisionError(text)
        call.fail(9, text)
        return None

    def twice(self, message: bytes, call: Call) -> bytes:
        """Answer three times; only the first counts."""
        call.reply(b"first")
        call.fail(5, "second")
        return b"third"

    def tap(self, stream: Stream) -> Tap:
        """Keep the stream."""
        tap = Tap(stream)
        self.taps.append(tap)
        return tap

    def closed(self, stream: Stream) -> Tap:
        """Refuse the stream."""
        raise StatusError(7, "no entry")

    def handle_http(self, request: HttpRequest) -> HttpResponse | None:
        """Echo a request for a page, at once or later."""
        path = request.target.partition("?")[0]
        if path == "/stats":
            # A little later, when nothing is left of this connection's beginning.
            asyncio.get_running_loop().call_later(
                0.01, lambda: request.respond(HttpResponse(200, [], self.stats()))
            )
            return None
        if path == "/crash":
            raise ZeroDivisionError
        if path == "/broken":
            return BROKEN
        if path == "/broken-later":
            asyncio.get_running_loop().call_soon(request.respond, BROKEN)
            return None
        if path == "/large":
            return HttpResponse(200, [], bytes(1 << 20))
        response = HttpResponse(200, [("x-method", request.method)], request.body or b"hello\n")
        if path == "/later":
            asyncio.get_running_loop().call_soon(request.respond, response)
            return None
        if path == "/never":
            self.http.append(request)
            return None
        return response
