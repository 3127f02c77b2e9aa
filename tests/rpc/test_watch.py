"""etcdserverpb.Watch: from requests as clients send them to responses, without a socket."""

import pytest

from kvstore.config import WatchConfig
from kvstore.pb import rpc_pb2 as pb
from kvstore.rpc.watch import WatchService
from kvstore.transport.api import Kind, StreamSink
from tests.rpc.streams import HandStream, deliver, opened
from tests.watch_world import World


class Peer:
    """A client's stream."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.stream, self.sink = open_stream(world)

    def create(self, **request: object) -> pb.WatchResponse:
        """Ask for a watch; the answer."""
        message = pb.WatchRequest()
        message.create_request.SetInParent()
        for name, value in request.items():
            if name == "filters":
                message.create_request.filters.extend(value)  # type: ignore[arg-type]
            else:
                setattr(message.create_request, name, value)
        return self.ask(message)[0]

    def ask(self, request: pb.WatchRequest) -> list[pb.WatchResponse]:
        """Send a request; what is sent at once."""
        before = len(self.stream.sent)
        deliver(self.sink, self.stream, request.SerializeToString())
        return self.responses(before)

    def responses(self, after: int = 0) -> list[pb.WatchResponse]:
        """What has been sent."""
        return [pb.WatchResponse.FromString(message) for message in self.stream.sent[after:]]

    def put(self, key: bytes) -> list[pb.WatchResponse]:
        """Write a key; what is sent."""
        before = len(self.stream.sent)
        self.world.put(key)
        self.world.settle()
        return self.responses(before)


def open_stream(world: World) -> tuple[HandStream, StreamSink]:
    """What the service makes of a new stream."""
    return opened(WatchService(world.hub).watch)


@pytest.fixture
def peer() -> Peer:
    """A client of a new store."""
    return Peer(World())


def test_method() -> None:
    """One method, in both directions."""
    (method,) = WatchService(World().hub).methods()
    assert (method.path, method.kind) == (b"/etcdserverpb.Watch/Watch", Kind.BIDI_STREAM)


@pytest.mark.parametrize(
    ("key", "range_end", "seen"),
    [
        (b"b", b"", [b"b"]),
        (b"b", b"c", [b"b", b"b1"]),
        (b"b", b"\0", [b"b", b"b1", b"c"]),
        (b"", b"", [b"\0"]),
        (b"", b"b", [b"\0", b"a"]),
        (b"", b"\0", [b"\0", b"a", b"b", b"b1", b"c"]),
        (b"\0", b"\0", [b"\0", b"a", b"b", b"b1", b"c"]),
    ],
)
def test_ranges(peer: Peer, key: bytes, range_end: bytes, seen: list[bytes]) -> None:
    """An empty key is the smallest; no end is one key; a zero byte as end is no upper bound."""
    assert peer.create(key=key, range_end=range_end).created
    events = [e for k in (b"\0", b"a", b"b", b"b1", b"c") for r in peer.put(k) for e in r.events]
    assert [event.kv.key for event in events] == seen


def test_flags(peer: Peer) -> None:
    """prev_kv, filters (unknown ones are ignored), ids and start revisions reach the hub."""
    peer.put(b"a")
    peer.create(key=b"a", prev_kv=True, watch_id=5, filters=[7])
    peer.create(key=b"a", filters=[pb.WatchCreateRequest.NOPUT])
    (response,) = peer.put(b"a")
    assert response.watch_id == 5
    assert response.events[0].prev_kv.version == 1
    before = len(peer.stream.sent)
    peer.create(key=b"a", start_revision=2)
    peer.world.settle()
    assert [len(r.events) for r in peer.responses(before)] == [0, 2]


def test_fragment() -> None:
    """Fragments are made for those who ask."""
    peer = Peer(World(config=WatchConfig(fragment_bytes=1)))
    peer.create(key=b"a", range_end=b"c", fragment=True)
    peer.world.put(b"a")
    peer.world.put(b"b")
    peer.world.settle()
    assert [r.fragment for r in peer.responses()[1:]] == [True, False]


def test_progress(peer: Peer) -> None:
    """A progress request in either encoding is answered with id -1; progress_notify is heeded."""
    peer.create(key=b"a", progress_notify=True)
    request = pb.WatchRequest(progress_request=pb.WatchProgressRequest())
    assert request.SerializeToString() == b"\x1a\x00"
    assert [r.watch_id for r in peer.ask(request)] == [-1]
    before = len(peer.stream.sent)
    deliver(peer.sink, peer.stream, b"\x1a\x02\x08\x01")
    assert [r.watch_id for r in peer.responses(before)] == [-1]
    before = len(peer.stream.sent)
    peer.world.clock.advance(1000)
    peer.world.hub.tick()
    assert [r.watch_id for r in peer.responses(before)] == [0]


def test_cancel(peer: Peer) -> None:
    """A cancel is answered with the id; an unknown one and an empty request are ignored."""
    peer.create(key=b"a", watch_id=3)
    cancel = pb.WatchRequest(cancel_request=pb.WatchCancelRequest(watch_id=3))
    (answer,) = peer.ask(cancel)
    assert (answer.watch_id, answer.canceled) == (3, True)
    assert not peer.ask(cancel)
    assert not peer.ask(pb.WatchRequest())
    assert not peer.put(b"a")
    assert peer.stream.status is None


def test_malformed(peer: Peer) -> None:
    """Bytes that are no request end the stream as grpc-go does."""
    deliver(peer.sink, peer.stream, b"\xff\xff")
    assert peer.stream.status is not None
    code, text = peer.stream.status
    assert code == 13
    assert text.startswith("grpc: failed to unmarshal the received message: ")


def test_half_closed(peer: Peer) -> None:
    """A client that asks no more still gets its events."""
    peer.create(key=b"a")
    peer.sink.half_closed()
    assert peer.put(b"a")


def test_closed(peer: Peer) -> None:
    """Nothing is kept for a stream that is gone."""
    peer.create(key=b"a", progress_notify=True)
    peer.sink.closed()
    assert not peer.put(b"a")
    assert peer.world.hub.watchers == 0
    assert not peer.world.hub.streams


def test_writable() -> None:
    """A stream that was blocked goes on when the transport says so."""
    peer = Peer(World(config=WatchConfig(outbox_bytes_max=100)))
    peer.create(key=b"a")
    peer.stream.outbox_bytes = 101
    assert not peer.put(b"a")
    peer.stream.outbox_bytes = 0
    before = len(peer.stream.sent)
    peer.sink.writable()
    peer.world.settle()
    assert len(peer.responses(before)) == 1


def test_unread_answers() -> None:
    """A client that asks without reading is refused with ResourceExhausted."""
    peer = Peer(World(config=WatchConfig(outbox_bytes_max=100, control_bytes_max=100)))
    peer.stream.outbox_bytes = 101
    for _ in range(10):
        peer.ask(pb.WatchRequest(create_request=pb.WatchCreateRequest(key=b"b", range_end=b"a")))
    assert peer.stream.status == (8, "etcdserver: too many requests")
