"""Header blocks of requests, as cheap for the server as those of grpc-go.

A server that keeps a dynamic table (etcd) gets the fields that never change inserted into it once
and named by one byte each from then on; one that advertises a table of size 0 gets literals. So
neither pays more for our requests than for kube-apiserver's (RFC 7541 sections 2.3 and 6).
Only ``grpc-timeout`` differs from call to call; it is a literal at the end of each block.
"""

from kvstore.transport import fields, grpc

_STATIC_ENTRIES = 61
_ENTRY_OVERHEAD = 32


class RequestBlocks:
    """The blocks of one connection; inserting fields keeps the order in which they are sent."""

    def __init__(self, *, authority: bytes, table_bytes: int) -> None:
        """``table_bytes`` is the server's SETTINGS_HEADER_TABLE_SIZE; at most 4,096 are used."""
        self._common: tuple[fields.Field, ...] = (
            (b":authority", authority),
            (b"content-type", b"application/grpc"),
            (b"user-agent", b"kvstore-bench"),
            (b"te", b"trailers"),
        )
        size = min(table_bytes, 4096)
        self._room = size
        self._update = _size_update(0) + (_size_update(size) if size else b"")
        """Before the first block: the table is emptied, and is as large as the server allows; one
        that has less than the default insists on being told (section 4.2)."""
        self._inserted: dict[fields.Field, int] = {}
        self._ready: dict[bytes, bytes] = {}

    def block(self, path: bytes) -> bytes:
        """The block of a call of ``path``, without its ``grpc-timeout``.

        What is returned must be sent, and in this order: it may insert fields.
        """
        ready = self._ready.get(path)
        if ready is not None:
            return ready
        wanted = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", path), *self._common)
        before, update = len(self._inserted), self._update
        block = update + b"".join([self._field(field) for field in wanted])
        self._update = b""
        if update or len(self._inserted) != before:
            self._ready.clear()  # every insertion moves the numbers of the others
        else:
            self._ready[path] = block
        return block

    def _field(self, field: fields.Field) -> bytes:
        if field in fields.STATIC_TABLE:
            return fields.encode_field(*field)
        at = self._inserted.get(field)
        if at is not None:
            return fields.encode_integer(_STATIC_ENTRIES + len(self._inserted) - at, 7, 0x80)
        name, value = field
        size = len(name) + len(value) + _ENTRY_OVERHEAD
        if size > self._room:
            return fields.encode_field(name, value)
        self._room -= size
        self._inserted[field] = len(self._inserted)
        text = [fields.encode_integer(len(part), 7) + part for part in field]
        return b"\x40" + b"".join(text)


def _size_update(size: int) -> bytes:
    return fields.encode_integer(size, 5, 0x20)


def timeout_field(timeout_us: int) -> bytes:
    """``grpc-timeout`` in microseconds, or in what takes eight digits, as a literal."""
    value = b"%du" % timeout_us if timeout_us < 10**8 else grpc.encode_timeout(timeout_us / 1e6)
    return _TIMEOUT_NAME + bytes((len(value),)) + value


_TIMEOUT_NAME = b"\x00" + bytes((len(b"grpc-timeout"),)) + b"grpc-timeout"
