"""Values that decide a request, when they are more than memory holds."""

import pytest

from backends.memory import MemoryDisk
from kvstore import errors
from kvstore.config import StoreConfig
from kvstore.pb import rpc_pb2 as pb
from kvstore.rpc import deciding
from tests.stack import Answered, Stack, serve

NAMES = [b"a", b"b", b"c", b"d", b"e"]
VALUE = b"v" * 600


@pytest.fixture
def engine() -> Stack:
    """Five keys with values of which memory holds one."""
    memory = StoreConfig(cache_bytes_max=1_000, recent_bytes_max=1_000, fetch_rows_max=2)
    engine = Stack([MemoryDisk()], store=memory)
    for name in NAMES:
        serve(engine.kv.put, pb.PutRequest(key=name, value=VALUE).SerializeToString())
        engine.settle()
    return engine


def ask(engine: Stack, request: pb.TxnRequest) -> Answered:
    """Execute a Txn to its end."""
    call = serve(engine.kv.txn, request.SerializeToString())
    engine.settle()
    assert call.done
    assert engine.kv._deciding.bytes_held == 0
    return call


def answered(engine: Stack, request: pb.TxnRequest) -> pb.TxnResponse:
    """Likewise; its answer."""
    call = ask(engine, request)
    assert call.body is not None, call.failed
    return pb.TxnResponse.FromString(call.body)


def if_value(*names: bytes, value: bytes = VALUE, end: bytes = b"") -> pb.TxnRequest:
    """A put of z if all these keys have this value."""
    request = pb.TxnRequest()
    for name in names:
        request.compare.add(target=pb.Compare.VALUE, key=name, range_end=end, value=value)
    request.success.add().request_put.CopyFrom(pb.PutRequest(key=b"z", value=b"done"))
    return request


def test_compares_of_more_values_than_the_cache_holds(engine: Stack) -> None:
    """Each value that decides is compared, wherever the others have gone meanwhile."""
    assert answered(engine, if_value(*NAMES)).succeeded
    assert not answered(engine, if_value(*NAMES[:4], value=b"w")).succeeded


def test_a_compare_of_a_range(engine: Stack) -> None:
    """Likewise for all keys of a range."""
    assert answered(engine, if_value(b"a", end=b"f")).succeeded


def test_a_range_sorted_by_value(engine: Stack) -> None:
    """Inside a Txn it is decided before anything is changed, so its values are needed at once."""
    request = pb.TxnRequest()
    put = pb.PutRequest(key=b"c", value=b"w")
    request.success.add().request_put.CopyFrom(put)
    asked = pb.RangeRequest(
        key=b"a",
        range_end=b"f",
        sort_order=pb.RangeRequest.DESCEND,
        sort_target=pb.RangeRequest.VALUE,
    )
    request.success.add().request_range.CopyFrom(asked)
    pairs = answered(engine, request).responses[1].response_range.kvs
    assert [pair.key for pair in pairs] == [b"c", b"a", b"b", b"d", b"e"]
    assert [pair.value for pair in pairs] == [b"w", *[VALUE] * 4]


def test_puts_that_keep_their_values(engine: Stack) -> None:
    """A Txn that only changes leases writes the values that were there."""
    request = pb.TxnRequest()
    for name in NAMES:
        put = pb.PutRequest(key=name, ignore_value=True, prev_kv=True)
        request.success.add().request_put.CopyFrom(put)
    answer = answered(engine, request)
    assert [part.response_put.prev_kv.value for part in answer.responses] == [VALUE] * 5
    assert answered(engine, if_value(*NAMES)).succeeded


def test_a_request_that_needs_too_much_is_refused(
    engine: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that decide one request are bounded, and those of all together; nothing is applied."""
    before = engine.store.revision
    monkeypatch.setattr(deciding, "REQUEST_BYTES_MAX", 1_500)
    too_large = (errors.RequestTooLargeError.code, errors.RequestTooLargeError.text)
    assert too_large == ask(engine, if_value(*NAMES)).failed
    assert answered(engine, if_value(*NAMES[:2], value=b"w")).header.revision == before
    monkeypatch.setattr(deciding, "REQUEST_BYTES_MAX", 10_000)
    monkeypatch.setattr(deciding, "TOTAL_BYTES_MAX", 1_500)
    too_many = (errors.TooManyRequestsError.code, errors.TooManyRequestsError.text)
    assert too_many == ask(engine, if_value(*NAMES)).failed
    assert engine.store.revision == before


def test_a_key_that_changes_meanwhile_is_compared_as_it_is(engine: Stack) -> None:
    """Values fetched for an attempt before decide only while they are those of the head."""
    call = serve(engine.kv.txn, if_value(*NAMES).SerializeToString())
    assert not call.done, "more than one portion"
    serve(engine.kv.put, pb.PutRequest(key=b"a", value=b"new").SerializeToString())
    engine.settle()
    assert call.body is not None, call.failed
    assert not pb.TxnResponse.FromString(call.body).succeeded
