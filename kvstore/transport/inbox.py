"""Request messages out of DATA frames, however they are cut (gRPC PROTOCOL-HTTP2).

A message is refused by its prefix, before its bytes are kept.
What is kept counts towards the server's total until the message is whole or the call is over.
"""

from kvstore.transport import grpc
from kvstore.transport.api import StatusError
from kvstore.transport.limits import Limits
from kvstore.transport.output import Totals


class Inbox:
    """The unfinished message of one call."""

    __slots__ = ("_held", "_limits", "_need", "_totals")

    def __init__(self, limits: Limits, totals: Totals) -> None:
        self._limits = limits
        self._totals = totals
        self._held = bytearray()
        self._need = 0
        """Bytes of the unfinished message, prefix included, once its prefix is there."""

    @property
    def unfinished(self) -> bool:
        """Is there a part of a message; less than a prefix counts as nothing, as in grpc-go."""
        return len(self._held) >= grpc.PREFIX_BYTES

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that ``data`` completes; raises ``StatusError`` for one that is refused."""
        messages: list[bytes] = []
        position = 0
        if self._held:
            data = self._fill(data)
            if not data:
                return messages
        end = len(data)
        while end - position >= grpc.PREFIX_BYTES:
            stop = position + self._size(data, position)
            if stop > end:
                break
            messages.append(data[position + grpc.PREFIX_BYTES : stop])
            position = stop
        if position < end:
            self._keep(data[position:])
        return messages

    def _fill(self, data: bytes) -> bytes:
        """The held bytes and ``data`` if they complete a message, else nothing, and all is held."""
        self._keep(data)
        if not self._need:
            if len(self._held) < grpc.PREFIX_BYTES:
                return b""
            self._need = self._size(self._held, 0)
        if len(self._held) < self._need:
            return b""
        data = bytes(self._held)
        self.clear()
        return data

    def _keep(self, data: bytes) -> None:
        """Hold bytes of an unfinished message, if the server has room for them."""
        totals = self._totals
        if totals.request_bytes + len(data) > self._limits.request_bytes_total_max:
            raise StatusError(
                grpc.RESOURCE_EXHAUSTED, "grpc: too many bytes of requests in progress"
            )
        totals.request_bytes += len(data)
        self._held += data

    def _size(self, data: bytes | bytearray, position: int) -> int:
        """Bytes of the message at ``position``, with its prefix."""
        prefix: tuple[int, int] = grpc.unpack_prefix(data, position)
        compressed, size = prefix
        limit = self._limits.message_bytes_max
        if size > limit:
            text = f"grpc: received message larger than max ({size} vs. {limit})"
            raise StatusError(grpc.RESOURCE_EXHAUSTED, text)
        if compressed == 1:
            text = "grpc: compressed flag set with identity or empty encoding"
            raise StatusError(grpc.INTERNAL, text)
        if compressed:
            text = f"grpc: received unexpected payload format {compressed}"
            raise StatusError(grpc.INTERNAL, text)
        return size + grpc.PREFIX_BYTES

    def clear(self) -> None:
        """Forget what is held."""
        self._totals.request_bytes -= len(self._held)
        self._held = bytearray()
        self._need = 0
