"""A transport's stream that a test holds in its hands."""

from collections.abc import Callable, Sequence

from kvstore.transport.api import StatusError, Stream, StreamSink


class HandStream:
    """Keeps what is sent; ``outbox_bytes`` is what the test says."""

    peer = "test"
    deadline = None
    cancelled = False
    blocked = False

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.status: tuple[int, str] | None = None
        self.outbox_bytes = 0

    def metadata(self, name: bytes, /) -> bytes | None:
        """None is sent."""
        return None

    def send(self, parts: Sequence[bytes], size: int, /) -> None:
        """One message, dropped after ``finish``."""
        message = b"".join(parts)
        assert len(message) == size, "the size is that of the parts"
        if self.status is None:
            self.sent.append(message)

    def finish(self, code: int = 0, message: str = "", /) -> None:
        """The first status counts."""
        if self.status is None:
            self.status = (code, message)


def deliver(sink: StreamSink, stream: HandStream, message: bytes) -> None:
    """Give the sink a message as the transport does."""
    try:
        sink.message(message)
    except StatusError as error:
        stream.finish(error.code, error.message)


def opened(handler: Callable[[Stream], StreamSink]) -> tuple[HandStream, StreamSink]:
    """A new stream and what the handler makes of it."""
    stream = HandStream()
    return stream, handler(stream)
