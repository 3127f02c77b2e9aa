"""The two kinds of call as the connection holds them: unary and streaming.

States of a call, by what is set:

    open      in the connection's ``open``; ``cancelled`` is false
    sending   a unary answer or a stream's last status is on its way through an outbox;
              ``cancelled`` is true for a unary call, ``finishing`` for a stream; still in
              ``open``
    over      not in ``open``; nothing is sent or told any more

A unary call whose request and answer each fit one frame passes from open to over within one turn
and is in ``open`` only if its handler did not answer at once.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from kvstore.transport import frames, grpc
from kvstore.transport.api import CallObserver, Kind, StreamSink
from kvstore.transport.headers import Head, seconds_of
from kvstore.transport.inbox import Inbox
from kvstore.transport.output import Outbox, Output, response_headers


class Carrier(Protocol):
    """The connection, as its calls see it."""

    peer: str
    now: float
    output: Output
    open: "dict[int, AnyCall]"
    observer: CallObserver | None

    def new_inbox(self) -> Inbox:
        """An empty inbox under the server's limits."""

    def leave(self, call: "AnyCall", /) -> None:
        """The stream is closed on our side: forget it, and reset it if the peer is not done."""

    def reset(self, call: "AnyCall", code: int, /) -> None:
        """Send RST_STREAM and forget the call."""

    def ended(self, call: "AnyCall", code: int, /) -> None:
        """For the books."""

    def tell(self, callback: Callable[[], None], /) -> None:
        """Call what a handler has given us, whatever it raises."""


class Unfinished(NamedTuple):
    """A request that is not whole."""

    since: float | None
    """When it began; None if it may take any time."""
    held: int
    """Bytes that it holds."""


def _deadline(now: float, timeout: bytes) -> float | None:
    """When a call that came at ``now`` with the literal ``timeout`` is over."""
    seconds = seconds_of(timeout)
    return None if seconds is None else now + seconds


class Transfer:
    """What a unary call has more of when its request or its answer takes more than one frame."""

    __slots__ = ("credit", "half_closed", "inbox", "message", "outbox", "received", "total")

    def __init__(self, inbox: Inbox, *, half_closed: bool) -> None:
        self.inbox = inbox
        self.half_closed = half_closed
        self.message: bytes | None = None
        """The request, once it is whole."""
        self.received = 0
        """Bytes of the stream's window that the peer has used and was not given back."""
        self.total = 0
        """Bytes of DATA, padding not counted."""
        self.credit = 0
        """What the peer granted before there was an outbox."""
        self.outbox: Outbox | None = None

    @property
    def deaf(self) -> bool:
        """Further messages are ignored, as by grpc-go: the first is the request."""
        return self.message is not None


