"""What the header blocks of answers say: few different ones, looked up by their bytes."""

from kvstore.transport import fields, frames, grpc

_BLOCKS_MAX = 4096
_FIELDS_MAX, _BYTES_MAX = 100, 65_536


class Status:
    """What a header block of an answer says: gRPC code (-1: none yet) and text."""

    __slots__ = ("code", "text")

    def __init__(self, block: bytes) -> None:
        found, _ = fields.decode(block, count_max=_FIELDS_MAX, bytes_max=_BYTES_MAX)
        said = dict(found)
        self.code, self.text = -1, ""
        if b"grpc-status" in said:
            self.code = int(said[b"grpc-status"])
            self.text = grpc.decode_message(said.get(b"grpc-message", b""))
        elif said.get(b":status", b"200") != b"200":
            self.code = grpc.UNAVAILABLE
            self.text = f"HTTP status {said[b':status'].decode()}"


_statuses: dict[bytes, Status] = {}


def status_of(block: bytes) -> Status:
    """Raises ``ConnectionFault`` for a block that cannot be read."""
    found = _statuses.get(block)
    if found is None:
        if len(_statuses) >= _BLOCKS_MAX:
            _statuses.clear()
        try:
            found = _statuses[block] = Status(block)
        except ValueError as error:
            raise frames.ConnectionFault(frames.COMPRESSION_ERROR, str(error)) from error
    return found
