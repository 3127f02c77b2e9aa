"""The requests that are encoded by hand, against protobuf."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.client import requests
from kvstore.pb import rpc_pb2 as pb

pytestmark = pytest.mark.slow  # so many examples are
KEYS = st.binary(min_size=1, max_size=200)
VALUES = st.binary(max_size=40) | st.integers(0, 70_000).map(bytes)
NUMBERS = st.integers(0, 2**63 - 1)


def compare(key: bytes, revision: int) -> pb.Compare:
    """MOD(key) = revision."""
    return pb.Compare(
        result=pb.Compare.EQUAL, target=pb.Compare.MOD, key=key, mod_revision=revision
    )


def put(key: bytes, value: bytes, lease: int) -> pb.RequestOp:
    """A put."""
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))


def read(key: bytes) -> pb.RequestOp:
    """The else-branch."""
    return pb.RequestOp(request_range=pb.RangeRequest(key=key))


@given(KEYS, VALUES, NUMBERS)
def test_create(key: bytes, value: bytes, lease: int) -> None:
    """A create puts, with its lease, what must be absent."""
    found = pb.TxnRequest.FromString(requests.create(key, value, lease))
    assert pb.TxnRequest(compare=[compare(key, 0)], success=[put(key, value, lease)]) == found


@given(KEYS, VALUES, NUMBERS, NUMBERS)
def test_update(key: bytes, value: bytes, revision: int, lease: int) -> None:
    """An update puts what is as it was seen, and reads it if it is not."""
    wanted = pb.TxnRequest(
        compare=[compare(key, revision)], success=[put(key, value, lease)], failure=[read(key)]
    )
    assert wanted == pb.TxnRequest.FromString(requests.update(key, value, revision, lease))


@given(KEYS, NUMBERS)
def test_delete(key: bytes, revision: int) -> None:
    """A delete removes what is as it was seen, and reads it if it is not."""
    deletion = pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
    wanted = pb.TxnRequest(
        compare=[compare(key, revision)], success=[deletion], failure=[read(key)]
    )
    assert wanted == pb.TxnRequest.FromString(requests.delete(key, revision))


@given(KEYS, VALUES, NUMBERS)
def test_compact_cas(key: bytes, value: bytes, version: int) -> None:
    """The Txn before a compaction compares the version, also that of an absent key."""
    mine = pb.Compare(result=pb.Compare.EQUAL, target=pb.Compare.VERSION, key=key, version=version)
    wanted = pb.TxnRequest(compare=[mine], success=[put(key, value, 0)], failure=[read(key)])
    found = pb.TxnRequest.FromString(requests.compact_cas(key, value, version))
    assert wanted == found
    assert found.compare[0].WhichOneof("target_union") == "version"


@given(KEYS, st.binary(max_size=200), NUMBERS, NUMBERS, st.booleans())
def test_read(key: bytes, end: bytes, limit: int, revision: int, count: bool) -> None:  # noqa: FBT001 - drawn
    """A Range of one key or many, limited, at a revision, or only counted."""
    wanted = pb.RangeRequest(
        key=key, range_end=end, limit=limit, revision=revision, count_only=count
    )
    message = requests.read(key, end, limit=limit, revision=revision, count=count)
    assert wanted == pb.RangeRequest.FromString(message)


@given(NUMBERS)
def test_numbers(number: int) -> None:
    """A compaction's revision and a lease's TTL; the server chooses the lease's id."""
    compaction = pb.CompactionRequest.FromString(requests.compact(number))
    assert pb.CompactionRequest(revision=number) == compaction
    grant = pb.LeaseGrantRequest.FromString(requests.grant(number))
    assert pb.LeaseGrantRequest(TTL=number) == grant


@given(st.binary(max_size=6), st.binary(max_size=8))
def test_prefix_end(prefix: bytes, key: bytes) -> None:
    """A key is in the range of a prefix exactly if it starts with it."""
    end = requests.prefix_end(prefix)
    inside = prefix <= key and (end == b"\0" or key < end)
    assert key.startswith(prefix) == inside


@pytest.mark.parametrize(
    ("path", "service", "method"),
    [
        (requests.RANGE, "KV", "Range"),
        (requests.TXN, "KV", "Txn"),
        (requests.COMPACT, "KV", "Compact"),
        (requests.RANGE_STREAM, "KV", "RangeStream"),
        (requests.WATCH, "Watch", "Watch"),
        (requests.GRANT, "Lease", "LeaseGrant"),
        (requests.STATUS, "Maintenance", "Status"),
    ],
    ids=lambda given: given if isinstance(given, str) else "path",
)
def test_paths_exist(path: bytes, service: str, method: str) -> None:
    """Every path is that of a method of the API."""
    described = pb.DESCRIPTOR.services_by_name[service]
    assert method in described.methods_by_name
    assert f"/{described.full_name}/{method}".encode() == path
