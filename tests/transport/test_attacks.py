"""Attacks on HTTP/2, one for each limit: the attacker is stopped, a calm client is served well.

The classes are those of CVE-2019-9511 to 9518 (floods), CVE-2023-44487 (rapid reset),
CVE-2024-27316 (CONTINUATION), CVE-2025-8671 (provoked resets), CVE-2016-6581 and CVE-2026-49975
(header bombs), and slow readers.
"""

import socket
import struct

import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.transport.attack import MANY, new_sids, sent_away, target
from tests.transport.peer import PREFACE, connected, message, request_fields
from tests.transport.service import PATH

pytestmark = pytest.mark.slow
ECHO = request_fields(PATH + "Echo")
NEVER = request_fields(PATH + "Never")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The server is another process, under uvloop; the attacker's loop does not matter."""
    return ("asyncio", {"use_uvloop": True})


async def test_rapid_reset() -> None:
    """Calls that are begun and reset at once end the connection, not the server."""
    async with target(resets_per_second_max=200) as server, server.peer() as peer:

        async def attack() -> None:
            frames: list[Frame] = []
            for sid in new_sids(peer, 50):
                body = DataFrame(sid, message(b""), flags=["END_STREAM"])
                frames += [peer.headers(sid, NEVER), body, RstStreamFrame(sid, 8)]
            peer.send(*frames)

        assert await sent_away(server, peer, attack) == "too_many_resets"
        stats = await server.stats()
        assert stats["refusals"] == {"too_many_resets": 1}
        assert 200 <= stats["cancelled"] <= 260


@pytest.mark.parametrize("how", ["zero increment", "data after end", "overflow", "malformed"])
async def test_provoked_resets(how: str) -> None:
    """To make the server reset its own streams counts as much as resetting them."""
    async with target(faults_per_second_max=100) as server, server.peer() as peer:

        async def attack() -> None:
            data = b""
            for sid in new_sids(peer, 20):
                begin = peer.headers(sid, NEVER).serialize()
                end = DataFrame(sid, message(b""), flags=["END_STREAM"]).serialize()
                data += {
                    "zero increment": begin + end + struct.pack(">IBII", 0x408, 0, sid, 0),
                    "data after end": begin + end + DataFrame(sid, b"x").serialize(),
                    "overflow": begin + end + WindowUpdateFrame(sid, 2**31 - 1).serialize(),
                    "malformed": peer.headers(sid, [("Bad", "x")], "END_STREAM").serialize(),
                }[how]
            peer.write(data)

        assert await sent_away(server, peer, attack) == "too_many_faults"


async def test_refused_streams_flood() -> None:
    """Calls above the limit of streams are refused, a flood of them ends the connection."""
    async with (
        target(streams_per_connection_max=50, unserved_per_second_max=100) as server,
        server.peer() as peer,
    ):

        async def attack() -> None:
            peer.send(*(peer.headers(sid, NEVER) for sid in new_sids(peer, 20)))

        assert await sent_away(server, peer, attack) == "too_many_unserved"
        stats = await server.stats()
        assert stats["refusals"]["streams_per_connection_max"] >= 100


async def test_refused_calls_flood() -> None:
    """Calls refused because of their headers have a limit."""
    async with target(refusals_per_second_max=200) as server, server.peer() as peer:
        fields = request_fields("/no.Where/Is")

        async def attack() -> None:
            peer.send(*(peer.headers(sid, fields, "END_STREAM") for sid in new_sids(peer, 20)))

        assert await sent_away(server, peer, attack) == "too_many_refusals"


async def test_settings_flood() -> None:
    """SETTINGS frames, each of which wants an answer, have a limit."""
    async with target(settings_per_second_max=20) as server, server.peer() as peer:
        settings = SettingsFrame(0, settings={4: 70_000})

        async def attack() -> None:
            peer.send(settings, settings, settings)

        assert await sent_away(server, peer, attack) == "too_many_settings"


@pytest.mark.parametrize("entries", [32, 2_730])
async def test_settings_of_many_entries(entries: int) -> None:
    """However many changes a SETTINGS frame names, a thousand open streams are gone over once."""
    async with target() as server, server.peer() as peer:
        for sid in new_sids(peer, 1_000):
            peer.send(peer.headers(sid, request_fields(PATH + "Chat")))
        await peer.settle()
        values = [struct.pack(">HI", 4, 70_000 + i % 2) for i in range(entries)]
        frame = struct.pack(">IBI", 6 * entries << 8 | 4, 0, 0) + b"".join(values)

        async def attack() -> None:
            peer.write(frame * 6)

        reached = await sent_away(server, peer, attack)
        assert reached == ("too_many_settings" if entries == 32 else "too_many_settings_entries")


