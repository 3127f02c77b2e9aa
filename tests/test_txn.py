"""What the edge refuses of a Txn, after etcd's ``checkIntervals`` and ``checkTxnRequest``."""

import pytest

from kvstore.errors import (
    DuplicateKeyError,
    EmptyKeyError,
    InvalidSortOptionError,
    KeyNotFoundError,
    LeaseProvidedError,
    StoreError,
    TooManyOpsError,
    ValueProvidedError,
)
from kvstore.range import RangeQuery
from kvstore.txn import (
    EQUAL,
    TARGET_VERSION,
    Compare,
    DeleteRange,
    Op,
    Put,
    Txn,
    can_write,
    can_write_on,
    ranges_of,
    validate_txn,
)

OPS_MAX = 128
A, B = Put(b"a", b"1"), Put(b"b", b"2")
DELETE_A, DELETE_ALL = DeleteRange(b"a", None), DeleteRange(b"a", b"c")
DELETE_UNBOUNDED = DeleteRange(b"a", b"\0")
DELETE_A_TO_B = DeleteRange(b"a", b"b")
EXISTS = Compare(EQUAL, TARGET_VERSION, b"a", None, 0)


def then(*ops: Op | None) -> Txn:
    """A Txn with one branch."""
    return Txn([], ops, [])


def otherwise(*ops: Op | None) -> Txn:
    """A Txn with the other branch."""
    return Txn([], [], ops)


DUPLICATES = {
    "two puts": then(A, A),
    "a put and its delete": then(A, DELETE_A),
    "a delete and its put": then(DELETE_A, A),
    "a put in a deleted range": then(B, DELETE_ALL),
    "a put at the start of a deleted range": then(A, DELETE_A_TO_B),
    "the same in the failure branch": otherwise(A, A),
    "a put and a nested one": then(A, then(A)),
    "a nested put before its twin": then(then(A), A),
    "a put and one nested in the other branch": then(A, otherwise(A)),
    "nested puts of two siblings": then(then(A), then(A)),
    "siblings in different branches": then(then(A), otherwise(A)),
    "a nested put in a deleted range": then(then(B), DELETE_ALL),
    "a put in a range deleted below": then(B, then(DELETE_ALL)),
    "a sibling's put in a range deleted before": then(then(DELETE_ALL), then(B)),
    "two levels down": then(A, then(then(A))),
    "deleted two levels down": then(A, then(otherwise(DELETE_A))),
    "inside the nested one": then(then(A, A)),
    "inside the nested one's failure branch": then(otherwise(A, DELETE_A)),
}
ALLOWED = {
    "nothing": then(),
    "different keys": then(A, B),
    "the same put in both branches": Txn([], [A], [A]),
    "the same put in both branches, nested": then(Txn([], [A], [A])),
    "a put and a delete in different branches": Txn([], [A], [DELETE_ALL]),
    "a put and a delete in different branches, nested": then(Txn([], [A], [DELETE_ALL])),
    "overlapping deletes": then(DELETE_A, DELETE_ALL, DELETE_A),
    "overlapping deletes at two levels": then(DELETE_A, then(DELETE_ALL)),
    "a put at the end of a deleted range": then(B, DELETE_A_TO_B),
    "a put and a delete without an upper bound": then(DELETE_UNBOUNDED, A),
    "likewise nested": then(A, then(DELETE_UNBOUNDED), then(B)),
    "a put and an empty deleted range": then(A, DeleteRange(b"b", b"a")),
    "a put and a range that reads it": then(A, RangeQuery(b"a", b"\0")),
    "a sibling's delete of a range put before": then(then(B), then(DELETE_ALL)),
}


@pytest.mark.parametrize("txn", DUPLICATES.values(), ids=DUPLICATES)
def test_duplicate_key_is_refused(txn: Txn) -> None:
    """A key that one execution could change twice, as far as etcd looks."""
    with pytest.raises(DuplicateKeyError):
        validate_txn(txn, OPS_MAX)


@pytest.mark.parametrize("txn", ALLOWED.values(), ids=ALLOWED)
def test_what_etcd_allows_is_allowed(txn: Txn) -> None:
    """Branches exclude each other, deletes may overlap, and what etcd overlooks is overlooked."""
    validate_txn(txn, OPS_MAX)


