"""Reading requests: the short way of a get is only ever a shorter way, and no field gets lost."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore import errors
from kvstore.pb import rpc_pb2 as pb
from kvstore.range import RangeQuery
from kvstore.rpc import decode
from kvstore.transport.api import StatusError
from kvstore.txn import Compare, DeleteRange, Put, Txn
from tests.test_model import range_requests

PLAIN = RangeQuery(b"", None)
blobs = st.binary(max_size=200)


def check(payload: bytes) -> bool:
    """Was it read in place? Then protobuf reads a get of that key, and nothing else in it."""
    key = decode.plain_key(payload)
    if key is None:
        return False
    query = decode.range_query(pb.RangeRequest.FromString(payload))
    assert query._replace(limit=0) == PLAIN._replace(key=key)
    assert query.limit in {0, 1}
    return True


@given(st.binary(min_size=1, max_size=300), st.booleans())
def test_every_get_is_read_in_place(key: bytes, limited: object) -> None:
    """``key`` alone or with ``limit=1``, unless the key is longer than a byte can say."""
    request = pb.RangeRequest(key=key, limit=1 if limited else 0)
    assert check(request.SerializeToString()) == (len(key) < 128)


@given(range_requests(), blobs, blobs)
@example(pb.RangeRequest(), b"a", b"\x18\x01")
def test_other_ranges_are_never_mistaken(request_: pb.RangeRequest, key: bytes, end: bytes) -> None:
    """Whatever is read in place is what protobuf reads, with other fields and lengths too."""
    check(request_.SerializeToString())
    request_.key, request_.range_end = key, end
    check(request_.SerializeToString())


@given(st.binary(max_size=130), st.binary(max_size=6))
@example(b"ab", b"\x18\x01")
@example(b"", b"\x18\x01")
def test_unusual_encodings_are_never_mistaken(key: bytes, tail: bytes) -> None:
    """Bytes behind a key are taken as a limit of 1 or not in place; also where the key ends so."""
    payload = b"\x0a%c%b" % (min(len(key), 127), key[:127])
    assert decode.plain_key(payload + tail) is None or check(payload + tail)


@given(st.binary(max_size=12))
def test_any_bytes(payload: bytes) -> None:
    """Bytes that are no message are not read in place."""
    if decode.plain_key(payload) is not None:
        assert check(payload)


def test_no_message_is_refused() -> None:
    """Bytes that protobuf cannot read end the call as grpc-go ends it."""
    with pytest.raises(StatusError) as caught:
        decode.parse(pb.RangeRequest.FromString, b"\x0a\x05a")
    assert errors.INTERNAL == caught.value.code


@given(range_requests())
def test_range(request_: pb.RangeRequest) -> None:
    """Every field of a RangeRequest arrives under its name; a negative limit is none."""
    query = decode.range_query(request_)
    assert request_.range_end == (query.end or b"")
    for name in set(RangeQuery._fields) - {"end"}:
        assert getattr(request_, name) == getattr(query, name)
    request_.limit = -5
    assert decode.range_query(request_).limit == 0


def test_writes() -> None:
    """Every field of puts and deletes arrives."""
    put = pb.PutRequest(key=b"k", value=b"v", lease=-3, prev_kv=True, ignore_lease=True)
    expected = Put(b"k", b"v", -3, prev_kv=True, ignore_lease=True)
    assert expected == decode.put(put)
    put = pb.PutRequest(key=b"k", ignore_value=True)
    assert decode.put(put) == Put(b"k", b"", ignore_value=True)
    delete = pb.DeleteRangeRequest(key=b"k", range_end=b"l", prev_kv=True)
    assert decode.delete_range(delete) == DeleteRange(b"k", b"l", prev_kv=True)


def test_txn() -> None:
    """Both branches at any depth; an operation without content stays where it is."""
    message = pb.TxnRequest()
    message.success.add().request_txn.failure.add().request_delete_range.key = b"d"
    message.failure.add().request_range.key = b"r"
    message.failure.add()
    inner = Txn([], [], [DeleteRange(b"d", None)])
    assert decode.txn(message) == Txn([], [inner], [RangeQuery(b"r", None), None])


def test_compare_reads_the_field_of_its_target() -> None:
    """As in etcd, the union's other fields count as unset; an unknown target compares versions."""
    value = pb.Compare(key=b"k", range_end=b"l", target=pb.Compare.VALUE, value=b"v")
    value.result = pb.Compare.NOT_EQUAL
    lease = pb.Compare(key=b"k", target=pb.Compare.LEASE, mod_revision=5)
    unknown = pb.Compare.FromString(b"\x10\x09\x1a\x01k\x20\x06")
    message = pb.TxnRequest(compare=[value, lease, unknown])
    assert decode.txn(message).compares == [
        Compare(3, pb.Compare.VALUE, b"k", b"l", b"v"),
        Compare(0, pb.Compare.LEASE, b"k", None, 0),
        Compare(0, 9, b"k", None, 6),
    ]
