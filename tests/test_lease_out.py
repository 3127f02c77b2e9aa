"""Leases whose keys are on a shard that is out: they wait for it, and no other lease does."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from kvstore.backend import Batch, CommitResult
from kvstore.config import Config, LeaseConfig
from kvstore.pb import rpc_pb2 as pb
from kvstore.rpc.lease import LeaseService
from kvstore.transport.api import StreamSink
from tests.engine import Engine, Waiter
from tests.rpc.streams import HandStream, deliver, opened

TIMED_OUT = (14, "etcdserver: request timed out")
Commit = tuple[Batch, Callable[[CommitResult], None]]
HANG = 6
"""Seconds after which a shard that hangs is out."""


@pytest.fixture
def engine() -> Engine:
    """Home and shards for keys under x/ and y/; lease 1 has a key under x/, lease 2 one on home."""
    engine = Engine(routes={b"x/": 1, b"y/": 2})
    engine.granted(1, 5)
    engine.granted(2, 60)
    engine.put(b"x/1", lease=1)
    engine.put(b"leader", lease=2)
    engine.settle()
    return engine


def stream_of(engine: Engine) -> tuple[HandStream, StreamSink]:
    """A new LeaseKeepAlive stream."""
    service = LeaseService(
        engine.store, engine.lessor, engine.header, engine.config.lease, call_soon=engine.steps
    )
    return opened(service.keep_alives)


def keep(stream: HandStream, sink: StreamSink, lease_id: int) -> None:
    """Send a LeaseKeepAlive."""
    deliver(sink, stream, pb.LeaseKeepAliveRequest(ID=lease_id).SerializeToString())


def ttls(stream: HandStream) -> list[tuple[int, int]]:
    """The answers: lease and TTL."""
    found = map(pb.LeaseKeepAliveResponse.FromString, stream.sent)
    return [(answer.ID, answer.TTL) for answer in found]


# -- keep-alives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("looked", [False, True], ids=["next tick", "at once"])
def test_an_expired_lease_that_cannot_end_holds_up_no_other(
    engine: Engine, *, looked: bool
) -> None:
    """It is answered with TTL 0 though its keys are still there, the next one on the stream is
    renewed, however often that is asked.
    """
    engine.commits.lost(1, "gone")
    engine.clock.advance(6)
    if looked:
        engine.lessor.tick()
    stream, sink = stream_of(engine)
    for _ in range(50):
        keep(stream, sink, 1)
        keep(stream, sink, 2)
        if not looked:
            engine.lessor.tick()
        engine.settle()
        engine.pass_time(2)
    assert ttls(stream) == [(1, 0), (2, 60)] * 50
    assert stream.status is None
    assert engine.lessor.exists(2)
    assert engine.live() == [b"leader", b"x/1"]


def test_a_lease_told_to_be_over_is_never_renewed(engine: Engine) -> None:
    """Neither when its shard is back: it ends then."""
    engine.commits.lost(1, "gone")
    engine.pass_time(6)
    stream, sink = stream_of(engine)
    keep(stream, sink, 1)
    engine.commits.found(1)
    keep(stream, sink, 1)
    engine.pass_time(1)
    assert ttls(stream) == [(1, 0), (1, 0)]
    assert (engine.live(), engine.lessor.leases()) == ([b"leader"], [2])


def test_a_full_queue_is_waited_for_until_it_refuses(engine: Engine) -> None:
    """Whatever refuses the end of the lease: who waits is answered then."""
    engine.commits.config = replace(engine.config.commit, queue_rows_max=2)
    engine.clock.advance(6)
    stream, sink = stream_of(engine)
    keep(stream, sink, 1)
    engine.put(b"x/a")
    engine.put(b"x/b")
    assert ttls(stream) == []
    engine.lessor.tick()
    assert ttls(stream) == [(1, 0)]
    engine.settle()
    engine.pass_time(1)
    assert engine.lessor.leases() == [2]


def test_a_lease_that_is_ending_holds_up_no_other(engine: Engine) -> None:
    """Its keys are deleted, and that does not become durable: TTL 0 when its shard is found to be
    out, and at once from then on.
    """
    stream, sink = stream_of(engine)
    hanging = engine.backends[1]
    engine.lessor.revoke(1)
    keep(stream, sink, 1)
    keep(stream, sink, 2)
    commits: list[Commit] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hanging, "commit", lambda *call: commits.append(call))
        engine.settle()
    assert ttls(stream) == []
    engine.clock.advance(HANG)
    engine.commits.tick()
    keep(stream, sink, 1)
    keep(stream, sink, 2)
    assert ttls(stream) == [(1, 0), (2, 60)] * 2
    hanging.commit(*commits.pop())
    engine.settle()
    engine.pass_time(1)
    assert engine.lessor.leases() == [2]


def test_nobody_is_told_that_a_lease_is_over_while_home_is_out(engine: Engine) -> None:
    """Another server may have taken over, and know better."""
    engine.commits.lost(0, "gone")
    engine.pass_time(6)
    stream, sink = stream_of(engine)
    keep(stream, sink, 1)
    assert (stream.sent, stream.status) == ([], TIMED_OUT)


def test_a_put_to_a_lease_that_cannot_end_is_refused_at_once(engine: Engine) -> None:
    """Its end is not durable, so it cannot be told; nor is it waited for."""
    hanging = engine.backends[1]
    engine.lessor.revoke(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hanging, "commit", lambda *_: None)
        engine.settle()
    engine.clock.advance(HANG)
    engine.commits.tick()
    answer = Waiter()
    engine.lessor.after_absence(1, answer)
    assert answer.failure == TIMED_OUT


# -- many ------------------------------------------------------------------------------------------


def crowded(count: int, **limits: int) -> Engine:
    """``count`` leases of 5 seconds with a key under x/ each, that of lease 1 under y/, too; their
    shard is out. Lease 1000 is for 8 seconds, with a key on home.
    """
    config = replace(Config(), lease=replace(LeaseConfig(), **limits))
    engine = Engine(routes={b"x/": 1, b"y/": 2}, config=config)
    for lease_id in range(1, count + 1):
        engine.lessor.grant(lease_id, 5)
    engine.granted(1000, 8)
    for lease_id in range(1, count + 1):
        engine.put(b"x/%d" % lease_id, lease=lease_id)
    engine.put(b"home", lease=1000)
    engine.settle()
    engine.put(b"y/1", lease=1)
    engine.settle()
    engine.commits.lost(1, "gone")
    return engine


def test_leases_that_wait_for_a_shard_delay_no_others() -> None:
    """However many: they are tried once, not again and again with the time that the others need."""
    engine = crowded(300, expired_per_second_max=20)
    engine.pass_time(9)
    assert b"home" not in engine.live()
    assert len(engine.lessor) == 300


def test_leases_that_wait_for_a_shard_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at them until it takes writes again."""
    engine = crowded(300)
    engine.pass_time(9)
    tried: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(engine.lessor, "_revoke", lambda lease_id, _: tried.append(lease_id))
        engine.pass_time(20)
    assert tried == []


