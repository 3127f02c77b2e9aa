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

from tests.transport.attack import sent_away, target
from tests.transport.peer import PREFACE, Peer, message, request_fields
from tests.transport.service import PATH

pytestmark = pytest.mark.slow
MANY = 100_000
ECHO = request_fields(PATH + "Echo")
NEVER = request_fields(PATH + "Never")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The server is another process, under uvloop; the attacker's loop does not matter."""
    return ("asyncio", {"use_uvloop": True})


def new_sids(peer: Peer, count: int) -> list[int]:
    """Streams not used yet."""
    first = peer.next_sid
    peer.next_sid += 2 * count
    return list(range(first, peer.next_sid, 2))


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
        target(streams_per_connection_max=50, faults_per_second_max=100) as server,
        server.peer() as peer,
    ):

        async def attack() -> None:
            peer.send(*(peer.headers(sid, NEVER) for sid in new_sids(peer, 20)))

        assert await sent_away(server, peer, attack) == "too_many_faults"
        stats = await server.stats()
        assert stats["refusals"]["streams_per_connection_max"] >= 100


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


async def test_different_headers_for_every_call() -> None:
    """What is remembered of header blocks is bounded per connection."""
    async with target() as server, server.peer() as peer:
        for i in range(3000):
            answer = await peer.call(PATH + "Echo", b"x", token=f"{i:0500d}")
            assert answer.messages == [b"x"]


async def test_requests_that_never_end() -> None:
    """All unfinished requests together hold a bounded number of bytes."""
    limit = 4 << 20
    async with target(request_bytes_total_max=limit) as server:
        refused = 0
        async with server.peer() as one, server.peer() as other:
            for peer in (one, other):
                sids = [peer.start(PATH + "Echo") for _ in range(40)]
                start = message(bytes(1_000_000))[:14_000]
                for sid in sids:
                    peer.send(*[DataFrame(sid, start)] * 10)
            for peer in (one, other):
                await peer.settle()
                refused += sum(isinstance(f, HeadersFrame) for f in peer.seen)
            stats = await server.stats()
            assert limit - 140_000 < stats["request_bytes"] <= limit
            assert refused >= 40
            answer = await one.call(PATH + "Echo", b"whole")
            assert answer.messages == [b"whole"], "a request that is not held is served"


async def test_messages_too_large() -> None:
    """Large messages are refused by their prefix: their bytes are never held."""
    async with (
        target(message_bytes_max=1000, faults_per_second_max=1000) as server,
        server.peer() as peer,
    ):
        for _ in range(200):
            sid = peer.start(PATH + "Echo")
            peer.send(*[DataFrame(sid, message(bytes(1 << 20))[:16_000])] * 2)
            answer = await peer.answer(sid)
            assert answer.status[0] == 8
        assert (await server.stats())["request_bytes"] == 0


async def test_slow_reader_with_a_tiny_window() -> None:
    """A client that reads a byte at a time holds one answer, and the calm client does not wait."""
    async with target() as server, server.peer(settings={4: 1}) as peer:
        sid = peer.start(PATH + "Size", b"1000000")
        for _ in range(500):
            peer.send(WindowUpdateFrame(sid, 1))
            await peer.until(lambda f: isinstance(f, DataFrame))
        assert 999_000 < (await server.stats())["output_bytes"] < 1_000_005


async def test_refused_calls_flood() -> None:
    """Calls refused because of their headers have a limit."""
    async with target(refusals_per_second_max=200) as server, server.peer() as peer:
        fields = request_fields("/no.Where/Is")

        async def attack() -> None:
            peer.send(*(peer.headers(sid, fields, "END_STREAM") for sid in new_sids(peer, 20)))

        assert await sent_away(server, peer, attack) == "too_many_refusals"


def refused_with_long_texts(peer: Peer, count: int) -> bytes:
    """Calls whose refusals repeat a path that takes nine times its bytes there."""
    path = b"/" + b"\xff" * 350 + b"/y"
    fields = [(n.encode(), path if n == ":path" else v.encode()) for n, v in ECHO]
    peer.encoder.encode(ECHO)  # the update of the table's size is said once
    block = peer.encoder.encode(fields, huffman=False)
    return b"".join(
        HeadersFrame(sid, block, flags=["END_HEADERS", "END_STREAM"]).serialize()
        for sid in new_sids(peer, count)
    )


