"""Pages over HTTP/2: requests that are not gRPC's, answered by the handler of HTTP/1.1.

A client that may speak either protocol takes HTTP/2 where TLS offers it, and etcd serves its pages
there. gRPC's requests are always POST, pages are never: that and the content type tell them apart
(``headers.understand``).

A request is served when it has ended; its body is taken off the windows and forgotten, as no page
wants one.
The pages of one connection are served in their order, one in each turn of the loop: metrics are
milliseconds of work, and a thousand may be asked for in one write.
"""

from collections.abc import Callable
from email.utils import formatdate
from typing import Protocol

from kvstore.transport import fields, frames, grpc
from kvstore.transport.api import HttpHandler, HttpRequest, HttpResponse
from kvstore.transport.calls import Carrier, Transfer, UnaryCall
from kvstore.transport.headers import Head
from kvstore.transport.output import Outbox, Output

_TEXT = (("content-type", "text/plain; charset=utf-8"),)


class PageCall(UnaryCall):
    """One request for a page; in ``Streams.open`` like any call until its answer is sent."""

    __slots__ = ()

    def __init__(self, connection: Carrier, sid: int, head: Head) -> None:
        super().__init__(connection, sid, head, None)
        self.transfer = Transfer(connection.new_inbox(), half_closed=False)
        self.transfer.message = b""  # so it is deaf

    def request(self, respond: Callable[[HttpResponse], None]) -> HttpRequest:
        """What the handler gets."""
        found = self.head.page
        assert found is not None
        headers = [
            ("host" if name == b":authority" else name.decode("latin-1"), value.decode("latin-1"))
            for name, value in found.items()
            if name[:1] != b":" or name == b":authority"
        ]
        return HttpRequest(
            method=found[b":method"].decode("latin-1"),
            target=found[b":path"].decode("latin-1"),
            headers=headers,
            body=b"",
            peer=self.peer,
            respond=respond,
        )

    def answer(self, response: HttpResponse, date: str) -> None:
        """Send the whole answer; dropped when the client has gone or it is the second."""
        if self.cancelled:
            return
        length = len(response.body)
        pairs = [
            (b":status", b"%d" % response.status),
            *((name.encode("ascii"), value.encode("latin-1")) for name, value in response.headers),
            (b"content-length", b"%d" % length),
            (b"date", date.encode("ascii")),
        ]
        block = fields.encode(pairs)
        self.cancelled = True
        found = self.head.page
        assert found is not None
        if not length or found[b":method"] == b"HEAD":
            self._refuse(block)
            return
        transfer = self.transfer
        assert transfer is not None
        output = self._connection.output
        outbox = transfer.outbox = Outbox(self.sid, self, transfer.credit)
        outbox.tail = frames.frame(frames.DATA, frames.END_STREAM, self.sid)
        outbox.parts.append(response.body)
        output.write(
            frames.headers(self.sid, block, end_stream=False, frame_bytes_max=output.frame_max)
        )
        output.queue(outbox, length)

    def give_up_request(self, code: int, message: str) -> None:
        """Nobody but a client that does not go on wants to know why."""
        self._connection.reset(self, frames.CANCEL)
        self.abort(code)

    def give_up(self) -> None:
        """There is no answer."""
        self._connection.reset(self, frames.INTERNAL_ERROR)
        self.abort(grpc.INTERNAL)

    def abort(self, code: int) -> None:
        """The client has gone; the observer counts gRPC's calls only."""
        self.release()
        self.cancelled = True


class Host(Protocol):
    """The server, as the pages of a connection see it."""

    http_handler: HttpHandler

    def wall(self) -> float:
        """Seconds since the Unix epoch, for ``date``."""

    def failed(self, what: str, error: Exception, /) -> None:
        """Something of ours raised what it must not."""


class Pages:
    """The requests for pages of one connection that wait for their turn."""

    __slots__ = ("_host", "_output", "_queue")

    def __init__(self, host: Host, output: Output) -> None:
        self._host = host
        self._output = output
        self._queue: list[PageCall] = []
        """Those that were reset meanwhile included; the streams of a connection bound it."""

    def put(self, call: PageCall) -> None:
        """The request is whole."""
        self._queue.append(call)
        if len(self._queue) == 1:
            self._come_back()

    def _come_back(self) -> None:
        self._output.after.append(self._serve)
        self._output.schedule()

    def _serve(self) -> None:
        """Serve the next request that is still wanted, and come back for the rest."""
        queue = self._queue
        while queue:
            call = queue.pop(0)
            if not call.cancelled:
                self._ask(call)
                break
        if queue:
            self._come_back()

    def _ask(self, call: PageCall) -> None:
        def respond(response: HttpResponse) -> None:
            try:
                call.answer(response, formatdate(self._host.wall(), usegmt=True))
            except Exception as error:  # noqa: BLE001 - nor may what calls it later
                self._host.failed("http answer failed", error)
                call.give_up()

        try:
            response = self._host.http_handler(call.request(respond))
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the connection
            self._host.failed("http handler failed", error)
            response = HttpResponse(500, _TEXT, b"internal error\n")
        if response is not None:
            respond(response)
