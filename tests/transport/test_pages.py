"""Pages over HTTP/2: what is not gRPC's is answered by the handler of HTTP/1.1."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import hpack
import pytest
from hyperframe.frame import DataFrame, HeadersFrame, RstStreamFrame

from kvstore.transport.api import HttpRequest, HttpResponse
from tests.transport.peer import Fields, Peer, connected
from tests.transport.running import Running, draining, eventually, serving
from tests.transport.service import PATH

INTERNAL_ERROR, CANCEL = 2, 8
LATE = HttpResponse(200, [], b"late")


class Page(NamedTuple):
    """An answer over HTTP/2 that is not gRPC's."""

    headers: dict[str, str]
    body: bytes
    reset: int | None


def ask(peer: Peer, target: str, method: str = "GET", body: bytes | None = None) -> int:
    """Send a request; gives its stream."""
    sid = peer.next_sid
    peer.next_sid += 2
    fields: Fields = [
        (":method", method),
        (":scheme", "http"),
        (":path", target),
        (":authority", "here"),
        ("user-agent", "curl"),
    ]
    peer.send(peer.headers(sid, fields, *(["END_STREAM"] if body is None else [])))
    if body is not None:
        peer.send(DataFrame(sid, body, flags=["END_STREAM"]))
    return sid


async def answer(peer: Peer, sid: int) -> Page:
    """Read until stream ``sid`` has ended."""
    headers: dict[str, str] = {}
    body = b""
    while True:
        frame = await peer.read()
        if frame.stream_id != sid:
            continue
        if isinstance(frame, HeadersFrame):
            headers = {str(n): str(v) for n, v in hpack.Decoder().decode(frame.data)}
        if isinstance(frame, DataFrame):
            body += frame.data
            if frame.data:
                peer.grant(sid, len(frame.data))
        if isinstance(frame, RstStreamFrame):
            return Page(headers, body, frame.error_code)
        if "END_STREAM" in frame.flags:
            return Page(headers, body, None)


async def get(peer: Peer, target: str, method: str = "GET", body: bytes | None = None) -> Page:
    """One request and its answer."""
    return await answer(peer, ask(peer, target, method, body))


async def test_requests_and_answers() -> None:
    """Pages are served beside calls, at once or later, with length and date."""
    async with serving() as running, connected(running.port) as peer:
        for target in ("/x?a=b", "/later", "/x?a=b"):
            page = await get(peer, target)
            assert (page.headers[":status"], page.body, page.reset) == ("200", b"hello\n", None)
            assert page.headers["content-length"] == "6"
            assert page.headers["x-method"] == "GET"
            assert "GMT" in page.headers["date"]
        assert (await peer.call(PATH + "Echo", b"x")).messages == [b"x"]
        assert running.server.stats().calls == 0


async def test_what_the_handler_gets() -> None:
    """The request as over HTTP/1.1: path with query, authority as host, and the other fields."""
    async with serving() as running, connected(running.port) as peer:
        ask(peer, "/never?a=b")
        await eventually(lambda: bool(running.service.http))
        (request,) = running.service.http
        assert (request.method, request.target, request.body) == ("GET", "/never?a=b", b"")
        assert request.headers == [("host", "here"), ("user-agent", "curl")]
        assert request.peer.startswith("127.0.0.1:")
        request.respond(LATE)
        request.respond(LATE)
        assert (await answer(peer, 1)).body == b"late"


async def test_large_page() -> None:
    """A page larger than every window comes as the client grants it, and small calls pass."""
    async with serving() as running, connected(running.port) as peer:
        sid = ask(peer, "/large")
        assert (await peer.call(PATH + "Echo", b"x")).messages == [b"x"]
        for frame in peer.seen:
            if isinstance(frame, DataFrame) and frame.stream_id == sid:
                peer.grant(sid, len(frame.data))
        await answer(peer, sid)
        data = (f.data for f in peer.seen if isinstance(f, DataFrame) and f.stream_id == sid)
        assert sum(map(len, data)) == 1 << 20