async def test_ping_flood() -> None:
    """Pings that come too soon get strikes, then the connection ends."""
    async with target() as server, server.peer() as peer:

        async def attack() -> None:
            peer.send(*[PingFrame(0, bytes(8))] * 10)

        assert await sent_away(server, peer, attack) == "too_many_pings"


@pytest.mark.parametrize(
    "frame",
    [
        PriorityFrame(1, depends_on=0, stream_weight=1, exclusive=False).serialize(),
        WindowUpdateFrame(0, 1).serialize(),
        struct.pack(">IBI", 0xFA, 0, 0),
        PingFrame(0, bytes(8), flags=["ACK"]).serialize(),
        RstStreamFrame(1, 8).serialize(),
    ],
    ids=["priority", "window update", "unknown", "ping ack", "reset of nothing"],
)
async def test_control_frames_flood(frame: bytes) -> None:
    """Frames that ask for nothing have a limit too."""
    async with target(control_per_second_max=1000) as server, server.peer() as peer:
        await peer.call(PATH + "Echo", b"x")

        async def attack() -> None:
            peer.write(frame * 100)

        assert await sent_away(server, peer, attack) == "too_many_control"


@pytest.mark.parametrize("data", [b"", b"x"])
@pytest.mark.parametrize("name", ["Echo", "Chat"])
async def test_small_data_flood(name: str, data: bytes) -> None:
    """DATA frames that bring nothing forward have a limit."""
    async with target(small_data_per_second_max=500) as server, server.peer() as peer:
        sid = peer.start(PATH + name)
        peer.send(DataFrame(sid, b"\0\0\x10\0\0"))

        async def attack() -> None:
            peer.send(*[DataFrame(sid, data)] * 100)

        assert await sent_away(server, peer, attack) == "too_many_small_data"


@pytest.mark.parametrize("part", [b"", b"\x00\x01a\x01b" * 100])
async def test_continuation_flood(part: bytes) -> None:
    """A header block that never ends is ended."""
    async with target() as server, server.peer() as peer:
        (sid,) = new_sids(peer, 1)
        peer.send(HeadersFrame(sid, b""))

        async def attack() -> None:
            peer.send(ContinuationFrame(sid, part))

        assert await sent_away(server, peer, attack) == "too_many_continuations"


async def test_large_continuations() -> None:
    """Few but large parts of a block are limited by their bytes."""
    async with target(continuations_max=1000) as server, server.peer() as peer:
        (sid,) = new_sids(peer, 1)
        peer.send(HeadersFrame(sid, b""))

        async def attack() -> None:
            peer.send(ContinuationFrame(sid, b"x" * 16_000))

        assert await sent_away(server, peer, attack) == "header_block_too_large"


async def test_header_bomb_before_our_settings_are_taken() -> None:
    """Tiny references to a large entry of the dynamic table unfold to a bounded list only."""
    async with target() as server, server.peer(greet=False) as peer:
        peer.acknowledge = False
        peer.write(PREFACE)
        peer.send(SettingsFrame(0))
        large = [*ECHO, ("bomb", "x" * 3500)]

        async def attack() -> None:
            for sid in new_sids(peer, 10):
                peer.send(peer.headers(sid, [*large, *[("bomb", "x" * 3500)] * 1000]))

        assert await sent_away(server, peer, attack) == "header_list_too_large"


@pytest.mark.parametrize(
    "extra",
    [[("a", "x" * 900)] * 30, [("a", "")] * 100, [(":authority", "")] * 63],
    ids=["bytes", "count", "indexed"],
)
async def test_header_lists_too_large(extra: list[tuple[str, str]]) -> None:
    """Too many or too large fields are answered 431 (or reset), held by no stream."""
    async with (
        target(header_bytes_max=20_000, faults_per_second_max=1000) as server,
        server.peer() as peer,
    ):
        for sid in new_sids(peer, 300):
            block = peer.encoder.encode([*ECHO, *extra])
            parts = [block[i : i + 16_000] for i in range(0, len(block), 16_000)]
            frames: list[Frame] = [HeadersFrame(sid, parts[0])]
            frames += [ContinuationFrame(sid, part) for part in [*parts[1:], b""]]
            frames[-1].flags.add("END_HEADERS")
            peer.send(*frames)
            answer = await peer.answer(sid)
            assert answer.headers.get(":status") == "431" or answer.reset == 1
        assert (await server.stats())["calls"] == 0


