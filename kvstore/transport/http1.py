"""HTTP/1.1 for health, metrics and the JSON gateway: whole requests in, whole answers out, by h11.

One request is served at a time; pipelined ones wait, unread beyond ``http1_header_bytes_max``.
Until then reading goes on, because only who reads learns that a client has gone.
Every answer is sent with its length; a connection is kept for the next request unless either side
says otherwise.
"""

import asyncio
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import cast

import h11

from kvstore.transport import linger
from kvstore.transport.api import HttpRequest, HttpResponse
from kvstore.transport.host import Host
from kvstore.transport.output import SocketBuffer

_TEXT = [("content-type", "text/plain; charset=utf-8")]


def _size(request: h11.Request) -> int:
    """Bytes of a request's header, near enough; h11 itself limits only what comes in pieces."""
    fields = sum(len(name) + len(value) + 4 for name, value in request.headers)
    return len(request.method) + len(request.target) + fields


class Http1Connection(asyncio.Protocol):
    """The server's end of one HTTP/1.1 connection."""

    def __init__(self, host: Host, peer: str) -> None:
        self._host = host
        self._limits = host.limits
        self.peer = peer
        self._transport: asyncio.Transport | None = None
        self._http = h11.Connection(
            h11.SERVER, max_incomplete_event_size=host.limits.http1_header_bytes_max
        )
        self._request: h11.Request | None = None
        self._body = bytearray()
        self._serial = 0
        """Counts requests, so that a late answer is not taken for that of a later one."""
        self._answering = False
        self._paused = False
        self._draining = False
        self._since = host.clock()
        """When the last request was answered, or the first byte of this one came."""
        self._dying_at: float | None = None
        self._socket = SocketBuffer(host.totals)
        self._mark = 0
        self._moved_at = self._since

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass
        self._transport.set_write_buffer_limits(high=self._limits.socket_bytes_max)
        self._host.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody waits for an answer any more."""
        self._transport = None
        self._socket.holds(0)
        self._serial += 1
        self._clear_body()
        self._host.closed(self)

    def pause_writing(self) -> None:
        """The socket's buffer is full: the next request waits."""
        self._paused = True
        self._look()

    def resume_writing(self) -> None:
        """It has room again: go on, but not within its write, which asyncio would finish twice."""
        self._paused = False
        self._look()
        asyncio.get_running_loop().call_soon(self._guarded, self._go_on)

    def data_received(self, data: bytes) -> None:
        """Take what belongs to the current request."""
        self._guarded(lambda: self._receive(data))

    def _guarded(self, work: Callable[[], None]) -> None:
        """A bug of ours costs one connection, not all."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is
            self._host.failed("http connection failed", error)
            self.abort()

    def _receive(self, data: bytes) -> None:
        self._host.totals.bytes_received += len(data)
        if self._request is None and self._http.trailing_data[0] == b"":
            self._since = self._host.clock()
        self._http.receive_data(data)
        self._go_on()

    def eof_received(self) -> None:
        """The client sends no more, and so wants no more, as in Go's server: closed."""

    # Requests.

    @property
    def _serving(self) -> bool:
        """More requests may be read: the connection is not being closed."""
        transport = self._transport
        return transport is not None and self._dying_at is None and not transport.is_closing()

    def _go_on(self) -> None:
        """Read events until a request is being answered or more bytes are needed."""
        while self._serving and not self._answering and not self._paused:
            try:
                event = self._http.next_event()
                if isinstance(event, h11.ConnectionClosed):
                    self.close()
                    break
                if not isinstance(event, h11.Request | h11.Data | h11.EndOfMessage):
                    break
                self._take(event)
            except h11.RemoteProtocolError as error:
                self._refuse(error.error_status_hint, str(error))
        if self._transport is not None and self._serving:
            if len(self._http.trailing_data[0]) > self._limits.http1_header_bytes_max:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _take(self, event: h11.Request | h11.Data | h11.EndOfMessage) -> None:
        """One event of the request."""
        if isinstance(event, h11.Request):
            self._request = event
            if event.http_version not in {b"1.0", b"1.1"}:
                self._refuse(505, "unsupported protocol version")
            elif event.method == b"CONNECT":  # an answer of 2xx would make a tunnel of it
                self._refuse(405, "CONNECT is not served", ("allow", "GET, HEAD"))
            elif _size(event) > self._limits.http1_header_bytes_max:
                self._refuse(431, "request header too large")
            elif self._http.they_are_waiting_for_100_continue:
                self._write(self._http.send(h11.InformationalResponse(status_code=100, headers=[])))
        elif isinstance(event, h11.Data):
            self._take_body(bytes(event.data))
        else:
            self._serve()

    def _take_body(self, data: bytes) -> None:
        totals = self._host.totals
        if len(self._body) + len(data) > self._limits.http1_body_bytes_max:
            self._host.refused("http1_body_bytes_max")
            self._refuse(413, "request body too large")
        elif totals.request_bytes + len(data) > self._limits.request_bytes_total_max:
            self._host.refused("request_bytes_total_max")
            self._refuse(503, "too many requests in progress")
        else:
            totals.request_bytes += len(data)
            self._body += data

    def _clear_body(self) -> None:
        self._host.totals.request_bytes -= len(self._body)
        self._body = bytearray()

    def _serve(self) -> None:
        """Hand a whole request to the handler."""
        event = self._request
        assert event is not None
        body = bytes(self._body)
        self._clear_body()
        self._answering = True
        serial = self._serial
        request = HttpRequest(
            method=event.method.decode("ascii"),
            target=event.target.decode("latin-1"),
            headers=[(n.decode("ascii"), v.decode("latin-1")) for n, v in event.headers],
            body=body,
            peer=self.peer,
            respond=lambda response: self._respond(serial, response),
        )
        try:
            response = self._host.http_handler(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the connection
            self._host.failed("http handler failed", error)
            response = HttpResponse(500, _TEXT, b"internal error\n")
        if response is not None:
            self._answer(response)

    def _respond(self, serial: int, response: HttpResponse) -> None:
        """An answer that comes later; dropped if it is not the current request's."""

        def answer() -> None:
            self._answer(response)
            self._go_on()

        if serial == self._serial and self._answering:
            self._guarded(answer)

    def _refuse(self, status: int, reason: str, *headers: tuple[str, str]) -> None:
        """Answer a request that cannot be served, and close."""
        if self._http.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self.abort()
            return
        self._draining = True
        self._clear_body()
        self._dying_at = self._host.clock()  # so that the answer does not close at once
        self._answer(HttpResponse(status, [*_TEXT, *headers], f"{reason}\n".encode()))
        if self._transport is not None:
            linger.linger(self, self._transport)

    def _answer(self, response: HttpResponse) -> None:
        """Write one answer, and be ready for the next request."""
        self._serial += 1
        headers = [
            *response.headers,
            ("content-length", str(len(response.body))),
            ("date", formatdate(self._host.wall(), usegmt=True)),
        ]
        if self._draining:
            headers.append(("connection", "close"))
        phrase = HTTPStatus(response.status).phrase
        head = h11.Response(status_code=response.status, headers=headers, reason=phrase)
        parts = [self._http.send(head)]
        if self._request is None or self._request.method != b"HEAD":
            parts.append(self._http.send(h11.Data(data=response.body)))
        parts.append(self._http.send(h11.EndOfMessage()))
        self._write(b"".join(part for part in parts if part))
        self._request = None
        self._answering = False
        self._since = self._host.clock()
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        elif self._dying_at is None:
            self.close()

    def _write(self, data: bytes | None) -> None:
        if data and self._transport is not None:
            self._host.totals.bytes_sent += len(data)
            self._transport.write(data)

    # Time and the end.

    @property
    def waiting(self) -> int:
        """Bytes of answers that the peer had not read when they were last looked at."""
        return self._socket.size

    def _look(self) -> None:
        """Count what the socket has not taken."""
        if self._transport is not None:
            self._socket.holds(self._transport.get_write_buffer_size())

    @property
    def calls(self) -> int:
        """Requests being answered."""
        return int(self._answering)

    def tick(self, now: float) -> None:
        """Close a connection that is idle, sends its request too slowly, or does not read."""
        if self._transport is None:
            return
        self._look()
        waiting = self.waiting
        if waiting != self._mark:
            self._mark = waiting
            self._moved_at = now
        if self._dying_at is not None:
            if now - self._dying_at >= linger.SECONDS:
                self.abort()
        elif waiting:
            if now - self._moved_at > self._limits.output_stall_timeout:
                self._host.refused("output_stall_timeout")
                self.abort()
        elif not self._answering and now - self._since > self._limits.http1_timeout:
            self._host.refused("http1_timeout")
            self.abort()

    def drain(self, code: int, message: str) -> None:
        """Close after the answer under way."""
        self._draining = True
        if not self._answering:
            self.close()

    def close(self) -> None:
        """Close once what was handed to the socket is on its way."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once; what the socket held counts no more."""
        if self._transport is not None:
            self._transport.abort()
            self._socket.holds(0)