REFUSED: dict[str, tuple[type[StoreError], Txn]] = {
    "a compare without a key": (EmptyKeyError, Txn([EXISTS._replace(key=b"")], [], [])),
    "a put without a key": (EmptyKeyError, then(Put(b"", b""))),
    "a range without a key": (EmptyKeyError, otherwise(RangeQuery(b"", None))),
    "a delete without a key": (EmptyKeyError, then(then(DeleteRange(b"", b"\0")))),
    "a value to be ignored": (ValueProvidedError, then(Put(b"a", b"1", ignore_value=True))),
    "a lease to be ignored": (LeaseProvidedError, then(Put(b"a", b"", 7, ignore_lease=True))),
    "an unknown order": (InvalidSortOptionError, then(RangeQuery(b"a", None, sort_order=3))),
    "an unknown target": (InvalidSortOptionError, then(RangeQuery(b"a", None, sort_target=-1))),
    "an operation without content": (KeyNotFoundError, then(A, None)),
    "the shape comes before duplicates": (EmptyKeyError, Txn([], [A, A], [Put(b"", b"")])),
    "the size comes before the shape": (TooManyOpsError, then(*[Put(b"", b"")] * (OPS_MAX + 1))),
}


@pytest.mark.parametrize(("error", "txn"), REFUSED.values(), ids=REFUSED)
def test_shape_is_refused(error: type[StoreError], txn: Txn) -> None:
    """What needs no state to be seen to be wrong, at any depth and in etcd's order."""
    with pytest.raises(error):
        validate_txn(txn, OPS_MAX)


def puts(count: int, prefix: bytes = b"k") -> list[Put]:
    """Puts of different keys."""
    return [Put(b"%b%d" % (prefix, n), b"") for n in range(count)]


@pytest.mark.parametrize(
    "txn",
    [
        then(*puts(OPS_MAX)),
        Txn([EXISTS] * OPS_MAX, puts(OPS_MAX), puts(OPS_MAX)),
        then(then(*puts(OPS_MAX - 1))),
        then(then(*puts(120)), then(*puts(126, b"m"))),
        Txn([], [then(*puts(126)), B], [A]),
    ],
)
def test_as_many_operations_as_allowed(txn: Txn) -> None:
    """Each list counts by itself; a nested Txn has what its parents' longest lists leave."""
    validate_txn(txn, OPS_MAX)


@pytest.mark.parametrize(
    "txn",
    [
        then(*puts(OPS_MAX + 1)),
        otherwise(*puts(OPS_MAX + 1)),
        Txn([EXISTS] * (OPS_MAX + 1), [], []),
        then(then(*puts(OPS_MAX))),
        then(then(then(*puts(OPS_MAX - 1)))),
        Txn([EXISTS] * 3, [then(*puts(126))], []),
        otherwise(then(*puts(127)), A),
    ],
)
def test_one_operation_too_many(txn: Txn) -> None:
    """Compares, branches and depth all use up the budget."""
    with pytest.raises(TooManyOpsError):
        validate_txn(txn, OPS_MAX)


def test_what_a_txn_touches() -> None:
    """Ranges of compares and of both branches at any depth; whether any operation can write."""
    read = RangeQuery(b"r", b"s")
    txn = Txn([EXISTS], [read, then(B)], [otherwise(DELETE_ALL)])
    expected = [(b"a", None), (b"r", b"s"), (b"b", None), (b"a", b"c")]
    assert expected == list(ranges_of(txn))
    assert can_write(txn)
    assert can_write(otherwise(then(A)))
    assert not can_write(Txn([EXISTS], [read], [then(read)]))


PATHS = [
    (then(A), [True], True),
    (then(A), [False], False),
    (otherwise(DELETE_ALL), [False], True),
    (then(RangeQuery(b"a", None)), [True], False),
    (then(otherwise(A)), [True, True], False),
    (then(otherwise(A)), [True, False], True),
    (then(then(A), otherwise(B)), [True, False, True], False),
    (then(then(A), otherwise(B)), [True, True, True], True),
    (then(then(otherwise(A)), then(B)), [True, True, True, False], False),
    (then(then(otherwise(A)), then(B)), [True, True, True, True], True),
]


@pytest.mark.parametrize(("txn", "taken", "writes"), PATHS)
def test_what_the_taken_branches_can_change(txn: Txn, taken: list[bool], *, writes: bool) -> None:
    """Only operations of branches that are taken count, at any depth, in the order of `decide`."""
    assert can_write_on(txn, iter(taken)) == writes
