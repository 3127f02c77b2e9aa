"""grpc.health.v1.Health: Check, List, Watch, as grpc-go's server answers them.

There is one service, the empty name: the server as a whole. It is SERVING until ``drain``.
"""

from kvstore import errors
from kvstore.pb import health_pb2 as pb
from kvstore.rpc import decode
from kvstore.transport.api import Call, Method, StatusError, Stream, StreamSink

_SERVICE = b"/grpc.health.v1.Health/"

_SERVING = pb.HealthCheckResponse.SERVING
_NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService:
    """The handlers of grpc.health.v1.Health. Watches are bounded by the transport's streams."""

    def __init__(self) -> None:
        self._draining = False
        self._watches: set[Stream] = set()

    def methods(self) -> list[Method]:
        """The service's table for the transport."""
        return [
            Method.unary(_SERVICE + b"Check", self.check),
            Method.unary(_SERVICE + b"List", self.list),
            Method.server_stream(_SERVICE + b"Watch", self.watch),
        ]

    def drain(self) -> None:
        """The server is going away: tell whoever asks or watches. Idempotent."""
        if not self._draining:
            self._draining = True
            for stream in self._watches:
                _send(stream, self._answer())

    def check(self, payload: bytes, _call: Call) -> bytes:
        """Health.Check."""
        if decode.parse(pb.HealthCheckRequest.FromString, payload).service:
            raise StatusError(errors.NOT_FOUND, "unknown service")
        return self._answer().SerializeToString()

    def list(self, payload: bytes, _call: Call) -> bytes:
        """Health.List."""
        decode.parse(pb.HealthListRequest.FromString, payload)
        return pb.HealthListResponse(statuses={"": self._answer()}).SerializeToString()

    def watch(self, stream: Stream) -> StreamSink:
        """Health.Watch."""
        return _Watch(self, stream)

    def begin_watch(self, stream: Stream, service: str) -> None:
        """Send the status now and when it changes; an unknown service never does."""
        if service:
            _send(stream, pb.HealthCheckResponse(status=_SERVICE_UNKNOWN))
        else:
            self._watches.add(stream)
            _send(stream, self._answer())

    def end_watch(self, stream: Stream) -> None:
        """Nothing can be sent any more."""
        self._watches.discard(stream)

    def _answer(self) -> pb.HealthCheckResponse:
        return pb.HealthCheckResponse(status=_NOT_SERVING if self._draining else _SERVING)


class _Watch:
    """One Health.Watch stream."""

    def __init__(self, service: HealthService, stream: Stream) -> None:
        self._service = service
        self._stream = stream

    def message(self, message: bytes, /) -> None:
        """The one request."""
        request = decode.parse(pb.HealthCheckRequest.FromString, message)
        self._service.begin_watch(self._stream, request.service)

    def half_closed(self) -> None:
        """The watch goes on."""

    def writable(self) -> None:
        """The few messages of a watch never wait for room."""

    def closed(self) -> None:
        """The watch is over."""
        self._service.end_watch(self._stream)


def _send(stream: Stream, answer: pb.HealthCheckResponse) -> None:
    message = answer.SerializeToString()
    stream.send([message], len(message))
