"""Tables and statements, declared once in SQLAlchemy Core and compiled to text per dialect.

SQLAlchemy never opens a connection: the text goes to the driver (``apsw`` for SQLite).
Parameters are positional, in the order stated at each statement.

Statements over several rows or ids exist in **sizes** (powers of two). A batch is padded with NULL rows, which the
statement ignores, up to the next size, so that a handful of prepared statements serves every batch, each in one step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import (
    BigInteger,
    Column,
    CTE,
    ColumnElement,
    Dialect,
    Executable,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    and_,
    bindparam,
    cast,
    column,
    delete,
    func,
    insert,
    literal_column,
    select,
    tuple_,
    update,
    values,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateTable

SCHEMA_VERSION = 1
SIZE_MAX = 512
"""Rows or ids in the largest statement."""
SIZES = tuple(1 << n for n in range(SIZE_MAX.bit_length()))

_int64 = BigInteger().with_variant(Integer(), "sqlite")
_metadata = MetaData()

revisions = Table(
    "revisions",
    _metadata,
    Column("revision", _int64, primary_key=True, autoincrement=False),
    Column("sub", Integer, primary_key=True, autoincrement=False),
    Column("key", LargeBinary, nullable=False),
    Column("create_revision", _int64, nullable=False),
    Column("version", _int64, nullable=False),
    Column("lease", _int64, nullable=False),
    Column("value", LargeBinary, nullable=False),
    sqlite_strict=True,
)
"""One row per change, append-only; ``value`` is last so that the others are read without it."""

leases = Table(
    "leases",
    _metadata,
    Column("id", _int64, primary_key=True, autoincrement=False),
    Column("granted_ttl", _int64, nullable=False),
    Column("remaining_ttl", _int64, nullable=False),
    sqlite_strict=True,
)

fence = Table(
    "fence",
    _metadata,
    Column("id", SmallInteger().with_variant(Integer(), "sqlite"), primary_key=True),
    Column("cluster_id", _int64, nullable=False),
    Column("member_id", _int64, nullable=False),
    Column("shard", Text, nullable=False),
    Column("epoch", _int64, nullable=False),
    Column("tip", _int64, nullable=False),
    Column("compact_revision", _int64, nullable=False),
    sqlite_strict=True,
)
"""One row, id 1. cluster_id and member_id are unsigned on the wire and two's complement here."""

meta = Table(
    "meta",
    _metadata,
    Column("id", SmallInteger().with_variant(Integer(), "sqlite"), primary_key=True),
    Column("schema_version", Integer, nullable=False),
    sqlite_strict=True,
)
"""One row, id 1."""


@dataclass(frozen=True, slots=True)
class Migration:
    """How a store of schema ``version - 1`` becomes one of ``version``: statements, run in one transaction."""

    version: int
    statements: tuple[str, ...]


def migrations(dialect: Dialect) -> list[Migration]:
    """Every step from an empty database to SCHEMA_VERSION, in order."""
    tables = [revisions, leases, fence, meta]
    first = Migration(1, tuple(str(CreateTable(t).compile(dialect=dialect)) for t in tables))
    return [first]


@dataclass(frozen=True, slots=True)
class Sized:
    """One statement in all its sizes."""

    width: int
    """Parameters per row."""
    texts: dict[int, str]
    """By size."""

    def fit(self, count: int) -> int:
        """The smallest size that holds ``count`` rows, 1 <= count <= SIZE_MAX."""
        return 1 << (count - 1).bit_length()


def signed(number: int) -> int:
    """An unsigned 64-bit number as the two's complement that an SQL column holds."""
    return number - (1 << 64) if number >> 63 else number


def unsigned(number: int) -> int:
    """The inverse of ``signed``."""
    return number & ((1 << 64) - 1)


