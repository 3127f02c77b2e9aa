"""Reading the commonest Txn in place: only ever a shorter way to the same operations."""

from hypothesis import given
from hypothesis import strategies as st

from kvstore.pb import rpc_pb2 as pb
from kvstore.range import RangeQuery
from kvstore.rpc import decode
from kvstore.txn import EQUAL, TARGET_MOD, Compare, Put, Txn
from tests.test_model import txn_requests, update_requests

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def long_way(payload: bytes) -> Txn:
    """The operations as protobuf reads them."""
    return decode.txn(pb.TxnRequest.FromString(payload))


def check(payload: bytes) -> bool:
    """Was it read in place? Then it is the Txn that protobuf reads."""
    plain = decode.plain_update(payload)
    if plain is None:
        return False
    key, mod_revision, value, lease = plain
    txn = long_way(payload)
    if mod_revision < 1 << 63:  # above: a negative number, which no key has
        assert txn.compares == [Compare(EQUAL, TARGET_MOD, key, None, mod_revision)]
    assert txn.success == [Put(key, value, lease)]
    assert txn.failure in ([], [RangeQuery(key, None)])
    return True


@given(update_requests(), INT64, st.binary(min_size=1, max_size=300), st.binary(max_size=20_000))
def test_every_create_and_update_is_read_in_place(
    request_: pb.TxnRequest, revision: int, key: bytes, value: bytes
) -> None:
    """Keys and values of any length; only a very long key may go the long way."""
    request_.compare[0].mod_revision = revision
    request_.compare[0].key = request_.success[0].request_put.key = key
    request_.success[0].request_put.value = value
    if request_.failure:
        request_.failure[0].request_range.key = key
    taken = check(request_.SerializeToString())
    negative = request_.success[0].request_put.lease < 0
    assert taken or negative or (len(key) > 120 and len(request_.failure) == 1)


@given(txn_requests())
def test_other_txns_are_never_mistaken(request_: pb.TxnRequest) -> None:
    """Whatever is read in place is what protobuf reads."""
    check(request_.SerializeToString())


@given(update_requests(), st.data())
def test_a_changed_byte_never_changes_the_meaning(
    request_: pb.TxnRequest, data: st.DataObject
) -> None:
    """A payload with a byte changed, added or cut is read as protobuf reads it, or not in place."""
    payload = bytearray(request_.SerializeToString())
    at = data.draw(st.integers(0, len(payload) - 1))
    match data.draw(st.integers(0, 2)):
        case 0:
            payload[at] = data.draw(st.integers(0, 255))
        case 1:
            payload.insert(at, data.draw(st.integers(0, 255)))
        case 2:
            del payload[at:]
    if decode.plain_update(bytes(payload)) is not None:
        assert check(bytes(payload))
