"""Attacks beside HTTP/2: slow or greedy HTTP/1.1 clients, and TLS handshakes that do not end."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.transport.attack import target
from tests.transport.certificates import Authority
from tests.transport.peer import talking

pytestmark = pytest.mark.slow


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The server is another process, under uvloop; the attacker's loop does not matter."""
    return ("asyncio", {"use_uvloop": True})


@asynccontextmanager
async def meanwhile(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """``work`` goes on until the end, whatever that is."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_slow_requests() -> None:
    """Requests that trickle in are ended in time, whatever part they stop at."""
    async with target(http1_timeout=0.4) as server, server.pairs(300) as pairs:
        for i, (_, writer) in enumerate(pairs):
            writer.write(
                (
                    b"GET / HTTP/1.1\r\nx-slow: ",
                    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nx",
                    b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\n",
                )[i % 3]
            )

        async def trickle() -> None:
            while True:
                for _, writer in pairs:
                    if not writer.is_closing():
                        writer.write(b"x")
                await asyncio.sleep(0.1)

        async with meanwhile(trickle()):
            # A third of them may earn a 400 for what trickles in.
            await server.until(lambda now: now["refusals"].get("http1_timeout", 0) >= 200)


async def test_large_headers_and_bodies() -> None:
    """Headers and bodies without end are refused when they pass the limit."""
    async with target() as server:
        for start, part in (
            (b"GET / HTTP/1.1\r\n", b"a: b\r\n" * 1000),
            (b"GET /", b"x" * 5000),
            (
                b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n",
                b"3e8\r\n" + b"x" * 1000 + b"\r\n",
            ),
        ):
            async with talking(server.port) as (_, writer):
                writer.write(start)
                with suppress(ConnectionError):
                    for _ in range(100_000):
                        writer.write(part)
                        await writer.drain()
                assert writer.is_closing()


async def test_bodies_of_many_connections() -> None:
    """Unfinished bodies count with all other unfinished requests."""
    limit = 2 << 20
    async with target(request_bytes_total_max=limit) as server, server.pairs(50) as pairs:
        head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"
        for _, writer in pairs:
            writer.write(head + bytes(100_000))
        stats = await server.until(
            lambda now: now["refusals"].get("request_bytes_total_max", 0) >= 29
        )
        assert stats["request_bytes"] <= limit


async def test_pipelining_without_reading() -> None:
    """A client that only sends requests is not answered beyond what it reads."""
    async with target(output_stall_timeout=1.0) as server, talking(server.port) as (_, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)
        stats = await server.until(lambda now: "output_stall_timeout" in now["refusals"])
        assert stats["rss"] < 200 << 20
        writer.transport.abort()  # what it has not sent it never will


async def test_handshakes_that_do_not_end(tmp_path: Path) -> None:
    """Half a TLS handshake, or none, is ended in time; others are served meanwhile."""
    authority = Authority.make(tmp_path, "ca")
    context = ssl.create_default_context(cafile=str(authority.certificate))
    context.set_alpn_protocols(["h2"])
    certificate = authority.issue("server")
    async with (
        target(certificate=certificate, tls=context, handshake_timeout=0.5) as server,
        server.pairs(200) as pairs,
    ):
        for i, (_, writer) in enumerate(pairs):
            writer.write((b"", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n\r\n")[i % 3])
        await server.until(lambda now: now["handshakes_failed"] == 200 and now["connections"] <= 3)
