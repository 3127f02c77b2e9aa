"""PostgreSQL's tables and statements: what is not as in ``schema``, and what a batch becomes.

The tables are those of ``schema``, but for three more columns of the fence row:

- ``holder``: a random number that a server draws when it opens the shard, 0 when it let go. Whoever
  loses its connection takes the shard anew on condition that it still is the holder: so it does not
  matter how many of its own attempts to raise the epoch have been carried out unknown to it.
- ``writes``: the number of the last commit or renewal. Numbers grow and are never used twice, so
  that a commit of unknown outcome has happened if its number is there; and whoever sees it change
  sees that the shard is being held.
- ``origin``: which database this was when it was last taken (see ``postgres_session``).

**A batch** is one statement wherever it can be: the update of the fence row, on condition that the
epoch is ours and the tip our last one's, is a common table expression that the insert of the rows
is joined with. So either the fence row moves and all rows are stored, or neither, in one round trip
and one transaction of the server's own. The tag tells: ``INSERT 0 <rows>``, or ``INSERT 0 0``.
Rows are given as one array per column (``unnest``), so that a batch of any size is the same text,
prepared once; many rows are copied instead. That, and what else a batch may carry, follows the
update of the fence row as further statements of one transaction.

A condition that finds the fence row locked waits and is then judged by the row as it has become
(READ COMMITTED): a statement of a server that lost the shard changes nothing, however late it runs.
That holds for the server's own statements, too, which it gave up with their connection and which
may still be under way: taking and letting go name the epoch that was seen, like all others.

Texts have their parameters as ``$1``, ``$2``, ... in the order stated at each. Beside what the
comments below name, all of it is in the documentation of CockroachDB and YugabyteDB, too; neither
could be tried.
"""

import re
from collections.abc import Sequence
from itertools import chain
from typing import Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ClauseElement,
    Column,
    MetaData,
    Table,
    TableValuedAlias,
    Text,
    bindparam,
    cast,
    column,
    delete,
    func,
    insert,
    literal_column,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql

from backends import schema
from backends.schema import leases, meta, redo, revisions, shard_map, shards
from kvstore.backend import Batch

ROW_OVERHEAD_BYTES: Final = 64
"""What a row takes beside its key and value, roughly: its header, its integers, the index."""

COPY_ROWS_MIN: Final = 512
"""From here on COPY is faster than arrays, though it takes a transaction of several round trips:
1.2 times with 512 rows of 1 KiB, twice with 2,000."""
COPY_ROWS: Final = "COPY revisions"
"""(rows): not a text to run, but that these rows are to be copied into ``revisions``."""

Step = tuple[str, tuple[object, ...]]
"""A statement and its parameters."""

DIALECT: Final = postgresql.dialect()  # type: ignore[no-untyped-call]

fence = schema.fence.to_metadata(MetaData())
for _column in (
    Column("holder", BigInteger, nullable=False, server_default=literal_column("0")),
    Column("writes", BigInteger, nullable=False, server_default=literal_column("0")),
    Column("origin", Text, nullable=False, server_default=literal_column("''")),
):
    fence.append_column(_column)


def tables() -> list[Table]:
    """All tables, as PostgreSQL has them."""
    return [fence if table.name == fence.name else table for table in schema.tables()]


_PLACE = re.compile(r"%\((\w+)\)s")


def _text(statement: ClauseElement, *order: str) -> str:
    """The text of ``statement`` with its parameters numbered in this order."""
    named = str(statement.compile(dialect=DIALECT))
    assert set(order) == set(_PLACE.findall(named)), "each parameter has its place"
    numbered = _PLACE.sub(lambda place: f"${order.index(place[1]) + 1}", named)
    return " ".join(numbered.replace("%%", "%").split())


def _given(columns: Sequence[Column[object]]) -> TableValuedAlias:
    """A table of given rows: one array per column, named ``all_`` and the column's name."""
    arrays = (bindparam(f"all_{c.name}", type_=ARRAY(c.type)) for c in columns)
    typed = (cast(array, ARRAY(c.type)) for array, c in zip(arrays, columns, strict=True))
    places = (column(c.name, c.type) for c in columns)
    return func.unnest(*typed).table_valued(*places).render_derived(name="given")


def _order(columns: Sequence[Column[object]]) -> list[str]:
    return [f"all_{c.name}" for c in columns]


