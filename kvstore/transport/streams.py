"""The calls of one connection: opened by HEADERS, fed by DATA, ended by answers and resets.

The road of a small unary call is ``whole_call``: its HEADERS and its only DATA frame lie side by
side in what was read, its block is known by a template, its handler answers at once, and its answer
is appended to the output, which is written once per read.
No stream is entered anywhere on that road.
Everything else goes frame by frame; it does the same, only slower.

A stream that is not ``open`` is idle if its number is above ``last_sid``, else closed.
Of closed streams, those that we ended before the peer did are remembered for a while (``_left``):
what the peer had on its way to them is no mistake.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable

from kvstore.transport import frames, grpc, guard
from kvstore.transport.api import Kind, StatusError
from kvstore.transport.blocks import Blocks
from kvstore.transport.calls import AnyCall, StreamCall, Transfer, UnaryCall
from kvstore.transport.frames import ConnectionFault, StreamFault
from kvstore.transport.guard import Guard
from kvstore.transport.headers import NOWHERE
from kvstore.transport.host import Host
from kvstore.transport.inbox import NO_ROOM, Holder, Inbox, NoRoomError
from kvstore.transport.output import Output
from kvstore.transport.pages import PageCall, Pages

_unpack_message: Callable[[bytes, int], tuple[int, int, int, int, int]]
_unpack_message = struct.Struct(">IBIBI").unpack_from
"""Header of a DATA frame and prefix of the message that it begins with."""
_LEFT_MAX = 100
_SMALL_DATA_BYTES = 256


class Streams(Holder):
    """The calls of one connection."""

    __slots__ = (
        "_crowd_largest",
        "_crowd_max",
        "_crowd_seen",
        "_find",
        "_guard",
        "_host",
        "_left",
        "_pages",
        "_whole_max",
        "blocks",
        "ending",
        "last_sid",
        "observer",
        "open",
        "open_max",
        "output",
        "peer",
        "unreturned",
    )

    def __init__(self, host: Host, peer: str, output: Output, counts: Guard) -> None:
        limits = host.limits
        super().__init__(limits, host.totals, host.clock())
        self._host = host
        self._guard = counts
        self.output = output
        self.peer = peer
        self.observer = host.observer
        self.ending: tuple[int, str] | None = None
        """Status of every streaming call from now on: the server stops."""
        self.open: dict[int, AnyCall] = {}
        self.open_max = limits.streams_per_connection_max
        self.last_sid = 0
        self.unreturned = 0
        """Bytes of DATA received on the connection and not yet granted again."""
        self.blocks = Blocks(limits, host.routes, host.totals)
        self._find = self.blocks.templates.find
        self._left: OrderedDict[int, None] = OrderedDict()
        self._whole_max = min(limits.message_bytes_max, limits.frame_bytes_max - 5)
        self._crowd_max = limits.output_bytes_max
        self._crowd_seen = 0
        """Bytes that waited when the largest answer was looked for."""
        self._crowd_largest = 0
        self._pages = Pages(host, output)

    # The fast road.

    def whole_call(self, data: bytes, sid: int, start: int, stop: int, end: int) -> int:
        """Serve the call whose HEADERS are at ``start`` if all of it is there and simple.

        Gives the position behind it, or 0: nothing was done.
        """
        follower, flags, same_sid, compressed, size = _unpack_message(data, stop)
        begin = stop + 14
        finish = begin + size
        if (
            flags != 1
            or follower != size + 5 << 8
            or same_sid != sid
            or compressed
            or finish > end
            or size > self._whole_max
            or not self.last_sid < sid <= frames.STREAM_MASK
            or not sid & 1
            or len(self.open) >= self.open_max
            or self.blocks.open_stream
            or self.output.waiting > self._crowd_max
        ):
            return 0
        found = self._find(data[start:stop])
        if found is None:
            return 0
        head, timeout = found
        route = head.route
        if route.unary is None:
            return 0
        route.started += 1
        self.last_sid = sid
        self.unreturned += size + 5
        call = UnaryCall(self, sid, head, timeout)
        self._serve(call, data[begin:finish])
        return finish

    def _serve(self, call: UnaryCall, message: bytes) -> None:
        """Call a unary handler and send its answer, or keep the call for later."""
        route = call.head.route
        assert route.unary is not None
        try:
            answer = route.unary(message, call)
        except StatusError as error:
            call.fail(error.code, error.message)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the connection
            self._host.failed("handler failed", error)
            call.fail(grpc.INTERNAL, "internal error")
        else:
            if answer is not None:
                call.reply(answer)
            elif not call.cancelled:
                self.open[call.sid] = call

    def data(self, flags: int, sid: int, payload: bytes) -> None:
        """DATA."""
        self.unreturned += len(payload)
        data = frames.unpad(flags, payload)
        call = self.open.get(sid)
        ended = flags & frames.END_STREAM
        completed = 0
        if call is None:
            self._not_open(sid)
        elif call.half_closed:
            raise StreamFault(frames.STREAM_CLOSED, "DATA after the end")
        else:
            completed = self._deliver(call, data, len(payload))
        if not ended and not completed and len(payload) < _SMALL_DATA_BYTES:
            self._guard.count(guard.SMALL_DATA)
        if ended and call is not None and sid in self.open:
            self._half_close(call)

    def _deliver(self, call: AnyCall, data: bytes, length: int) -> int:
        """Hand data to its call and grant its window again; gives the messages completed."""
        side = call if isinstance(call, StreamCall) else call.transfer
        assert side is not None
        side.received += length
        side.total += len(data)
        if side.received > self._limits.stream_window_bytes:
            raise StreamFault(frames.FLOW_CONTROL_ERROR, "DATA beyond the stream's window")
        if side.received * 2 >= self._limits.stream_window_bytes:
            self.output.write(frames.window_update(call.sid, side.received))
            side.received = 0
        if side.deaf:
            return 0
        try:
            messages = side.inbox.feed(data)
            if isinstance(side, StreamCall):
                self._sink_messages(side, messages)
            elif messages:
                side.message = messages[0]
        except StatusError as error:
            if isinstance(error, NoRoomError):
                self._host.refused("request_bytes_total_max")
            if isinstance(call, StreamCall):
                call.finish(error.code, error.message)
            else:
                call.fail(error.code, error.message)
            return 1
        return len(messages)

    def _sink_messages(self, call: StreamCall, messages: list[bytes]) -> None:
        """Tell a sink of its messages; raises ``StatusError``."""
        for message in messages:
            if call.deaf or call.sink is None:
                return
            call.received_messages += 1
            call.head.route.messages_received += 1
            try:
                call.sink.message(message)
            except StatusError:
                raise
            except Exception as error:
                self._host.failed("sink failed", error)
                raise StatusError(grpc.INTERNAL, "internal error") from error

    def _half_close(self, call: AnyCall) -> None:
        """The client has sent END_STREAM."""
        length = call.head.content_length
        if length is not None:
            side = call if isinstance(call, StreamCall) else call.transfer
            if side is not None and side.total != length:
                raise StreamFault(frames.PROTOCOL_ERROR, "content-length is not that of the DATA")
        if isinstance(call, StreamCall):
            call.half_closed = True
            if call.inbox.unfinished:
                call.finish(grpc.INTERNAL, "unexpected EOF")
            elif call.head.route.kind is Kind.SERVER_STREAM and not call.received_messages:
                call.finish(grpc.UNKNOWN, "EOF")
            elif call.sink is not None and not call.finishing:
                self.tell(call.sink.half_closed)
            return
        transfer = call.transfer
        assert transfer is not None
        transfer.half_closed = True
        if isinstance(call, PageCall):
            self._pages.put(call)
        elif transfer.message is not None:
            message = transfer.message
            transfer.message = None
            self._serve(call, message)
        else:
            unfinished = transfer.inbox.unfinished
            call.fail(grpc.UNKNOWN, "unexpected EOF" if unfinished else "EOF")

    def _not_open(self, sid: int) -> None:
        """A frame that must not come on a stream that is idle or closed."""
        if sid == 0 or sid > self.last_sid or not sid & 1:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "frame on an idle stream")
        if sid not in self._left:
            raise StreamFault(frames.STREAM_CLOSED, "frame on a closed stream")

    def on_block(self, flags: int, sid: int, block: bytes) -> None:
        """A whole header block: a new call, or the trailers of one."""
        ended = bool(flags & frames.END_STREAM)
        call = self.open.get(sid)
        if call is not None:
            self.blocks.trailers(block)
            if call.half_closed:
                raise StreamFault(frames.STREAM_CLOSED, "HEADERS after the end")
            if not ended:
                raise StreamFault(frames.PROTOCOL_ERROR, "trailers that do not end the stream")
            self._half_close(call)
        elif sid > self.last_sid:
            self.last_sid = sid
            self._open(sid, block, ended=ended)
        elif sid in self._left:
            self.blocks.skip(block)
        else:
            raise ConnectionFault(frames.STREAM_CLOSED, "HEADERS on a closed stream")

    def _open(self, sid: int, block: bytes, *, ended: bool) -> None:
        """Begin a call, or answer at once that there will be none."""
        full = len(self.open) >= self.open_max
        if full or self._crowded():
            self.blocks.skip(block)
            self._host.refused("streams_per_connection_max" if full else "output_bytes_max")
            raise StreamFault(frames.REFUSED_STREAM, "too many streams")
        head, timeout = self.blocks.request(block)
        if head.route is not NOWHERE:
            head.route.started += 1  # the observer will be told of its end, whatever that is
        refusal = head.refusal
        if refusal is not None:
            block = grpc.refusal_block(refusal.code, refusal.message, refusal.http_status)
            self.output.write(self.output.last_headers(sid, block))
            if not ended:
                self.output.write(frames.reset(sid, frames.NO_ERROR))
                self._remember(sid)
            if self.observer is not None:
                self.observer(head.route.path, refusal.code, 0.0)
            self._guard.count(guard.REFUSAL)
            return
        if head.route.unary is not None or head.page is not None:
            if head.page is not None:
                call: UnaryCall = PageCall(self, sid, head)
            else:
                call = UnaryCall(self, sid, head, timeout)
                call.transfer = Transfer(self.new_inbox(), half_closed=False)
            self.open[sid] = call
            if self._headers_kept(call) and ended:
                self._half_close(call)
        else:
            self._open_stream(StreamCall(self, sid, head, timeout), ended=ended)

    def _open_stream(self, call: StreamCall, *, ended: bool) -> None:
        route = call.head.route
        assert route.stream is not None
        self.open[call.sid] = call
        if not self._headers_kept(call):
            return
        try:
            call.sink = route.stream(call)
        except StatusError as error:
            call.finish(error.code, error.message)
        except Exception as error:  # noqa: BLE001 - as for unary handlers
            self._host.failed("handler failed", error)
            call.finish(grpc.INTERNAL, "internal error")
        if ended:
            self._half_close(call)
        if self.ending is not None:
            call.finish(*self.ending)

    def _headers_kept(self, call: AnyCall) -> bool:
        """Count the headers that no template shares; False: there was no room, the call is over."""
        size = call.head.size
        if size > self._limits.template_bytes_max:
            side = call if isinstance(call, StreamCall) else call.transfer
            assert side is not None
            try:
                side.inbox.keep_headers(size)
            except NoRoomError as error:
                self._host.refused("request_bytes_total_max")
                call.give_up_request(error.code, error.message)
                return False
        return True

    def _crowded(self) -> bool:
        """Are there too many unread answers, the largest not counted."""
        waiting = self.output.waiting
        if waiting <= self._crowd_max:
            return False
        if waiting != self._crowd_seen:  # a refused call changes nothing: it looks at no other
            self._crowd_seen = waiting
            self._crowd_largest = max(call.queued_bytes for call in self.open.values())
        return waiting - self._crowd_largest > self._crowd_max

    def reset_by_peer(self, sid: int) -> None:
        """RST_STREAM."""
        if sid == 0 or sid > self.last_sid:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "RST_STREAM on an idle stream")
        call = self.open.pop(sid, None)
        if call is None:
            self._guard.count(guard.CONTROL)
            return
        call.abort(grpc.CANCELLED)
        self._guard.count(guard.RESET)

    def set_stream_window(self, size: int) -> None:
        """SETTINGS_INITIAL_WINDOW_SIZE: it changes the windows of open streams too."""
        self.output.set_stream_window(size)
        for call in self.open.values():
            if size + call.granted(0) > frames.WINDOW_MAX:
                raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "a stream's window overflows")

    def granted(self, sid: int, increment: int) -> None:
        """WINDOW_UPDATE for a stream."""
        call = self.open.get(sid)
        if call is None:
            if sid > self.last_sid:
                raise ConnectionFault(frames.PROTOCOL_ERROR, "WINDOW_UPDATE on an idle stream")
        elif not increment:
            raise StreamFault(frames.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
        elif self.output.stream_window + call.granted(increment) > frames.WINDOW_MAX:
            raise StreamFault(frames.FLOW_CONTROL_ERROR, "the stream's window overflows")

    # What calls need of their connection.

    def new_inbox(self) -> Inbox:
        """An empty inbox under the server's limits."""
        return Inbox(self._limits, self)

    def give_way(self, size: int) -> None:
        """End unfinished requests, the largest first, until ``size`` bytes are given back."""
        wanted = self.held - size
        parts = [(call.unfinished, call) for call in self.open.values()]
        holding = [(part.held, call) for part, call in parts if part is not None and part.held]
        for _, call in sorted(holding, key=lambda found: found[0], reverse=True):
            if self.held <= wanted:
                break
            self._host.refused("request_bytes_total_max")
            call.give_up_request(grpc.RESOURCE_EXHAUSTED, NO_ROOM)

    def ended(self, call: AnyCall, code: int) -> None:
        """Tell the observer of a call that ended."""
        if self.observer is not None:
            self.observer(call.head.route.path, code, self._host.clock() - call.started)

    def tell(self, callback: Callable[[], None]) -> None:
        """Call what a handler has given us, whatever it raises."""
        try:
            callback()
        except Exception as error:  # noqa: BLE001 - it must not end the connection
            self._host.failed("callback failed", error)

    def leave(self, call: AnyCall) -> None:
        """The stream is closed on our side: forget it, and reset it if the peer is not done."""
        if self.open.pop(call.sid, None) is not None and not call.half_closed:
            self.output.write(frames.reset(call.sid, frames.NO_ERROR))
            self._remember(call.sid)

    def reset(self, call: AnyCall, code: int) -> None:
        """Send RST_STREAM and forget the call."""
        if self.open.pop(call.sid, None) is not None:
            self.output.write(frames.reset(call.sid, code))
            self._remember(call.sid)

    def _remember(self, sid: int) -> None:
        self._left[sid] = None
        if len(self._left) > _LEFT_MAX:
            self._left.popitem(last=False)

    # What the connection asks for.

    def fault(self, sid: int, code: int) -> None:
        """The peer broke a rule on one stream, or its call is one too many."""
        call = self.open.pop(sid, None)
        if call is not None:
            call.abort(grpc.INTERNAL)
        self.output.write(frames.reset(sid, code))
        self._remember(sid)
        self._guard.count(guard.UNSERVED if code == frames.REFUSED_STREAM else guard.FAULT)

    def expire(self) -> None:
        """End the calls whose deadline has passed, and those whose request does not end."""
        now = self._host.clock()
        begun_by = now - self._limits.request_timeout
        for call in list(self.open.values()):
            if call.deadline is not None and call.deadline <= now:
                call.expire()
                continue
            part = call.unfinished
            if part is not None and part.since is not None and part.since < begun_by:
                self._host.refused("request_timeout")
                call.give_up_request(grpc.RESOURCE_EXHAUSTED, "grpc: request takes too long")

    def end(self, code: int, message: str) -> None:
        """End the streaming calls, those that come later too."""
        self.ending = (code, message)
        for call in list(self.open.values()):
            if isinstance(call, StreamCall):
                call.finish(code, message)

    def abort(self) -> None:
        """The connection is lost, and all calls with it."""
        self.blocks.close()
        calls = list(self.open.values())
        self.open.clear()
        for call in calls:
            call.abort(grpc.CANCELLED)
