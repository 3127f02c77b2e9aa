"""HTTP/1.1 on the same port, recognised by its first bytes."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple

import h11
import pytest

from kvstore.transport import sniff
from kvstore.transport.api import HttpResponse
from tests.transport.limits import TEST_LIMITS
from tests.transport.peer import PATIENCE, ClosedError, connected
from tests.transport.running import Running, draining, eventually, serving
from tests.transport.service import PATH

LATE = HttpResponse(200, [], b"late")


class Reply(NamedTuple):
    """An answer over HTTP/1.1."""

    status: int
    headers: dict[str, str]
    body: bytes


class Browser:
    """An HTTP/1.1 client around h11."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._unread = b""

    async def read(self, method: str = "GET") -> Reply:
        """The next answer on the connection."""
        http = h11.Connection(h11.CLIENT)
        http.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        http.send(h11.EndOfMessage())
        if self._unread:
            http.receive_data(self._unread)
        head: h11.Response | None = None
        body = b""
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                async with asyncio.timeout(PATIENCE):
                    http.receive_data(await self.reader.read(65_536))
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                self._unread = http.trailing_data[0]
                fields = {n.decode(): v.decode() for n, v in head.headers}
                return Reply(head.status_code, fields, body)

    async def get(self, target: str, method: str = "GET", body: bytes = b"") -> Reply:
        """One request and its answer."""
        length = f"content-length: {len(body)}\r\n" if body else ""
        head = f"{method} {target} HTTP/1.1\r\nhost: x\r\n{length}\r\n"
        self.writer.write(head.encode() + body)
        return await self.read(method)

    async def closed(self) -> bool:
        """Is the connection closed by the server."""
        async with asyncio.timeout(PATIENCE):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True


@asynccontextmanager
async def browsing(running: Running) -> AsyncIterator[Browser]:
    """A client connected to the server."""
    browser = Browser(*await asyncio.open_connection("127.0.0.1", running.port))
    try:
        yield browser
    finally:
        browser.writer.close()


async def test_requests_and_answers() -> None:
    """Requests are answered in turn on one connection, with length and date."""
    async with serving() as running, browsing(running) as browser:
        for target in ("/x?a=b", "/later", "/"):
            reply = await browser.get(target)
            assert (reply.status, reply.body, reply.headers["x-method"]) == (200, b"hello\n", "GET")
            assert reply.headers["content-length"] == "6"
            assert "GMT" in reply.headers["date"]
        body = b"x" * 100_000
        assert (await browser.get("/", "POST", body)).body == body
        assert len((await browser.get("/large")).body) == 1 << 20


async def test_gRPC_on_the_same_port() -> None:  # noqa: N802 - its name
    """One listener serves both."""
    async with serving() as running, browsing(running) as browser, connected(running.port) as peer:
        assert (await peer.call(PATH + "Echo", b"x")).messages == [b"x"]
        assert (await browser.get("/")).status == 200


async def test_head() -> None:
    """HEAD has the length of the answer and no body; the connection goes on."""
    async with serving() as running, browsing(running) as browser:
        reply = await browser.get("/", "HEAD")
        assert (reply.status, reply.headers["content-length"], reply.body) == (200, "6", b"")
        assert (await browser.get("/")).body == b"hello\n"


async def test_pipelining() -> None:
    """Requests sent without waiting are answered in order, slow ones too."""
    async with serving() as running, browsing(running) as browser:
        targets = ["/later", "/", "/later", "/later", "/"] * 20
        for i, target in enumerate(targets):
            head = f"POST {target} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n"
            browser.writer.write(head.encode() + b"%02d" % i)
        for i in range(len(targets)):
            assert (await browser.read()).body == b"%02d" % i


async def test_request_in_pieces() -> None:
    """A request may arrive byte by byte."""
    async with serving() as running, browsing(running) as browser:
        for byte in b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc":
            browser.writer.write(bytes((byte,)))
            await browser.writer.drain()
        assert (await browser.read()).body == b"abc"


