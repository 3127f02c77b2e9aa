"""etcdserverpb.Lease: answers as etcd 3.6 gives them, released when they are durable."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from kvstore.config import Config, LeaseConfig
from kvstore.pb import rpc_pb2 as pb
from kvstore.rpc import lease as lease_module
from kvstore.rpc.lease import LeaseService
from kvstore.transport.api import Call
from tests.engine import Engine
from tests.rpc.streams import HandStream, deliver, opened
from tests.stack import Answered, serve

NOT_FOUND = (5, "etcdserver: requested lease not found")
TOO_MANY = (8, "etcdserver: too many requests")
Send = Callable[[Callable[[bytes, Call], bytes | None], bytes], bytes]


def lease_service(engine: Engine) -> LeaseService:
    """The service over a store."""
    return LeaseService(
        engine.store,
        engine.lessor,
        engine.header,
        engine.config.lease,
        call_soon=engine.steps,
    )


@pytest.fixture
def engine() -> Engine:
    """A new store."""
    return Engine()


@pytest.fixture
def service(engine: Engine) -> LeaseService:
    """Its lease service."""
    return lease_service(engine)


@pytest.fixture
def send(engine: Engine) -> Send:
    """Sends a request and waits for the commits; the answer's bytes, which must have come."""

    def sent(method: Callable[[bytes, Call], bytes | None], payload: bytes) -> bytes:
        call = serve(method, payload)
        engine.settle()
        assert call.body is not None
        return call.body

    return sent


def header(revision: int) -> pb.ResponseHeader:
    """The header of the engine's answers."""
    return pb.ResponseHeader(cluster_id=1, member_id=2, revision=revision, raft_term=1)


def grant(service: LeaseService, lease_id: int, ttl: int) -> Answered:
    """Send a LeaseGrant."""
    return serve(service.grant, pb.LeaseGrantRequest(ID=lease_id, TTL=ttl).SerializeToString())


def revoke(service: LeaseService, lease_id: int) -> Answered:
    """Send a LeaseRevoke."""
    return serve(service.revoke, pb.LeaseRevokeRequest(ID=lease_id).SerializeToString())


# -- unary -------------------------------------------------------------------------------------


def test_grant_answers_id_and_ttl_once_durable(engine: Engine, service: LeaseService) -> None:
    """The TTL in the answer is the one granted; negative ids survive the encoding."""
    call = grant(service, -5, -7)
    assert not call.done
    engine.settle()
    assert call.body is not None
    answer = pb.LeaseGrantResponse.FromString(call.body)
    assert answer == pb.LeaseGrantResponse(header=header(1), ID=-5, TTL=2)


def test_grant_chooses_an_id(engine: Engine, service: LeaseService) -> None:
    """0 asks for a positive id, the largest included."""
    call = grant(service, 0, 60)
    engine.settle()
    assert call.body is not None
    answer = pb.LeaseGrantResponse.FromString(call.body)
    assert engine.lessor.leases() == [answer.ID]
    assert answer.ID > 0


def test_refusals_wait_for_what_they_rest_on(engine: Engine, service: LeaseService) -> None:
    """'Already exists' and 'not found' tell of changes that must be durable first."""
    grant(service, 5, 60)
    exists = grant(service, 5, 60)
    assert not exists.done
    engine.settle()
    assert exists.failed == (9, "etcdserver: lease already exists")
    revoke(service, 5)
    gone = revoke(service, 5)
    assert not gone.done
    engine.settle()
    assert gone.failed == NOT_FOUND


def test_refusals_for_want_of_room_wait_for_nothing() -> None:
    """A full queue refuses grants and revokes at once; a revoked lease's end is not waited for,
    because it was not revoked.
    """
    config = Config()
    engine = Engine(config=replace(config, commit=replace(config.commit, queue_rows_max=2)))
    service = lease_service(engine)
    engine.granted(5, 60)
    engine.put(b"a")
    engine.put(b"b")
    assert grant(service, 6, 60).failed == TOO_MANY
    assert revoke(service, 5).failed == TOO_MANY
    assert engine.lessor.leases() == [5]
    engine.settle()
    assert not revoke(service, 5).done
    engine.settle()
    assert engine.lessor.leases() == []


