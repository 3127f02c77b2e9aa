"""KV requests over several shards: atomic, in one revision, whatever is uncommitted or breaks."""

from collections.abc import Callable

import pytest

from backends.memory import MemoryBackend, MemoryDisk
from kvstore.backend import Batch, CommitResult, Row
from kvstore.errors import TimedOutError
from kvstore.pb import rpc_pb2 as pb
from kvstore.recent import RecentValues
from tests.stack import Answered, PromptReads, Stack, serve

ROUTES = {b"x/": 1, b"y/": 2}
TIMED_OUT = (TimedOutError.code, TimedOutError.text)
ALL = (b"a", b"x/a", b"y/a")
Commit = tuple[Batch, Callable[[CommitResult], None]]


def three_shards(backend: type[MemoryBackend] = PromptReads) -> Stack:
    """A store of three shards with nothing in it."""
    disks = [MemoryDisk(shard=str(number)) for number in range(3)]
    return Stack(disks, routes=ROUTES, backend=backend)


@pytest.fixture
def engine() -> Stack:
    """Likewise, its reads answered at once."""
    return three_shards()


def put(engine: Stack, key: bytes, value: bytes = b"v") -> Answered:
    """Send a put."""
    return serve(engine.kv.put, pb.PutRequest(key=key, value=value).SerializeToString())


def puts(*keys: bytes, value: bytes = b"new") -> pb.TxnRequest:
    """A Txn that puts these."""
    request = pb.TxnRequest()
    for key in keys:
        request.success.add().request_put.CopyFrom(pb.PutRequest(key=key, value=value))
    return request


def guarded(guard: bytes, *keys: bytes, version: int = 1) -> pb.TxnRequest:
    """Likewise, if ``guard`` has this version; otherwise it reads them."""
    request = puts(*keys)
    request.compare.add(key=guard, target=pb.Compare.VERSION, version=version)
    for key in keys:
        request.failure.add().request_range.key = key
    return request


def send(engine: Stack, request: pb.TxnRequest) -> Answered:
    """Send a Txn."""
    return serve(engine.kv.txn, request.SerializeToString())


def answer(call: Answered) -> pb.TxnResponse:
    """The answer, which has come."""
    assert call.body is not None, call.failed
    return pb.TxnResponse.FromString(call.body)


def held(engine: Stack) -> list[int]:
    """Shards that are held."""
    return [queue.number for queue in engine.commits.queues if queue.held]


def get(engine: Stack, key: bytes) -> Answered:
    """Send a get."""
    return serve(engine.kv.range, pb.RangeRequest(key=key).SerializeToString())


def value(call: Answered) -> bytes:
    """What a get found."""
    assert call.body is not None, call.failed
    return pb.RangeResponse.FromString(call.body).kvs[0].value


def forget_values(engine: Stack) -> None:
    """All values that storage has leave memory."""
    store = engine.store
    for chunk in store.index._chunks:
        chunk.hot = False
    store.index.evict(0, engine.commits.durable)
    store._recent = [RecentValues(r._bytes_max, r._stored) for r in store._recent]


# -- what is changed -------------------------------------------------------------------------------


def test_puts_of_several_shards_are_one_revision(engine: Stack) -> None:
    """Each row is stored on its key's shard, in the order of the operations; the record goes."""
    call = send(engine, puts(*reversed(ALL)))
    engine.settle()
    assert answer(call).header.revision == 2
    stored = [[(row[:3]) for row in backend.disk.rows.values()] for backend in engine.backends]
    assert stored == [[(2, 2, b"a")], [(2, 1, b"x/a")], [(2, 0, b"y/a")]]
    assert not engine.backends[0].disk.redo
    for key in ALL:
        assert value(get(engine, key)) == b"new"


def test_a_delete_of_everything(engine: Stack) -> None:
    """One revision; what was deleted comes in key order."""
    for key in ALL:
        put(engine, key)
    engine.settle()
    request = pb.DeleteRangeRequest(key=b"\0", range_end=b"\0", prev_kv=True)
    call = serve(engine.kv.delete_range, request.SerializeToString())
    engine.settle()
    assert call.body is not None, call.failed
    response = pb.DeleteRangeResponse.FromString(call.body)
    assert (response.header.revision, response.deleted) == (5, 3)
    assert [pair.key for pair in response.prev_kvs] == list(ALL)
    assert engine.store.index.live == 0


