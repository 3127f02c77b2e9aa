"""RangeStream: chunks that add up to the Range at one revision, whatever happens between them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.memory import MemoryDisk
from kvstore import errors
from kvstore.config import StoreConfig
from kvstore.pb import rpc_pb2 as pb
from kvstore.transport.api import StreamSink
from tests.rpc.streams import HandStream, deliver, opened
from tests.stack import Stack, serve

NAMES = [bytes([name]) for name in b"abcdefgh"]


def eight_keys(disk: MemoryDisk, *, step: int = 2, chunk: int = 1 << 20) -> Stack:
    """Keys a to h at revisions 2 to 9, in storage only; steps and chunks of these sizes."""
    config = StoreConfig(read_chunk_keys=step, stream_chunk_bytes=chunk)
    engine = Stack([disk], store=config)
    for name in NAMES:
        write(engine, name)
    engine.settle()
    for held in engine.store.index._chunks:
        held.hot = False
    engine.store.index.evict(0, engine.commits.durable)
    return engine


def write(engine: Stack, key: bytes) -> None:
    """A put, not committed yet."""
    serve(engine.kv.put, pb.PutRequest(key=key, value=b"value").SerializeToString())


def ask(engine: Stack, request: pb.RangeRequest) -> tuple[HandStream, StreamSink]:
    """Send the request on a new stream."""
    stream, sink = opened(engine.kv.range_stream)
    deliver(sink, stream, request.SerializeToString())
    sink.half_closed()
    return stream, sink


def everything(**fields: int) -> pb.RangeRequest:
    """All keys."""
    return pb.RangeRequest(key=b"\0", range_end=b"\0", **fields)  # type: ignore[arg-type]


def chunks(stream: HandStream) -> list[pb.RangeResponse]:
    """The RangeResponses of the messages sent."""
    return [pb.RangeStreamResponse.FromString(sent).range_response for sent in stream.sent]


def joined(stream: HandStream) -> pb.RangeResponse:
    """The whole answer, put together as a client does; every chunk is checked on the way."""
    assert stream.status == (0, "")
    *others, last = chunks(stream)
    whole = pb.RangeResponse()
    for chunk in others:
        assert chunk.kvs, "no chunk but the last is empty"
        assert not chunk.HasField("header"), "the header is on the last one"
        assert (chunk.count, chunk.more) == (0, False), "and so are the totals"
        whole.kvs.extend(chunk.kvs)
    whole.MergeFrom(last)
    return whole


@given(
    st.integers(1, 10),
    st.sampled_from([1, 40, 1 << 20]),
    st.integers(0, 9),
    st.sampled_from([0, 0, 5, 9]),
    st.booleans(),
    st.sampled_from([b"\0", b"e", b"h", b"a", b""]),
)
def test_chunks_add_up_to_the_range(
    step: int, chunk: int, limit: int, revision: int, bare: object, end: bytes
) -> None:
    """For any sizes of steps and chunks, any limit and revision: the same answer as Range's, with
    count and more of the whole.
    """
    engine = eight_keys(MemoryDisk(), step=step + 1, chunk=chunk)
    request = pb.RangeRequest(
        key=b"a", range_end=end, limit=limit, revision=revision, keys_only=bool(bare)
    )
    whole = serve(engine.kv.range, request.SerializeToString())
    stream, _ = ask(engine, request)
    engine.settle()
    assert whole.body is not None, whole.failed
    assert pb.RangeResponse.FromString(whole.body) == joined(stream)


def test_empty_range_is_one_chunk() -> None:
    """A header and nothing else."""
    engine = eight_keys(MemoryDisk())
    stream, _ = ask(engine, pb.RangeRequest(key=b"x", range_end=b"z"))
    engine.settle()
    (only,) = chunks(stream)
    assert (0, False, 9) == (only.count, only.more, only.header.revision)
    assert not only.kvs


def test_keys_born_later_leave_no_empty_chunk() -> None:
    """Steps that see nothing but keys younger than the snapshot send nothing."""
    engine = eight_keys(MemoryDisk())
    stream, _ = ask(engine, everything(revision=2))
    engine.settle()
    assert [pair.key for pair in joined(stream).kvs] == [b"a"]


def test_changes_between_chunks_are_not_seen() -> None:
    """What is put or deleted while the stream goes on belongs to later revisions."""
    engine = eight_keys(MemoryDisk())
    stream, _ = ask(engine, everything())
    assert len(stream.sent) == 1
    write(engine, b"d")
    write(engine, b"dd")
    serve(engine.kv.delete_range, pb.DeleteRangeRequest(key=b"g").SerializeToString())
    engine.settle()
    assert [(pair.key, pair.mod_revision) for pair in joined(stream).kvs] == [
        (name, at) for at, name in enumerate(NAMES, 2)
    ]
    assert joined(stream).count == len(NAMES)


@pytest.mark.parametrize("revision", [0, 9])
def test_compaction_ends_the_stream(revision: int) -> None:
    """As soon as the snapshot is compacted there is no further chunk, and the client is told."""
    engine = eight_keys(MemoryDisk())
    stream, sink = opened(engine.kv.range_stream)
    stream.blocked = True
    deliver(sink, stream, everything(revision=revision).SerializeToString())
    sent = len(stream.sent)
    write(engine, b"a")
    engine.settle()
    compact = serve(engine.kv.compact, pb.CompactionRequest(revision=10).SerializeToString())
    engine.settle()
    assert compact.body is not None, compact.failed
    stream.blocked = False
    sink.writable()
    assert stream.status == (errors.CompactedError.code, errors.CompactedError.text)
    assert sent == len(stream.sent)


def test_slow_client_is_waited_for() -> None:
    """Nothing is read on while the client has not taken what was sent; then it goes on."""
    engine = eight_keys(MemoryDisk())
    stream, sink = opened(engine.kv.range_stream)
    stream.blocked = True
    deliver(sink, stream, everything().SerializeToString())
    for sent in range(1, 4):
        engine.settle()
        assert sent == len(stream.sent)
        assert stream.status is None
        sink.writable()
    stream.blocked = False
    sink.writable()
    engine.settle()
    assert len(joined(stream).kvs) == len(NAMES)


def test_client_that_left_is_not_served() -> None:
    """After the stream's end nothing more is read or sent."""
    engine = eight_keys(MemoryDisk())
    stream, sink = ask(engine, everything())
    stream.cancelled = True
    sink.closed()
    engine.settle()
    assert len(stream.sent) == 1


