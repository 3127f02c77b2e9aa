"""What is under way on one HTTP/2 connection: calls and streams, and what waits to be sent."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

Answered = Callable[[int, bytes, str], None]
"""gRPC code, message (empty unless the code is OK) and text of the error."""


class Sink(Protocol):
    """The receiving end of a stream."""

    def message(self, message: bytes, received_us: int, /) -> None:
        """One whole message."""

    def ended(self, code: int, text: str, /) -> None:
        """The stream is over; called once."""


class Exchange:
    """One call or stream that is not over."""

    __slots__ = (
        "answered",
        "credit",
        "deadline_us",
        "have",
        "over",
        "parts",
        "sink",
        "unread",
        "wanted",
    )

    def __init__(self, answered: Answered | None, sink: Sink | None, deadline_us: int) -> None:
        self.answered = answered
        self.sink = sink
        self.deadline_us = deadline_us
        self.over = False
        self.parts: list[bytes] = []
        """What has come of a message that is not whole."""
        self.have = 0
        """Bytes in ``parts`` of a stream."""
        self.wanted = 0
        """Bytes of a stream's message that is not whole; 0: its length is not known."""
        self.credit = 0
        """To be granted; negative: granted in advance."""
        self.unread = 0
        """Bytes of whole messages for which the sink has not granted credit yet."""


class Unsent:
    """What windows do not take yet of a stream that this side is still sending."""

    __slots__ = ("end", "position", "raw")

    def __init__(self, raw: bytes, *, end: bool) -> None:
        self.raw = raw
        self.position = 0
        self.end = end


class Held(NamedTuple):
    """A call that waits for another to be over."""

    path: bytes
    message: bytes
    exchange: Exchange