def _arrays(rows: Sequence[Sequence[object]], width: int) -> tuple[object, ...]:
    """Rows as one sequence per column."""
    columns = tuple(zip(*rows, strict=True))
    assert len(columns) == width, "every row has every column"
    return columns


_F = fence.c
_OWN = _F.id == literal_column("1")
_COLUMNS = (
    *(_F.cluster_id, _F.member_id, _F.shard, _F.epoch, _F.tip, _F.compact_revision, _F.reserved),
    *(_F.holder, _F.writes, _F.origin),
)

# -- the fence row ---------------------------------------------------------------------------------

SELECT_FENCE: Final = _text(select(*_COLUMNS).where(_OWN))
"""(cluster_id, member_id, shard, epoch, tip, compact_revision, reserved, holder, writes, origin)"""

INSERT_FENCE: Final = _text(
    postgresql.insert(fence)
    .values(
        id=literal_column("1"),
        cluster_id=bindparam("new_cluster"),
        member_id=bindparam("new_member"),
        shard=bindparam("new_shard"),
        epoch=literal_column("0"),
        tip=literal_column("1"),
        compact_revision=literal_column("-1"),
    )
    .on_conflict_do_nothing(),
    *("new_cluster", "new_member", "new_shard"),
)
"""(cluster_id, member_id, shard): the row of a new store, unless there is one."""

_raise = update(fence).values(
    epoch=_F.epoch + literal_column("1"),
    holder=bindparam("new_holder"),
    origin=bindparam("new_origin"),
)
TAKE_SEEN: Final = _text(
    _raise.where(
        _OWN, _F.epoch == bindparam("seen_epoch"), _F.writes == bindparam("seen_writes")
    ).returning(*_COLUMNS),
    *("new_holder", "new_origin", "seen_epoch", "seen_writes"),
)
"""(holder, origin, epoch, writes): raise the epoch if nobody has written since that was seen; gives
the row as it is then, or none."""

TAKE_ANY: Final = _text(
    _raise.where(_OWN, _F.epoch == bindparam("seen_epoch")).returning(*_COLUMNS),
    *("new_holder", "new_origin", "seen_epoch"),
)
"""(holder, origin, epoch): whoever has it, unless somebody has taken it since that was seen."""

TAKE_MINE: Final = _text(
    update(fence)
    .values(epoch=_F.epoch + literal_column("1"), origin=bindparam("new_origin"))
    .where(
        _OWN,
        _F.holder == bindparam("my_holder"),
        _F.tip >= bindparam("known_tip"),
        _F.writes >= bindparam("known_writes"),
        _F.epoch == bindparam("seen_epoch"),
    )
    .returning(*_COLUMNS),
    *("my_holder", "new_origin", "known_tip", "known_writes", "seen_epoch"),
)
"""(holder, origin, tip, writes, epoch): if it is still ours, lacks nothing that was acknowledged,
and has not been taken since that was seen."""

RENEW: Final = _text(
    update(fence)
    .values(writes=bindparam("new_writes"))
    .where(_OWN, _F.epoch == bindparam("my_epoch"), _F.holder == bindparam("my_holder")),
    *("new_writes", "my_epoch", "my_holder"),
)
"""(writes, epoch, holder): shows that the shard is held; changes no row when it is not by us."""

RELEASE: Final = _text(
    update(fence)
    .values(holder=literal_column("0"))
    .where(_OWN, _F.holder == bindparam("my_holder"), _F.epoch == bindparam("my_epoch")),
    *("my_holder", "my_epoch"),
)
"""(holder, epoch): nobody holds the shard from now on, unless it has been taken since."""

MARK_LOST: Final = _text(
    update(fence)
    .values(origin=bindparam("new_origin"))
    .where(_OWN, _F.epoch == bindparam("seen_epoch"), _F.writes == bindparam("seen_writes")),
    *("new_origin", "seen_epoch", "seen_writes"),
)
"""(origin, epoch, writes): what a start is told by, if nobody has written since that was seen."""

