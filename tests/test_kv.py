"""Every encoding made by hand against the protobuf library."""

from hypothesis import example, given
from hypothesis import strategies as st

from kvstore import kv
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb

INT64_MAX = (1 << 63) - 1
int64 = st.one_of(
    st.integers(-INT64_MAX - 1, INT64_MAX),
    st.sampled_from([0, 1, 127, 128, (1 << 14) - 1, 1 << 14, (1 << 28) - 1, 1 << 28, INT64_MAX]),
)
positive = st.one_of(st.integers(1, 1 << 15), st.integers(1, INT64_MAX))
uint64 = st.integers(1, (1 << 64) - 1)
blobs = st.one_of(st.binary(max_size=40), st.integers(0, 20_000).map(lambda size: b"x" * size))
pairs = st.builds(
    kv_pb2.KeyValue,
    key=blobs.filter(bool),
    create_revision=positive,
    mod_revision=positive,
    version=positive,
    value=blobs,
    lease=int64,
)


def framed(pair: kv_pb2.KeyValue) -> bytes:
    """``pair`` by hand."""
    return kv.frame_key_value(
        pair.key, pair.create_revision, pair.mod_revision, pair.version, pair.value, pair.lease
    )


def one_key(pair: kv_pb2.KeyValue) -> bytes:
    """``pair`` as field 2 of a message, by protobuf."""
    return pb.RangeResponse(kvs=[pair]).SerializeToString()


@given(st.one_of(int64, uint64))
@example(-1)
@example(-INT64_MAX - 1)
@example((1 << 64) - 1)
def test_varint(number: int) -> None:
    """int64 and uint64 as protobuf writes them, read back to the same bits."""
    signed = number if number <= INT64_MAX else number - (1 << 64)
    expected = pb.ResponseHeader(revision=signed).SerializeToString()[1:] or b"\0"
    assert expected == kv.varint(number)
    assert kv._read_varint(kv.varint(number), 0) == (number & (1 << 64) - 1, len(expected))


@given(pairs)
def test_key_value(pair: kv_pb2.KeyValue) -> None:
    """A framed KeyValue is field 2, with negative leases and empty values; as field 3 only the tag
    differs.
    """
    assert one_key(pair) == framed(pair)
    response = pb.DeleteRangeResponse(prev_kvs=[pair]).SerializeToString()
    assert response == kv.as_field_3(framed(pair))


@given(pairs)
def test_value_of(pair: kv_pb2.KeyValue) -> None:
    """The value is found behind any key and numbers."""
    assert pair.value == kv.value_of(framed(pair))


@given(blobs.filter(bool), positive)
def test_tombstone(key: bytes, revision: int) -> None:
    """A deleted key shows itself and its revision only."""
    pair = kv_pb2.KeyValue(key=key, mod_revision=revision)
    assert one_key(pair) == kv.frame_tombstone(key, revision)


@given(pairs, st.none() | pairs)
def test_put_event(pair: kv_pb2.KeyValue, previous: kv_pb2.KeyValue | None) -> None:
    """A put event with and without what it replaced."""
    event = kv_pb2.Event(type=kv_pb2.Event.PUT, kv=pair, prev_kv=previous)
    expected = pb.WatchResponse(events=[event]).SerializeToString()
    before = None if previous is None else framed(previous)
    assert expected == kv.frame_put_event(framed(pair), before)


@given(blobs.filter(bool), positive, st.none() | pairs)
def test_delete_event(key: bytes, revision: int, previous: kv_pb2.KeyValue | None) -> None:
    """A delete event is read as protobuf's; its fields stand in another order."""
    tombstone = kv_pb2.KeyValue(key=key, mod_revision=revision)
    event = kv_pb2.Event(type=kv_pb2.Event.DELETE, kv=tombstone, prev_kv=previous)
    before = None if previous is None else framed(previous)
    made = kv.frame_delete_event(kv.frame_tombstone(key, revision), before)
    assert pb.WatchResponse(events=[event]) == pb.WatchResponse.FromString(made)


@given(uint64, uint64, positive, st.lists(st.integers(0, INT64_MAX), min_size=1, max_size=4))
def test_header(cluster: int, member: int, term: int, revisions: list[int]) -> None:
    """Headers of one member, whatever revision came before; 0 is left out."""
    header = kv.Header(cluster_id=cluster, member_id=member, raft_term=term)
    for revision in revisions:
        expected = pb.ResponseHeader(
            cluster_id=cluster, member_id=member, raft_term=term, revision=revision
        )
        assert pb.PutResponse(header=expected).SerializeToString() == header.at(revision)


@given(positive)
def test_revision_header(revision: int) -> None:
    """Inside a Txn a header has its revision only."""
    expected = pb.PutResponse(header=pb.ResponseHeader(revision=revision))
    assert expected.SerializeToString() == kv.revision_header(revision)


@given(blobs.filter(bool))
def test_frame(body: bytes) -> None:
    """A tag, the length, the body."""
    assert pb.PutRequest(key=body).SerializeToString() == kv.frame(b"\x0a", body)


@given(st.binary(max_size=5), st.binary(max_size=8))
@example(b"", b"")
@example(b"a\xff", b"b")
@example(b"\xff\xff", b"\xff\xff\xff")
def test_prefix_end(prefix: bytes, key: bytes) -> None:
    """[prefix, end) holds the keys that start with the prefix, and no other."""
    end = kv.prefix_end(prefix)
    inside = prefix <= key and (end == b"\0" or key < end)
    assert key.startswith(prefix) == inside
    assert prefix <= prefix + key
    assert end == b"\0" or prefix + key < end


@given(st.lists(blobs))
def test_joined_size(parts: list[bytes]) -> None:
    """The size of what joining would give."""
    assert len(b"".join(parts)) == kv.joined_size(parts)
