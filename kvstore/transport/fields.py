"""HPACK without a dynamic table (RFC 7541): header blocks to field lines and back.

A server that advertises SETTINGS_HEADER_TABLE_SIZE = 0 leaves its peer nothing to remember: every
block then means the same whenever it is read, can be looked up by its bytes, and no small block
can unfold into a large one.
An indexed field or name is from the static table; a literal "with incremental indexing" is only a
literal, because a table of size 0 keeps nothing (section 4.4).

Encoding uses literals without indexing and without Huffman: valid for any peer in any state.
Pure: servers and clients use it alike.
"""

from kvstore.transport.huffman import HuffmanError
from kvstore.transport.huffman import decode as decode_huffman

Field = tuple[bytes, bytes]

FIELD_OVERHEAD = 32
"""Added to each field when a list's size is limited (RFC 9113 section 6.5.2)."""

# RFC 7541 appendix A, from index 1.
STATIC_TABLE: tuple[Field, ...] = (
    (b":authority", b""),
    (b":method", b"GET"),
    (b":method", b"POST"),
    (b":path", b"/"),
    (b":path", b"/index.html"),
    (b":scheme", b"http"),
    (b":scheme", b"https"),
    *((b":status", status) for status in b"200 204 206 304 400 404 500".split()),
    (b"accept-charset", b""),
    (b"accept-encoding", b"gzip, deflate"),
    *(
        (name, b"")
        for name in (
            b"accept-language accept-ranges accept access-control-allow-origin age allow "
            b"authorization cache-control content-disposition content-encoding content-language "
            b"content-length content-location content-range content-type cookie date etag expect "
            b"expires from host if-match if-modified-since if-none-match if-range "
            b"if-unmodified-since last-modified link location max-forwards proxy-authenticate "
            b"proxy-authorization range referer refresh retry-after server set-cookie "
            b"strict-transport-security transfer-encoding user-agent vary via www-authenticate"
        ).split()
    ),
)

TABLE_SIZE_ZERO = 0x20
"""A dynamic table size update to 0, as the first byte of a block."""

_INDEX_BY_NAME = {name: i for i, (name, _) in reversed([*enumerate(STATIC_TABLE, 1)])}
_INDEX_BY_FIELD = {field: i for i, field in reversed([*enumerate(STATIC_TABLE, 1)])}

_INTEGER_BYTES_MAX = 4
_STRINGS_MAX = 4096
_STRING_BYTES_MAX = 128
_strings: dict[bytes, bytes] = {}
"""Decoded Huffman strings by their coded form; emptied when it holds ``_STRINGS_MAX``."""


class CompressionError(ValueError):
    """A block that cannot be read: the connection is lost (RFC 9113 section 4.3)."""


class FieldsTooLargeError(ValueError):
    """A readable block with more or larger fields than allowed."""


def encode_integer(value: int, prefix_bits: int, first: int = 0) -> bytes:
    """An integer with a prefix of ``prefix_bits`` in a byte whose other bits are ``first``."""
    mask = (1 << prefix_bits) - 1
    if value < mask:
        return bytes((first | value,))
    out = bytearray((first | mask,))
    value -= mask
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_field(name: bytes, value: bytes) -> bytes:
    """One field line: indexed if the static table has it whole, else a literal without indexing."""
    index = _INDEX_BY_FIELD.get((name, value))
    if index is not None and value:
        return encode_integer(index, 7, 0x80)
    index = _INDEX_BY_NAME.get(name)
    literal = encode_integer(len(value), 7) + value
    if index is not None:
        return encode_integer(index, 4) + literal
    return b"\x00" + encode_integer(len(name), 7) + name + literal


def encode(fields: "list[Field] | tuple[Field, ...]") -> bytes:
    """A header block that changes no table."""
    return b"".join(encode_field(name, value) for name, value in fields)


def _read_integer(block: bytes, position: int, mask: int) -> tuple[int, int]:
    """The integer at ``position`` whose prefix is ``mask``, and where it ends."""
    value = block[position] & mask
    position += 1
    if value < mask:
        return value, position
    for i in range(_INTEGER_BYTES_MAX):
        byte = block[position + i]
        value += (byte & 127) << 7 * i
        if byte < 128:
            return value, position + i + 1
    raise CompressionError("an integer is too long")


def _read_string(block: bytes, position: int) -> tuple[bytes, int]:
    """The string literal at ``position``, and where it ends."""
    coded = block[position] & 0x80
    size, position = _read_integer(block, position, 0x7F)
    end = position + size
    if end > len(block):
        raise CompressionError("a string ends after its block")
    raw = block[position:end]
    if not coded:
        return raw, end
    value = _strings.get(raw)
    if value is None:
        try:
            value = decode_huffman(raw)
        except HuffmanError as error:
            raise CompressionError(str(error)) from error
        if size <= _STRING_BYTES_MAX:
            if len(_strings) >= _STRINGS_MAX:
                _strings.clear()
            _strings[raw] = value
    return value, end


def decode(
    block: bytes, *, count_max: int, bytes_max: int, locate: bytes = b""
) -> tuple[list[Field], tuple[int, int] | None]:
    """The field lines of a block, and the span of the value literal of the field ``locate``.

    The span starts at the literal's length and is None if the field is absent, indexed or there
    more than once.
    Raises ``CompressionError``, also for a dynamic index or a table size other than 0, and
    ``FieldsTooLargeError``.
    """
    try:
        return _decode(block, count_max, bytes_max, locate)
    except IndexError as error:
        raise CompressionError("a field ends after its block") from error


def _decode(
    block: bytes, count_max: int, bytes_max: int, locate: bytes
) -> tuple[list[Field], tuple[int, int] | None]:
    fields: list[Field] = []
    span: tuple[int, int] | None = None
    located = 0
    position = 0
    end = len(block)
    while position < end and block[position] >> 5 == 1:
        size, position = _read_integer(block, position, 0x1F)
        if size:
            raise CompressionError("a table size above ours")
    while position < end:
        first = block[position]
        if first & 0x80:
            index, position = _read_integer(block, position, 0x7F)
            field = _static(index)
        else:
            if first & 0x40:
                index, position = _read_integer(block, position, 0x3F)
            elif first & 0x20:
                raise CompressionError("a table size update inside a block")
            else:
                index, position = _read_integer(block, position, 0x0F)
            name, position = (
                (_static(index)[0], position) if index else _read_string(block, position)
            )
            start = position
            value, position = _read_string(block, position)
            field = (name, value)
            if name == locate:
                located += 1
                span = (start, position)
        fields.append(field)
        bytes_max -= len(field[0]) + len(field[1]) + FIELD_OVERHEAD
        if len(fields) > count_max or bytes_max < 0:
            raise FieldsTooLargeError(f"more than {count_max} fields, or too many bytes")
    return fields, span if located == 1 else None


def _static(index: int) -> Field:
    """The static table's entry ``index``."""
    if not 1 <= index <= len(STATIC_TABLE):
        raise CompressionError(f"index {index} is not in the static table")
    return STATIC_TABLE[index - 1]