def test_a_delete_of_nothing_issues_nothing(engine: Stack) -> None:
    """It waits for its turn and answers with the head of what it looked at."""
    put(engine, b"x/a")
    delete = pb.DeleteRangeRequest(key=b"x/a").SerializeToString()
    serve(engine.kv.delete_range, delete)
    everything = pb.DeleteRangeRequest(key=b"\0", range_end=b"\0").SerializeToString()
    call = serve(engine.kv.delete_range, everything)
    engine.settle()
    assert call.body is not None, call.failed
    response = pb.DeleteRangeResponse.FromString(call.body)
    assert (response.header.revision, response.deleted) == (3, 0)
    assert (engine.store.revision, held(engine)) == (3, [])


# -- crashes ---------------------------------------------------------------------------------------


def advance(engine: Stack, steps: int) -> None:
    """Let that much happen."""
    for _ in range(steps):
        _ = engine.turns.run_next() or engine.steps.run_next()


def survives(engine: Stack) -> set[Row]:
    """What a restart would find: what is stored, and records of what will be."""
    recorded = {row for _, row in engine.backends[0].disk.redo}
    return recorded.union(*(backend.disk.rows.values() for backend in engine.backends))


@pytest.mark.parametrize("steps", range(24))
def test_a_crash_leaves_all_of_it_or_nothing(engine: Stack, steps: int) -> None:
    """Wherever it comes; all of it, if it was answered."""
    put(engine, b"x/b")
    call = send(engine, puts(*ALL))
    advance(engine, steps)
    engine.crash()
    found = {row[2] for row in survives(engine) if row[6] == b"new"}
    assert found in ([{*ALL}] if call.done else [set(), {*ALL}])
    assert steps < 23 or call.done, "the last one is after the end"


@pytest.mark.parametrize(("guard", "changed"), [(b"x/g", b"y/a"), (b"x/g", b"a"), (b"g", b"x/a")])
@pytest.mark.parametrize("steps", range(16))
def test_no_crash_keeps_a_change_and_loses_its_guard(
    engine: Stack, guard: bytes, changed: bytes, steps: int
) -> None:
    """They are on different shards; the guard was not durable when the Txn came."""
    put(engine, guard)
    call = send(engine, guarded(guard, changed))
    advance(engine, steps)
    engine.crash()
    found = {row[2] for row in survives(engine)}
    assert changed not in found or guard in found
    assert steps < 15 or (call.done and changed in found)


@pytest.mark.parametrize("steps", range(24))
def test_no_crash_keeps_what_rests_on_a_change_of_the_same_moment(
    engine: Stack, steps: int
) -> None:
    """Two Txns wait for x/; the first changes a key there, without a record, the second that key
    again and one under y/.
    """
    put(engine, b"x/b")
    first = send(engine, guarded(b"y/a", b"x/a", version=0))
    second = send(engine, puts(b"x/a", b"y/a"))
    advance(engine, steps)
    engine.crash()
    found = [row[2] for row in survives(engine)]
    assert found.count(b"x/a") == 2 if b"y/a" in found else found.count(b"x/a") < 2
    assert steps < 23 or (first.done and second.done)


# -- waiting ---------------------------------------------------------------------------------------


def test_requests_behind_it_are_answered_in_their_order(engine: Stack) -> None:
    """A put, an update as kube-apiserver sends it, a delete: they wait for what holds their shard;
    requests to other shards do not.
    """
    put(engine, b"x/a")
    over = send(engine, puts(b"x/a", b"a"))
    update = pb.TxnRequest()
    update.compare.add(key=b"x/c", target=pb.Compare.MOD, mod_revision=0)
    update.success.add().request_put.CopyFrom(pb.PutRequest(key=b"x/c", value=b"v"))
    delete = pb.DeleteRangeRequest(key=b"x/c").SerializeToString()
    behind = [
        put(engine, b"x/b"),
        send(engine, update),
        serve(engine.kv.delete_range, delete),
    ]
    other = put(engine, b"y/a")
    assert held(engine) == [1]
    engine.settle()
    revisions = [
        pb.PutResponse.FromString(call.body or b"").header.revision
        for call in (other, over, *behind)
    ]
    assert revisions == [3, 4, 5, 6, 7]
    assert held(engine) == []


def test_a_read_over_several_shards_holds_nobody(engine: Stack) -> None:
    """It waits for what it shows to be durable, whether it is a range or a Txn of ranges."""
    put(engine, b"x/a")
    everything = pb.RangeRequest(key=b"\0", range_end=b"\0")
    request = pb.TxnRequest()
    request.success.add().request_range.CopyFrom(everything)
    call = send(engine, request)
    assert not call.done
    assert held(engine) == []
    engine.settle()
    response = answer(call)
    assert (response.header.revision, response.responses[0].response_range.count) == (2, 1)


