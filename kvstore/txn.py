"""Transactions: the operations, what is refused before anything is done, and how compares decide.

A request becomes a tree of frozen operations. ``validate`` refuses what etcd's edge refuses
(``server/etcdserver/api/v3rpc/key.go``); ``decide`` evaluates every compare of the tree once,
before any operation, and returns the path of taken branches; ``check`` refuses what etcd's
``checkTxn`` refuses, on the taken path. After that ``store`` applies the taken operations in order
and may no longer fail.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kvstore.errors import (
    DuplicateKeyError,
    EmptyKeyError,
    InvalidSortOptionError,
    KeyNotFoundError,
    LeaseProvidedError,
    TooManyOpsError,
    ValueProvidedError,
)
from kvstore.history import Entry
from kvstore.kv import value_of
from kvstore.range import Item, RangeQuery, RangeRead


class Put(NamedTuple):
    """A put; ``lease`` 0 is none."""

    key: bytes
    value: bytes
    lease: int = 0
    prev_kv: bool = False
    ignore_value: bool = False
    ignore_lease: bool = False


class DeleteRange(NamedTuple):
    r"""A delete of [key, end); ``end`` None is the single key, ``b"\\0"`` no upper bound."""

    key: bytes
    end: bytes | None
    prev_kv: bool = False


class Compare(NamedTuple):
    """A condition on every key of [key, end); ``operand`` is bytes for TARGET_VALUE, else a
    number.
    """

    result: int
    target: int
    key: bytes
    end: bytes | None
    operand: bytes | int


class Txn(NamedTuple):
    """Compares and two branches. None stands for an operation without content."""

    compares: Sequence[Compare]
    success: Sequence["Op | None"]
    failure: Sequence["Op | None"]


Op = Put | DeleteRange | RangeQuery | Txn

TARGET_VERSION, TARGET_CREATE, TARGET_MOD, TARGET_VALUE, TARGET_LEASE = range(5)
EQUAL, GREATER, LESS, NOT_EQUAL = range(4)


class PutResult(NamedTuple):
    """``previous`` only if asked for and there was one."""

    revision: int
    previous: Item | None


class DeleteResult(NamedTuple):
    """``previous`` only if asked for."""

    revision: int
    deleted: int
    previous: Sequence[Item]


class RangeResult(NamedTuple):
    """What a range inside a Txn saw: a read that is done and finished."""

    revision: int
    read: RangeRead


class TxnResult(NamedTuple):
    """Which branch ran and what its operations answered."""

    succeeded: bool
    results: Sequence["Result"]


Result = PutResult | DeleteResult | RangeResult | TxnResult


class NeedValuesError(Exception):
    """Values that decide the request are not in memory: fetch ``pairs`` and execute from the start
    with them at hand.
    """

    def __init__(self, pairs: list[tuple[bytes, Entry]]) -> None:
        super().__init__(f"{len(pairs)} values needed")
        self.pairs = pairs


# -- what the edge refuses ---------------------------------------------


def validate_put(op: Put) -> None:
    """Raises EmptyKeyError, ValueProvidedError or LeaseProvidedError."""
    if not op.key:
        raise EmptyKeyError
    if op.ignore_value and op.value:
        raise ValueProvidedError
    if op.ignore_lease and op.lease:
        raise LeaseProvidedError


def validate_range(query: RangeQuery) -> None:
    """Raises EmptyKeyError or InvalidSortOptionError."""
    if not query.key:
        raise EmptyKeyError
    if not 0 <= query.sort_order <= 2 or not 0 <= query.sort_target <= 4:
        raise InvalidSortOptionError


def validate_delete(op: DeleteRange) -> None:
    """Raises EmptyKeyError."""
    if not op.key:
        raise EmptyKeyError


def validate_txn(txn: Txn, ops_max: int) -> None:
    """All of etcd's checks of a Txn that need no state, in etcd's order."""
    _validate_ops(txn, ops_max)
    _check_duplicates(txn.success)
    _check_duplicates(txn.failure)


def _validate_ops(txn: Txn, ops_max: int) -> None:
    longest = max(len(txn.compares), len(txn.success), len(txn.failure))
    if longest > ops_max:
        raise TooManyOpsError
    for compare in txn.compares:
        if not compare.key:
            raise EmptyKeyError
    for branch in (txn.success, txn.failure):
        for op in branch:
            _validate_op(op, ops_max - longest)


def _validate_op(op: Op | None, ops_left: int) -> None:
    match op:
        case Put():
            validate_put(op)
        case RangeQuery():
            validate_range(op)
        case DeleteRange():
            validate_delete(op)
        case Txn():
            _validate_ops(op, ops_left)
        case None:
            raise KeyNotFoundError


def _check_duplicates(ops: Sequence[Op | None]) -> tuple[set[bytes], list[DeleteRange]]:
    """Refuse a key put twice, or put and deleted; returns the puts and deletes of ``ops`` at any
    depth.

    Puts in the two branches of one nested Txn exclude each other and may be equal. The order of the
    checks, and so what is overlooked, is that of etcd's ``checkIntervals``.
    """
    deletes = [op for op in ops if isinstance(op, DeleteRange)]
    puts: set[bytes] = set()
    for op in ops:
        if not isinstance(op, Txn):
            continue
        then_puts, then_deletes = _check_duplicates(op.success)
        else_puts, else_deletes = _check_duplicates(op.failure)
        for key in then_puts:
            if key in puts or _overlaps(deletes, key):
                raise DuplicateKeyError
        for key in else_puts:
            if key in puts or _overlaps(deletes, key):
                raise DuplicateKeyError
        puts |= then_puts | else_puts
        deletes += then_deletes + else_deletes
    for op in ops:
        if isinstance(op, Put):
            if op.key in puts or _overlaps(deletes, op.key):
                raise DuplicateKeyError
            puts.add(op.key)
    return puts, deletes


def _overlaps(deletes: list[DeleteRange], key: bytes) -> bool:
    r"""Is ``key`` in one of the ranges, an end of ``b"\0"`` taken literally, as etcd does here?

    So a delete without an upper bound may stand beside a put, and deletes what was put before it.
    """
    return any(
        key == delete.key if delete.end is None else delete.key <= key < delete.end
        for delete in deletes
    )


# -- compares ---------------------------------------------

ReadItems = Callable[[bytes, bytes | None], Sequence[Item]]


def decide(txn: Txn, read: ReadItems) -> Iterator[bool]:
    """The outcome of each Txn of the taken path, outermost first, in order of execution.

    ``read(key, end)`` gives the live items of a range. Raises NeedValuesError, once, with all that
    is missing.
    """
    missing: list[tuple[bytes, Entry]] = []
    path: list[bool] = []
    _decide(txn, read, path, missing)
    if missing:
        raise NeedValuesError(missing)
    return iter(path)


def _decide(
    txn: Txn, read: ReadItems, path: list[bool], missing: list[tuple[bytes, Entry]]
) -> None:
    succeeded = True
    for compare in txn.compares:
        items = read(compare.key, compare.end)
        if compare.target == TARGET_VALUE:
            missing += [(item.key, item.entry) for item in items if item.framed is None]
        if succeeded and not missing and not _holds(compare, items):
            succeeded = False
    path.append(succeeded)
    for op in txn.success if succeeded else txn.failure:
        if isinstance(op, Txn):
            _decide(op, read, path, missing)


def _holds(compare: Compare, items: Sequence[Item]) -> bool:
    """Does ``compare`` hold for every item? Without any: as for a missing key, whose numbers are
    all 0.
    """
    if not items:
        return compare.target != TARGET_VALUE and _matches(compare.result, 0, compare.operand)
    return all(
        _matches(compare.result, _field(compare.target, item), compare.operand) for item in items
    )


def _field(target: int, item: Item) -> bytes | int:
    mod, _, create, version, lease = item.entry
    if target == TARGET_VALUE:
        assert item.framed is not None, "values that decide are fetched first"
        return value_of(item.framed)
    return (version, create, mod, 0, lease)[target] if 0 <= target <= TARGET_LEASE else 0


def _matches(result: int, actual: bytes | int, operand: bytes | int) -> bool:
    if result == EQUAL:
        return actual == operand
    if result == NOT_EQUAL:
        return actual != operand
    assert isinstance(actual, bytes) == isinstance(operand, bytes), "one kind each"
    if result == GREATER:
        return actual > operand  # type: ignore[operator]  # the assertion above
    if result == LESS:
        return actual < operand  # type: ignore[operator]
    return True


# -- the tree ---------------------------------------------


def can_write(txn: Txn) -> bool:
    """Could any branch change something?"""
    return any(
        isinstance(op, Put | DeleteRange) or (isinstance(op, Txn) and can_write(op))
        for branch in (txn.success, txn.failure)
        for op in branch
    )


def can_write_on(txn: Txn, taken: Iterator[bool]) -> bool:
    """Could the branches that are ``taken``, as ``decide`` gave them, change something?"""
    ops = txn.success if next(taken) else txn.failure
    return any(
        can_write_on(op, taken) if isinstance(op, Txn) else isinstance(op, Put | DeleteRange)
        for op in ops
    )


def ranges_of(txn: Txn) -> Iterator[tuple[bytes, bytes | None]]:
    """Every range that the Txn's compares and both branches touch, at any depth, reads included."""
    for compare in txn.compares:
        yield compare.key, compare.end
    for branch in (txn.success, txn.failure):
        for op in branch:
            match op:
                case Put():
                    yield op.key, None
                case DeleteRange() | RangeQuery():
                    yield op.key, op.end
                case Txn():
                    yield from ranges_of(op)
