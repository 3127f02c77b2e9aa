"""Query plans: each statement of the hot path finds its rows by key."""

from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from backends import sqlite_file
from backends.schema import Statements, sqlite_dialect
from tests.backends.raw import raw

STATEMENTS = Statements(sqlite_dialect())
BY_ID = "SEARCH revisions USING INDEX sqlite_autoindex_revisions_1 (revision=? AND sub=?)"
BY_RANGE = "SEARCH revisions USING INDEX sqlite_autoindex_revisions_1 ((revision,sub)>(?,?))"
FENCE = "SEARCH fence USING INTEGER PRIMARY KEY (rowid=?)"
LAST = "SEARCH revisions USING COVERING INDEX sqlite_autoindex_revisions_1"


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[apsw.Connection]:
    """A store with rows."""
    path = tmp_path / "kvstore.db"
    sqlite_file.create(path, "plans")
    with raw(path) as opened:
        rows = [(2 + n // 50, n % 50, b"%d" % n, n, 1, 0, b"v") for n in range(512)]
        opened.execute(*STATEMENTS.insert_rows.fitting(rows, 0, 1))
        yield opened


def plan(connection: apsw.Connection, text: str) -> list[str]:
    """What SQLite does with tables, line by line: lines about given rows are left out."""
    lines = connection.execute("EXPLAIN QUERY PLAN " + text, (1,) * text.count("?"))
    details = [str(line[3]) for line in lines]
    return [detail for detail in details if "revisions" in detail or "fence" in detail]


@pytest.mark.parametrize("size", [1, 128, 512])
def test_values_are_found_by_key(connection: apsw.Connection, size: int) -> None:
    """Values: one search per id."""
    found = plan(connection, STATEMENTS.select_values.texts[size])
    assert [BY_ID + " LEFT-JOIN"] == found


@pytest.mark.parametrize("size", [1, 128, 512])
def test_drops_are_found_by_key(connection: apsw.Connection, size: int) -> None:
    """Deletes: one search per id."""
    found = plan(connection, STATEMENTS.delete_rows.texts[size])
    assert [BY_ID.replace("INDEX", "COVERING INDEX")] == found


@pytest.mark.parametrize("text", [STATEMENTS.select_index, STATEMENTS.select_rows])
def test_pages_of_rows_start_at_their_key(connection: apsw.Connection, text: str) -> None:
    """Pages: one search, then in order, without sorting."""
    assert [BY_RANGE] == plan(connection, text)


def test_rows_are_inserted_without_a_scan(connection: apsw.Connection) -> None:
    """Inserts look at the fence row only, and are not collected in a temporary table first."""
    for text in STATEMENTS.insert_rows.texts.values():
        assert {FENCE} == set(plan(connection, text))
        lines = connection.execute("EXPLAIN " + text, (1,) * text.count("?"))
        assert "OpenEphemeral" not in [line[1] for line in lines]


def test_fence_is_one_row(connection: apsw.Connection) -> None:
    """The fence row by its id, the last revision from the end of the index."""
    assert {FENCE, LAST} == set(plan(connection, STATEMENTS.select_fence))
    assert [FENCE] == plan(connection, STATEMENTS.advance)
    assert {FENCE, LAST} == set(plan(connection, STATEMENTS.raise_epoch))


def searches(connection: apsw.Connection, text: str) -> list[str]:
    """The lines about tables that are searched."""
    lines = connection.execute("EXPLAIN QUERY PLAN " + text, (1,) * text.count("?"))
    return [str(line[3]) for line in lines if str(line[3]).startswith("SEARCH")]


def test_leases_are_found_by_id(connection: apsw.Connection) -> None:
    """Deletes of leases: one search per id."""
    found = searches(connection, STATEMENTS.delete_leases.texts[8])
    assert ["SEARCH leases USING INTEGER PRIMARY KEY (rowid=?)"] == found


def test_what_home_keeps_is_found_by_key(connection: apsw.Connection) -> None:
    """Deletes of records and of redo rows: one search per name and per revision."""
    by_name = "SEARCH shards USING COVERING INDEX sqlite_autoindex_shards_1 (name=?)"
    assert [by_name] == searches(connection, STATEMENTS.delete_shards.texts[8])
    by_revision = "SEARCH redo USING COVERING INDEX sqlite_autoindex_redo_1 (revision=?)"
    assert [by_revision] == searches(connection, STATEMENTS.delete_redo.texts[8])
