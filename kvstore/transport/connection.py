"""One HTTP/2 connection that carries gRPC (RFC 9113): frames, control frames, its life and its end.

What was read is cut into frames; a small unary call, which is two frames side by side, is handed to
``Streams.whole_call`` at once, every other frame goes through ``_frame`` to its method.

Life, in the order of states:

    new         the peer has until ``preface_timeout`` to send SETTINGS and acknowledge ours
    serving     for as long as it keeps the rules
    draining    GOAWAY 2^31-1 and a ping were sent; the ping's answer, or a second, ends the time
                in which new calls are still on their way, and GOAWAY with the last call is sent
    dying       GOAWAY with an error was sent; what comes is discarded for a second, so that the
                peer reads the GOAWAY before the connection is reset
    closed      ``connection_lost`` was called
"""

import asyncio
from typing import cast

from kvstore.transport import frames, guard, linger
from kvstore.transport.frames import ConnectionFault, StreamFault
from kvstore.transport.guard import Guard
from kvstore.transport.host import Host
from kvstore.transport.output import Output
from kvstore.transport.streams import Streams

_DRAIN_SECONDS = 1.0
_KEEPALIVE_PING = frames.ping(b"\0kalive\0")
_LONG_READ_BYTES = 128 * 1024
"""A read of as many bytes or more may have left some: uvloop's buffer holds 250 KiB."""
_DRAIN_PING = b"\0goaway\0"


