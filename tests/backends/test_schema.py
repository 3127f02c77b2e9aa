"""The declarations: portable, and what is compiled from them."""

from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from backends import schema
from backends.schema import (
    SIZE_MAX,
    Sized,
    Statements,
    migrations,
    signed,
    sqlite_dialect,
    unsigned,
)

STATEMENTS = Statements(sqlite_dialect())


def test_tables_compile_for_postgresql() -> None:
    """The same declarations make PostgreSQL's tables, with its types."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    made = {
        name: " ".join(str(CreateTable(table).compile(dialect=dialect)).split())
        for name, table in schema.revisions.metadata.tables.items()
    }
    assert {table.name for table in schema.tables()} == set(made)
    assert 7 == len(made)
    assert "key BYTEA NOT NULL, create_revision BIGINT NOT NULL" in made["revisions"]
    assert made["revisions"].endswith("value BYTEA NOT NULL, PRIMARY KEY (revision, sub) )")
    assert "STRICT" not in "".join(made.values())
    assert "SERIAL" not in "".join(made.values())
    first, second = migrations(dialect)
    assert 4 == len(first.statements)
    assert "ADD COLUMN reserved BIGINT DEFAULT 0 NOT NULL" in second.statements[0]


def test_statements_are_kept_prepared() -> None:
    """The driver keeps statements of less than 16 KiB; ours are, in their largest size too."""
    sized = [value for value in vars(STATEMENTS).values() if isinstance(value, Sized)]
    assert 9 == len(sized)
    assert all(len(text) < 16 * 1024 for each in sized for text in each.texts.values())
    assert SIZE_MAX == max(sized[0].texts)


@given(st.integers(1, SIZE_MAX))
def test_sized_statement_is_filled_exactly(count: int) -> None:
    """Rows, padding and further parameters are as many as the text has places for."""
    sized = STATEMENTS.insert_rows
    text, given_ = sized.fitting([(n,) * sized.width for n in range(count)], "epoch", "tip")
    assert text.count("?") == len(given_)
    assert ("epoch", "tip") == given_[-2:]
    assert len(given_) - 2 < 2 * count * sized.width or count == 1


@given(st.integers(0, (1 << 64) - 1))
def test_unsigned_numbers_fit_a_column(number: int) -> None:
    """An unsigned 64-bit number survives a signed column."""
    assert -(1 << 63) <= signed(number) < 1 << 63
    assert number == unsigned(signed(number))
