"""The far end of a client's connection: h2 as a server that says what a test tells it to.

h2 is strict: whatever breaks RFC 9113, a window that is overrun included, ends the test.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import cast

import h2.config
import h2.connection
import h2.events
import h2.settings
from h2.settings import SettingCodes
from hyperframe.frame import Frame

from bench.client.connection import WINDOW_BYTES, Connection
from tests.transport.peer import message, messages
from tests.transport.running import eventually

OK = [(":status", "200"), ("content-type", "application/grpc")]
GOOD_END = [("grpc-status", "0")]
PATH = b"/test.Service/Echo"
LONG_US = 60_000_000

Answer = tuple[int, bytes, str]


class Far(asyncio.Protocol):
    """One connection; a test reads ``received`` and speaks through ``h2`` and ``flush``."""

    def __init__(self, settings: dict[SettingCodes, int], *, renew: bool) -> None:
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding=None)
        )
        self.h2.local_settings = h2.settings.Settings(client=False, initial_values=settings)
        self.renew = renew
        """Give credit for what comes, at once."""
        self.headers: dict[int, dict[bytes, bytes]] = {}
        self.received: dict[int, bytes] = defaultdict(bytes)
        self.ended: list[int] = []
        self.resets: dict[int, int] = {}
        self.acknowledged = 0
        self.pongs: list[bytes] = []
        self.goodbye = False
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self.transport = cast("asyncio.Transport", transport)
        self.h2.initiate_connection()
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note it."""
        self.lost = True

    def flush(self) -> None:
        """Send what h2 has to say."""
        self.transport.write(self.h2.data_to_send())

    def frame(self, *frames: Frame) -> None:
        """Send frames behind h2's back."""
        self.transport.write(b"".join(frame.serialize() for frame in frames))

    def data_received(self, data: bytes) -> None:
        """Note what happened."""
        for event in self.h2.receive_data(data):
            match event:
                case h2.events.RequestReceived():
                    fields = event.headers or []
                    self.headers[event.stream_id] = {bytes(f[0]): bytes(f[1]) for f in fields}
                case h2.events.DataReceived():
                    self.received[event.stream_id] += event.data
                    if self.renew and event.flow_controlled_length:
                        self.credit(event.stream_id, event.flow_controlled_length)
                case h2.events.StreamEnded():
                    self.ended.append(event.stream_id)
                case h2.events.StreamReset():
                    self.resets[event.stream_id] = event.error_code
                case h2.events.SettingsAcknowledged():
                    self.acknowledged += 1
                case h2.events.PingAckReceived():
                    self.pongs.append(event.ping_data)
                case h2.events.ConnectionTerminated():
                    self.goodbye = True
        self.flush()

    def credit(self, stream: int, size: int) -> None:
        """For one stream and the connection."""
        self.h2.increment_flow_control_window(size)
        if stream not in self.ended and stream not in self.resets:
            self.h2.increment_flow_control_window(size, stream)
        self.flush()

    def requests(self, stream: int) -> list[bytes]:
        """The messages of a stream so far."""
        return messages(self.received[stream])

    def begin(self, stream: int) -> None:
        """The headers of an answer."""
        self.h2.send_headers(stream, OK)
        self.flush()

    def data(self, stream: int, raw: bytes, **options: int) -> None:
        """Bytes of an answer that fit the window."""
        self.h2.send_data(stream, raw, pad_length=options.get("pad_length"))
        self.flush()

    def end(self, stream: int, fields: Sequence[tuple[str, str]] = tuple(GOOD_END)) -> None:
        """The trailers of an answer."""
        self.h2.send_headers(stream, list(fields), end_stream=True)
        self.flush()

    def answer(self, stream: int, body: bytes) -> None:
        """All of an answer that is OK."""
        self.begin(stream)
        self.data(stream, message(body))
        self.end(stream)


class Taking:
    """A sink that notes what it is told."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.ends: list[tuple[int, str]] = []
        self.on_message: Callable[[], None] = lambda: None

    def message(self, message: bytes, received_us: int, /) -> None:
        """Note it."""
        assert received_us > 0
        assert not self.ends, "a message after the end"
        self.messages.append(message)
        self.on_message()

    def ended(self, code: int, text: str, /) -> None:
        """Note it."""
        self.ends.append((code, text))


class Near:
    """The connection under test with its far end; ``call`` notes answers by name."""

    def __init__(self, connection: Connection, far: Far, notes: dict[str, int]) -> None:
        self.connection = connection
        self.far = far
        self.notes = notes
        """How often it was told to be ready, and lost."""
        self.answers: dict[str, list[Answer]] = defaultdict(list)

    def call(self, name: str, body: bytes = b"", timeout_us: int = LONG_US) -> None:
        """A unary call whose answers are noted."""

        def answered(code: int, raw: bytes, text: str) -> None:
            self.answers[name].append((code, raw, text))

        self.connection.call(PATH, body, answered, timeout_us)

    async def answered(self, *names: str) -> list[Answer]:
        """The answers of calls, once each has one."""
        await eventually(lambda: all(self.answers[name] for name in names))
        assert [1] * len(names) == [len(self.answers[name]) for name in names]
        return [self.answers[name][0] for name in names]


@asynccontextmanager
async def meeting(
    settings: dict[SettingCodes, int] | None = None,
    *,
    renew: bool = True,
    window_bytes: int = WINDOW_BYTES,
) -> AsyncIterator[Near]:
    """A connection that is ready, and its far end; at the end everything has been told once."""
    loop = asyncio.get_running_loop()
    notes = {"ready": 0, "lost": 0}

    def note(what: str) -> Callable[[], None]:
        def told() -> None:
            notes[what] += 1

        return told

    far = Far(settings or {}, renew=renew)
    server = await loop.create_server(lambda: far, "127.0.0.1", 0)
    connection = Connection("far", note("ready"), note("lost"), window_bytes=window_bytes)
    near = Near(connection, far, notes)
    try:
        port = server.sockets[0].getsockname()[1]
        await loop.create_connection(lambda: connection, "127.0.0.1", port)
        await eventually(lambda: connection.usable)
        yield near
        connection.close()
        await eventually(lambda: connection.lost and far.lost)
        assert notes == {"ready": 1, "lost": 1}
        assert all(len(answers) == 1 for answers in near.answers.values())
    finally:
        far.transport.abort()
        server.close()
