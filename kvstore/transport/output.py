"""The sending half of an HTTP/2 connection: flow control, fairness, and one write per turn.

Two roads lead to the socket.

*Direct*: a small answer that fits a frame and both windows, while the socket takes data, is
appended to ``pending`` as finished bytes; everything appended in one turn of the loop is one write.
That is the road of nearly all unary answers and watch events.
Frames that no window limits (headers, refusals, resets, acknowledgements) go that way always.

*Through an outbox*: whatever does not fit waits in its stream's ``Outbox``.
Outboxes that may send stand in ``ready`` and are served in turn, one frame each (more if one stands
alone), so that many large answers share the connection fairly, and small direct answers pass
between them.

What a turn of the loop may add to the socket's buffer is bounded: messages of ``turn_bytes_max`` on
the direct road, as many cut, and of the other frames what the guard lets a peer provoke.
Once the buffer holds more than ``socket_bytes_max``, messages wait in outboxes; once it holds more
than ``unread_bytes_max``, which only other frames can bring about, nothing is read from the peer
until it has read.

Invariants:
- A stream with anything in its outbox sends no message on the direct road: its order is kept.
- An outbox in ``ready`` has bytes, and its stream's window was open when it was put there.
- While ``paused`` (the socket's buffer is full), ``direct_max`` is -1 and nothing is cut.
- The connection's window is ``window + reserve``: what messages may use before the next flush, at
  most ``turn_bytes_max``, and the rest.
- ``waiting`` is the sum of the outboxes' bytes, ``socket.size`` what the socket's buffer held when
  last looked at (at each write while ``paused``, else twice a second); the server's total has both.

A stream's window is ``stream_window + credit``: the peer's SETTINGS_INITIAL_WINDOW_SIZE as it is
now, plus what the peer granted, minus what was sent. A change of the setting so applies to every
stream at once, and may make windows negative (RFC 9113 section 6.9.2).
"""

import struct
from asyncio import Transport
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from kvstore.transport import frames, grpc
from kvstore.transport.limits import Limits

_data_frame = struct.Struct(">IBIBI").pack
_frame_header = struct.Struct(">IBI").pack

_HEADERS_HEAD = _frame_header(
    len(grpc.RESPONSE_BLOCK) << 8 | frames.HEADERS, frames.END_HEADERS, 0
)[:5]
_TRAILERS_HEAD = _frame_header(
    len(grpc.TRAILER_BLOCK_OK) << 8 | frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 0
)[:5]
_answer_start = struct.Struct(f">5sI{len(grpc.RESPONSE_BLOCK)}sIBIBI").pack
_answer_end = struct.Struct(f">5sI{len(grpc.TRAILER_BLOCK_OK)}s").pack
_response = grpc.RESPONSE_BLOCK
_trailers_ok = grpc.TRAILER_BLOCK_OK


_HANDED_BYTES = 64 * 1024
"""Of large answers, what is written at a time."""
_NEVER_BELOW = -(2**32)
"""Less than any window."""


def response_headers(sid: int) -> bytes:
    """The HEADERS frame before an answer's first message."""
    return frames.frame(frames.HEADERS, frames.END_HEADERS, sid, grpc.RESPONSE_BLOCK)


class Holder(Protocol):
    """A connection that holds a share of all unfinished requests; see ``inbox``."""

    held: int

    def give_way(self, size: int) -> None:
        """End unfinished requests until ``size`` bytes are given back or none is left."""


class Totals:
    """What all connections of a server hold together."""

    __slots__ = (
        "_on_full",
        "_output_max",
        "bytes_received",
        "bytes_sent",
        "full",
        "holders",
        "output_bytes",
        "request_bytes",
    )

    def __init__(self, *, output_max: int, on_full: Callable[[], None]) -> None:
        self._output_max = output_max
        self._on_full = on_full
        self.full = False
        self.bytes_received = 0
        self.bytes_sent = 0
        self.request_bytes = 0
        self.holders: dict[Holder, None] = {}
        """The connections that hold unfinished requests."""
        self.output_bytes = 0

    def add_output(self, size: int) -> None:
        """Count bytes that wait for their client; too many are told once."""
        self.output_bytes += size
        if self.output_bytes > self._output_max and not self.full:
            self.full = True
            self._on_full()


