"""Request messages out of DATA frames, however they are cut (gRPC PROTOCOL-HTTP2).

A message is refused by its prefix, before its bytes are kept.
What is kept counts towards the server's total until the message is whole or the call is over, as do
the headers of a call that are too large to be remembered by a template.

When the total is reached, a connection that holds more than its even share is refused more.
For any other, those that hold the most give way: their unfinished requests are ended until an
eighth of the total is free, so that much must be sent before it happens again.
"""

from abc import ABC, abstractmethod

from kvstore.transport import grpc
from kvstore.transport.api import StatusError
from kvstore.transport.limits import Limits
from kvstore.transport.output import Totals

NO_ROOM = "grpc: too many bytes of requests in progress"


class NoRoomError(StatusError):
    """All unfinished requests together hold too much already."""

    def __init__(self) -> None:
        super().__init__(grpc.RESOURCE_EXHAUSTED, NO_ROOM)


class Holder(ABC):
    """A connection, as what holds a share of the bytes of unfinished requests."""

    __slots__ = ("_limits", "_totals", "held", "now")

    def __init__(self, limits: Limits, totals: Totals, now: float) -> None:
        self._limits = limits
        self._totals = totals
        self.held = 0
        self.now = now
        """When the bytes being worked on were read."""

    @abstractmethod
    def give_way(self, size: int) -> None:
        """End unfinished requests until ``size`` bytes are given back or none is left."""

    def take(self, size: int) -> None:
        """Hold ``size`` bytes more; raises ``NoRoomError`` if there is no room for them."""
        totals = self._totals
        if totals.request_bytes + size > self._limits.request_bytes_total_max:
            self._make_room(size)
        if size:
            totals.holders[self] = None
            self.held += size
            totals.request_bytes += size

    def give_back(self, size: int) -> None:
        """Hold so much less."""
        self.held -= size
        self._totals.request_bytes -= size
        if not self.held:
            self._totals.holders.pop(self, None)

    def _make_room(self, size: int) -> None:
        totals = self._totals
        limit = self._limits.request_bytes_total_max
        others = [holder for holder in totals.holders if holder is not self]
        if (self.held + size) * (len(others) + 1) <= limit:
            for holder in sorted(others, key=lambda other: other.held, reverse=True):
                excess = totals.request_bytes + size - limit * 7 // 8
                if excess <= 0:
                    break
                holder.give_way(excess)
        if totals.request_bytes + size > limit:
            raise NoRoomError


class Inbox:
    """The unfinished message of one call."""

    __slots__ = ("_headers", "_held", "_holder", "_limits", "_need", "since")

    def __init__(self, limits: Limits, holder: Holder) -> None:
        self._limits = limits
        self._holder = holder
        self._held = bytearray()
        self._headers = 0
        self._need = 0
        """Bytes of the unfinished message, prefix included, once its prefix is there."""
        self.since = 0.0
        """When the first byte of the unfinished message came."""

    @property
    def size(self) -> int:
        """Bytes that count towards the total."""
        return len(self._held) + self._headers

    @property
    def empty(self) -> bool:
        """No part of a message is held."""
        return not self._held

    @property
    def unfinished(self) -> bool:
        """Is there a part of a message; less than a prefix counts as nothing, as in grpc-go."""
        return len(self._held) >= grpc.PREFIX_BYTES

    def keep_headers(self, size: int) -> None:
        """Count the call's headers; raises ``NoRoomError`` if there is no room for them."""
        self._holder.take(size)
        self._headers = size

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
        self._forget()
        return data

    def _keep(self, data: bytes) -> None:
        """Hold bytes of an unfinished message, if the server has room for them."""
        self._holder.take(len(data))
        if not self._held:
            self.since = self._holder.now
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

    def _forget(self) -> None:
        if self._held:
            self._holder.give_back(len(self._held))
            self._held = bytearray()
        self._need = 0

    def clear(self) -> None:
        """Forget what is held, and the headers: the call is over, or its answer is."""
        self._forget()
        if self._headers:
            self._holder.give_back(self._headers)
            self._headers = 0
