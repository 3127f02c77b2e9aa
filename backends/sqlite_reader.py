"""Reading rows from an SQLite file, packed so that a statement is one step.

The driver gives up the interpreter's lock around every step and, while the event loop is busy,
waits up to the interpreter's switch interval to get it back. Rows fetched one by one would pay that
for each row; SQLite therefore joins a page of rows into one row of a few columns (see ``schema``),
and Python cuts it up again.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import apsw

from backends.schema import SIZE_MAX, Statements
from kvstore.backend import HomeRows, IndexRow, LeaseRow, Row, RowId, ShardRecord

ROWS_FIRST = 128
"""Values, or rows with values, of a read's first statement; of the next ones up to SIZE_MAX."""
JOINED_BYTES = 16 << 20
"""What the values of one statement should come to, judged by the ones before."""

Packed = tuple[str | bytes | None, ...]


class Reader:
    """Reads through one connection, in short statements: none stays open and holds the log back.

    Every method raises ``apsw.Error`` when storage fails.
    """

    def __init__(self, connection: apsw.Connection, statements: Statements) -> None:
        self._connection = connection
        self._statements = statements

    def index_rows(self, after: RowId, rows_max: int) -> list[IndexRow]:
        """Up to ``rows_max`` rows after ``after`` without their values."""
        packed = self._row(self._statements.select_index, (*after, rows_max))
        return list(zip(*_index_columns(packed), strict=True))

    def rows(self, after: RowId, rows_max: int) -> list[Row]:
        """Up to ``rows_max`` rows after ``after``."""
        found: list[Row] = []
        page_max = ROWS_FIRST
        while len(found) < rows_max:
            wanted = min(rows_max - len(found), page_max)
            try:
                packed = self._row(self._statements.select_rows, (*after, wanted))
            except apsw.TooBigError:
                page_max = _smaller(wanted)
                continue
            values = _cut(packed[8], list(_numbers(packed[7])))
            page: list[Row] = list(zip(*_index_columns(packed), values, strict=True))
            found += page
            if len(page) < wanted:
                break
            after = page[-1][:2]
            page_max = _next_size(packed[8], len(page))
        return found

    def values(self, ids: Sequence[RowId]) -> list[bytes | None]:
        """The value of each row, None where there is none."""
        found: list[bytes | None] = []
        page_max = ROWS_FIRST
        while len(found) < len(ids):
            part = ids[len(found) : len(found) + page_max]
            try:
                packed = self._row(*self._statements.select_values.fitting(part))
            except apsw.TooBigError:
                page_max = _smaller(len(part))
                continue
            lengths = list(_numbers(packed[0]))[: len(part)]
            if -1 in lengths:
                cut = _cut(packed[1], [max(length, 0) for length in lengths])
                pairs = zip(lengths, cut, strict=True)
                found += [None if length < 0 else value for length, value in pairs]
            else:
                found += _cut(packed[1], lengths)
            page_max = _next_size(packed[1], len(part))
        return found

    def leases(self) -> list[LeaseRow]:
        """Every lease."""
        rows = self._connection.execute(self._statements.select_leases)
        return [LeaseRow(*row) for row in rows]

    def home(self) -> HomeRows:
        """What home keeps for all shards."""
        execute, s = self._connection.execute, self._statements
        return HomeRows(
            shard_map=str(execute(s.select_shard_map).get or ""),
            records=[ShardRecord(*row) for row in execute(s.select_shards)],
            redo=[(shard, tuple(row)) for shard, *row in execute(s.select_redo)],
        )

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _row(self, text: str, given: tuple[object, ...]) -> Packed:
        cursor = self._connection.execute(text, given)
        row: Packed | None = cursor.fetchone()
        cursor.close()
        assert row is not None, "an aggregate returns one row"
        return row


def _numbers(joined: str | bytes | None) -> Iterator[int]:
    """Comma-separated integers; none in None, which is SQL's sum of nothing."""
    assert not isinstance(joined, bytes), "numbers are joined as text"
    return map(int, joined.split(",")) if joined is not None else iter(())


def _cut(joined: str | bytes | None, lengths: list[int]) -> Iterator[bytes]:
    """``joined`` cut into pieces of ``lengths``; it is None when there was nothing to join."""
    whole = joined or b""
    assert isinstance(whole, bytes), "keys and values are joined as a blob"
    ends = list(accumulate(lengths, initial=0))
    return map(whole.__getitem__, map(slice, ends, ends[1:]))


def _next_size(joined: str | bytes | None, count: int) -> int:
    """How many rows the next statement takes if they are like these ``count``."""
    return max(1, min(SIZE_MAX, JOINED_BYTES * count // max(len(joined or b""), 1)))


def _smaller(count: int) -> int:
    """How many rows to try after ``count`` were too much for SQLite to join; one row never is."""
    assert count > 1, "a stored value can be read"
    return count // 2


def _index_columns(packed: Packed) -> tuple[Iterable[int], ...]:
    """The columns of an IndexRow from the first seven of ``packed``."""
    revision, sub, create_revision, version, lease = map(_numbers, packed[:5])
    keys = _cut(packed[6], list(_numbers(packed[5])))
    return revision, sub, keys, create_revision, version, lease  # type: ignore[return-value]