class Statements:
    """The text of every statement in one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        text = self._text
        f = fence.c
        one = f.id == literal_column("1")
        self.insert_fence = text(insert(fence).values({c.name: bindparam(c.name) for c in f}))
        """(1, cluster_id, member_id, shard, epoch, tip, compact_revision)"""
        self.insert_meta = text(insert(meta).values({c.name: bindparam(c.name) for c in meta.c}))
        """(1, schema_version)"""
        self.select_schema_version = text(select(meta.c.schema_version))
        self.update_schema_version = text(update(meta).values(schema_version=bindparam("version")))
        """(schema_version)"""
        self.raise_epoch = text(
            update(fence).where(one).values(epoch=f.epoch + literal_column("1"))
        )
        self.select_fence = text(
            select(f.cluster_id, f.member_id, f.shard, f.epoch, f.tip, f.compact_revision).where(
                one
            )
        )
        self.advance = text(
            update(fence)
            .where(one, f.epoch == bindparam("held"), f.tip == bindparam("before"))
            .values(tip=bindparam("after"))
        )
        """(tip, epoch, tip_before): changes one row, or none when another process owns the shard."""
        self.set_compact_revision = text(
            update(fence).where(one).values(compact_revision=bindparam("compacted"))
        )
        """(compact_revision)"""
        self.select_leases = text(select(leases.c.id, leases.c.granted_ttl, leases.c.remaining_ttl))

        self.insert_rows = self._sized(revisions.c.keys(), lambda rows: _insert(revisions, rows))
        """Rows in the table's order of columns."""
        self.insert_leases = self._sized(leases.c.keys(), lambda rows: _insert(leases, rows))
        self.delete_rows = self._sized(
            ["revision", "sub"],
            lambda ids: delete(revisions).where(
                tuple_(revisions.c.revision, revisions.c.sub).in_(select(ids))
            ),
        )
        """Ids as (revision, sub)."""
        self.delete_leases = self._sized(
            ["id"], lambda ids: delete(leases).where(leases.c.id.in_(select(ids)))
        )
        self.select_values = self._sized(["revision", "sub"], _packed_values)
        """Ids as (revision, sub), padded with NULL. One row: the lengths of the values, -1 for a missing row,
        separated by commas, in the order of the ids; then all values, joined."""
        self.select_index = text(_packed_rows(with_values=False))
        """(revision, sub, limit): the rows after that id, packed into one row; see ``_packed_rows``."""
        self.select_rows = text(_packed_rows(with_values=True))
        """Likewise, values included."""

    def _text(self, statement: Executable) -> str:
        return " ".join(str(statement.compile(dialect=self._dialect)).split())  # type: ignore[attr-defined]

    def _sized(self, columns: Sequence[str], build: Callable[[CTE], Executable]) -> Sized:
        """``build`` makes the statement from a table of the given rows; it is compiled once, then repeated."""
        given = values(*(column(name) for name in columns), name="given").data(
            [(0,) * len(columns)]
        )
        once = self._text(build(given.cte("given")))
        row = "(" + ", ".join("?" * len(columns)) + ")"
        assert once.count(row) == 1, "the rows appear once"
        return Sized(len(columns), {n: once.replace(row, ",".join([row] * n)) for n in SIZES})


def _insert(table: Table, given: CTE) -> Executable:
    """Insert the given rows; a row whose first column is NULL is padding."""
    first = given.c[table.c.keys()[0]]
    return insert(table).from_select(table.c.keys(), select(given).where(first.is_not(None)))


_EMPTY = literal_column("''")


def _joined(element: ColumnElement[bytes]) -> ColumnElement[bytes]:
    return cast(func.group_concat(element, _EMPTY), LargeBinary)


def _packed_values(ids: CTE) -> Executable:
    """Values in one row: the driver gives up the interpreter's lock once instead of once per value."""
    r = revisions.c
    lengths = func.group_concat(func.coalesce(func.length(r.value), literal_column("-1")))
    found = and_(r.revision == ids.c.revision, r.sub == ids.c.sub)
    return select(lengths, _joined(r.value)).select_from(ids.outerjoin(revisions, found))


def _packed_rows(*, with_values: bool) -> Executable:
    """Rows in one row, for the same reason: a text of comma-separated numbers for each integer column and for the
    lengths of the keys, the keys joined; then, if wanted, the lengths of the values and the values joined.
    """
    r = revisions.c
    after = tuple_(r.revision, r.sub) > tuple_(bindparam("revision"), bindparam("sub"))
    columns = [c for c in r if with_values or c.name != "value"]
    chosen = select(*columns).where(after).order_by(r.revision, r.sub)
    page = chosen.limit(bindparam("rows_max")).offset(literal_column("0")).subquery("page")
    p = page.c
    numbers = [p.revision, p.sub, p.create_revision, p.version, p.lease, func.length(p.key)]
    packed = [*map(func.group_concat, numbers), _joined(p.key)]
    if with_values:
        packed += [func.group_concat(func.length(p.value)), _joined(p.value)]
    return select(*packed).select_from(page)


def sqlite_dialect() -> Dialect:
    """SQLite's SQL with ``?`` parameters."""
    return sqlite.dialect(paramstyle="qmark")  # type: ignore[no-untyped-call]