def test_leases_that_waited_for_a_shard_end_when_it_is_back() -> None:
    """In the order in which they had expired, as many a second as others; one that waits for
    another shard then goes on waiting.
    """
    engine = crowded(300, expired_per_second_max=100)
    engine.pass_time(9)
    engine.commits.lost(2, "gone, too")
    engine.commits.found(1)
    engine.pass_time(1.5)
    ended = 300 - len(engine.lessor)
    assert 100 <= ended <= 200
    assert 2 not in engine.lessor.leases()
    engine.pass_time(3)
    assert engine.lessor.leases() == [1]
    engine.commits.found(2)
    engine.pass_time(1)
    assert (engine.lessor.leases(), engine.live()) == ([], [])
    assert engine.lessor.expired_total == 301


def test_leases_that_are_ending_are_asked_for_when_their_shards_are_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not at each tick, and all of them together."""
    engine = Engine(routes={b"x/": 1})
    for lease_id in range(1, 51):
        engine.granted(lease_id, 60)
        engine.put(b"x/%d" % lease_id, lease=lease_id)
    engine.settle()
    hanging, commits = engine.backends[1], list[Commit]()
    for lease_id in range(1, 51):
        engine.lessor.revoke(lease_id)
    with monkeypatch.context() as patch:
        patch.setattr(hanging, "commit", lambda *call: commits.append(call))
        engine.settle()
    engine.clock.advance(HANG)
    engine.commits.tick()
    with monkeypatch.context() as patch:
        patch.setattr(engine.commits, "release", lambda *_: pytest.fail("asked"))
        for _ in range(20):
            engine.lessor.tick()
    hanging.commit(*commits.pop())
    engine.settle()
    assert len(engine.lessor) == 50
    engine.lessor.tick()
    engine.settle()
    assert (engine.lessor.leases(), engine.disks[0].leases) == ([], {})


def test_a_lease_granted_anew_is_not_taken_for_one_that_waited() -> None:
    """The old one has lost its key and was revoked before its shard's turn came."""
    engine = crowded(2)
    engine.pass_time(6)
    engine.commits.found(1)
    engine.delete(b"x/2")
    engine.settle()
    engine.lessor.revoke(2)
    engine.settle()
    engine.granted(2, 100)
    engine.pass_time(10)
    assert engine.left(2) == 90