_HELD_ORDER = ("my_epoch", "tip_before", "new_tip", "new_writes", "new_compact", "new_reserved")
_advance = (
    update(fence)
    .values(
        tip=bindparam("new_tip"),
        writes=bindparam("new_writes"),
        compact_revision=func.coalesce(bindparam("new_compact"), _F.compact_revision),
        reserved=func.coalesce(bindparam("new_reserved"), _F.reserved),
    )
    .where(_OWN, _F.epoch == bindparam("my_epoch"), _F.tip == bindparam("tip_before"))
)
ADVANCE: Final = _text(_advance, *_HELD_ORDER)
"""(epoch, tip_before, tip, writes, compact_revision or NULL, reserved or NULL): the fence row of a
batch without rows; changes no row when another server owns the shard."""

_ROW = list(revisions.c)
ROW_COLUMNS: Final = [c.name for c in _ROW]
_held = _advance.returning(_F.id).cte("held")
_rows = _given(_ROW)
INSERT_ROWS: Final = _text(
    insert(revisions).from_select(
        [c.name for c in _ROW], select(*_rows.c).select_from(_rows.join(_held, true()))
    ),
    *(*_HELD_ORDER, *_order(_ROW)),
)
"""(likewise, then the columns of the rows): the fence row of a batch with rows, and the rows."""

# -- what else a batch may carry -------------------------------------------------------------------

_ID = [revisions.c.revision, revisions.c.sub]
_ids = _given(_ID)
_gone = (
    delete(revisions)
    .where(revisions.c.revision == _ids.c.revision, revisions.c.sub == _ids.c.sub)
    .returning(
        (func.octet_length(revisions.c.key) + func.octet_length(revisions.c.value)).label("size")
    )
    .cte("gone")
)
DELETE_ROWS: Final = _text(
    select(func.count(), func.coalesce(func.sum(_gone.c.size), literal_column("0"))).select_from(
        _gone
    ),
    *_order(_ID),
)
"""(revisions, subs): deletes them, and tells how many there were and the bytes of their keys and
values."""

_LEASE = list(leases.c)
_granted = _given(_LEASE)
_put_leases = postgresql.insert(leases).from_select(
    [c.name for c in _LEASE], select(*_granted.c).select_from(_granted)
)
PUT_LEASES: Final = _text(
    _put_leases.on_conflict_do_update(
        index_elements=[leases.c.id],
        set_={
            "granted_ttl": _put_leases.excluded.granted_ttl,
            "remaining_ttl": _put_leases.excluded.remaining_ttl,
        },
    ),
    *_order(_LEASE),
)
"""(the columns of the leases): a lease replaces the one with its id."""

DELETE_LEASES: Final = _text(
    delete(leases).where(leases.c.id.in_(select(_given([leases.c.id]).c.id))), "all_id"
)
"""(ids)"""

_RECORD = list(shards.c)
_seen = _given(_RECORD)
_put_records = postgresql.insert(shards).from_select(
    [c.name for c in _RECORD], select(*_seen.c).select_from(_seen)
)
PUT_RECORDS: Final = _text(
    _put_records.on_conflict_do_update(
        index_elements=[shards.c.name],
        set_={"tip": _put_records.excluded.tip, "origin": _put_records.excluded.origin},
    ),
    *_order(_RECORD),
)
"""(the columns of the records): a record replaces the one of its shard."""

DELETE_REDO: Final = _text(
    delete(redo).where(redo.c.revision.in_(select(_given([redo.c.revision]).c.revision))),
    "all_revision",
)
"""(revisions)"""

_REDO = [redo.c.shard, *(redo.c[c.name] for c in _ROW)]
_moved = _given(_REDO)
INSERT_REDO: Final = _text(
    insert(redo).from_select([c.name for c in _REDO], select(*_moved.c).select_from(_moved)),
    *_order(_REDO),
)
"""(shards, then the columns of the rows)"""

_put_map = postgresql.insert(shard_map).values(
    id=literal_column("1"), document=bindparam("new_document")
)
PUT_SHARD_MAP: Final = _text(
    _put_map.on_conflict_do_update(
        index_elements=[shard_map.c.id], set_={"document": _put_map.excluded.document}
    ),
    "new_document",
)
"""(document)"""


