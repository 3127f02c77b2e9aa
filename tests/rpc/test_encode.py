"""Answers made by joining bytes against the protobuf library."""

from hypothesis import given
from hypothesis import strategies as st

from kvstore.history import Entry, History
from kvstore.index import Index
from kvstore.kv import Header, frame_key_value
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb
from kvstore.range import Item, RangeQuery, RangeRead
from kvstore.rpc import encode
from kvstore.txn import DeleteResult, PutResult, RangeResult, Result, TxnResult

HEADER = Header(cluster_id=1, member_id=2, raft_term=3)
REVISION = 300
positive = st.integers(1, (1 << 63) - 1)
pairs = st.builds(
    kv_pb2.KeyValue,
    key=st.binary(min_size=1, max_size=200),
    create_revision=positive,
    mod_revision=positive,
    version=positive,
    value=st.binary(max_size=200),
    lease=st.integers(-(1 << 63), (1 << 63) - 1),
)
Stored = dict[tuple[bytes, Entry], bytes]


def head(revision: int = REVISION) -> pb.ResponseHeader:
    """The header of a whole answer."""
    return pb.ResponseHeader(cluster_id=1, member_id=2, raft_term=3, revision=revision)


def item(pair: kv_pb2.KeyValue, stored: Stored, *, cached: bool) -> Item:
    """``pair`` as the engine holds it, its value in memory or only in storage."""
    entry = (pair.mod_revision, len(stored), pair.create_revision, pair.version, pair.lease)
    framed = frame_key_value(
        pair.key, pair.create_revision, pair.mod_revision, pair.version, pair.value, pair.lease
    )
    stored[pair.key, entry] = framed
    return Item(pair.key, entry, framed if cached else None)


@st.composite
def reads(draw: st.DrawFn, stored: Stored) -> tuple[RangeRead, pb.RangeResponse]:
    """A finished read and its answer without the header."""
    shown = draw(st.lists(pairs, max_size=4))
    query = RangeQuery(b"a", b"b", keys_only=draw(st.booleans()))
    read = RangeRead(Index(), History(), query, at=1, head=1, step_keys=1)
    for pair in shown:
        one = item(pair, stored, cached=draw(st.booleans()))
        read.keys.append(one.key)
        read.entries.append(one.entry)
        read.values.append(one.framed)
        if query.keys_only:
            pair.value = b""
    read.more, read.count = draw(st.booleans()), draw(st.integers(0, 1 << 40))
    return read, pb.RangeResponse(kvs=shown, more=read.more, count=read.count)


@st.composite
def results(draw: st.DrawFn, stored: Stored, depth: int = 2) -> tuple[Result, pb.ResponseOp]:
    """A result inside a Txn and protobuf's reading of it."""
    answer = pb.ResponseOp()
    header = pb.ResponseHeader(revision=draw(positive))
    match draw(st.integers(0, 3 if depth else 2)):
        case 0:
            pair = draw(st.none() | pairs)
            previous = None if pair is None else item(pair, stored, cached=draw(st.booleans()))
            answer.response_put.CopyFrom(pb.PutResponse(header=header, prev_kv=pair))
            return PutResult(header.revision, previous), answer
        case 1:
            before = draw(st.lists(pairs, max_size=3))
            gone = [item(pair, stored, cached=draw(st.booleans())) for pair in before]
            deleted = len(gone) or draw(st.integers(0, 1 << 20))
            answer.response_delete_range.CopyFrom(
                pb.DeleteRangeResponse(header=header, deleted=deleted, prev_kvs=before)
            )
            return DeleteResult(header.revision, deleted, gone), answer
        case 2:
            read, response = draw(reads(stored))
            response.header.CopyFrom(header)
            answer.response_range.CopyFrom(response)
            return RangeResult(header.revision, read), answer
        case _:
            nested = draw(st.lists(results(stored, depth - 1), max_size=3))
            succeeded = draw(st.booleans())
            answer.response_txn.succeeded = succeeded
            answer.response_txn.header.SetInParent()
            answer.response_txn.responses.extend(one for _, one in nested)
            return TxnResult(succeeded, [one for one, _ in nested]), answer


@given(st.data())
def test_range_response(data: st.DataObject) -> None:
    """A range with everything in memory; keys only show no value."""
    stored: Stored = {}
    read, expected = data.draw(reads(stored))
    expected.header.CopyFrom(head())
    places = zip(read.keys, read.entries, strict=True)
    read.values = [stored[place] for place in places]
    body = encode.range_response(HEADER.at(REVISION), read)
    assert expected.SerializeToString() == body
    assert b"".join(encode.range_parts(HEADER.at(REVISION), read)) == body


@given(st.data())
def test_shown_pairs_from_a_place(data: st.DataObject) -> None:
    """A piece of an answer is the rest of the whole one."""
    stored: Stored = {}
    read, _ = data.draw(reads(stored))
    read.values = [stored[place] for place in zip(read.keys, read.entries, strict=True)]
    start = data.draw(st.integers(0, len(read.keys)))
    assert encode.shown_pairs(read)[start:] == encode.shown_pairs(read, start)


@given(st.data())
def test_txn_response(data: st.DataObject) -> None:
    """Any tree of results, values from memory or fetched; just the missing ones are asked for."""
    stored: Stored = {}
    parts = data.draw(st.lists(results(stored), max_size=3))
    succeeded = data.draw(st.booleans())
    result = TxnResult(succeeded, [one for one, _ in parts])
    missing = {
        (one.key, one.entry): stored[one.key, one.entry]
        for one in encode.shown_items(result.results)
    }
    body = encode.txn_response(
        HEADER.at(REVISION),
        result,
        lambda one: one.framed if one.framed is not None else missing[one.key, one.entry],
    )
    expected = pb.TxnResponse(header=head(), succeeded=succeeded)
    expected.responses.extend(one for _, one in parts)
    assert expected.SerializeToString() == body


@given(positive)
def test_put_succeeded(revision: int) -> None:
    """The ready answer of a Txn of one put."""
    expected = pb.TxnResponse(header=head(revision), succeeded=True)
    expected.responses.add().response_put.header.revision = revision
    assert expected.SerializeToString() == encode.put_succeeded(HEADER.at(revision), revision)


@given(st.none() | pairs, st.lists(pairs, max_size=3))
def test_answers_of_single_writes(
    replaced: kv_pb2.KeyValue | None, deleted: list[kv_pb2.KeyValue]
) -> None:
    """A put with and without what it replaced; a delete of none, one or more."""
    stored: Stored = {}
    previous = None if replaced is None else item(replaced, stored, cached=False)

    def lookup(one: Item) -> bytes:
        return stored[one.key, one.entry]

    put = encode.put_response(HEADER.at(REVISION), PutResult(REVISION, previous), lookup)
    assert pb.PutResponse(header=head(), prev_kv=replaced).SerializeToString() == put
    gone = [item(pair, stored, cached=False) for pair in deleted]
    result = DeleteResult(REVISION, len(gone), gone)
    body = encode.delete_response(HEADER.at(REVISION), result, lookup)
    expected = pb.DeleteRangeResponse(header=head(), deleted=len(gone), prev_kvs=deleted)
    assert expected.SerializeToString() == body