def test_too_many_leases_are_refused_at_once() -> None:
    """Whatever is pending: the limit tells of nothing that is not durable."""
    config = Config()
    engine = Engine(config=replace(config, lease=replace(config.lease, leases_max=1)))
    service = lease_service(engine)
    assert not grant(service, 5, 60).done
    assert grant(service, 6, 60).failed == TOO_MANY


@pytest.mark.parametrize("method", ["grant", "revoke"])
def test_a_shard_that_is_out_refuses_at_once(
    engine: Engine, service: LeaseService, method: str
) -> None:
    """A lease that was not revoked is not waited for."""
    engine.granted(5, 60)
    engine.put(b"a")
    engine.steps.run_next()
    engine.clock.advance(6)
    engine.commits.tick()
    call = grant(service, 6, 60) if method == "grant" else revoke(service, 5)
    assert call.failed == (14, "etcdserver: request timed out")


def test_a_too_large_ttl_is_refused(service: LeaseService) -> None:
    """With etcd's code and text, at once when nothing is pending."""
    assert grant(service, 5, 9_000_000_001).failed == (11, "etcdserver: too large lease TTL")


def test_revoke_answers_with_the_deletions_revision(
    engine: Engine, service: LeaseService, send: Send
) -> None:
    """Or the current one when no key was attached."""
    engine.granted(5, 60)
    engine.granted(6, 60)
    engine.put(b"a", lease=5)
    for lease_id, revision in ((5, 3), (6, 3)):
        body = send(service.revoke, pb.LeaseRevokeRequest(ID=lease_id).SerializeToString())
        assert pb.LeaseRevokeResponse.FromString(body).header == header(revision)


def test_time_to_live_shows_keys_only_on_request(
    engine: Engine, service: LeaseService, send: Send
) -> None:
    """TTL in whole seconds rounded down, keys in key order."""
    engine.granted(5, 60)
    engine.put(b"b", lease=5)
    engine.put(b"a", lease=5)
    engine.clock.advance(0.5)
    for keys, shown in ((False, []), (True, [b"a", b"b"])):
        request = pb.LeaseTimeToLiveRequest(ID=5, keys=keys)
        body = send(service.time_to_live, request.SerializeToString())
        answer = pb.LeaseTimeToLiveResponse(
            header=header(3), ID=5, TTL=59, grantedTTL=60, keys=shown
        )
        assert pb.LeaseTimeToLiveResponse.FromString(body) == answer


@pytest.mark.parametrize("lease_id", [0, 77, -77])
def test_time_to_live_of_an_unknown_lease_is_minus_one(
    service: LeaseService, send: Send, lease_id: int
) -> None:
    """No error: TTL -1, granted TTL 0, no keys."""
    request = pb.LeaseTimeToLiveRequest(ID=lease_id, keys=True)
    body = send(service.time_to_live, request.SerializeToString())
    answer = pb.LeaseTimeToLiveResponse(header=header(1), ID=lease_id, TTL=-1)
    assert pb.LeaseTimeToLiveResponse.FromString(body) == answer


def test_time_to_live_with_keys_waits_for_their_commits(
    engine: Engine, service: LeaseService
) -> None:
    """A key that is attached but not durable must not be shown."""
    engine.granted(5, 60)
    engine.put(b"a", lease=5)
    request = pb.LeaseTimeToLiveRequest(ID=5, keys=True)
    call = serve(service.time_to_live, request.SerializeToString())
    assert not call.done
    engine.settle()
    assert call.done


