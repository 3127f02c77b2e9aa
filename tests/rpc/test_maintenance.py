"""etcdserverpb.Maintenance: Status, Alarm, Defragment and the hashes."""

import pytest

from kvstore.compaction import Compactor
from kvstore.config import CompactionConfig, ServerConfig
from kvstore.errors import BackendError
from kvstore.pb import rpc_pb2 as pb
from kvstore.rpc import hash as hash_module
from kvstore.rpc.maintenance import MaintenanceService
from kvstore.txn import DeleteRange, Put
from tests.engine import Engine, Waiter
from tests.stack import Answered, serve

COMPACTED = (11, "etcdserver: mvcc: required revision has been compacted")
FUTURE = (11, "etcdserver: mvcc: required revision is a future revision")
BUSY = (8, "etcdserver: too many requests")

ETCD = {
    -1: (1084519789, -1, -1),
    0: (3615041724, -1, 9),
    1: (1084519789, -1, 1),
    2: (2587454935, -1, 2),
    3: (4204889446, -1, 3),
    4: (57358706, -1, 4),
    5: (1326902061, -1, 5),
    6: (1513965807, -1, 6),
    7: (4014453069, -1, 7),
    8: (2801102798, -1, 8),
    9: (3615041724, -1, 9),
}
"""(hash, compact_revision, hash_revision) that etcd 3.6.16 answers for the history below."""
ETCD_COMPACTED_AT_6 = {
    0: (3047459017, 6, 9),
    7: (3400719538, 6, 7),
    8: (2140471072, 6, 8),
    9: (3047459017, 6, 9),
}
ETCD_COMPACTED_AT_8 = {0: (430284997, 8, 10), 9: (1809538584, 8, 9), 10: (430284997, 8, 10)}
"""After everything was deleted in revision 10."""


def service_of(engine: Engine) -> MaintenanceService:
    """The service over an engine."""
    return MaintenanceService(engine.store, engine.header, ServerConfig(quota_bytes=7))


@pytest.fixture
def engine() -> Engine:
    """The history that etcd was given: updates, a lease, an empty and a large value, deletions."""
    engine = Engine()
    engine.granted(-5, 1000)
    store = engine.store
    store.put(Put(b"a", b"1"))
    store.put(Put(b"b", b"", -5))
    store.put(Put(b"c", b"x" * 300))
    store.put(Put(b"a", b"2"))
    store.delete_range(DeleteRange(b"b", None))
    store.put(Put(b"d" * 200, b"4"))
    store.delete_range(DeleteRange(b"a", b"d"))
    store.put(Put(b"a", b"3"))
    engine.settle()
    return engine


@pytest.fixture
def service(engine: Engine) -> MaintenanceService:
    """Over that history."""
    return service_of(engine)


def send_hash(service: MaintenanceService, revision: int) -> Answered:
    """Send a HashKV."""
    return serve(service.hash_kv, pb.HashKVRequest(revision=revision).SerializeToString())


def hash_kv(engine: Engine, service: MaintenanceService, revision: int) -> tuple[int, int, int]:
    """What HashKV answers."""
    call = send_hash(service, revision)
    engine.settle()
    assert call.body is not None
    answer = pb.HashKVResponse.FromString(call.body)
    assert answer.header.revision == engine.store.revision
    return answer.hash, answer.compact_revision, answer.hash_revision


def compact(engine: Engine, compactor: Compactor, revision: int, *, physical: bool) -> None:
    """Compact, rows gone as well if ``physical``."""
    answer = Waiter()
    compactor.compact(revision, physical=physical, answer=answer, body=b"")
    for _ in range(20):
        if physical or answer.waits:
            engine.settle()
            compactor.tick()
    assert not answer.waits


def compactor_of(engine: Engine) -> Compactor:
    """The store's compactor."""
    return Compactor(engine.store, CompactionConfig(), engine.steps, lambda: None)


# -- hashes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [1, 3, 500])
def test_hashes_are_etcds(
    engine: Engine,
    service: MaintenanceService,
    monkeypatch: pytest.MonkeyPatch,
    chunk_rows: int,
) -> None:
    """At every revision, before compactions and after, however the rows are cut into chunks."""
    monkeypatch.setattr(hash_module, "CHUNK_ROWS_MAX", chunk_rows)
    assert {at: hash_kv(engine, service, at) for at in ETCD} == ETCD
    compactor = compactor_of(engine)
    compact(engine, compactor, 6, physical=True)
    found = {at: hash_kv(engine, service, at) for at in ETCD_COMPACTED_AT_6}
    assert found == ETCD_COMPACTED_AT_6
    compact(engine, compactor, 8, physical=True)
    engine.store.delete_range(DeleteRange(b"\0", b"\0"))
    engine.settle()
    found = {at: hash_kv(engine, service, at) for at in ETCD_COMPACTED_AT_8}
    assert found == ETCD_COMPACTED_AT_8