async def test_chunked_body_and_continue() -> None:
    """A chunked body is put together; who waits for 100 Continue gets it."""
    async with serving() as running, browsing(running) as browser:
        browser.writer.write(
            b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        async with asyncio.timeout(PATIENCE):
            assert await browser.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 \r\n\r\n"
        browser.writer.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
        assert (await browser.read()).body == b"abcde"


async def test_handler_that_fails() -> None:
    """An unexpected exception is a 500 without its text, and the connection goes on."""
    async with serving(expect_failures=True) as running, browsing(running) as browser:
        assert (await browser.get("/crash")).status == 500
        assert (await browser.get("/")).status == 200


@contextmanager
def nothing_reaches_the_loop() -> Iterator[None]:
    """An exception that reaches the event loop ends the whole server: there must be none."""
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    complaints: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    try:
        yield
    finally:
        loop.set_exception_handler(before)
    assert complaints == []


@pytest.mark.parametrize("target", ["/broken", "/broken-later"])
async def test_answer_that_cannot_be_sent(target: str) -> None:
    """It costs its connection, and is told; nothing else."""
    async with serving(expect_failures=True) as running, browsing(running) as other:
        with nothing_reaches_the_loop():
            async with browsing(running) as browser:
                browser.writer.write(f"GET {target} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
                assert await browser.closed()
            assert len(running.failures) == 1
            assert (await other.get("/")).status == 200


async def test_answer_that_cannot_be_sent_once_there_is_room() -> None:
    """Likewise when it was the socket's turn that brought it."""
    async with serving(expect_failures=True) as running, browsing(running) as browser:
        with nothing_reaches_the_loop():
            request = b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n"
            browser.writer.write(request % b"/large" * 20 + request % b"/broken")
            async with asyncio.timeout(PATIENCE):
                with suppress(ConnectionError):
                    while await browser.reader.read(65_536):
                        pass
            assert len(running.failures) == 1


async def test_connection_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug between the first bytes and the connection they ask for costs that connection."""

    def broken(_host: object, _peer: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sniff, "Http1Connection", broken)
    async with serving(expect_failures=True) as running:
        with nothing_reaches_the_loop():
            async with browsing(running) as browser:
                browser.writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                assert await browser.closed()
            await eventually(lambda: running.server.stats().connections == 0)


async def test_connect() -> None:
    """Nobody gets a tunnel, whatever the handler would say (RFC 9110 section 9.3.6)."""
    async with serving() as running, browsing(running) as browser:
        with nothing_reaches_the_loop():
            reply = await browser.get("here:1", "CONNECT")
            assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
            assert await browser.closed()


async def test_refusal_is_read_by_who_still_sends() -> None:
    """The connection is not reset under a client that has not read the refusal yet: what it sends
    is read and dropped for a while (RFC 9112 section 9.6).
    """
    limits = replace(TEST_LIMITS, http1_body_bytes_max=1000)
    async with serving(limits) as running, browsing(running) as browser:
        head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"
        browser.writer.write(head + bytes(2000))
        await eventually(lambda: "http1_body_bytes_max" in running.server.stats().refusals)
        for _ in range(20):
            browser.writer.write(bytes(5000))
            await browser.writer.drain()
            await asyncio.sleep(0)
        assert running.server.stats().connections == 1
        assert (await browser.read()).status == 413
        assert await browser.closed()
        await eventually(lambda: running.server.stats().connections == 0)


async def test_client_that_leaves() -> None:
    """An answer to a client that has gone is dropped."""
    async with serving() as running:
        async with browsing(running) as browser:
            browser.writer.write(b"GET /never HTTP/1.1\r\nhost: x\r\n\r\n")
            await eventually(lambda: bool(running.service.http))
        await eventually(lambda: running.server.stats().connections == 0)
        running.service.http[0].respond(LATE)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no host
        (b"GET / HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS client", 400),
    ],
)
async def test_bad_requests(request_bytes: bytes, status: int) -> None:
    """What is not HTTP/1.1 is answered so, and the connection is closed."""
    async with serving() as running, browsing(running) as browser:
        browser.writer.write(request_bytes)
        assert (await browser.read()).status == status
        assert await browser.closed()


async def test_http2_where_only_http1_is_served() -> None:
    """A listener for metrics does not speak HTTP/2."""
    async with serving(http1_only=True) as running:
        async with browsing(running) as browser:
            assert (await browser.get("/")).status == 200
        async with connected(running.port, greet=False) as peer:
            with pytest.raises((ClosedError, ValueError)):
                await peer.greet()


async def test_limits_of_a_request() -> None:
    """Too long a header is 431, too long a body 413, announced or not."""
    limits = replace(TEST_LIMITS, http1_header_bytes_max=1000, http1_body_bytes_max=1000)
    async with serving(limits) as running:
        async with browsing(running) as browser:
            assert (await browser.get("/" + "x" * 2000)).status == 431
            assert await browser.closed()
        async with browsing(running) as browser:
            assert (await browser.get("/", "POST", b"x" * 1000)).status == 200
            assert (await browser.get("/", "POST", b"x" * 1001)).status == 413
            assert await browser.closed()
        async with browsing(running) as browser:
            chunk = b"190\r\n" + b"x" * 400 + b"\r\n"
            head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            browser.writer.write(head + chunk * 3)
            assert (await browser.read()).status == 413


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HT", b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9"]
)
async def test_silence_is_ended(sent: bytes) -> None:
    """A connection that is idle, or does not finish its request, is closed after the timeout."""
    limits = replace(TEST_LIMITS, http1_timeout=0.05, preface_timeout=0.05)
    async with serving(limits) as running, browsing(running) as browser:
        browser.writer.write(sent)
        assert await browser.closed()
        assert sum(running.server.stats().refusals.values()) == 1


async def test_connection_close() -> None:
    """A client that asks for the close gets it after its answer."""
    async with serving() as running, browsing(running) as browser:
        browser.writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await browser.read()).status == 200
        assert await browser.closed()


async def test_drain_lets_an_answer_finish() -> None:
    """A request under way is answered, with the word that the connection closes."""
    async with serving() as running, browsing(running) as browser, browsing(running) as idle:
        assert (await idle.get("/")).status == 200
        browser.writer.write(b"GET /never HTTP/1.1\r\nhost: x\r\n\r\n")
        await eventually(lambda: bool(running.service.http))
        async with draining(running):
            assert await idle.closed()
            running.service.http[0].respond(LATE)
            reply = await browser.read()
        assert (reply.body, reply.headers["connection"]) == (b"late", "close")