class UnaryCall:
    """One unary call; what handlers see of it is ``api.Call``."""

    __slots__ = (
        "_connection",
        "_deadline",
        "_timeout",
        "cancelled",
        "head",
        "on_cancel",
        "sid",
        "started",
        "transfer",
    )

    def __init__(self, connection: Carrier, sid: int, head: Head, timeout: bytes | None) -> None:
        self._connection = connection
        self._timeout = timeout
        self._deadline: float | None = None
        self.sid = sid
        self.head = head
        self.cancelled = False
        self.on_cancel: Callable[[], None] | None = None
        self.started = connection.now
        self.transfer: Transfer | None = None
        """None while the request was one whole message and the answer is not sent."""

    @property
    def deadline(self) -> float | None:
        """When the client gives up, worked out when first asked for."""
        if self._timeout is not None:
            self._deadline = _deadline(self.started, self._timeout)
            self._timeout = None
        return self._deadline

    @property
    def peer(self) -> str:
        """Address of the client."""
        return self._connection.peer

    def metadata(self, name: bytes, /) -> bytes | None:
        """The value of a request header by its lower-case name."""
        return self.head.metadata.get(name)

    def reply(self, message: bytes, /) -> None:
        """Finish with OK and one message."""
        if self.cancelled:
            return
        self.cancelled = True
        self.on_cancel = None  # it usually knows the call: a cycle, which only the collector ends
        connection = self._connection
        output = connection.output
        transfer = self.transfer
        if (transfer is None or transfer.half_closed) and output.answer(self.sid, message):
            connection.open.pop(self.sid, None)
            if transfer is not None:
                transfer.inbox.clear()
            if not output.dirty:
                output.schedule()
        else:
            self._answer_slowly((message,), len(message))
        if connection.observer is not None:
            connection.ended(self, grpc.OK)

    def reply_parts(self, parts: Sequence[bytes], size: int, /) -> None:
        """Finish with OK and one large message, whose parts are not joined before the socket."""
        if not self.cancelled:
            self.cancelled = True
            self.on_cancel = None
            self._answer_slowly(parts, size)
            self._connection.ended(self, grpc.OK)

    def fail(self, code: int, message: str, /) -> None:
        """Finish with a status and no message."""
        if self.cancelled:
            return
        self.cancelled = True
        self.on_cancel = None
        self._refuse(grpc.refusal_block(code, message))
        self._connection.ended(self, code)

    # For the connection.

    @property
    def unfinished(self) -> Unfinished | None:
        """What there is of the request until it is whole."""
        transfer = self.transfer
        if transfer is None or transfer.half_closed or self.cancelled:
            return None
        return Unfinished(self.started, transfer.inbox.size)

    def give_up_request(self, code: int, message: str) -> None:
        """End a call whose request is not whole."""
        self.fail(code, message)

    @property
    def half_closed(self) -> bool:
        """The client has sent the end of its request."""
        return self.transfer is None or self.transfer.half_closed

    @property
    def queued_bytes(self) -> int:
        """Bytes of the answer that wait in an outbox."""
        transfer = self.transfer
        return transfer.outbox.size if transfer is not None and transfer.outbox is not None else 0

    def _answer_slowly(self, parts: Sequence[bytes], size: int) -> None:
        """An answer that is too large, or comes at a bad moment: through an outbox."""
        connection = self._connection
        output = connection.output
        if self.transfer is None:
            self.transfer = Transfer(connection.new_inbox(), half_closed=True)
        transfer = self.transfer
        transfer.inbox.clear()
        connection.open[self.sid] = self
        outbox = transfer.outbox = Outbox(self.sid, self, transfer.credit)
        outbox.tail = output.last_headers(self.sid, grpc.TRAILER_BLOCK_OK)
        output.write(response_headers(self.sid))
        outbox.parts.append(grpc.prefix(size))
        outbox.parts.extend(parts)
        output.queue(outbox, grpc.PREFIX_BYTES + size)

    def _refuse(self, block: bytes) -> None:
        """An answer of nothing but headers."""
        self.release()
        connection = self._connection
        connection.output.write(connection.output.last_headers(self.sid, block))
        connection.leave(self)

    def abort(self, code: int) -> None:
        """The client's interest is over; ``code`` is what the books say."""
        self.release()
        if self.cancelled:
            return
        self.cancelled = True
        self._connection.ended(self, code)
        on_cancel = self.on_cancel
        self.on_cancel = None
        if on_cancel is not None:
            self._connection.tell(on_cancel)

    def expire(self) -> None:
        """The deadline has passed."""
        if self.cancelled:
            self.release()
            self._connection.reset(self, frames.CANCEL)
        else:
            self._refuse(grpc.DEADLINE_BLOCK)
            self.abort(grpc.DEADLINE_EXCEEDED)

    def release(self) -> None:
        """Give back what the call holds of the server's totals."""
        transfer = self.transfer
        if transfer is not None:
            transfer.inbox.clear()
            if transfer.outbox is not None:
                self._connection.output.drop(transfer.outbox)

    def granted(self, increment: int) -> int:
        """WINDOW_UPDATE for the stream; gives its credit."""
        if self.transfer is None:
            self.transfer = Transfer(self._connection.new_inbox(), half_closed=True)
        transfer = self.transfer
        outbox = transfer.outbox
        if outbox is None:
            transfer.credit += increment
            return transfer.credit
        outbox.credit += increment
        self._connection.output.wake(outbox)
        return outbox.credit

    def drained(self) -> None:
        """Nobody waits for it."""

    def sent(self) -> None:
        """The long answer has been handed to the socket."""
        self._connection.leave(self)
        self.release()