def steps(batch: Batch, *, epoch: int, writes: int) -> list[Step]:
    """The statements that store ``batch`` as the commit numbered ``writes``. The first one moves
    the fence row or, if it must not be moved, does nothing. Redo rows leave before others come.
    """
    held = (epoch, batch.tip_before, batch.tip, writes, batch.compact_revision, batch.reserved)
    if 0 < len(batch.rows) < COPY_ROWS_MIN:
        found: list[Step] = [(INSERT_ROWS, held + _arrays(batch.rows, len(_ROW)))]
    else:
        found = [(ADVANCE, held)]
        if batch.rows:
            found.append((COPY_ROWS, (batch.rows,)))
    if batch.drops:
        found.append((DELETE_ROWS, _arrays(batch.drops, len(_ID))))
    if batch.lease_deletes:
        found.append((DELETE_LEASES, (batch.lease_deletes,)))
    if batch.lease_puts:
        found.append((PUT_LEASES, _arrays(list(batch.lease_puts.values()), len(_LEASE))))
    if batch.records:
        found.append((PUT_RECORDS, _arrays(list(batch.records.values()), len(_RECORD))))
    if batch.redo_drops:
        found.append((DELETE_REDO, (batch.redo_drops,)))
    if batch.redo:
        moved = [(shard, *row) for shard, row in batch.redo]
        found.append((INSERT_REDO, _arrays(moved, len(_REDO))))
    if batch.shard_map is not None:
        found.append((PUT_SHARD_MAP, (batch.shard_map,)))
    return found


# -- reading ---------------------------------------------------------------------------------------

_R = revisions.c
_AFTER = tuple_(_R.revision, _R.sub) > tuple_(bindparam("after_revision"), bindparam("after_sub"))
_PAGE_ORDER = ("after_revision", "after_sub", "rows_max")


def _page(*columns: object) -> str:
    page = select(*columns).where(_AFTER).order_by(_R.revision, _R.sub)  # type: ignore[call-overload]
    return _text(page.limit(bindparam("rows_max")), *_PAGE_ORDER)


SELECT_INDEX: Final = _page(
    *(c for c in _ROW if c.name != "value"), func.octet_length(_R.value).label("size")
)
"""(revision, sub, limit): the rows after that id without their values, and the values' lengths,
which PostgreSQL knows without reading a value that is stored apart."""

SELECT_ROWS: Final = _page(*_ROW)
"""(revision, sub, limit): the rows after that id."""

_wanted = _given(_ID)
SELECT_VALUES: Final = _text(
    select(
        _wanted.c.revision,
        _wanted.c.sub,
        select(_R.value)
        .where(_R.revision == _wanted.c.revision, _R.sub == _wanted.c.sub)
        .correlate(_wanted)
        .scalar_subquery()
        .label("value"),
    ),
    *_order(_ID),
)
"""(revisions, subs): (revision, sub, value or NULL). A subquery per id is looked up by the key,
whatever the planner thinks of the sizes; a join may become a scan."""

SELECT_LEASES: Final = _text(select(*leases.c))
"""(id, granted_ttl, remaining_ttl)"""
SELECT_RECORDS: Final = _text(select(*shards.c).order_by(shards.c.name))
"""(name, tip, origin)"""
SELECT_REDO: Final = _text(select(*_REDO).order_by(redo.c.revision, redo.c.sub))
"""(shard, then a row as in ``revisions``)"""
SELECT_SHARD_MAP: Final = _text(select(shard_map.c.document))
"""(document), or no row"""
SELECT_SCHEMA_VERSION: Final = _text(select(meta.c.schema_version))
"""(schema_version)"""
INSERT_META: Final = _text(
    insert(meta).values(id=literal_column("1"), schema_version=bindparam("new_version")),
    "new_version",
)
"""(schema_version)"""
UPDATE_META: Final = _text(
    update(meta).values(schema_version=bindparam("new_version")), "new_version"
)
"""(schema_version)"""
HAS_ROWS: Final = _text(select(select(_R.revision).limit(literal_column("1")).exists()))
"""(bool): is there any revision?"""

SELECT_SIZE: Final = _text(
    select(
        sum(
            (func.pg_total_relation_size(literal_column(f"'{t.name}'")) for t in tables()),
            literal_column("0"),
        )
    )
)
"""(bytes): of all tables with their indexes. PostgreSQL's own function; YugabyteDB has it, in
CockroachDB there is none."""


def row_bytes(batch: Batch) -> int:
    """What the rows of ``batch`` add to the bytes in use."""
    lengths = map(len, chain.from_iterable((row[2], row[6]) for row in batch.rows))
    return sum(lengths) + ROW_OVERHEAD_BYTES * len(batch.rows)
