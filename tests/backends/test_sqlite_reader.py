"""How reads are cut into statements."""

from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from backends import sqlite_file, sqlite_reader
from backends.schema import Statements, sqlite_dialect
from backends.sqlite_reader import Reader
from kvstore.backend import Row, RowId
from tests.backends.raw import raw

STATEMENTS = Statements(sqlite_dialect())
ROWS: list[Row] = [
    (2 + n, 0, b"%d" % n, 2 + n, 1, 0, bytes(400 + n % 100) if n else b"") for n in range(700)
]
IDS: list[RowId] = [(row[0], 0) for row in ROWS]
VALUES = [row[6] for row in ROWS]


class Counted(Reader):
    """Writes down how many values each statement gave, or that it was too much."""

    def __init__(self, connection: apsw.Connection) -> None:
        super().__init__(connection, STATEMENTS)
        self.statements: list[int | str] = []

    def _row(self, text: str, given: tuple[object, ...]) -> sqlite_reader.Packed:
        try:
            packed = super()._row(text, given)
        except apsw.TooBigError:
            self.statements.append("too big")
            raise
        lengths = str(packed[0]).split(",")
        self.statements.append(sum(length != "-1" for length in lengths))
        return packed


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Counted]:
    """A reader of a store with the rows."""
    path = tmp_path / "kvstore.db"
    sqlite_file.create(path, "reads")
    with raw(path) as connection:
        for start in range(0, len(ROWS), 512):
            part = ROWS[start : start + 512]
            connection.execute(*STATEMENTS.insert_rows.fitting(part, 0, 1))
        yield Counted(connection)


def test_statements_grow_while_values_are_small(reader: Counted) -> None:
    """The first statement is careful, the next one takes as much as a statement can."""
    assert VALUES == reader.values(IDS)
    assert [128, 512, 60] == reader.statements
    reader.statements.clear()
    assert ROWS == reader.rows((0, 0), 10_000)
    assert 3 == len(reader.statements)


def test_statements_shrink_to_their_bytes(reader: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values are large, fewer come at a time, down to one."""
    monkeypatch.setattr(sqlite_reader, "JOINED_BYTES", 20_000)
    assert VALUES == reader.values(IDS)
    assert all(isinstance(count, int) and count < 80 for count in reader.statements[1:])
    monkeypatch.setattr(sqlite_reader, "JOINED_BYTES", 1)
    reader.statements.clear()
    assert ROWS == reader.rows((0, 0), 10_000)
    assert len(ROWS) - 128 + 2 == len(reader.statements)


def test_more_than_sqlite_can_join_is_read_in_parts(reader: Counted) -> None:
    """Values that are too much for SQLite together are read with fewer at a time."""
    reader._connection.limit(apsw.SQLITE_LIMIT_LENGTH, 8_000)
    assert VALUES == reader.values(IDS)
    assert "too big" in reader.statements
    reader.statements.clear()
    assert ROWS == reader.rows((0, 0), 10_000)
    assert "too big" in reader.statements


def test_missing_rows_are_told_from_empty_values(reader: Counted) -> None:
    """A row without a value has an empty one; no row has none."""
    assert [b"", None, VALUES[1], None] == reader.values([(2, 0), (2, 1), (3, 0), (1, 0)])