class StreamCall:
    """One streaming call; what handlers see of it is ``api.Stream``."""

    __slots__ = (
        "_begun",
        "_connection",
        "cancelled",
        "deadline",
        "finishing",
        "half_closed",
        "head",
        "inbox",
        "outbox",
        "received",
        "received_messages",
        "sid",
        "sink",
        "started",
        "total",
    )

    def __init__(self, connection: Carrier, sid: int, head: Head, timeout: bytes | None) -> None:
        self._connection = connection
        self.sid = sid
        self.head = head
        self.deadline = None if timeout is None else _deadline(connection.now, timeout)
        self.cancelled = False
        self.half_closed = False
        self.started = connection.now
        self.inbox = connection.new_inbox()
        self.outbox = Outbox(sid, self)
        self.sink: StreamSink | None = None
        self.received = 0
        """Bytes of the peer's window that it was not given back."""
        self.total = 0
        """Bytes of DATA, padding not counted."""
        self._begun = False
        self.finishing = False
        """``finish`` was called: messages are neither sent nor taken any more."""
        self.received_messages = 0

    @property
    def peer(self) -> str:
        """Address of the client."""
        return self._connection.peer

    @property
    def outbox_bytes(self) -> int:
        """Bytes accepted by ``send`` and not yet handed to the socket."""
        return self.outbox.size

    @property
    def blocked(self) -> bool:
        """Something waits in the outbox."""
        return self.outbox.size > 0

    def metadata(self, name: bytes, /) -> bytes | None:
        """The value of a request header by its lower-case name."""
        return self.head.metadata.get(name)

    def send(self, parts: Sequence[bytes], size: int, /) -> None:
        """Queue one message, given as parts whose lengths add up to ``size``."""
        if self.cancelled or self.finishing:
            return
        output = self._connection.output
        if not self._begun:
            self._begun = True
            output.write(response_headers(self.sid))
        self.head.route.messages_sent += 1
        output.send(self.outbox, parts, size)

    def finish(self, code: int = 0, message: str = "", /) -> None:
        """End the call with a status once everything queued is sent."""
        if self.cancelled or self.finishing:
            return
        self.finishing = True
        connection = self._connection
        if self._begun:
            block = grpc.trailer_block(code, message)
        else:
            block = grpc.refusal_block(code, message)
        tail = connection.output.last_headers(self.sid, block)
        if self.outbox.size:
            self.outbox.tail = tail
        else:
            connection.output.write(tail)
            connection.output.after.append(self.sent)
        connection.ended(self, code)

    # For the connection.

    @property
    def unfinished(self) -> Unfinished | None:
        """What there is of a message that is not whole, or of headers without one."""
        if self.finishing or self.cancelled:
            return None
        if self.head.route.kind is Kind.SERVER_STREAM and not self.received_messages:
            return Unfinished(self.started, self.inbox.size)
        size = self.inbox.size
        return Unfinished(None if self.inbox.empty else self.inbox.since, size) if size else None

    def give_up_request(self, code: int, message: str) -> None:
        """End a call whose request is not whole."""
        self.inbox.clear()
        self.finish(code, message)

    @property
    def deaf(self) -> bool:
        """Further messages are ignored, as by grpc-go: nobody takes them, or one was enough."""
        if self.head.route.kind is Kind.SERVER_STREAM and self.received_messages:
            return True
        return self.cancelled or self.finishing

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait in the outbox."""
        return self.outbox.size

    def abort(self, code: int) -> None:
        """Nothing can be sent any more."""
        self.release()
        if not self.finishing:
            self._connection.ended(self, code)
        self._close()

    def expire(self) -> None:
        """The deadline has passed: what is queued is dropped, the status is sent."""
        self._connection.output.drop(self.outbox)
        if self.finishing:
            self._connection.reset(self, frames.CANCEL)
            self.abort(grpc.DEADLINE_EXCEEDED)
        else:
            self.finish(grpc.DEADLINE_EXCEEDED, "context deadline exceeded")

    def release(self) -> None:
        """Give back what the call holds of the server's totals."""
        self.inbox.clear()
        self._connection.output.drop(self.outbox)

    def granted(self, increment: int) -> int:
        """WINDOW_UPDATE for the stream; gives its credit."""
        self.outbox.credit += increment
        self._connection.output.wake(self.outbox)
        return self.outbox.credit

    def drained(self) -> None:
        """The outbox has fallen to its low-water mark."""
        if not self.cancelled and not self.finishing and self.sink is not None:
            self._connection.tell(self.sink.writable)

    def sent(self) -> None:
        """The status has been handed to the socket."""
        if not self.cancelled:
            self._connection.leave(self)
            self.release()
            self._close()

    def _close(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            sink = self.sink
            self.sink = None
            if sink is not None:
                self._connection.tell(sink.closed)


AnyCall = UnaryCall | StreamCall