class SocketBuffer:
    """What a connection's socket has not taken, as the totals know it."""

    __slots__ = ("_totals", "size")

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self.size = 0

    def holds(self, size: int) -> None:
        """Count what was just found in it."""
        if size != self.size:
            self._totals.add_output(size - self.size)
            self.size = size


class Owner(Protocol):
    """The call that an outbox belongs to."""

    def drained(self) -> None:
        """Its bytes have fallen to the low-water mark."""

    def sent(self) -> None:
        """Its tail has been handed to the socket: the answer is complete."""


class _Nobody:
    """The owner of an outbox that is over; an outbox and its call would else keep each other."""

    def drained(self) -> None:
        """Nobody waits."""

    def sent(self) -> None:
        """Nobody waits."""


_NOBODY = _Nobody()


class Outbox:
    """What one stream has to send and may not send yet."""

    __slots__ = ("blocked", "credit", "owner", "parts", "sid", "size", "tail")

    def __init__(self, sid: int, owner: Owner, credit: int = 0) -> None:
        self.sid = sid
        self.owner: Owner = owner
        self.credit = credit
        self.parts: deque[bytes | memoryview] = deque()
        self.size = 0
        self.tail = b""
        """Frames (trailers) that follow the last byte, outside flow control."""
        self.blocked = False
        """``drained`` is owed."""

    def cut(self, count: int, frame_max: int, into: list[bytes | memoryview]) -> None:
        """Move the first ``count`` bytes to ``into``, as DATA frames; there are as many."""
        self.size -= count
        while count > 0:
            length = min(count, frame_max)
            into.append(_frame_header(length << 8, 0, self.sid))
            self._take(length, into)
            count -= length

    def disown(self) -> None:
        """Its call is over: there is nobody to tell."""
        self.owner = _NOBODY

    def _take(self, count: int, into: list[bytes | memoryview]) -> None:
        parts = self.parts
        while count:
            part = parts[0]
            length = len(part)
            if length <= count:
                into.append(part)
                parts.popleft()
                count -= length
            else:
                view = memoryview(part)
                into.append(view[:count])
                parts[0] = view[count:]
                count = 0


