"""The same methods served by grpcio: the reference that the transport is compared with.

Not for production: an empty call costs it over 300 microseconds.
It keeps the interface of ``api``, with these differences, which are grpcio's own:

- unknown methods and requests above ``message_bytes_max`` are refused with grpcio's texts
- ``outbox_bytes`` counts what grpcio has not taken yet; it buffers a further message per stream
- there is no HTTP/1.1 on its port
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import grpc
import grpc.aio

from kvstore.transport.api import (
    CallObserver,
    Kind,
    Method,
    StatusError,
    StreamHandler,
    StreamSink,
    UnaryHandler,
)
from kvstore.transport.grpc import CANCELLED, INTERNAL, OK, UNAVAILABLE
from kvstore.transport.limits import Limits

_Context = grpc.aio.ServicerContext[bytes, bytes]
_CODES = {code.value[0]: code for code in grpc.StatusCode}

Reporter = Callable[[str, Exception], None]


class _Caller:
    """What handlers may know of a call, from grpcio's context."""

    def __init__(self, context: _Context, clock: Callable[[], float]) -> None:
        seconds: float | None = context.time_remaining()
        self.deadline = None if seconds is None else clock() + seconds
        self.peer = context.peer().partition(":")[2]
        self._context = context

    def metadata(self, name: bytes) -> bytes | None:
        """The value of a request header; repeated ones joined with a comma."""
        wanted = name.decode()
        pairs: Iterable[tuple[str, str | bytes]] = self._context.invocation_metadata() or ()
        values = [value for key, value in pairs if key == wanted]
        found = [value.encode() if isinstance(value, str) else value for value in values]
        return b",".join(found) if found else None


class GrpcioCall:
    """``api.Call`` over grpcio."""

    def __init__(self, caller: _Caller) -> None:
        self.peer = caller.peer
        self.deadline = caller.deadline
        self.metadata = caller.metadata
        self.cancelled = False
        self.on_cancel: Callable[[], None] | None = None
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def reply(self, message: bytes, /) -> None:
        """Finish with OK and one message."""
        if not self.cancelled:
            self.cancelled = True
            self.answer.set_result(message)

    def reply_parts(self, parts: Sequence[bytes], size: int, /) -> None:
        """Finish with OK and one message, joined: grpcio takes no parts."""
        self.reply(b"".join(parts))

    def fail(self, code: int, message: str, /) -> None:
        """Finish with a status and no message."""
        if not self.cancelled:
            self.cancelled = True
            self.answer.set_exception(StatusError(code, message))

    def abandon(self) -> None:
        """The client has lost interest."""
        if not self.cancelled:
            self.cancelled = True
            if self.on_cancel is not None:
                self.on_cancel()


class GrpcioStream:
    """``api.Stream`` over grpcio."""

    def __init__(self, caller: _Caller) -> None:
        self.peer = caller.peer
        self.deadline = caller.deadline
        self.metadata = caller.metadata
        self.cancelled = False
        self.outbox_bytes = 0
        self.status: tuple[int, str] | None = None
        self._outbox: deque[bytes] = deque()
        self._wake = asyncio.Event()

    @property
    def blocked(self) -> bool:
        """Something waits in the outbox."""
        return self.outbox_bytes > 0

    def send(self, parts: Sequence[bytes], size: int, /) -> None:
        """Queue one message, given as parts whose lengths add up to ``size``."""
        if not self.cancelled and self.status is None:
            self._outbox.append(b"".join(parts))
            self.outbox_bytes += size
            self._wake.set()

    def finish(self, code: int = OK, message: str = "", /) -> None:
        """End the call with a status once everything queued is sent."""
        if self.status is None:
            self.status = (code, message)
            self._wake.set()

    async def write_all(
        self, context: _Context, low_bytes: int, writable: Callable[[], None]
    ) -> None:
        """Write what is queued until the call is finished."""
        while True:
            blocked = self.blocked
            while self._outbox:
                message = self._outbox.popleft()
                await context.write(message)
                self.outbox_bytes -= len(message)
                if blocked and self.outbox_bytes <= low_bytes:
                    blocked = False
                    writable()
            if self.status is not None:
                return
            self._wake.clear()
            await self._wake.wait()


