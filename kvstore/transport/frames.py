"""HTTP/2 frames as bytes (RFC 9113 section 4 and 6): numbers, the nine-byte header, small frames.

Pure: no sockets, no state; servers and clients use it alike.
A frame header is read as one struct of three numbers, ``(length << 8 | type, flags, stream)``: one
call instead of five slices, which is what a small call is made of.
"""

import struct
from collections.abc import Iterator, Sequence

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_BYTES = 9

DATA = 0x0
HEADERS = 0x1
PRIORITY = 0x2
RST_STREAM = 0x3
SETTINGS = 0x4
PUSH_PROMISE = 0x5
PING = 0x6
GOAWAY = 0x7
WINDOW_UPDATE = 0x8
CONTINUATION = 0x9

END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITY_FLAG = 0x20

HEADER_TABLE_SIZE = 0x1
ENABLE_PUSH = 0x2
MAX_CONCURRENT_STREAMS = 0x3
INITIAL_WINDOW_SIZE = 0x4
MAX_FRAME_SIZE = 0x5
MAX_HEADER_LIST_SIZE = 0x6

NO_ERROR = 0x0
PROTOCOL_ERROR = 0x1
INTERNAL_ERROR = 0x2
FLOW_CONTROL_ERROR = 0x3
SETTINGS_TIMEOUT = 0x4
STREAM_CLOSED = 0x5
FRAME_SIZE_ERROR = 0x6
REFUSED_STREAM = 0x7
CANCEL = 0x8
COMPRESSION_ERROR = 0x9
ENHANCE_YOUR_CALM = 0xB

WINDOW_MAX = 2**31 - 1
DEFAULT_WINDOW = 65_535
FRAME_BYTES_MIN = 16_384
FRAME_BYTES_MAX = 2**24 - 1
STREAM_MASK = 2**31 - 1

_header = struct.Struct(">IBI")
_setting = struct.Struct(">HI")
_u32 = struct.Struct(">I")

unpack_header = _header.unpack_from
"""``(length << 8 | type, flags, stream)`` of the frame at an offset, the reserved bit left in."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame of type ``kind``."""
    return _header.pack(len(payload) << 8 | kind, flags, stream) + payload


def header(kind: int, flags: int, stream: int, length: int) -> bytes:
    """The nine bytes before a payload of ``length`` bytes."""
    return _header.pack(length << 8 | kind, flags, stream)


def settings(values: Sequence[tuple[int, int]]) -> bytes:
    """A SETTINGS frame of (identifier, value) pairs."""
    return frame(SETTINGS, 0, 0, b"".join(_setting.pack(*pair) for pair in values))


def iter_settings(payload: bytes) -> Iterator[tuple[int, int]]:
    """The pairs of a SETTINGS payload, whose length must be a multiple of six."""
    return _setting.iter_unpack(payload)


SETTINGS_ACK = frame(SETTINGS, ACK, 0)


def window_update(stream: int, increment: int) -> bytes:
    """Credit of ``increment`` bytes for a stream, or for the connection as stream 0."""
    return _header.pack(4 << 8 | WINDOW_UPDATE, 0, stream) + _u32.pack(increment)


def reset(stream: int, code: int) -> bytes:
    """RST_STREAM."""
    return _header.pack(4 << 8 | RST_STREAM, 0, stream) + _u32.pack(code)


def ping(payload: bytes, flags: int = 0) -> bytes:
    """PING of eight bytes; ``flags`` may be ``ACK``."""
    return _header.pack(8 << 8 | PING, flags, 0) + payload


def goaway(last_stream: int, code: int, debug: bytes = b"") -> bytes:
    """GOAWAY; streams above ``last_stream`` were not and will not be processed."""
    return frame(GOAWAY, 0, 0, _u32.pack(last_stream) + _u32.pack(code) + debug)


def headers(stream: int, block: bytes, *, end_stream: bool, frame_bytes_max: int) -> bytes:
    """HEADERS, with CONTINUATION frames if the block is larger than the peer's frames may be."""
    flags = END_STREAM if end_stream else 0
    if len(block) <= frame_bytes_max:
        return frame(HEADERS, flags | END_HEADERS, stream, block)
    pieces = [block[i : i + frame_bytes_max] for i in range(0, len(block), frame_bytes_max)]
    return b"".join(
        [
            frame(HEADERS, flags, stream, pieces[0]),
            *(frame(CONTINUATION, 0, stream, piece) for piece in pieces[1:-1]),
            frame(CONTINUATION, END_HEADERS, stream, pieces[-1]),
        ]
    )


class ConnectionFault(Exception):  # noqa: N818 - RFC 9113's "connection error" is not our failure
    """The peer broke a rule or a limit: GOAWAY and the end (RFC 9113 section 5.4.1)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class StreamFault(Exception):  # noqa: N818 - likewise
    """Likewise on one stream: RST_STREAM (section 5.4.2)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


def unpad(flags: int, payload: bytes) -> bytes:
    """The payload of a DATA or HEADERS frame without its padding (section 6.1)."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(PROTOCOL_ERROR, "padding is longer than its frame")
    return payload[1 : len(payload) - payload[0]]


def check_setting(name: int, value: int) -> None:
    """Raises ``ConnectionFault`` for a value that a setting must not have (section 6.5.2)."""
    if name == ENABLE_PUSH and value > 1:
        raise ConnectionFault(PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")
    if name == INITIAL_WINDOW_SIZE and value > WINDOW_MAX:
        raise ConnectionFault(FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE is too large")
    if name == MAX_FRAME_SIZE and not FRAME_BYTES_MIN <= value <= FRAME_BYTES_MAX:
        raise ConnectionFault(PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of bounds")