class Output:
    """The sending half of one connection."""

    __slots__ = (
        "_limits",
        "_refill_below",
        "_schedule",
        "_totals",
        "_transport",
        "after",
        "answered",
        "bytes_cut",
        "bytes_sent",
        "deaf",
        "direct_max",
        "dirty",
        "frame_max",
        "paused",
        "pending",
        "ready",
        "reserve",
        "socket",
        "stream_window",
        "waiting",
        "window",
    )

    def __init__(
        self, limits: Limits, totals: Totals, schedule: "Callable[[Output], None]"
    ) -> None:
        self._limits = limits
        self._totals = totals
        self._schedule = schedule
        self._refill_below = _NEVER_BELOW
        """Less of the window than this, and there is more in reserve."""
        self._transport: Transport | None = None
        self.window = frames.DEFAULT_WINDOW
        """What messages may use of the connection's window in this turn."""
        self.reserve = 0
        """The rest of it."""
        self.stream_window = frames.DEFAULT_WINDOW
        self.frame_max = frames.FRAME_BYTES_MIN
        self.paused = False
        self.deaf = False
        """The peer is not read from until it reads."""
        self.direct_max = -1
        """Largest message that may take the direct road; see ``_set_direct_max``."""
        self.pending: list[bytes | memoryview] = []
        self.ready: OrderedDict[int, Outbox] = OrderedDict()
        """Outboxes in line, by stream; those of a stream that ends leave at once."""
        self.waiting = 0
        self.socket = SocketBuffer(totals)
        self.bytes_sent = 0
        """Everything handed to the socket's buffer."""
        self.bytes_cut = 0
        """What has left outboxes: proof that the peer reads."""
        self.answered = False
        """Headers or data were sent; reset by the keepalive policy."""
        self.dirty = False
        """A flush is due in this turn of the loop."""
        self.after: list[Callable[[], None]] = []
        """What is to be told once the bytes of this turn are on their way."""

    def attach(self, transport: Transport) -> None:
        """Begin to write to a connected transport."""
        self._transport = transport
        transport.set_write_buffer_limits(high=self._limits.socket_bytes_max)
        self._set_direct_max()

    def detach(self) -> None:
        """The transport is gone: whatever is queued is dropped."""
        self._transport = None
        self.direct_max = -1
        self.pending.clear()
        self.socket.holds(0)

    def abort(self) -> None:
        """Close the connection at once; what its socket held counts no more."""
        if self._transport is not None:
            self._transport.abort()
            self.socket.holds(0)

    def _set_direct_max(self) -> None:
        if self.paused or self._transport is None:
            self.direct_max = -1
        else:
            size = min(self.frame_max, self.stream_window, _HANDED_BYTES)
            self.direct_max = size - grpc.PREFIX_BYTES

    def write(self, frame: bytes) -> None:
        """Append a finished frame that no window limits."""
        self.pending.append(frame)
        if not self.dirty:
            self.schedule()

    def schedule(self) -> None:
        """Have ``flush`` called in this turn of the loop."""
        if not self.dirty:
            self.dirty = True
            self._schedule(self)

    def last_headers(self, sid: int, block: bytes) -> bytes:
        """The frames of a block that ends a stream."""
        self.answered = True
        return frames.headers(sid, block, end_stream=True, frame_bytes_max=self.frame_max)

    # The direct road.

    def answer(self, sid: int, message: bytes) -> bool:
        """A whole OK answer, headers to trailers; False if it cannot go directly."""
        size = len(message)
        framed = size + grpc.PREFIX_BYTES
        if size > self.direct_max or framed > self.window:
            return False
        self.window -= framed
        self.answered = True
        self.pending += (
            _answer_start(_HEADERS_HEAD, sid, _response, framed << 8, 0, sid, 0, size),
            message,
            _answer_end(_TRAILERS_HEAD, sid, _trailers_ok),
        )
        return True

    def send(self, outbox: Outbox, parts: Sequence[bytes], size: int) -> None:
        """One message of a stream, directly or into its outbox."""
        framed = size + grpc.PREFIX_BYTES
        if (
            size <= self.direct_max
            and framed <= self.window
            and framed <= self.stream_window + outbox.credit
            and not outbox.size
        ):
            self.window -= framed
            self.answered = True
            outbox.credit -= framed
            self.pending.append(_data_frame(framed << 8, 0, outbox.sid, 0, size))
            self.pending += parts
            if not self.dirty:
                self.schedule()
        else:
            outbox.parts.append(grpc.prefix(size))
            outbox.parts.extend(parts)
            self.queue(outbox, framed)

    # The road through outboxes.

    def queue(self, outbox: Outbox, size: int) -> None:
        """Account for ``size`` bytes that were appended to an outbox."""
        outbox.size += size
        outbox.blocked = True
        self.waiting += size
        self._totals.add_output(size)
        self.wake(outbox)

    def wake(self, outbox: Outbox) -> None:
        """Put an outbox in line if it may send."""
        if outbox.size and self.stream_window + outbox.credit > 0:
            self.ready[outbox.sid] = outbox
            self.schedule()

    def drop(self, outbox: Outbox) -> None:
        """Forget what an outbox holds; its stream is over."""
        self.waiting -= outbox.size
        self._totals.output_bytes -= outbox.size
        outbox.size = 0
        outbox.parts.clear()
        outbox.tail = b""
        outbox.disown()
        self.ready.pop(outbox.sid, None)

    def _cut(self) -> None:
        """Cut frames out of the outboxes in turn, as far as windows, socket and turn allow."""
        ready = self.ready
        budget = self._limits.turn_bytes_max
        handed = 0
        while ready and self.window > 0 and not self.paused:
            if budget <= 0:
                self.after.append(self.schedule)
                return
            sid, outbox = ready.popitem(last=False)
            open_bytes = self.stream_window + outbox.credit
            share = self.frame_max if ready else max(self.frame_max, _HANDED_BYTES)
            count = min(outbox.size, share, self.window, open_bytes)
            if count <= 0:  # the peer has shrunk its windows meanwhile
                continue
            outbox.cut(count, self.frame_max, self.pending)
            outbox.credit -= count
            self.window -= count
            self.waiting -= count
            self.bytes_cut += count
            self.answered = True
            self._totals.output_bytes -= count
            budget -= count
            handed += count
            if outbox.size and open_bytes > count:
                ready[sid] = outbox
            if outbox.size <= self._limits.outbox_low_bytes:
                self._drained(outbox)
            if handed >= _HANDED_BYTES:
                handed = 0
                self._hand_over()

    def _drained(self, outbox: Outbox) -> None:
        """Send the tail after the last byte, and tell the owner what it waits for."""
        if outbox.tail and not outbox.size:
            self.pending.append(outbox.tail)
            outbox.tail = b""
            self.after.append(outbox.owner.sent)
        elif outbox.blocked:
            outbox.blocked = False
            self.after.append(outbox.owner.drained)

    def flush(self) -> None:
        """Hand everything of this turn to the socket in one write."""
        self.dirty = False
        if self.ready:
            self.window += self.reserve
            self.reserve = 0
            self._cut()
            self._divide_window()
        elif self.window < self._refill_below:
            self._divide_window()
        self._hand_over()
        if self.after:
            after = self.after
            self.after = []
            for tell in after:
                tell()

    def _hand_over(self) -> None:
        pending = self.pending
        if pending and self._transport is not None:
            data = b"".join(pending)
            self.bytes_sent += len(data)
            self._totals.bytes_sent += len(data)
            self._transport.write(data)
            if self.paused:
                self.look()
        pending.clear()

    def _divide_window(self) -> None:
        """Decide what the direct road may use in the coming turn."""
        window = self.window + self.reserve
        share = self._limits.turn_bytes_max
        self.window = min(window, share)
        self.reserve = window - self.window
        self._refill_below = share // 2 if self.reserve else _NEVER_BELOW

    def look(self) -> None:
        """Count what the socket has not taken; from a peer that leaves too much nothing is read."""
        if self._transport is not None:
            size = self._transport.get_write_buffer_size()
            self.socket.holds(size)
            if size > self._limits.unread_bytes_max and self.paused and not self.deaf:
                self.deaf = True
                self._transport.pause_reading()

    # What the peer and the socket say.

    def pause(self) -> None:
        """The socket's buffer is full."""
        self.paused = True
        self._set_direct_max()

    def resume(self) -> None:
        """It has room again."""
        self.paused = False
        self._set_direct_max()
        self.look()
        if self.deaf and self._transport is not None:
            self.deaf = False
            self._transport.resume_reading()
        if self.ready:
            self.schedule()

    def grant(self, increment: int) -> int:
        """WINDOW_UPDATE for the connection; gives its window."""
        self.reserve += increment
        if self.pending:  # this turn's share is used in part
            self._refill_below = self._limits.turn_bytes_max // 2
        else:
            self._divide_window()
        if self.ready:
            self.schedule()
        return self.window + self.reserve

    def set_stream_window(self, size: int) -> None:
        """SETTINGS_INITIAL_WINDOW_SIZE; the caller wakes the outboxes of its streams."""
        self.stream_window = size
        self._set_direct_max()

    def set_frame_max(self, size: int) -> None:
        """SETTINGS_MAX_FRAME_SIZE."""
        self.frame_max = size
        self._set_direct_max()