def test_rows_that_a_compaction_has_not_removed_yet_do_not_count(
    engine: Engine, service: MaintenanceService
) -> None:
    """The hash depends on what was compacted, not on how far the removal has come."""
    answer = Waiter()
    compactor_of(engine).compact(6, physical=False, answer=answer, body=b"")
    while answer.waits:
        engine.steps.run_next()
    before = list(engine.disks[0].rows)
    engine.steps.waiting.clear()
    call = send_hash(service, 9)
    while not call.done:
        engine.steps.run_next()
    assert list(engine.disks[0].rows) == before
    assert call.body is not None
    assert pb.HashKVResponse.FromString(call.body).hash == ETCD_COMPACTED_AT_6[9][0]


def test_hash_refuses_revisions_as_range_does(engine: Engine, service: MaintenanceService) -> None:
    """Compacted below the compact revision, future above the head."""
    assert send_hash(service, 10).failed == FUTURE
    compact(engine, compactor_of(engine), 6, physical=True)
    assert send_hash(service, 5).failed == COMPACTED
    assert send_hash(service, 10).failed == FUTURE


def test_hash_covers_what_is_durable(engine: Engine, service: MaintenanceService) -> None:
    """A pending write is not there yet, neither for 0 nor by its number."""
    engine.store.put(Put(b"z", b""))
    call = send_hash(service, 0)
    assert send_hash(service, 10).failed == FUTURE
    engine.settle()
    assert call.body is not None
    assert pb.HashKVResponse.FromString(call.body).hash == ETCD[0][0]