async def test_head() -> None:
    """HEAD has the length of the answer and no body."""
    async with serving() as running, connected(running.port) as peer:
        page = await get(peer, "/large", "HEAD")
        assert (page.headers["content-length"], page.body, page.reset) == ("1048576", b"", None)


async def test_request_with_a_body() -> None:
    """A body is dropped and its windows are given back: any number of them may come."""
    async with serving() as running, connected(running.port) as peer:
        for _ in range(600):  # more than the connection's window
            assert (await get(peer, "/", "PUT", bytes(16_000))).body == b"hello\n"
            peer.seen.clear()


async def test_handler_that_fails() -> None:
    """An unexpected exception is a 500; an answer that cannot be sent resets its stream."""
    async with serving(expect_failures=True) as running, connected(running.port) as peer:
        page = await get(peer, "/crash")
        assert (page.headers[":status"], page.body) == ("500", b"internal error\n")
        for target in ("/broken", "/broken-later"):
            assert (await get(peer, target)).reset == INTERNAL_ERROR
        assert (await get(peer, "/")).body == b"hello\n"
        assert len(running.failures) == 3


async def test_client_that_leaves() -> None:
    """An answer to a client that has gone is dropped."""
    async with serving() as running:
        async with connected(running.port) as peer:
            ask(peer, "/never")
            await eventually(lambda: bool(running.service.http))
        await eventually(lambda: running.server.stats().connections == 0)
        running.service.http[0].respond(LATE)


async def test_drain_lets_an_answer_finish() -> None:
    """A request under way is answered before the connection closes."""
    async with serving() as running, connected(running.port) as peer:
        sid = ask(peer, "/never")
        await eventually(lambda: bool(running.service.http))
        async with draining(running):
            running.service.http[0].respond(LATE)
            assert (await answer(peer, sid)).body == b"late"
            await peer.read_all()


@contextmanager
def turns(running: Running) -> Iterator[list[int]]:
    """Collects the turn of the loop in which each page is served."""
    loop = asyncio.get_running_loop()
    handler = running.server.http_handler
    served: list[int] = []
    turn = 0
    handle: asyncio.Handle

    def count() -> None:
        nonlocal turn, handle
        turn += 1
        handle = loop.call_soon(count)

    def recording(request: HttpRequest) -> HttpResponse | None:
        served.append(turn)
        return handler(request)

    handle = loop.call_soon(count)
    running.server.http_handler = recording
    try:
        yield served
    finally:
        handle.cancel()


async def test_one_in_a_turn() -> None:
    """Pages asked for in one write do not keep the loop from others; order is kept."""
    async with serving() as running, connected(running.port) as peer:
        with turns(running) as served:
            sids = [ask(peer, "/") for _ in range(50)]
            for sid in sids:
                assert (await answer(peer, sid)).body == b"hello\n"
        assert len(set(served)) == 50


async def test_reset_while_it_waits() -> None:
    """A page that is not wanted any more is not made."""
    async with serving() as running, connected(running.port) as peer:
        with turns(running) as served:
            sids = [ask(peer, "/") for _ in range(50)]
            peer.send(*(RstStreamFrame(sid, CANCEL) for sid in sids[1:-1]))
            assert (await answer(peer, sids[-1])).body == b"hello\n"
        assert len(served) < 50
        assert running.server.stats().calls == 0


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_what_stays_grpcs(method: str) -> None:
    """POST, and whatever says that it is gRPC, is none: refused in gRPC's words."""
    async with serving() as running, connected(running.port) as peer:
        kind = "text/html" if method == "POST" else "application/grpc"
        fields: Fields = [
            (":method", method),
            (":scheme", "http"),
            (":path", PATH + "Echo"),
            ("content-type", kind),
        ]
        peer.send(peer.headers(1, fields, "END_STREAM"))
        page = await answer(peer, 1)
        assert page.headers[":status"] == ("415" if method == "POST" else "405")
        assert "grpc-status" in page.headers
