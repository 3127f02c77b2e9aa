"""Tables and statements, declared once in SQLAlchemy Core and compiled to text per dialect.

SQLAlchemy never opens a connection: the text goes to the driver (``apsw`` for SQLite). Parameters
are positional, in the order stated at each statement.

Statements over several rows or ids exist in **sizes** (powers of two). A batch is padded with NULL
rows, which the statement ignores, up to the next size, so that a handful of prepared statements
serves every batch, each in one step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from sqlalchemy import (
    CTE,
    BigInteger,
    ClauseElement,
    Column,
    ColumnElement,
    Dialect,
    Insert,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    SmallInteger,
    Table,
    Text,
    and_,
    bindparam,
    case,
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
from sqlalchemy.schema import CreateColumn, CreateTable

SCHEMA_VERSION = 2
SIZE_MAX = 512
"""Rows or ids in the largest statement; its text must stay below 16 KiB, above which apsw does not
keep it prepared."""
SIZES = tuple(1 << n for n in range(SIZE_MAX.bit_length()))

_int64 = BigInteger().with_variant(Integer(), "sqlite")
_int16 = SmallInteger().with_variant(Integer(), "sqlite")
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


def _fence_table(metadata: MetaData, *later: Column[int]) -> Table:
    """The fence as schema 1 has it, and the columns of ``later`` versions."""
    return Table(
        "fence",
        metadata,
        Column("id", _int16, primary_key=True, autoincrement=False),
        Column("cluster_id", _int64, nullable=False),
        Column("member_id", _int64, nullable=False),
        Column("shard", Text, nullable=False),
        Column("epoch", _int64, nullable=False),
        Column("tip", _int64, nullable=False),
        Column("compact_revision", _int64, nullable=False),
        *later,
        sqlite_strict=True,
    )


_fence_1 = _fence_table(MetaData())

fence = _fence_table(
    _metadata, Column("reserved", _int64, nullable=False, server_default=literal_column("0"))
)
"""One row, id 1. ``cluster_id`` and ``member_id`` are unsigned on the wire and two's complement
here. The shard's tip is the greater of ``tip`` and the last revision in ``revisions``. Only home
reserves revisions."""

meta = Table(
    "meta",
    _metadata,
    Column("id", _int16, primary_key=True, autoincrement=False),
    Column("schema_version", Integer, nullable=False),
    sqlite_strict=True,
)
"""One row, id 1."""

shards = Table(
    "shards",
    _metadata,
    Column("name", Text, primary_key=True),
    Column("tip", _int64, nullable=False),
    Column("origin", Text, nullable=False),
    sqlite_strict=True,
)
"""On home: each shard as it was last seen."""

redo = Table(
    "redo",
    _metadata,
    Column("revision", _int64, primary_key=True, autoincrement=False),
    Column("sub", Integer, primary_key=True, autoincrement=False),
    Column("shard", Text, nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("create_revision", _int64, nullable=False),
    Column("version", _int64, nullable=False),
    Column("lease", _int64, nullable=False),
    Column("value", LargeBinary, nullable=False),
    sqlite_strict=True,
)
"""On home: rows that are committed here and on their way to the ``shard`` named."""

shard_map = Table(
    "shard_map",
    _metadata,
    Column("id", _int16, primary_key=True, autoincrement=False),
    Column("document", Text, nullable=False),
    sqlite_strict=True,
)
"""On home: one row, id 1, or none in a store that never had a map."""


@dataclass(frozen=True, slots=True)
class Migration:
    """How a store of schema ``version - 1`` becomes one of ``version``: statements that are run in
    one transaction.
    """

    version: int
    statements: tuple[str, ...]


def tables(version: int = SCHEMA_VERSION) -> list[Table]:
    """All tables of a store of schema ``version``."""
    if version == 1:
        return [revisions, leases, _fence_1, meta]
    return [revisions, leases, fence, meta, shards, redo, shard_map]


def migrations(dialect: Dialect) -> list[Migration]:
    """Every step from an empty database to SCHEMA_VERSION, in order."""

    def create(*made: Table) -> tuple[str, ...]:
        return tuple(_text(CreateTable(table), dialect) for table in made)

    reserved = _text(CreateColumn(fence.c.reserved), dialect)
    return [
        Migration(1, create(*tables(1))),
        Migration(
            2, (f"ALTER TABLE fence ADD COLUMN {reserved}", *create(shards, redo, shard_map))
        ),
    ]


@dataclass(frozen=True, slots=True)
class Sized:
    """One statement in all its sizes."""

    width: int
    """Parameters per row."""
    texts: dict[int, str]
    """By size."""

    def fitting(
        self, rows: Sequence[Sequence[object]], *more: object
    ) -> tuple[str, tuple[object, ...]]:
        """The text that takes ``rows`` (1 to SIZE_MAX of them), and its parameters: the rows, the
        padding, ``more``.
        """
        size = 1 << (len(rows) - 1).bit_length()
        padding = (None,) * (self.width * (size - len(rows)))
        return self.texts[size], (*chain.from_iterable(rows), *padding, *more)


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
        self._make_fence_statements()
        self._make_row_statements()
        self._make_lease_statements()
        self._make_home_statements()

    def _make_fence_statements(self) -> None:
        text, f = self._text, fence.c
        own = f.id == literal_column("1")
        last = select(func.max(revisions.c.revision)).scalar_subquery()
        tip = case((last > f.tip, last), else_=f.tip)
        columns = (f.cluster_id, f.member_id, f.shard, f.epoch, tip, f.compact_revision)
        self.select_fence = text(select(*columns, f.reserved).where(own))
        """(cluster_id, member_id, shard, epoch, tip, compact_revision, reserved)"""
        self.select_fence_1 = text(select(*columns).where(own))
        """Likewise in a store of schema 1, which reserves nothing."""
        self.select_identity = text(select(f.cluster_id, f.shard).where(own))
        """(cluster_id, shard), in a store of any schema"""
        self.insert_fence = text(_insert_one(fence))
        """(1, cluster_id, member_id, shard, epoch, tip, compact_revision, reserved)"""
        self.raise_epoch = text(
            update(fence).where(own).values(epoch=f.epoch + literal_column("1"), tip=tip)
        )
        held = (own, f.epoch == bindparam("epoch_held"), f.tip <= bindparam("before"))
        self.advance = text(update(fence).where(*held).values(tip=bindparam("reached")))
        """(tip, epoch, tip_before): changes no row when another process owns the shard."""
        self.set_compact_revision = text(
            update(fence).where(own).values(compact_revision=bindparam("compacted"))
        )
        """(compact_revision)"""
        self.set_reserved = text(update(fence).where(own).values(reserved=bindparam("up_to")))
        """(reserved)"""
        self.select_schema_version = text(select(meta.c.schema_version))
        self.insert_meta = text(_insert_one(meta))
        """(1, schema_version)"""
        self.update_schema_version = text(update(meta).values(schema_version=bindparam("version")))
        """(schema_version)"""

    def _make_row_statements(self) -> None:
        r = revisions.c
        f = fence.c
        held = and_(f.epoch == bindparam("held"), f.tip <= bindparam("before"))
        own = select(held).where(f.id == literal_column("1")).scalar_subquery()
        self.insert_rows = self._sized(r.keys(), lambda rows: _insert_given(revisions, rows, own))
        """(rows in the table's order of columns, epoch, tip_before): inserts all or, when another
        process owns the shard, none."""
        self.delete_rows = self._sized(
            ["revision", "sub"],
            lambda ids: delete(revisions).where(tuple_(r.revision, r.sub).in_(select(ids))),
        )
        """(ids as (revision, sub))"""
        self.select_values = self._sized(["revision", "sub"], _pack_values)
        """(ids as (revision, sub)): see ``_pack_values``."""
        self.select_index = self._text(_pack_rows(with_values=False))
        """(revision, sub, limit): the rows after that id; see ``_pack_rows``."""
        self.select_rows = self._text(_pack_rows(with_values=True))
        """Likewise, values included."""
        columns = [*(c for c in r if c.name != "value"), func.length(r.value)]
        self.select_chains = self._text(select(*columns).order_by(r.revision, r.sub))
        """All rows in order, with the value's length instead of the value."""

    def _make_lease_statements(self) -> None:
        self.select_leases = self._text(select(*leases.c))
        """(id, granted_ttl, remaining_ttl)"""
        self.insert_leases = self._sized(leases.c.keys(), lambda rows: _insert_given(leases, rows))
        """(rows in the table's order of columns)"""
        self.delete_leases = self._sized(
            ["id"], lambda ids: delete(leases).where(leases.c.id.in_(select(ids)))
        )
        """(ids)"""

    def _make_home_statements(self) -> None:
        text, sized, name, r = self._text, self._sized, shards.c.name, redo.c
        self.select_shards = text(select(*shards.c).order_by(name))
        """(name, tip, origin)"""
        self.insert_shards = sized(shards.c.keys(), lambda rows: _insert_given(shards, rows))
        """(rows in the table's order of columns)"""
        self.delete_shards = sized(
            ["name"], lambda names: delete(shards).where(name.in_(select(names)))
        )
        """(names)"""
        row = [column for column in r if column.name != "shard"]
        self.select_redo = text(select(r.shard, *row).order_by(r.revision, r.sub))
        """(shard, then a row as in ``revisions``), in the order of the rows"""
        self.insert_redo = sized(r.keys(), lambda rows: _insert_given(redo, rows))
        """(rows in the table's order of columns)"""
        self.delete_redo = sized(
            ["revision"], lambda gone: delete(redo).where(r.revision.in_(select(gone)))
        )
        """(revisions)"""
        self.select_shard_map = text(select(shard_map.c.document))
        self.delete_shard_map = text(delete(shard_map))
        self.insert_shard_map = text(_insert_one(shard_map))
        """(1, document)"""

    def _text(self, statement: ClauseElement) -> str:
        return _text(statement, self._dialect)

    def _sized(self, columns: Sequence[str], build: Callable[[CTE], ClauseElement]) -> Sized:
        """What ``build`` makes of a table of given rows: compiled for one, which is repeated."""
        width = len(columns)
        given = values(*map(column, columns), name="given").data([(0,) * width]).cte("given")
        once = self._text(build(given))
        row = f"({', '.join('?' * width)})"
        assert once.count(row) == 1, "the rows appear once"
        return Sized(width, {n: once.replace(row, ",".join([row] * n)) for n in SIZES})


def _text(statement: ClauseElement, dialect: Dialect) -> str:
    return " ".join(str(statement.compile(dialect=dialect)).split())


def _insert_one(table: Table) -> Insert:
    return insert(table).values({name: bindparam(name) for name in table.c.keys()})  # noqa: SIM118


def _insert_given(table: Table, given: CTE, *conditions: ColumnElement[bool]) -> Insert:
    """Insert the given rows; one whose first column is NULL is padding."""
    names = table.c.keys()
    chosen = select(given).where(given.c[names[0]].is_not(None), *conditions)
    return insert(table).from_select(names, chosen)


def _joined(element: ColumnElement[bytes]) -> ColumnElement[bytes]:
    return cast(func.group_concat(element, literal_column("''")), LargeBinary)


def _pack_values(ids: CTE) -> Select[tuple[str, bytes]]:
    """The values of ``ids`` in one row: their lengths as a text of comma-separated numbers, in the
    order of the ids, -1 where there is no row; then the values joined (NULL if there are none).
    """
    r = revisions.c
    lengths = func.group_concat(func.coalesce(func.length(r.value), literal_column("-1")))
    found = and_(r.revision == ids.c.revision, r.sub == ids.c.sub)
    return select(lengths, _joined(r.value)).select_from(ids.outerjoin(revisions, found))


def _pack_rows(*, with_values: bool) -> Select[tuple[str | bytes, ...]]:
    """A page of rows in one row: a text of comma-separated numbers for each integer column, in the
    order of the table, and for the lengths of the keys; the keys joined; then, if wanted, the
    lengths of the values and the values joined. All are NULL when there are no rows.
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
    return sqlite.dialect(paramstyle="qmark")
