"""Reads that take several turns, while writes, compactions and damage come in between."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.memory import MemoryDisk
from kvstore import errors
from kvstore.backend import RowId
from kvstore.config import CommitConfig
from kvstore.errors import BackendError, ReadsFullError
from kvstore.pb import rpc_pb2 as pb
from kvstore.recent import RecentValues
from tests.model import Model
from tests.stack import STORE, Answered, PromptReads, Stack, serve

ALL = pb.RangeRequest(key=b"\0", range_end=b"\0")
keys = st.sampled_from([b"a", b"b", b"b/1", b"c", b"d", b"e", b"f", b"g"])
writes = st.lists(st.tuples(keys, st.booleans()), max_size=6)
queries = st.builds(
    pb.RangeRequest,
    key=st.sampled_from([b"\0", b"a", b"b"]),
    range_end=st.sampled_from([b"\0", b"e", b"g"]),
    limit=st.sampled_from([0, 0, 1, 3, 5]),
    keys_only=st.booleans(),
    sort_order=st.sampled_from(pb.RangeRequest.SortOrder.values()),
    sort_target=st.sampled_from([pb.RangeRequest.KEY, pb.RangeRequest.MOD]),
    max_mod_revision=st.sampled_from([0, 0, 6]),
)


def write(engine: Stack, model: Model | None, changes: Sequence[tuple[bytes, bool]]) -> None:
    """Put or delete keys, one revision each; not committed yet."""
    for key, puts in changes:
        if puts:
            put = pb.PutRequest(key=key, value=b"%d" % engine.store.revision)
            serve(engine.kv.put, put.SerializeToString())
            if model:
                model.put(put)
        else:
            delete = pb.DeleteRangeRequest(key=key)
            serve(engine.kv.delete_range, delete.SerializeToString())
            if model:
                model.delete_range(delete)


def forget_values(engine: Stack) -> None:
    """All values that storage has leave memory."""
    store = engine.store
    for chunk in store.index._chunks:
        chunk.hot = False
    store.index.evict(0, engine.commits.durable)
    store._recent = [RecentValues(r._bytes_max, r._stored) for r in store._recent]


def eight_keys(disk: MemoryDisk) -> Stack:
    """A store with keys a to h at revisions 2 to 9, values in storage only."""
    engine = Stack([disk])
    write(engine, None, [(bytes([name]), True) for name in b"abcdefgh"])
    engine.settle()
    forget_values(engine)
    return engine


def overtake(engine: Stack, changes: Sequence[tuple[bytes, bool]], revision: int) -> None:
    """Write and compact, both durable, while a read waits for its turn."""
    waiting = list(engine.turns.waiting)
    engine.turns.waiting.clear()
    write(engine, None, changes)
    engine.settle()
    request = pb.CompactionRequest(revision=revision)
    call = serve(engine.kv.compact, request.SerializeToString())
    engine.settle()
    assert call.body is not None, call.failed
    engine.turns.waiting.extend(waiting)


def answer(call: Answered) -> pb.RangeResponse:
    """What the read answered."""
    assert call.body is not None, call.failed
    return pb.RangeResponse.FromString(call.body)


@given(writes, queries, st.booleans(), st.lists(writes, min_size=1, max_size=5))
def test_changes_between_steps_are_not_seen(
    before: list[tuple[bytes, bool]],
    query: pb.RangeRequest,
    explicit: object,
    between: list[list[tuple[bytes, bool]]],
) -> None:
    """A read of many steps equals the snapshot at its revision, whatever is put, deleted or born
    again before its next step.
    """
    engine, model = Stack([MemoryDisk()]), Model()
    every = [(key, True) for key in (b"a", b"b", b"c", b"d", b"e", b"f", b"g")]
    write(engine, model, [*every, *before])
    engine.settle()
    model.durable = engine.commits.durable
    if explicit:
        query.revision = max(2, model.durable - 2)
    expected = model.range(query)
    call = serve(engine.kv.range, query.SerializeToString())
    for changes in between:
        write(engine, None, changes)
        engine.turns.run_next()
    engine.settle()
    actual = answer(call)
    actual.ClearField("header")
    expected.ClearField("header")
    assert expected == actual


def test_key_deleted_before_its_step_is_still_shown() -> None:
    """The read's revision is older than the deletion."""
    engine = eight_keys(MemoryDisk())
    call = serve(engine.kv.range, ALL.SerializeToString())
    assert not call.done, "it takes several steps"
    write(engine, None, [(b"g", False)])
    engine.settle()
    assert [pair.key for pair in answer(call).kvs] == [bytes([name]) for name in b"abcdefgh"]


def test_compaction_ends_a_read_of_an_old_revision() -> None:
    """Between two of its steps: refused as compacted, never answered in part."""
    engine = eight_keys(MemoryDisk())
    query = pb.RangeRequest(key=b"\0", range_end=b"\0", revision=6)
    call = serve(engine.kv.range, query.SerializeToString())
    assert not call.done
    overtake(engine, [], 8)
    engine.settle()
    assert call.failed == (errors.CompactedError.code, errors.CompactedError.text)


def test_read_at_the_head_begins_again_after_compaction() -> None:
    """Nobody asked for the revision that was compacted: the answer is that of a newer one."""
    engine = eight_keys(MemoryDisk())
    call = serve(engine.kv.range, ALL.SerializeToString())
    overtake(engine, [(b"a", False), (b"i", True)], 11)
    engine.settle()
    assert [pair.key for pair in answer(call).kvs] == [bytes([name]) for name in b"bcdefghi"]
    assert answer(call).header.revision == 11


