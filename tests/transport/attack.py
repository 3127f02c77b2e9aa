"""What attacks have in common: a server of their own, and a calm client that must not notice."""

import asyncio
import json
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from hyperframe.frame import GoAwayFrame

from tests.transport.peer import PATIENCE, ClosedError, Pair, Peer, connected, talking
from tests.transport.service import PATH

ENHANCE_YOUR_CALM = 11
GUARDED = ("too_many_", "header_block_", "header_list_")
"""How the names of limits begin whose excess ends a connection with GOAWAY."""
ROOT = Path(__file__).parents[2]
MANY = 100_000
"""A limit that is out of reach."""
CALM_CALLS_MIN = 100
"""Calls without which a 99th percentile would be the worst of a few."""
CALM_P99 = 0.5
"""Seconds; what a calm client waits at most while another attacks."""
LATE_FACTOR = 4
"""And as often as this what the machine keeps even us waiting: the server computes more."""
RSS_GROWTH_MAX = 64 << 20
"""Bytes of memory that may stay after an attack: the allocator keeps some."""


class Stats(TypedDict):
    """What a server holds and has counted, as JSON has it."""

    connections: int
    connections_accepted: int
    calls: int
    request_bytes: int
    output_bytes: int
    handshakes_failed: int
    refusals: dict[str, int]
    objects: dict[str, int]
    rss: int
    cancelled: int
    templates: int
    """Header blocks that one connection remembers, at most."""


@dataclass
class Target:
    """A server under attack."""

    port: int
    tls: ssl.SSLContext | None = None

    async def stats(self) -> Stats:
        """What the server holds and has counted."""
        async with talking(self.port, tls=self.tls) as (reader, writer):
            writer.write(b"GET /stats HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            async with asyncio.timeout(PATIENCE):
                answer = await reader.read()
        found: Stats = json.loads(answer.partition(b"\r\n\r\n")[2])
        return found

    async def until(self, wanted: Callable[[Stats], bool]) -> Stats:
        """Ask for the statistics until they are as wanted."""
        async with asyncio.timeout(PATIENCE):
            while True:
                with suppress(json.JSONDecodeError, ConnectionResetError):  # refused: too many
                    found = await self.stats()
                    if wanted(found):
                        return found
                await asyncio.sleep(0.05)

    @asynccontextmanager
    async def peer(
        self, *, settings: dict[int, int] | None = None, greet: bool = True
    ) -> AsyncIterator[Peer]:
        """A connection to attack with."""
        async with connected(self.port, settings=settings, greet=greet, tls=self.tls) as peer:
            yield peer

    @asynccontextmanager
    async def pairs(self, count: int) -> AsyncIterator[list[Pair]]:
        """Connections that say nothing of their own; closed at the end whatever happened."""
        made: list[Pair] = []
        async with AsyncExitStack() as closing:
            for _ in range(count):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                closing.callback(writer.close)
                made.append((reader, writer))
            yield made


def new_sids(peer: Peer, count: int) -> list[int]:
    """Streams not used yet."""
    first = peer.next_sid
    peer.next_sid += 2 * count
    return list(range(first, peer.next_sid, 2))


@asynccontextmanager
async def target(
    *,
    certificate: tuple[Path, Path] | None = None,
    tls: ssl.SSLContext | None = None,
    calm_bytes: int = 4,
    **limits: float,
) -> AsyncIterator[Target]:
    """A server in its own process, with a calm client that is served well all the time.

    ``calm_bytes`` is the size of the calm client's requests.
    When it ends, everything that the attack took must have been given back.
    """
    options: dict[str, object] = {"limits": limits}
    if certificate is not None:
        options |= {"certificate": str(certificate[0]), "key": str(certificate[1])}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.transport.serve", json.dumps(options)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        under_attack = Target(int(await process.stdout.readline()), tls)
        async with under_attack.peer() as calm:
            await calm.call(PATH + "Echo", b"warm")
            before = await under_attack.stats()
            async with _served_well(calm, bytes(calm_bytes)):
                yield under_attack
            await _given_back(under_attack, before)
    finally:
        process.stdin.close()
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 0


@asynccontextmanager
async def _served_well(calm: Peer, body: bytes) -> AsyncIterator[None]:
    """Call all the time, and look at the times afterwards."""
    loop = asyncio.get_running_loop()
    times: list[float] = []
    late: list[float] = []  # how late this process itself is: it attacks, and others may compute
    over = False

    async def call() -> None:
        while not over or len(times) < CALM_CALLS_MIN:
            begin = loop.time()
            assert (await calm.call(PATH + "Echo", body)).messages == [body]
            calm.seen.clear()
            end = loop.time()
            times.append(end - begin)
            await asyncio.sleep(0.005)
            late.append(loop.time() - end - 0.005)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(call())
        try:
            yield
        finally:
            over = True
    p99 = int((len(times) - 1) * 0.99)
    assert sorted(times)[p99] < CALM_P99 + LATE_FACTOR * sorted(late)[p99], sorted(times)[-5:]


async def _given_back(under_attack: Target, before: Stats) -> None:
    """Nothing of the attack is left: no stream, no task, no bytes, little memory."""

    def clean(now: Stats) -> bool:
        return (
            now["connections"] == before["connections"]
            and now["objects"] == before["objects"]
            and now["calls"] == now["request_bytes"] == now["output_bytes"] == 0
        )

    try:
        after = await under_attack.until(clean)
    except TimeoutError:
        raise AssertionError((await under_attack.stats(), before)) from None
    assert after["rss"] - before["rss"] < RSS_GROWTH_MAX


async def sent_away(
    server: Target, peer: Peer, attack: Callable[[], Awaitable[None]]
) -> str | None:
    """Attack until the connection is ended, which must be soon; the limit that was reached.

    GOAWAY says why, unless it is overtaken by the reset that a flood of unread bytes earns.
    """

    async def forever() -> None:
        while True:
            await attack()
            await peer.writer.drain()
            await asyncio.sleep(0)

    said: GoAwayFrame | None = None
    attacking = asyncio.ensure_future(forever())
    try:
        async with asyncio.timeout(PATIENCE):
            while said is None:
                frame = await peer.read()
                peer.seen.clear()
                if isinstance(frame, GoAwayFrame):
                    said = frame
    except ClosedError:
        pass
    finally:
        attacking.cancel()
        await asyncio.gather(attacking, return_exceptions=True)
    reached = [name for name in (await server.stats())["refusals"] if name.startswith(GUARDED)]
    assert len(reached) == 1, reached
    if said is not None:
        assert (said.error_code, said.additional_data.decode()) == (ENHANCE_YOUR_CALM, reached[0])
    return reached[0]