class Http2Connection(asyncio.Protocol):
    """The server's end of one connection."""

    def __init__(self, host: Host, peer: str) -> None:
        self._host = host
        self._limits = host.limits
        self._clock = host.clock
        self._transport: asyncio.Transport | None = None
        self._guard = Guard(host.limits)
        self.output = Output(host.limits, host.totals, host.schedule)
        self.streams = Streams(host, peer, self.output, self._guard)
        self._rest = b""
        self._rest_since = 0.0
        """When the last frame that is whole came."""
        self._greeted = False
        self._acknowledged = False
        self._made_at = self._ticked_at = self.streams.now
        self._pinged_at: float | None = None
        self._drained_at: float | None = None
        self._refusing = False
        self._dying_at: float | None = None
        self._mark = -1
        self._moved_at = self._made_at

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: our SETTINGS go first."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass
        self.output.attach(self._transport)
        self._host.opened(self)
        self.output.write(self._host.greeting)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, whoever made it."""
        self._transport = None
        self.output.detach()
        self._host.totals.request_bytes -= len(self._rest)
        self._rest = b""
        self.streams.abort()
        self._host.closed(self)

    def pause_writing(self) -> None:
        """The socket's buffer is full."""
        self.output.pause()

    def resume_writing(self) -> None:
        """The socket's buffer has room again."""
        self.output.resume()

    def data_received(self, data: bytes) -> None:
        """Take the frames that are complete; the rest waits for more."""
        output = self.output
        streams = self.streams
        scheduled = output.dirty
        output.dirty = True  # replies made meanwhile wait for the flush below, or that one
        streams.now = self._clock()
        self._host.totals.bytes_received += len(data)
        rest = self._rest
        if rest:
            data = rest + data
        end = len(data)
        position = 0
        try:
            while end - position >= 9:
                head, flags, sid = frames.unpack_header(data, position)
                start = position + 9
                stop = start + (head >> 8)
                if stop > end:
                    self._check_size(head >> 8)
                    break
                if flags == 4 and head & 255 == 1 and end - stop >= 14:
                    position = streams.whole_call(data, sid, start, stop, end)
                    if position:
                        continue
                self._frame(head & 255, flags, sid & frames.STREAM_MASK, data[start:stop])
                position = stop
            if streams.unreturned:
                self._return_window()
            if rest or position < end:
                self._keep(data[position:], progress=position > 0)
            if not scheduled:
                output.flush()
            if end >= _LONG_READ_BYTES:
                self._let_others_read()
        except ConnectionFault as fault:
            self._die(fault)
        except Exception as error:  # noqa: BLE001 - a bug costs one connection, not all
            self._host.failed("connection failed", error)
            self.abort()

    def _keep(self, rest: bytes, *, progress: bool) -> None:
        """Hold the frame that is not whole; ``progress``: another one was."""
        if progress or not self._rest:
            self._rest_since = self.streams.now
        self._host.totals.request_bytes += len(rest) - len(self._rest)
        self._rest = rest

    def _let_others_read(self) -> None:
        """Read on in the next turn: libuv reads 32 times from a socket that always has more."""
        if self._transport is not None:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        if self._transport is not None and not self.output.deaf:
            self._transport.resume_reading()

    # Frames.

    def _check_size(self, size: int) -> None:
        """No frame may be larger than we said."""
        if size > self._limits.frame_bytes_max:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "frame too large")

    def _frame(self, kind: int, flags: int, sid: int, payload: bytes) -> None:
        """Take one frame; raises ``ConnectionFault``."""
        self._check_size(len(payload))
        open_block = self.streams.blocks.open_stream
        if open_block and (kind != frames.CONTINUATION or sid != open_block):
            raise ConnectionFault(frames.PROTOCOL_ERROR, "a header block is not finished")
        if not self._greeted and (kind != frames.SETTINGS or flags & frames.ACK):
            raise ConnectionFault(frames.PROTOCOL_ERROR, "SETTINGS must come first")
        if kind >= len(self._handlers):
            self._guard.count(guard.CONTROL)
            return
        try:
            self._handlers[kind](self, flags, sid, payload)
        except StreamFault as fault:
            self.streams.fault(sid, fault.code)

    def _return_window(self) -> None:
        """Grant again what was received, once it is half of the connection's window."""
        received = self.streams.unreturned
        window = self._limits.connection_window_bytes
        if received > window:
            raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "DATA beyond the window")
        if received * 2 >= window:
            self.output.write(frames.window_update(0, received))
            self.streams.unreturned = 0

    def _on_data(self, flags: int, sid: int, payload: bytes) -> None:
        self.streams.data(flags, sid, payload)

    def _on_headers(self, flags: int, sid: int, payload: bytes) -> None:
        if not sid & 1:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "HEADERS on an even stream")
        block = frames.unpad(flags, payload)
        if flags & frames.PRIORITY_FLAG:
            if len(block) < 5:
                raise ConnectionFault(frames.FRAME_SIZE_ERROR, "HEADERS too short for priority")
            block = block[5:]
        if flags & frames.END_HEADERS:
            self.streams.on_block(flags, sid, block)
        else:
            self.streams.blocks.begin(sid, flags, block)

    def _on_continuation(self, flags: int, sid: int, payload: bytes) -> None:
        blocks = self.streams.blocks
        if not blocks.open_stream:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "CONTINUATION of nothing")
        blocks.go_on(payload)
        if flags & frames.END_HEADERS:
            first_flags = blocks.open_flags
            self.streams.on_block(first_flags, sid, blocks.end())

    def _on_rst_stream(self, flags: int, sid: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "RST_STREAM of a wrong length")
        self.streams.reset_by_peer(sid)

    def _on_settings(self, flags: int, sid: int, payload: bytes) -> None:
        if sid:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(payload) % 6 or (flags & frames.ACK and payload):
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "SETTINGS of a wrong length")
        self._guard.count(guard.SETTINGS)
        if flags & frames.ACK:
            self._acknowledged = True
            self.streams.blocks.settings_acknowledged()
            return
        self._greeted = True
        if len(payload) > 6 * self._limits.settings_entries_max:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "too_many_settings_entries")
        changes: dict[int, int] = {}
        for name, value in frames.iter_settings(payload):
            frames.check_setting(name, value)
            changes[name] = value  # of several values only the last has an effect
        if frames.MAX_FRAME_SIZE in changes:
            self.output.set_frame_max(changes[frames.MAX_FRAME_SIZE])
        if frames.INITIAL_WINDOW_SIZE in changes:
            self.streams.set_stream_window(changes[frames.INITIAL_WINDOW_SIZE])
        self.output.write(frames.SETTINGS_ACK)

    def _on_window_update(self, flags: int, sid: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "WINDOW_UPDATE of a wrong length")
        self._guard.count(guard.CONTROL)
        increment = int.from_bytes(payload, "big") & frames.STREAM_MASK
        if sid:
            self.streams.granted(sid, increment)
            return
        if not increment:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
        if self.output.grant(increment) > frames.WINDOW_MAX:
            raise ConnectionFault(frames.FLOW_CONTROL_ERROR, "the window overflows")

    def _on_ping(self, flags: int, sid: int, payload: bytes) -> None:
        if sid:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "PING of a wrong length")
        if flags & frames.ACK:
            self._guard.count(guard.CONTROL)
            if payload == _DRAIN_PING and self._drained_at is not None:
                self._refuse_new()
            return
        output = self.output
        self._guard.ping(self.streams.now, calls=len(self.streams.open), answered=output.answered)
        output.answered = False
        output.write(frames.ping(payload, frames.ACK))

    def _on_priority(self, flags: int, sid: int, payload: bytes) -> None:
        self._guard.count(guard.CONTROL)
        if not sid:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "PRIORITY on no stream")
        if len(payload) != 5:
            raise StreamFault(frames.FRAME_SIZE_ERROR, "PRIORITY of a wrong length")

    def _on_push_promise(self, flags: int, sid: int, payload: bytes) -> None:
        raise ConnectionFault(frames.PROTOCOL_ERROR, "PUSH_PROMISE by a client")

    def _on_goaway(self, flags: int, sid: int, payload: bytes) -> None:
        """The client opens no more calls; those under way are served."""
        if sid:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "GOAWAY on a stream")
        self._guard.count(guard.CONTROL)

    _handlers = (
        _on_data,
        _on_headers,
        _on_priority,
        _on_rst_stream,
        _on_settings,
        _on_push_promise,
        _on_ping,
        _on_goaway,
        _on_window_update,
        _on_continuation,
    )
    """By the number of a frame's type."""

    # Time and the end.

    @property
    def peer(self) -> str:
        """Address and port of the client."""
        return self.streams.peer

    @property
    def waiting(self) -> int:
        """Bytes of answers that the peer has not read."""
        return self.output.waiting + self.output.socket.size

    @property
    def calls(self) -> int:
        """Calls in progress."""
        return len(self.streams.open)

    def tick(self, now: float) -> None:
        """Called by the server several times a second: whatever is due by the clock."""
        self._guard.drain(now - self._ticked_at)
        self._ticked_at = now
        if self._transport is None:
            return
        if self._dying_at is not None:
            if now - self._dying_at >= linger.SECONDS:
                self._transport.abort()
            return
        self.streams.expire()
        self.output.look()
        limits = self._limits
        if not self._acknowledged and now - self._made_at > limits.preface_timeout:
            self._die(ConnectionFault(frames.SETTINGS_TIMEOUT, "preface_timeout"))
        elif not self.streams.last_sid and now - self._made_at > limits.first_request_timeout:
            self._die(ConnectionFault(frames.NO_ERROR, "first_request_timeout"))
        elif self._stalled(now):
            self._host.refused("output_stall_timeout")
            self._transport.abort()
        elif now - self._unfinished_since(now) > limits.request_timeout:
            self._die(ConnectionFault(frames.NO_ERROR, "request_timeout"))
        elif self._drained_at is not None:
            self._tick_draining(now, self._drained_at)
        else:
            self._keep_alive(now)

    def _stalled(self, now: float) -> bool:
        """Has the peer read nothing for too long while answers wait."""
        output = self.output
        buffered = output.socket.size
        mark = output.bytes_cut if output.waiting else output.bytes_sent - buffered
        if mark != self._mark or not (output.waiting or buffered):
            self._mark = mark
            self._moved_at = now
        return now - self._moved_at > self._limits.output_stall_timeout

    def _unfinished_since(self, now: float) -> float:
        """When a frame or a header block that is not whole began; ``now`` if there is none."""
        if self._rest:
            return self._rest_since
        return self.streams.now if self.streams.blocks.open_stream else now

    def _keep_alive(self, now: float) -> None:
        """Ping a silent peer, and give up on one that does not answer."""
        heard_at = self.streams.now
        if self.output.deaf:  # it may have answered: nobody has listened
            self._pinged_at = None
        elif self._pinged_at is not None and self._pinged_at >= heard_at:
            if now - self._pinged_at > self._limits.keepalive_timeout:
                self._host.refused("keepalive_timeout")
                assert self._transport is not None
                self._transport.abort()
        elif now - heard_at > self._limits.keepalive_interval:
            self._pinged_at = now
            self.output.write(_KEEPALIVE_PING)

    def drain(self, code: int, message: str) -> None:
        """Ask the peer to open no more calls; the connection closes when the last is answered."""
        if self._drained_at is None and self._dying_at is None and self._transport is not None:
            self._drained_at = self._clock()
            self.output.write(frames.goaway(frames.WINDOW_MAX, frames.NO_ERROR))
            self.output.write(frames.ping(_DRAIN_PING))
            self.streams.end(code, message)

    def _refuse_new(self) -> None:
        """The peer knows that it must open no more calls: those that come now are refused."""
        if not self._refusing:
            self._refusing = True
            self.streams.open_max = 0
            self.output.write(frames.goaway(self.streams.last_sid, frames.NO_ERROR))

    def _tick_draining(self, now: float, since: float) -> None:
        if now - since >= _DRAIN_SECONDS:
            self._refuse_new()
        if self._refusing and not self.streams.open:
            self.close()

    def close(self) -> None:
        """Close once what was handed to the socket is on its way."""
        if self._transport is not None:
            self.output.flush()
            self._transport.close()

    def abort(self) -> None:
        """Close at once; what the connection holds is given back now."""
        if self._transport is not None:
            self.output.abort()
            self.streams.abort()

    def _die(self, fault: ConnectionFault) -> None:
        """The peer broke a rule or a limit: GOAWAY, and the end."""
        if self._dying_at is not None or self._transport is None:
            return
        self._dying_at = self._clock()
        self._host.faulted(fault)
        self.streams.abort()
        self.output.write(frames.goaway(self.streams.last_sid, fault.code, fault.reason.encode()))
        self.output.flush()
        transport = self._transport
        if transport is not None:  # the flush may have found it broken
            linger.linger(self, transport)