class GrpcioServer:
    """Serves methods through ``grpc.aio`` on the running event loop."""

    def __init__(
        self,
        *,
        methods: Iterable[Method],
        limits: Limits,
        clock: Callable[[], float],
        on_failure: Reporter,
        observer: CallObserver | None = None,
    ) -> None:
        """The arguments are those of ``server.Server``."""
        self._limits = limits
        self._clock = clock
        self._on_failure = on_failure
        self._observer = observer
        self._ending: tuple[int, str] | None = None
        self._streams: set[GrpcioStream] = set()
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limits.message_bytes_max),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", limits.streams_per_connection_max),
                ("grpc.max_metadata_size", limits.header_bytes_max),
                # Its own idea of too many pings is not etcd's: every 30 s is too often for it.
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.so_reuseport", 0),
            ]
        )
        services: dict[str, dict[str, grpc.RpcMethodHandler[bytes, bytes]]] = {}
        for method in methods:
            _, service, name = method.path.decode().split("/")
            services.setdefault(service, {})[name] = self._handler(method)
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(*pair) for pair in services.items()]
        )

    async def listen(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Serve at ``host:port`` (or ``unix:path``); gives the port.

        All listeners must be added before the first call of ``start``.
        """
        if credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, credentials)

    async def start(self) -> None:
        """Begin to accept."""
        await self._server.start()

    async def drain(self, grace_seconds: float, *, message: str, code: int = UNAVAILABLE) -> None:
        """Stop: accept no more, let unary calls finish, end streams with a status."""
        self._ending = (code, message)
        for stream in list(self._streams):
            stream.finish(code, message)
        await self._server.stop(grace_seconds)

    def _handler(self, method: Method) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """A method as grpcio wants it."""
        handler = method.handler
        path = method.path
        if method.kind is Kind.UNARY:
            unary: UnaryHandler = handler  # type: ignore[assignment]

            async def answer(request: bytes, context: _Context) -> bytes:
                return await self._serve_unary(path, unary, request, context)

            return grpc.unary_unary_rpc_method_handler(answer)
        stream: StreamHandler = handler  # type: ignore[assignment]
        if method.kind is Kind.SERVER_STREAM:

            async def stream_out(request: bytes, context: _Context) -> None:
                await self._serve_stream(path, stream, context, request)

            return grpc.unary_stream_rpc_method_handler(stream_out)

        async def stream_both(_requests: object, context: _Context) -> None:
            await self._serve_stream(path, stream, context, None)

        return grpc.stream_stream_rpc_method_handler(stream_both)

    async def _serve_unary(
        self, path: bytes, handler: UnaryHandler, request: bytes, context: _Context
    ) -> bytes:
        started = self._clock()
        call = GrpcioCall(_Caller(context, self._clock))
        code, text = OK, ""
        try:
            answer = handler(request, call)
            return await call.answer if answer is None or call.cancelled else answer
        except StatusError as error:
            code, text = error.code, error.message
        except asyncio.CancelledError:
            code = CANCELLED
            call.abandon()
            raise
        except Exception as error:  # noqa: BLE001 - told to the operator, and to the client without its text
            self._on_failure("handler failed", error)
            code, text = INTERNAL, "internal error"
        finally:
            call.cancelled = True
            self._observe(path, code, started)
        return await context.abort(_CODES[code], text)

    async def _serve_stream(
        self, path: bytes, handler: StreamHandler, context: _Context, request: bytes | None
    ) -> None:
        started = self._clock()
        stream = GrpcioStream(_Caller(context, self._clock))
        self._streams.add(stream)
        code, text = CANCELLED, ""
        try:
            code, text = await self._run_stream(stream, handler, context, request)
        finally:
            stream.cancelled = True
            self._streams.discard(stream)
            self._observe(path, code, started)
        if code:
            await context.abort(_CODES[code], text)

    async def _run_stream(
        self,
        stream: GrpcioStream,
        handler: StreamHandler,
        context: _Context,
        request: bytes | None,
    ) -> tuple[int, str]:
        """Let a sink read and write until the stream is finished; gives its status."""
        sink: StreamSink | None = None
        try:
            sink = handler(stream)
            if self._ending is not None:
                stream.finish(*self._ending)
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(self._read(stream, sink, context, request))
                await stream.write_all(context, self._limits.outbox_low_bytes, sink.writable)
                reading.cancel()
        except StatusError as error:
            return error.code, error.message
        except Exception as error:  # noqa: BLE001 - as for unary calls
            self._on_failure("handler failed", error)
            return INTERNAL, "internal error"
        finally:
            stream.cancelled = True
            if sink is not None:
                sink.closed()
        assert stream.status is not None
        return stream.status

    async def _read(
        self, stream: GrpcioStream, sink: StreamSink, context: _Context, request: bytes | None
    ) -> None:
        """Hand a sink its messages."""
        try:
            if request is not None:
                sink.message(request)
            while request is None:
                message: object = await context.read()
                if not isinstance(message, bytes):
                    break
                sink.message(message)
            sink.half_closed()
        except StatusError as error:
            stream.finish(error.code, error.message)
        except Exception as error:  # noqa: BLE001 - as for unary calls
            self._on_failure("sink failed", error)
            stream.finish(INTERNAL, "internal error")

    def _observe(self, path: bytes, code: int, started: float) -> None:
        if self._observer is not None:
            self._observer(path, code, self._clock() - started)