async def test_refusals_that_are_not_read() -> None:
    """A peer that does not read what it provokes is not read from either, until it reads."""
    limit = 1 << 20
    async with (
        target(
            unread_bytes_max=limit, turn_bytes_max=limit // 2, refusals_per_second_max=MANY
        ) as server,
        server.peer() as peer,
    ):
        await peer.call(PATH + "Echo")
        peer.write(refused_with_long_texts(peer, 24_000))
        await server.until(lambda now: now["output_bytes"] > limit)
        for _ in range(20):
            assert (await server.stats())["output_bytes"] < 2 * limit
        assert peer.writer.transport.get_write_buffer_size() > limit
        for _ in range(24_000):
            await peer.until(lambda f: isinstance(f, HeadersFrame))
            peer.seen.clear()
        assert (await peer.call(PATH + "Echo", b"next")).messages == [b"next"]


async def test_refusals_count_as_unread_answers() -> None:
    """Whose refusals fill what all connections share is closed as if they were answers."""
    async with (
        target(output_bytes_total_max=1 << 20, refusals_per_second_max=MANY) as server,
        server.peer() as peer,
    ):
        peer.write(refused_with_long_texts(peer, 24_000))
        await server.until(lambda now: now["refusals"] == {"output_bytes_total_max": 1})


async def test_unread_answers_of_one_connection() -> None:
    """Beyond its limit (the largest not counted) a connection gets no more calls served."""
    async with (
        target(output_bytes_max=2_000_000, faults_per_second_max=1000) as server,
        server.peer(settings={4: 0}) as peer,
    ):
        for _ in range(100):
            peer.start(PATH + "Size", b"500000")
        await peer.settle()
        refused = [f for f in peer.seen if isinstance(f, RstStreamFrame)]
        assert {f.error_code for f in refused} == {7}
        stats = await server.stats()
        assert stats["output_bytes"] <= 2_000_000 + 2 * 500_005
        assert stats["refusals"]["output_bytes_max"] == len(refused) >= 90


async def test_unread_answers_of_all_connections() -> None:
    """Beyond the limit of all, the connection that holds the most is closed."""
    async with (
        target(output_bytes_total_max=10_000_000) as server,
        server.peer(settings={4: 0}) as greedy,
        server.peer(settings={4: 0}) as modest,
    ):
        modest.start(PATH + "Size", b"100000")
        await modest.settle()
        for _ in range(11):
            greedy.start(PATH + "Size", b"1000000")
        await greedy.read_all()
        stats = await server.stats()
        assert stats["output_bytes"] == 100_005
        assert stats["refusals"] == {"output_bytes_total_max": 1}


@pytest.mark.parametrize("settings", [{4: 0}, {4: 2**31 - 1}], ids=["window", "socket"])
async def test_reader_that_stopped(settings: dict[int, int]) -> None:
    """Who reads nothing for too long while answers wait is disconnected."""
    async with (
        target(output_stall_timeout=0.5) as server,
        server.peer(settings=settings) as peer,
    ):
        peer.send(WindowUpdateFrame(0, 2**31 - 1 - 65_535))
        for _ in range(3):
            peer.start(PATH + "Size", b"10000000")
        await server.until(lambda stats: stats["refusals"] == {"output_stall_timeout": 1})


async def test_watchers_that_do_not_read() -> None:
    """Streams that nobody reads say so to those who send, and hold what they were given."""
    async with target() as server, server.peer(settings={4: 100}) as peer:
        sids = [peer.start(PATH + "Chat") for _ in range(500)]
        for _ in range(5):
            for sid in sids:
                peer.send(DataFrame(sid, message(bytes(200))))
        await peer.settle()
        assert (await server.stats())["output_bytes"] == 500 * (5 * 205 - 100)


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
