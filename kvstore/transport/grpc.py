"""gRPC over HTTP/2 as bytes: message prefix, timeouts, percent-encoding, status blocks.

Facts are from gRPC's PROTOCOL-HTTP2.md; texts of refusals are grpc-go's, because clients match on
them.
Pure: servers and clients use it alike.
"""

import binascii
import math
import re
import struct

from kvstore.transport import fields

OK = 0
CANCELLED = 1
UNKNOWN = 2
INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
RESOURCE_EXHAUSTED = 8
UNIMPLEMENTED = 12
INTERNAL = 13
UNAVAILABLE = 14

STATUS_TEXT_BYTES_MAX = 1024
"""Of a status' text; the rest is cut off: some texts repeat what the client has sent."""
PREFIX_BYTES = 5
MESSAGE_BYTES_MAX = 2**32 - 1

_prefix = struct.Struct(">BI")
unpack_prefix = _prefix.unpack_from
"""``(compressed, length)`` of the message at an offset."""


def prefix(size: int) -> bytes:
    """The five bytes before an uncompressed message of ``size`` bytes."""
    return _prefix.pack(0, size)


_SECONDS_BY_UNIT = {
    ord("H"): 3600.0,
    ord("M"): 60.0,
    ord("S"): 1.0,
    ord("m"): 1e-3,
    ord("u"): 1e-6,
    ord("n"): 1e-9,
}
_PER_SECOND = tuple(zip(b"numSMH", (1e9, 1e6, 1e3, 1.0, 1 / 60, 1 / 3600), strict=True))
_TIMEOUT_BYTES_MAX = 9


def quote(value: bytes) -> str:
    """A string as Go's ``%q`` shows it, near enough for messages; of a long one its beginning."""
    text = value[:STATUS_TEXT_BYTES_MAX].decode("utf-8", "replace")
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text) + '"'


def parse_timeout(value: bytes) -> float:
    """Seconds of a ``grpc-timeout``: up to eight digits and a unit.

    Raises ``ValueError`` with grpc-go's text.
    """
    if len(value) < 2:
        raise ValueError(f"transport: timeout string is too short: {quote(value)}")
    if len(value) > _TIMEOUT_BYTES_MAX:
        raise ValueError(f"transport: timeout string is too long: {quote(value)}")
    unit = _SECONDS_BY_UNIT.get(value[-1])
    if unit is None:
        raise ValueError(f"transport: timeout unit is not recognized: {quote(value)}")
    digits = value[:-1]
    if not digits.isdigit():
        raise ValueError(f"strconv.ParseUint: parsing {quote(digits)}: invalid syntax")
    return int(digits) * unit


def encode_timeout(seconds: float) -> bytes:
    """A ``grpc-timeout`` of at least ``seconds``, in the finest unit that takes eight digits."""
    for unit, per_second in _PER_SECOND:
        count = math.ceil(seconds * per_second)
        if count < 10**8:
            return b"%d%c" % (max(count, 0), unit)
    return b"99999999H"


_BASE64 = re.compile(rb"[A-Za-z0-9+/]*")
_UNSAFE = re.compile(rb"[^ -$&-~]")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_ESCAPED = [b"%%%02X" % i if _UNSAFE.match(b"%c" % i) else b"%c" % i for i in range(256)]


def encode_message(text: str) -> bytes:
    """``grpc-message``: UTF-8 with everything but printable ASCII, and ``%``, percent-encoded."""
    raw = text.encode("utf-8", "replace")
    return b"".join(map(_ESCAPED.__getitem__, raw)) if _UNSAFE.search(raw) else raw


def decode_message(value: bytes) -> str:
    """The text behind a ``grpc-message``; what is not valid stays as it is."""
    raw = _ESCAPE.sub(lambda m: bytes((int(m[1], 16),)), value)
    return raw.decode("utf-8", "replace")


def decode_binary(value: bytes) -> bytes:
    """The bytes of a ``-bin`` header: base64, padded or not; raises ``ValueError``."""
    try:
        return binascii.a2b_base64(value + b"=" * (-len(value) % 4), strict_mode=True)
    except binascii.Error as error:
        end = _BASE64.match(value)
        raise ValueError(f"illegal base64 data at input byte {end.end() if end else 0}") from error


def encode_binary(value: bytes) -> bytes:
    """The value of a ``-bin`` header, unpadded as the specification prefers."""
    return binascii.b2a_base64(value, newline=False).rstrip(b"=")


RESPONSE_BLOCK = fields.encode([(b":status", b"200"), (b"content-type", b"application/grpc")])
"""Headers of every answer that has a message."""

TRAILER_BLOCK_OK = fields.encode([(b"grpc-status", b"0")])
"""Trailers of every answer that is OK."""


def trailer_block(code: int, message: str) -> bytes:
    """Trailers of an answer that ends with a status."""
    if not code and not message:
        return TRAILER_BLOCK_OK
    status: list[fields.Field] = [(b"grpc-status", b"%d" % code)]
    if message:
        status.append((b"grpc-message", _cut(encode_message(message[:STATUS_TEXT_BYTES_MAX]))))
    return fields.encode(status)


def _cut(value: bytes) -> bytes:
    """The beginning of a ``grpc-message`` that is too long, without a part of an escape."""
    if len(value) <= STATUS_TEXT_BYTES_MAX:
        return value
    value = value[:STATUS_TEXT_BYTES_MAX]
    return value[: value.rindex(b"%")] if b"%" in value[-2:] else value


def refusal_block(code: int, message: str, http_status: int = 200) -> bytes:
    """Headers and trailers in one block, for an answer without a message ("Trailers-Only")."""
    head = fields.encode(
        [(b":status", b"%d" % http_status), (b"content-type", b"application/grpc")]
    )
    return head + trailer_block(code, message)


DEADLINE_BLOCK = refusal_block(DEADLINE_EXCEEDED, "context deadline exceeded")
"""What grpc-go's server answers to a call whose time is up before it begins."""