def test_a_compaction_meanwhile_starts_the_hash_again(
    engine: Engine, service: MaintenanceService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the head it goes on with what counts now; at a revision it has passed it is refused."""
    monkeypatch.setattr(hash_module, "CHUNK_ROWS_MAX", 1)
    head, passed = send_hash(service, 0), send_hash(service, 5)
    engine.steps.run_next()
    engine.store.compact_revision = 6
    engine.settle()
    assert head.body is not None
    assert pb.HashKVResponse.FromString(head.body).hash == ETCD_COMPACTED_AT_6[0][0]
    assert passed.failed == COMPACTED


def test_endless_compactions_end_a_hash(
    engine: Engine, service: MaintenanceService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few times it starts again, then it gives up and says so."""
    monkeypatch.setattr(hash_module, "CHUNK_ROWS_MAX", 1)
    call = send_hash(service, 0)
    while not call.done:
        engine.store.compact_revision += 1
        assert engine.steps.run_next()
    assert call.failed == (14, "etcdserver: request timed out")


def test_hashes_at_a_time_are_bounded(engine: Engine, service: MaintenanceService) -> None:
    """One more is refused; finished and cancelled ones make room."""
    calls = [send_hash(service, 0) for _ in range(ServerConfig().hashes_max)]
    assert send_hash(service, 0).failed == BUSY
    calls[0].cancelled = True
    engine.settle()
    assert calls[1].body is not None
    assert hash_kv(engine, service, 0) == ETCD[0]


def test_a_hash_whose_storage_fails_says_so(
    engine: Engine, service: MaintenanceService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a hash of fewer rows."""
    backend = engine.backends[0]
    monkeypatch.setattr(
        backend, "read_rows", lambda _after, _rows, done: done(BackendError("gone"))
    )
    assert send_hash(service, 0).failed == (14, "etcdserver: server stopped")


def test_hash_is_of_all_changes(engine: Engine, service: MaintenanceService) -> None:
    """The older Hash answers the same number without its revision."""
    call = serve(service.hash, b"")
    engine.settle()
    assert call.body is not None
    answer = pb.HashResponse.FromString(call.body)
    assert (answer.hash, answer.header.revision) == (ETCD[0][0], 9)


def test_hashes_of_several_shards_cover_all_of_them() -> None:
    """A change on any shard changes the hash."""
    seen = set()
    for key in (b"a", b"x/a"):
        for value in (b"1", b"2"):
            engine = Engine(routes={b"x/": 1})
            engine.store.put(Put(key, value))
            engine.settle()
            seen.add(hash_kv(engine, service_of(engine), 0))
    assert len(seen) == 4


def test_a_hash_waits_for_the_slowest_shard() -> None:
    """A revision durable on one shard says nothing of smaller ones on another."""
    engine = Engine(routes={b"x/": 1})
    engine.store.put(Put(b"a", b""))
    engine.store.put(Put(b"x/a", b""))
    slow, fast = engine.steps.waiting.popleft(), engine.steps.waiting.popleft()
    fast()
    engine.settle()
    assert engine.commits.durable == 3
    call = send_hash(service_of(engine), 0)
    engine.settle()
    assert not call.done
    slow()
    engine.settle()
    assert call.body is not None
    assert hash_kv(engine, service_of(engine), 0)[0] == pb.HashKVResponse.FromString(call.body).hash


# -- the rest ----------------------------------------------------------------------------------


def test_status_tells_version_sizes_and_the_durable_revision(
    engine: Engine, service: MaintenanceService
) -> None:
    """The leader is the member itself; what is pending is not shown."""
    engine.store.put(Put(b"z", b""))
    body = serve(service.status, b"").body
    assert body is not None
    status = pb.StatusResponse.FromString(body)
    sizes = engine.backends[0].sizes()
    assert status == pb.StatusResponse(
        header=pb.ResponseHeader(cluster_id=1, member_id=2, revision=9, raft_term=1),
        version="3.6.16",
        dbSize=sizes.total,
        leader=2,
        raftIndex=9,
        raftTerm=1,
        raftAppliedIndex=9,
        dbSizeInUse=sizes.in_use,
        storageVersion="3.6.0",
        dbSizeQuota=7,
        downgradeInfo=pb.DowngradeInfo(),
    )
    assert status.HasField("downgradeInfo")


def test_status_names_shards_in_trouble(engine: Engine, service: MaintenanceService) -> None:
    """A shard that does not answer is in the errors, where etcd has its alarms."""
    engine.store.put(Put(b"z", b""))
    engine.steps.run_next()
    engine.clock.advance(6)
    engine.commits.tick()
    body = serve(service.status, b"").body
    assert body is not None
    assert pb.StatusResponse.FromString(body).errors == ["shard 0: not answering"]


@pytest.mark.parametrize("action", [pb.AlarmRequest.GET, pb.AlarmRequest.DEACTIVATE])
@pytest.mark.parametrize("alarm", [pb.NONE, pb.NOSPACE, pb.CORRUPT])
def test_no_alarm_is_ever_there(
    service: MaintenanceService,
    action: pb.AlarmRequest.AlarmAction.ValueType,
    alarm: pb.AlarmType.ValueType,
) -> None:
    """Listing and disarming find none."""
    request = pb.AlarmRequest(action=action, alarm=alarm)
    body = serve(service.alarm, request.SerializeToString()).body
    assert body is not None
    answer = pb.AlarmResponse.FromString(body)
    assert (answer.header.revision, len(answer.alarms)) == (9, 0)


def test_alarms_are_not_armed_by_request(service: MaintenanceService) -> None:
    """Refused, not accepted without effect; arming none is nothing, as in etcd."""
    for alarm, failed in (
        (pb.NONE, None),
        (pb.NOSPACE, (12, "etcdserver: alarms cannot be armed by request")),
    ):
        request = pb.AlarmRequest(action=pb.AlarmRequest.ACTIVATE, alarm=alarm)
        assert serve(service.alarm, request.SerializeToString()).failed == failed


def test_the_leader_can_be_moved_to_itself(service: MaintenanceService) -> None:
    """As in an etcd of one member; the answer has no header."""
    for target, body, failed in (
        (2, b"", None),
        (0, None, (9, "etcdserver: bad leader transferee")),
        (3, None, (9, "etcdserver: bad leader transferee")),
    ):
        request = pb.MoveLeaderRequest(targetID=target)
        call = serve(service.move_leader, request.SerializeToString())
        assert (call.body, call.failed) == (body, failed)


def test_defragment_gives_space_back_on_every_shard() -> None:
    """One after the other; the answer is empty; a second one meanwhile is refused."""
    engine = Engine(routes={b"x/": 1})
    for disk in engine.disks:
        disk.freed_bytes = 100
    service = service_of(engine)
    call = serve(service.defragment, b"")
    assert serve(service.defragment, b"").failed == BUSY
    assert not call.done
    engine.settle()
    assert call.body == b""
    assert [disk.freed_bytes for disk in engine.disks] == [0, 0]
    again = serve(service.defragment, b"")
    engine.settle()
    assert again.body == b""


def test_a_failed_defragment_says_so(
    engine: Engine, service: MaintenanceService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the operator's text, and the next one is not refused as busy."""
    monkeypatch.setattr(
        engine.backends[0], "defragment", lambda done: done(BackendError("disk full"))
    )
    for _ in range(2):
        failed = serve(service.defragment, b"").failed
        assert failed == (13, "etcdserver: defragmentation failed")