def test_a_txn_that_changes_nothing_holds_nobody(engine: Stack) -> None:
    """Its guard has failed: it answers with the head that it looked at, once that is durable."""
    put(engine, b"x/g")
    put(engine, b"x/g")
    call = send(engine, guarded(b"x/g", b"y/a"))
    assert not call.done
    assert held(engine) == []
    engine.settle()
    assert (answer(call).succeeded, answer(call).header.revision) == (False, 3)
    assert engine.store.revision == 3


def test_past_its_time_it_is_refused(engine: Stack) -> None:
    """Unavailable, as etcd says it, and nothing is issued."""
    put(engine, b"x/a")
    call = send(engine, puts(*ALL))
    engine.clock.advance(1.1)
    engine.store.barrier.tick()
    assert call.failed == TIMED_OUT
    engine.settle()
    assert (engine.store.revision, held(engine)) == (2, [])


def test_what_nobody_waits_for_is_not_executed(engine: Stack) -> None:
    """The client has gone while its request waited."""
    put(engine, b"x/a")
    over, behind = send(engine, puts(*ALL)), put(engine, b"x/b")
    over.cancelled = behind.cancelled = True
    engine.settle()
    assert (over.done, behind.done, engine.store.revision) == (False, False, 2)


def test_the_answer_comes_when_all_shards_have_their_part(
    engine: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y/ does not commit: the keys of the other shards are there, its own are waited for."""
    hanging: list[Commit] = []
    slow = engine.backends[2]
    monkeypatch.setattr(slow, "commit", lambda *commit: hanging.append(commit))
    call = send(engine, puts(*ALL))
    engine.settle()
    assert not call.done
    assert [value(get(engine, key)) for key in ALL[:2]] == [b"new", b"new"]
    waits = get(engine, b"y/a")
    assert not waits.done
    monkeypatch.undo()
    slow.commit(*hanging.pop())
    engine.settle()
    assert answer(call).header.revision == 2
    assert value(waits) == b"new"


# -- values that decide ----------------------------------------------------------------------------


def compared(key: bytes, wanted: bytes, *keys: bytes) -> pb.TxnRequest:
    """A Txn that puts ``keys`` if ``key`` has this value."""
    request = puts(*keys)
    request.compare.add(key=key, target=pb.Compare.VALUE, value=wanted)
    return request


def test_values_are_fetched_before_the_wait() -> None:
    """While storage reads, nobody is held; then it waits for its turn with the value at hand."""
    engine = three_shards(MemoryBackend)
    put(engine, b"x/a", b"old")
    engine.settle()
    forget_values(engine)
    put(engine, b"x/b")
    call = send(engine, compared(b"x/a", b"old", b"y/a"))
    assert held(engine) == []
    engine.steps.run_next()
    engine.turns.run_next()
    assert held(engine) == [1]
    forget_values(engine)
    engine.settle()
    assert answer(call).succeeded


def test_values_are_not_fetched_for_what_is_refused_anyway() -> None:
    """One of its shards is out."""
    engine = three_shards(MemoryBackend)
    put(engine, b"x/a", b"old")
    engine.settle()
    forget_values(engine)
    engine.commits.lost(2, "gone")
    call = send(engine, compared(b"x/a", b"old", b"y/a"))
    assert call.failed == TIMED_OUT
    assert not engine.steps.waiting


def test_values_that_change_meanwhile_decide_as_they_are() -> None:
    """One is overwritten while storage reads it."""
    engine = three_shards(MemoryBackend)
    put(engine, b"x/a", b"old")
    engine.settle()
    forget_values(engine)
    call = send(engine, compared(b"x/a", b"old", b"y/a"))
    put(engine, b"x/a", b"newer")
    engine.settle()
    assert not answer(call).succeeded
    assert held(engine) == []


def test_a_put_that_needs_its_value_waits_behind_a_hold(engine: Stack) -> None:
    """It keeps the value that was there before: that is fetched after the hold has ended."""
    put(engine, b"x/a", b"old")
    engine.settle()
    forget_values(engine)
    put(engine, b"x/b")
    over = send(engine, puts(b"x/b", b"a"))
    request = pb.PutRequest(key=b"x/a", ignore_value=True).SerializeToString()
    behind = serve(engine.kv.put, request)
    assert not behind.done
    engine.settle()
    assert over.body is not None
    assert behind.body is not None
    assert value(get(engine, b"x/a")) == b"old"