async def test_silent_connections() -> None:
    """Connections that say nothing, or half a preface, are closed in time."""
    async with target(preface_timeout=0.3) as server, server.pairs(200) as pairs:
        for _, writer in pairs[::2]:
            writer.write(PREFACE[:10])
        stats = await server.until(
            lambda now: now["refusals"] == {"preface_timeout": 200} and now["connections"] <= 3
        )
        assert stats["connections_accepted"] >= 200


async def test_connections_without_a_call() -> None:
    """Connections that greet and then never call are sent away without blame."""
    async with target(first_request_timeout=0.3) as server:
        for _ in range(20):
            async with server.peer() as peer:
                assert await peer.goaway() == (0, "first_request_timeout")
        assert (await server.stats())["refusals"] == {"first_request_timeout": 20}


async def test_too_many_connections() -> None:
    """Connections above the limit are closed at once; below it new ones are served again."""
    async with target(connections_max=50) as server:
        async with server.pairs(200) as pairs:
            for reader, _ in pairs[49:]:
                assert await reader.read() == b""
        stats = await server.until(lambda now: now["connections"] <= 3)
        assert stats["refusals"]["connections_max"] >= 151


async def test_too_many_connections_of_one_address() -> None:
    """One address has a share of all connections; those of another are served meanwhile."""
    async with target(connections_per_address_max=50) as server:
        async with server.pairs(200) as pairs:
            for reader, _ in pairs[49:]:
                assert await reader.read() == b""
            async with connected(server.port, address="127.0.0.2") as neighbour:
                assert (await neighbour.call(PATH + "Echo", b"x")).messages == [b"x"]
        stats = await server.until(lambda now: now["connections"] <= 3)
        assert stats["refusals"]["connections_per_address_max"] >= 151


async def test_connection_storm() -> None:
    """Thousands of connections that are made, used and reset leave nothing behind."""
    async with target() as server:
        for _ in range(30):
            async with server.pairs(50) as pairs:
                for i, (_, writer) in enumerate(pairs):
                    if i % 2:
                        writer.write(PREFACE + SettingsFrame(0).serialize())
                    await writer.drain()
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def test_keepalive_of_ours() -> None:
    """A client that is silent is pinged, and closed when it does not answer."""
    async with target(keepalive_interval=0.3, keepalive_timeout=2.0) as server:
        async with server.peer() as peer:
            peer.start(PATH + "Never", b"")
            for _ in range(2):
                await peer.until(lambda f: isinstance(f, PingFrame))
            peer.acknowledge = False
            await peer.read_all()
        stats = await server.stats()
        assert stats["refusals"] == {"keepalive_timeout": 1}


@pytest.mark.parametrize("ended", ["reset", "answered", "refused"])
async def test_ten_thousand_streams(ended: str) -> None:
    """Ten thousand streams, reset or answered, leave no stream, task or memory behind."""
    fields = {"reset": NEVER, "answered": ECHO, "refused": request_fields("/no.Where/Is")}[ended]
    async with (
        target(
            resets_per_second_max=MANY, settings_per_second_max=MANY, refusals_per_second_max=MANY
        ) as server,
        server.peer() as peer,
    ):
        peer.send(WindowUpdateFrame(0, 1 << 30))
        for _ in range(100):
            sids = new_sids(peer, 100)
            for sid in sids:
                frames: list[Frame] = [peer.headers(sid, fields)]
                frames.append(DataFrame(sid, message(bytes(50)), flags=["END_STREAM"]))
                if ended == "reset":
                    frames.append(RstStreamFrame(sid, 8))
                peer.send(*frames)
            await peer.settle()
            peer.seen.clear()
        stats = await server.stats()
        assert stats["calls"] == 0
        assert stats["cancelled"] == (10_000 if ended == "reset" else 0)


async def test_ten_thousand_bidi_streams() -> None:
    """Streams that were opened, used and reset leave nothing either."""
    async with (
        target(
            resets_per_second_max=MANY, settings_per_second_max=MANY, refusals_per_second_max=MANY
        ) as server,
        server.peer() as peer,
    ):
        for _ in range(50):
            for sid in new_sids(peer, 200):
                peer.send(
                    peer.headers(sid, request_fields(PATH + "Chat")),
                    DataFrame(sid, message(b"hello")),
                    RstStreamFrame(sid, 8),
                )
            await peer.settle()
            peer.seen.clear()
        assert (await server.stats())["calls"] == 0