def test_missing_row_ends_the_stream() -> None:
    """A value that storage lost is corruption, not a shorter list."""
    disk = MemoryDisk()
    engine = eight_keys(disk)
    del disk.rows[6, 0]
    stream, _ = ask(engine, everything())
    engine.settle()
    assert stream.status == (errors.CorruptError.code, errors.CorruptError.text)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"sort_order": pb.RangeRequest.DESCEND}, errors.UNIMPLEMENTED),
        ({"sort_order": pb.RangeRequest.ASCEND, "sort_target": 3}, errors.UNIMPLEMENTED),
        ({"min_mod_revision": 3}, errors.UNIMPLEMENTED),
        ({"max_create_revision": 3}, errors.UNIMPLEMENTED),
        ({"revision": 10}, errors.FutureRevisionError.code),
    ],
)
def test_refused(fields: dict[str, int], code: int) -> None:
    """Orders and bounds are not supported, as in etcd; the future cannot be read."""
    engine = eight_keys(MemoryDisk())
    stream, _ = ask(engine, everything(**fields))
    engine.settle()
    assert stream.status is not None
    assert code == stream.status[0]
    assert not stream.sent


def test_a_serializable_stream_shows_the_revision_it_read() -> None:
    """Over several shards that is what all of them have committed, as a Range shows it, and not
    the head of one that is ahead.
    """
    engine = Stack([MemoryDisk(), MemoryDisk(shard="1")], routes={b"b": 1})
    write(engine, b"b")
    engine.turn()
    commit_of_b = engine.steps.waiting.popleft()
    write(engine, b"a")
    engine.settle()
    assert engine.commits.durable == 3
    request = everything(serializable=True)
    stream, _ = ask(engine, request)
    engine.settle()
    answer = serve(engine.kv.range, request.SerializeToString())
    engine.settle()
    assert answer.body is not None
    expected = pb.RangeResponse.FromString(answer.body)
    assert expected.header.revision == 1
    assert not expected.kvs
    assert expected == joined(stream)
    commit_of_b()
    engine.settle()
    stream, _ = ask(engine, request)
    engine.settle()
    assert (joined(stream).header.revision, joined(stream).count) == (3, 2)
