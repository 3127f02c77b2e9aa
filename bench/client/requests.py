"""Requests in kube-apiserver's shapes, encoded by hand: a Txn of protobuf objects costs more to
build than the rest of a call costs to send.

Field numbers are those of etcd's ``rpc.proto``; tests compare every function with protobuf.
"""

RANGE = b"/etcdserverpb.KV/Range"
TXN = b"/etcdserverpb.KV/Txn"
COMPACT = b"/etcdserverpb.KV/Compact"
RANGE_STREAM = b"/etcdserverpb.KV/RangeStream"
WATCH = b"/etcdserverpb.Watch/Watch"
GRANT = b"/etcdserverpb.Lease/LeaseGrant"
STATUS = b"/etcdserverpb.Maintenance/Status"


def varint(value: int) -> bytes:
    """A protobuf varint of a number that is not negative."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(tag: bytes, raw: bytes) -> bytes:
    return tag + varint(len(raw)) + raw


def _number(tag: bytes, value: int) -> bytes:
    return tag + varint(value) if value else b""


def _if_modified_at(key: bytes, revision: int) -> bytes:
    """Compare: MOD(key) = revision."""
    compare = b"\x10\x02" + _field(b"\x1a", key) + b"\x30" + varint(revision)
    return _field(b"\x0a", compare)


def _put(key: bytes, value: bytes, lease: int) -> bytes:
    """Then: put."""
    put = _field(b"\x0a", key) + _field(b"\x12", value) + _number(b"\x18", lease)
    return _field(b"\x12", _field(b"\x12", put))


def _else_read(key: bytes) -> bytes:
    """Else: range."""
    return _field(b"\x1a", _field(b"\x0a", _field(b"\x0a", key)))


def create(key: bytes, value: bytes, lease: int = 0) -> bytes:
    """Txn: if the key is absent then put."""
    return _if_modified_at(key, 0) + _put(key, value, lease)


def update(key: bytes, value: bytes, revision: int, lease: int = 0) -> bytes:
    """Txn: if the key was last modified at ``revision`` then put, else read it."""
    return _if_modified_at(key, revision) + _put(key, value, lease) + _else_read(key)


def delete(key: bytes, revision: int) -> bytes:
    """Txn: if the key was last modified at ``revision`` then delete, else read it."""
    deletion = _field(b"\x12", _field(b"\x1a", _field(b"\x0a", key)))
    return _if_modified_at(key, revision) + deletion + _else_read(key)


def compact_cas(key: bytes, value: bytes, version: int) -> bytes:
    """Txn: if the key has had ``version`` versions then put, else read it."""
    compare = b"\x10\x00" + _field(b"\x1a", key) + b"\x20" + varint(version)
    return _field(b"\x0a", compare) + _put(key, value, 0) + _else_read(key)


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
