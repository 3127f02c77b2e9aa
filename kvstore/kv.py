"""Encoding of KeyValues, events and headers by hand, as bytes that can be shared and joined.

Building a protobuf message object per key costs 8 us; a range answer made of ready byte strings is
one join. Every KeyValue is kept **framed**: the tag of field 2, its length, the encoded
``mvccpb.KeyValue``. Field 2 is where etcd's messages hold a KeyValue most often
(``RangeResponse.kvs``, ``PutResponse.prev_kv``, ``Event.kv``); in field 3 (``Event.prev_kv``,
``DeleteRangeResponse.prev_kvs``) only the first byte differs.

The wire format is protobuf's (https://protobuf.dev/programming-guides/encoding/): zero fields are
left out, negative int64 are ten bytes. Tests compare every function with the protobuf library.
"""

from collections.abc import Iterable

_LOW = tuple(bytes([n]) for n in range(128))
_HIGH = tuple(bytes([n | 0x80]) for n in range(128))
_SHORT = tuple(_LOW[n] if n < 128 else _HIGH[n & 127] + _LOW[n >> 7] for n in range(1 << 14))
_CONTINUED = tuple(_HIGH[n & 127] + _HIGH[n >> 7] for n in range(1 << 14))
_MASK_64 = (1 << 64) - 1


def varint(number: int) -> bytes:
    """``number`` (int64 or uint64) as a base-128 varint."""
    if 0 <= number < 1 << 14:
        return _SHORT[number]
    if number < 0:
        number &= _MASK_64
    if number < 1 << 28:
        return _CONTINUED[number & 0x3FFF] + _SHORT[number >> 14]
    out = b""
    while number >= 1 << 14:
        out += _CONTINUED[number & 0x3FFF]
        number >>= 14
    return out + _SHORT[number]


def frame(tag: bytes, body: bytes) -> bytes:
    """A length-delimited field: ``tag`` (one byte), the length, ``body``."""
    return tag + varint(len(body)) + body


def frame_key_value(
    key: bytes, create_revision: int, mod_revision: int, version: int, value: bytes, lease: int
) -> bytes:
    """A framed KeyValue. ``create_revision`` and ``version`` are positive, ``value`` may be
    empty.
    """
    mod = varint(mod_revision)
    create = mod if create_revision == mod_revision else varint(create_revision)
    head = b"\x0a%b%b\x10%b\x18%b\x20%b" % (varint(len(key)), key, create, mod, varint(version))
    if value:
        length = varint(len(value))
        if lease:
            tail = b"\x30" + varint(lease)
            size = len(head) + 1 + len(length) + len(value) + len(tail)
            return b"\x12%b%b\x2a%b%b%b" % (varint(size), head, length, value, tail)
        size = len(head) + 1 + len(length) + len(value)
        return b"\x12%b%b\x2a%b%b" % (varint(size), head, length, value)
    if lease:
        head += b"\x30" + varint(lease)
    return b"\x12" + varint(len(head)) + head


def frame_tombstone(key: bytes, mod_revision: int) -> bytes:
    """The framed KeyValue of a DELETE event: key and mod_revision only, as etcd sends it."""
    head = b"\x0a%b%b\x18%b" % (varint(len(key)), key, varint(mod_revision))
    return b"\x12" + varint(len(head)) + head


def as_field_3(framed: bytes) -> bytes:
    """The same KeyValue as field 3 of its message."""
    return b"\x1a" + framed[1:]


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The varint at ``at`` and the position after it."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7


def value_of(framed: bytes) -> bytes:
    """The value inside a framed KeyValue made by ``frame_key_value``; empty when it has none."""
    _, at = _read_varint(framed, 1)
    while at < len(framed):
        tag = framed[at]
        number, at = _read_varint(framed, at + 1)
        if tag == 0x2A:
            return framed[at : at + number]
        if tag == 0x0A:
            at += number
    return b""


def frame_put_event(framed: bytes, previous: bytes | None) -> bytes:
    """``WatchResponse.events`` entry (field 11) of a put; ``previous`` is a framed KeyValue or
    None.
    """
    if previous is None:
        return b"\x5a" + varint(len(framed)) + framed
    return b"\x5a%b%b\x1a%b" % (varint(len(framed) + len(previous)), framed, previous[1:])


def frame_delete_event(framed: bytes, previous: bytes | None) -> bytes:
    """``WatchResponse.events`` entry (field 11) of a delete; ``framed`` is a tombstone."""
    if previous is None:
        return b"\x5a%b\x08\x01%b" % (varint(len(framed) + 2), framed)
    return b"\x5a%b\x08\x01%b\x1a%b" % (
        varint(len(framed) + len(previous) + 2),
        framed,
        previous[1:],
    )


class Header:
    """Makes encoded ResponseHeaders (field 1 of nearly every answer) of one member.

    ``cluster_id`` and ``member_id`` are unsigned 64 bit and not zero; ``raft_term`` is positive:
    clients check that it never goes back, so the store's epoch serves.
    """

    def __init__(self, *, cluster_id: int, member_id: int, raft_term: int) -> None:
        self.cluster_id = cluster_id
        self.member_id = member_id
        self.raft_term = raft_term
        self._ids = b"\x08" + varint(cluster_id) + b"\x10" + varint(member_id)
        self._term = b"\x20" + varint(raft_term)
        self._last_revision = -1
        self._last = b""

    def at(self, revision: int) -> bytes:
        """The framed header with ``revision`` (0 leaves the field out)."""
        if revision != self._last_revision:
            middle = b"\x18" + varint(revision) if revision else b""
            body = self._ids + middle + self._term
            self._last = b"\x0a" + varint(len(body)) + body
            self._last_revision = revision
        return self._last


def revision_header(revision: int) -> bytes:
    """The header inside a Txn's sub-answers: only the revision, as etcd sends it."""
    body = b"\x18" + varint(revision)
    return b"\x0a" + varint(len(body)) + body


def prefix_end(prefix: bytes) -> bytes:
    r"""The first key after every key that starts with ``prefix``; ``b"\\0"`` (no end) when there is
    none.
    """
    stripped = prefix.rstrip(b"\xff")
    if not stripped:
        return b"\0"
    return stripped[:-1] + bytes([stripped[-1] + 1])


def joined_size(parts: Iterable[bytes]) -> int:
    """Total bytes of ``parts``."""
    return sum(map(len, parts))
