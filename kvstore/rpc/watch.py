"""etcdserverpb.Watch: one client stream of many watchers.

Requests become calls of the hub, which writes its responses to the stream itself. A half-closed
stream stays open for events, as in etcd; ``hasleader`` in its metadata is met by being here.
"""

from google.protobuf.message import DecodeError

from kvstore import errors
from kvstore.errors import StoreError
from kvstore.pb import rpc_pb2 as pb
from kvstore.transport.api import Method, StatusError, Stream, StreamSink
from kvstore.watch import Watch, WatchHub
from kvstore.watch_message import FRAGMENTS, NO_DELETE, NO_PUT, PREVIOUS

_PROGRESS_REQUEST = b"\x1a\x00"
"""A WatchRequest that asks for progress: kube-apiserver sends ten of them a second."""

_FILTERS = {pb.WatchCreateRequest.NOPUT: NO_PUT, pb.WatchCreateRequest.NODELETE: NO_DELETE}


class WatchService:
    """The handler of etcdserverpb.Watch over ``hub``."""

    def __init__(self, hub: WatchHub) -> None:
        self._hub = hub

    def methods(self) -> list[Method]:
        """The service's table for the transport."""
        return [Method.bidi_stream(b"/etcdserverpb.Watch/Watch", self.watch)]

    def watch(self, stream: Stream) -> StreamSink:
        """Watch.Watch."""
        return _WatchSink(self._hub, stream)


class _WatchSink:
    """The receiving end of one Watch stream."""

    def __init__(self, hub: WatchHub, stream: Stream) -> None:
        self._watchers = hub.open(stream)

    def message(self, message: bytes, /) -> None:
        """One request; one without content is ignored, as in etcd."""
        try:
            if message == _PROGRESS_REQUEST:
                self._watchers.request_progress()
            else:
                self._request(_parse(message))
        except StoreError as error:
            raise StatusError(error.code, error.text) from error

    def half_closed(self) -> None:
        """No more requests; events go on."""

    def writable(self) -> None:
        """The client has read on."""
        self._watchers.writable()

    def closed(self) -> None:
        """Nothing can be sent any more."""
        self._watchers.close()

    def _request(self, request: pb.WatchRequest) -> None:
        match request.WhichOneof("request_union"):
            case "create_request":
                self._watchers.create(_watch(request.create_request))
            case "cancel_request":
                self._watchers.cancel(request.cancel_request.watch_id)
            case "progress_request":
                self._watchers.request_progress()
            case _:
                pass


def _parse(message: bytes) -> pb.WatchRequest:
    """Bytes that are no message end the stream with grpc-go's code and words (``rpc_util.go``)."""
    try:
        return pb.WatchRequest.FromString(message)
    except DecodeError as error:
        text = f"grpc: failed to unmarshal the received message: {error}"
        raise StatusError(errors.INTERNAL, text) from error


def _watch(request: pb.WatchCreateRequest) -> Watch:
    """A WatchCreateRequest as the hub's: an empty key is the smallest one, no end is one key."""
    wants = PREVIOUS * request.prev_kv + FRAGMENTS * request.fragment
    for number in request.filters:
        wants |= _FILTERS.get(number, 0)
    return Watch(
        request.key or b"\0",
        request.range_end or None,
        request.start_revision,
        request.watch_id,
        wants,
        request.progress_notify,
    )