def test_leases_are_listed_by_expiry(engine: Engine, service: LeaseService, send: Send) -> None:
    """The next one to expire comes first, as in etcd."""
    for lease_id, ttl in ((1, 50), (-2, 10), (3, 30)):
        engine.granted(lease_id, ttl)
    body = send(service.leases, b"")
    listed = [status.ID for status in pb.LeaseLeasesResponse.FromString(body).leases]
    assert listed == [-2, 3, 1]


def test_a_long_list_gives_way_and_shows_one_moment(
    engine: Engine, service: LeaseService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leases granted or revoked while it is made do not change it; each step is short."""
    monkeypatch.setattr(lease_module, "LIST_STEP", 3)
    ttls = {n: 1000 - n * 37 % 100 for n in range(1, 11)}
    for lease_id, ttl in ttls.items():
        engine.granted(lease_id, ttl)
    call = serve(service.leases, b"")
    engine.lessor.grant(99, 5)
    engine.lessor.revoke(7)
    turns = 0
    while not call.done:
        engine.steps.run_next()
        turns += 1
    assert call.body is not None
    listed = [status.ID for status in pb.LeaseLeasesResponse.FromString(call.body).leases]
    assert sorted(listed) == list(ttls)
    others = [lease_id for lease_id in listed if lease_id != 7]
    assert others == sorted(others, key=ttls.__getitem__)
    assert turns >= 8


def test_a_list_that_nobody_waits_for_ends(engine: Engine, service: LeaseService) -> None:
    """A cancelled call takes no more steps."""
    engine.granted(1, 60)
    call = serve(service.leases, b"")
    call.cancelled = True
    engine.settle()
    assert not call.done


def test_garbage_is_refused_as_grpc_go_does(service: LeaseService) -> None:
    """INTERNAL, with the text of an unmarshalling error."""
    for method in (service.grant, service.revoke, service.time_to_live, service.leases):
        failed = serve(method, b"\xff").failed
        assert failed is not None
        assert failed[0] == 13
        assert failed[1].startswith("grpc: error unmarshalling request")


# -- keep-alives -------------------------------------------------------------------------------


def keep(lease_id: int) -> bytes:
    """A LeaseKeepAliveRequest."""
    return pb.LeaseKeepAliveRequest(ID=lease_id).SerializeToString()


def answers(stream: HandStream) -> list[tuple[int, int, int]]:
    """What was sent: (id, ttl, revision of the header)."""
    parsed = [pb.LeaseKeepAliveResponse.FromString(message) for message in stream.sent]
    return [(answer.ID, answer.TTL, answer.header.revision) for answer in parsed]


def test_keep_alives_are_answered_in_order(engine: Engine, service: LeaseService) -> None:
    """Known leases with their TTL, unknown ones with 0, and the stream goes on."""
    engine.granted(5, 60)
    engine.granted(-6, 70)
    stream, sink = opened(service.keep_alives)
    for lease_id in (5, 99, 0, -6):
        deliver(sink, stream, keep(lease_id))
    assert answers(stream) == [(5, 60, 1), (99, 0, 1), (0, 0, 1), (-6, 70, 1)]
    sink.half_closed()
    assert stream.status == (0, "")


def test_a_keep_alive_waits_for_the_commit_it_rests_on(
    engine: Engine, service: LeaseService
) -> None:
    """Of a grant, or a cleared remainder; those behind it and the end wait, too."""
    engine.lessor.grant(5, 60)
    stream, sink = opened(service.keep_alives)
    deliver(sink, stream, keep(5))
    deliver(sink, stream, keep(6))
    sink.half_closed()
    assert (stream.sent, stream.status) == ([], None)
    engine.settle()
    assert answers(stream) == [(5, 60, 1), (6, 0, 1)]
    assert stream.status == (0, "")


def test_the_end_of_the_stream_waits_for_the_last_answer(
    engine: Engine, service: LeaseService
) -> None:
    """A client that has sent all it wants still hears of it."""
    engine.lessor.grant(5, 60)
    stream, sink = opened(service.keep_alives)
    deliver(sink, stream, keep(5))
    sink.half_closed()
    engine.settle()
    assert answers(stream) == [(5, 60, 1)]
    assert stream.status == (0, "")


def test_a_keep_alive_of_an_expired_lease_is_answered_when_it_is_gone(
    engine: Engine, service: LeaseService
) -> None:
    """TTL 0 then, under the header from before the deletion; others wait behind it."""
    engine.granted(5, 2)
    engine.granted(6, 60)
    engine.put(b"a", lease=5)
    engine.settle()
    engine.clock.advance(2)
    stream, sink = opened(service.keep_alives)
    deliver(sink, stream, keep(5))
    deliver(sink, stream, keep(6))
    engine.settle()
    assert stream.sent == []
    engine.pass_time(1)
    assert answers(stream) == [(5, 0, 2), (6, 60, 3)]


def test_a_thousand_keep_alives_released_at_once_do_not_nest(
    engine: Engine, service: LeaseService
) -> None:
    """Answering the first lets the rest go, in a loop and not one inside the other."""
    engine.lessor.grant(5, 60)
    stream, sink = opened(service.keep_alives)
    for _ in range(1 + LeaseConfig().keep_alives_waiting_max):
        deliver(sink, stream, keep(5))
    engine.settle()
    assert len(stream.sent) == 1 + LeaseConfig().keep_alives_waiting_max
    assert stream.status is None


def test_waiting_keep_alives_are_bounded(engine: Engine, service: LeaseService) -> None:
    """One more than may wait ends the stream."""
    engine.lessor.grant(5, 60)
    stream, sink = opened(service.keep_alives)
    for _ in range(2 + LeaseConfig().keep_alives_waiting_max):
        deliver(sink, stream, keep(5))
    assert stream.status == (8, "etcdserver: too many requests")
    sink.closed()
    engine.settle()
    assert stream.sent == []


def test_keep_alives_wait_for_a_client_that_does_not_read(
    engine: Engine, service: LeaseService
) -> None:
    """Answers do not pile up: renewals go on once the client has read."""
    engine.granted(5, 60)
    stream, sink = opened(service.keep_alives)
    stream.outbox_bytes = 1 << 20
    deliver(sink, stream, keep(5))
    assert stream.sent == []
    stream.outbox_bytes = 0
    sink.writable()
    assert answers(stream) == [(5, 60, 1)]


def test_a_keep_alive_that_cannot_be_made_durable_ends_the_stream(
    engine: Engine, service: LeaseService
) -> None:
    """The client must not believe that its lease lives on."""
    engine.granted(5, 1000)
    engine.pass_time(400)
    stream, sink = opened(service.keep_alives)
    deliver(sink, stream, keep(5))
    engine.steps.run_next()
    engine.clock.advance(6)
    engine.commits.tick()
    assert stream.status == (14, "etcdserver: request timed out")
    deliver(sink, stream, keep(5))
    sink.closed()
    engine.settle()
    assert stream.sent == []


def test_a_refused_renewal_ends_the_stream(engine: Engine, service: LeaseService) -> None:
    """A recorded remainder that cannot be cleared now: refused at once."""
    engine.granted(5, 1000)
    engine.pass_time(400)
    engine.put(b"a")
    engine.steps.run_next()
    engine.clock.advance(6)
    engine.commits.tick()
    stream, sink = opened(service.keep_alives)
    deliver(sink, stream, keep(5))
    assert stream.status == (14, "etcdserver: request timed out")


def test_garbage_on_the_stream_ends_it(service: LeaseService) -> None:
    """INTERNAL, as grpc-go does."""
    stream, sink = opened(service.keep_alives)
    deliver(sink, stream, b"\xff")
    assert stream.status is not None
    assert stream.status[0] == 13
