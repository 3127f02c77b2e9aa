"""Requests in kube-apiserver's shapes, encoded by hand: a Txn of protobuf objects costs more to
build than the rest of a call costs to send.

Field numbers are those of etcd's ``rpc.proto``; tests compare every function with protobuf.
"""

from functools import lru_cache
from typing import NamedTuple

RANGE = b"/etcdserverpb.KV/Range"
TXN = b"/etcdserverpb.KV/Txn"
COMPACT = b"/etcdserverpb.KV/Compact"
RANGE_STREAM = b"/etcdserverpb.KV/RangeStream"
WATCH = b"/etcdserverpb.Watch/Watch"
GRANT = b"/etcdserverpb.Lease/LeaseGrant"
STATUS = b"/etcdserverpb.Maintenance/Status"


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_SMALL = tuple(map(_varint, range(8192)))


def varint(value: int) -> bytes:
    """A protobuf varint of a number that is not negative."""
    return _SMALL[value] if value < len(_SMALL) else _varint(value)


def _field(tag: bytes, raw: bytes) -> bytes:
    return tag + varint(len(raw)) + raw


def _number(tag: bytes, value: int) -> bytes:
    return tag + varint(value) if value else b""


class _Parts(NamedTuple):
    """What is the same in all Txns on one key."""

    compare: bytes
    """MOD(key) = ..., without the revision."""
    key: bytes
    """The key as a field."""
    else_read: bytes
    """Else: range."""


@lru_cache(maxsize=65_536)
def _parts(key: bytes) -> _Parts:
    field = _field(b"\x0a", key)
    compare = b"\x10\x02" + _field(b"\x1a", key) + b"\x30"
    return _Parts(compare, field, _field(b"\x1a", _field(b"\x0a", field)))


def _put(key: bytes, value: bytes, lease: int) -> list[bytes]:
    """Then: put; ``key`` is a field."""
    length = varint(len(value))
    attached = _number(b"\x18", lease)
    put_size = len(key) + 1 + len(length) + len(value) + len(attached)
    put_length = varint(put_size)
    operation = 1 + len(put_length) + put_size
    return [
        b"\x12" + varint(operation) + b"\x12" + put_length + key + b"\x12" + length,
        value,
        attached,
    ]


def _if_modified_at(compare: bytes, revision: int) -> bytes:
    """Compare: MOD(key) = revision."""
    number = varint(revision)
    return b"\x0a" + varint(len(compare) + len(number)) + compare + number


def create(key: bytes, value: bytes, lease: int = 0) -> bytes:
    """Txn: if the key is absent then put."""
    parts = _parts(key)
    return b"".join([_if_modified_at(parts.compare, 0), *_put(parts.key, value, lease)])


def update(key: bytes, value: bytes, revision: int, lease: int = 0) -> bytes:
    """Txn: if the key was last modified at ``revision`` then put, else read it."""
    compare, field, else_read = _parts(key)
    put = _put(field, value, lease)
    return b"".join([_if_modified_at(compare, revision), *put, else_read])


def delete(key: bytes, revision: int) -> bytes:
    """Txn: if the key was last modified at ``revision`` then delete, else read it."""
    parts = _parts(key)
    deletion = _field(b"\x12", _field(b"\x1a", parts.key))
    return _if_modified_at(parts.compare, revision) + deletion + parts.else_read


def compact_cas(key: bytes, value: bytes, version: int) -> bytes:
    """Txn: if the key has had ``version`` versions then put, else read it."""
    compare = b"\x10\x00" + _field(b"\x1a", key) + b"\x20" + varint(version)
    parts = _parts(key)
    return b"".join([_field(b"\x0a", compare), *_put(parts.key, value, 0), parts.else_read])


def read(
    key: bytes, range_end: bytes = b"", *, limit: int = 0, revision: int = 0, count: bool = False
) -> bytes:
    """Range of a key, or of ``[key, range_end)``."""
    return (
        _field(b"\x0a", key)
        + (_field(b"\x12", range_end) if range_end else b"")
        + _number(b"\x18", limit)
        + _number(b"\x20", revision)
        + (b"\x48\x01" if count else b"")
    )


def compact(revision: int) -> bytes:
    """Compact, not waiting for storage."""
    return _number(b"\x08", revision)


def grant(ttl: int) -> bytes:
    """LeaseGrant of ``ttl`` seconds with an id of the server's choice."""
    return _number(b"\x08", ttl)


def prefix_end(prefix: bytes) -> bytes:
    """The end of the range of all keys that start with ``prefix``; ``\\0`` (no end) for none."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes((stripped[-1] + 1,)) if stripped else b"\0"