def test_read_that_is_always_overtaken_gives_up() -> None:
    """After its restarts it is refused as timed out, and does not go on for ever."""
    engine = eight_keys(MemoryDisk())
    call = serve(engine.kv.range, ALL.SerializeToString())
    for _ in range(STORE.read_restarts_max + 1):
        assert not call.done
        overtake(engine, [(b"a", True)], engine.store.revision + 1)
        engine.turns.run_next()
    engine.settle()
    assert call.failed is not None
    assert call.failed[0] == errors.TimedOutError.code


@pytest.mark.parametrize("revision", [0, 9])
def test_missing_row_is_never_skipped(revision: int) -> None:
    """A value that storage lost ends the read as corrupt; it is not an answer with a key less. Its
    shard is given up: whoever needs storage afterwards is told so.
    """
    disk = MemoryDisk()
    engine = eight_keys(disk)
    del disk.rows[6, 0]
    query = pb.RangeRequest(key=b"\0", range_end=b"\0", revision=revision)
    call = serve(engine.kv.range, query.SerializeToString())
    engine.settle()
    assert call.failed == (errors.CorruptError.code, errors.CorruptError.text)
    single = serve(engine.kv.range, pb.RangeRequest(key=b"e").SerializeToString())
    engine.settle()
    assert single.failed == (errors.StoppedError.code, errors.StoppedError.text)


def test_missing_row_is_no_previous_value() -> None:
    """A write that shows what it replaced is not answered without it when that is lost: its shard
    is given up, and its outcome unknown.
    """
    disk = MemoryDisk()
    engine = eight_keys(disk)
    del disk.rows[2, 0]
    call = serve(engine.kv.put, pb.PutRequest(key=b"a", prev_kv=True).SerializeToString())
    engine.settle()
    assert call.failed == (errors.StoppedError.code, errors.StoppedError.text)


def test_requests_of_wrong_shape_change_nothing() -> None:
    """Without a key, too large, or no message at all: refused before the engine."""
    engine = eight_keys(MemoryDisk())
    before = engine.store.revision
    too_large = pb.PutRequest(key=b"k", value=bytes(2 << 20)).SerializeToString()
    expected = (errors.RequestTooLargeError.code, errors.RequestTooLargeError.text)
    assert expected == serve(engine.kv.put, too_large).failed
    for method in (engine.kv.range, engine.kv.put, engine.kv.delete_range):
        empty = (errors.EmptyKeyError.code, errors.EmptyKeyError.text)
        assert empty == serve(method, b"").failed
        refused = serve(method, b"\xff").failed
        assert refused is not None
        assert refused[0] == errors.INTERNAL
    assert before == engine.store.revision


def test_refusals_for_want_of_room_wait_for_nothing() -> None:
    """A full queue refuses writes while its commits hang; what was decided at the head waits."""
    commit = CommitConfig(batch_rows_max=1, queue_rows_max=1)
    engine = Stack([MemoryDisk()], commit=commit)
    write(engine, None, [(b"a", True)])
    put = pb.PutRequest(key=b"k")
    delete = pb.DeleteRangeRequest(key=b"a")
    txns = [
        pb.TxnRequest(success=[pb.RequestOp(request_put=put)]),
        pb.TxnRequest(success=[pb.RequestOp(request_delete_range=delete)]),
    ]
    too_many = (errors.TooManyRequestsError.code, errors.TooManyRequestsError.text)
    assert too_many == serve(engine.kv.put, put.SerializeToString()).failed
    assert too_many == serve(engine.kv.delete_range, delete.SerializeToString()).failed
    for txn in txns:
        assert too_many == serve(engine.kv.txn, txn.SerializeToString()).failed


def test_refusals_that_rest_on_the_head_wait_for_it() -> None:
    """That a key is missing tells of a deletion, which must be durable first."""
    engine = eight_keys(MemoryDisk())
    write(engine, None, [(b"a", False)])
    request = pb.PutRequest(key=b"a", ignore_value=True).SerializeToString()
    call = serve(engine.kv.put, request)
    assert not call.done
    engine.settle()
    assert call.failed == (errors.KeyNotFoundError.code, errors.KeyNotFoundError.text)


class FullReads(PromptReads):
    """Storage with too many reads waiting for one more."""

    def read_values(
        self, ids: Sequence[RowId], done: Callable[[list[bytes | None] | BackendError], None]
    ) -> None:
        """Refuse."""
        done(ReadsFullError("too many"))


def test_overloaded_storage_is_too_many_requests() -> None:
    """Reads above the limit are refused with a status that says so, and the shard is not given up;
    a write that was executed is unknown to its client, not refused.
    """
    disk = MemoryDisk()
    eight_keys(disk).crash()
    engine = Stack([disk], backend=FullReads)
    get = pb.RangeRequest(key=b"a")
    compare = pb.Compare(key=b"a", target=pb.Compare.VALUE, value=b"1")
    put = pb.PutRequest(key=b"a", prev_kv=True)
    too_many = (errors.TooManyRequestsError.code, errors.TooManyRequestsError.text)
    timed_out = (errors.TimedOutError.code, errors.TimedOutError.text)
    calls = [
        (serve(engine.kv.range, get.SerializeToString()), too_many),
        (serve(engine.kv.txn, pb.TxnRequest(compare=[compare]).SerializeToString()), too_many),
        (serve(engine.kv.put, put.SerializeToString()), timed_out),
    ]
    engine.settle()
    for call, expected in calls:
        assert call.failed == expected
    assert not engine.commits.queues[0].broken
