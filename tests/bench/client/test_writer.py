"""What one turn of the loop sends goes out together, in order, and not too late."""

import asyncio

from bench.client.writer import FRAMES_MAX, Writer


class Taking(asyncio.Transport):
    """A transport that keeps each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep it."""
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        """Has it been closed?"""
        return self.closed

    def close(self) -> None:
        """No more writes."""
        self.closed = True


async def test_one_turn_is_one_write() -> None:
    """Nothing goes out before the turn ends, then all of it at once."""
    transport = Taking()
    writer = Writer(transport)
    for piece in (b"a", b"b", b"c"):
        writer.write(piece)
    assert transport.writes == []
    done = asyncio.Event()
    asyncio.get_running_loop().call_soon(done.set)
    await done.wait()
    assert transport.writes == [b"abc"]


async def test_a_long_turn_does_not_hold_the_first_back() -> None:
    """Every so many frames go out by themselves, none twice."""
    transport = Taking()
    writer = Writer(transport)
    for _ in range(2 * FRAMES_MAX + 1):
        writer.write(b"x")
    assert transport.writes == [b"x" * FRAMES_MAX] * 2
    writer.flush()
    assert b"".join(transport.writes) == b"x" * (2 * FRAMES_MAX + 1)


async def test_what_was_written_before_the_end_goes_out() -> None:
    """Closing sends what waits; afterwards nothing is sent."""
    transport = Taking()
    writer = Writer(transport)
    writer.write(b"last")
    writer.close()
    writer.write(b"late")
    writer.flush()
    assert transport.writes == [b"last"]
