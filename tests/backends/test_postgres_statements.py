"""What a batch becomes, and how PostgreSQL finds what a statement names."""

import re
from random import Random

import pytest
from sqlalchemy.schema import CreateTable

from backends import postgres_statements as sql
from backends.postgres_session import Session, connect, read_url
from backends.schema import tables
from kvstore.backend import Batch, LeaseRow, ShardRecord
from tests.backends.postgres_storage import QUICK, PostgresStorage
from tests.backends.storage import Session as Opened
from tests.backends.storage import put

TEXTS = {
    name: text
    for name, text in vars(sql).items()
    if name.isupper() and isinstance(text, str) and text != sql.COPY_ROWS
}
HELD = (7, 1, 3, 9, None, None)


def batch(**parts: object) -> Batch:
    """A batch from tip 1 to 3 with these parts."""
    return Batch(epoch=1, tip_before=1, tip=3, **parts)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TEXTS)
def test_parameters_are_numbered(name: str) -> None:
    """Each text has its parameters as $1 to $n, each once, and nothing else to fill in."""
    numbers = [int(number) for number in re.findall(r"\$(\d+)", TEXTS[name])]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert "%" not in TEXTS[name]


def test_fence_is_a_common_expression_of_the_insert() -> None:
    """Fence row and rows are one statement, the update at its top."""
    assert sql.INSERT_ROWS.startswith("WITH held AS (UPDATE fence SET tip=$3")
    assert re.search(r"fence\.epoch = \$1\S* AND fence\.tip = \$2", sql.INSERT_ROWS)
    assert "INSERT INTO revisions (revision, sub, key," in sql.INSERT_ROWS
    assert sql.INSERT_ROWS.endswith("JOIN held ON true")


def test_tables_are_those_of_the_schema() -> None:
    """PostgreSQL has every table, and the fence row's columns first, as they are elsewhere."""
    made = {
        table.name: " ".join(str(CreateTable(table).compile(dialect=sql.DIALECT)).split())
        for table in sql.tables()
    }
    assert [table.name for table in tables()] == list(made)
    assert "holder BIGINT DEFAULT 0 NOT NULL, writes BIGINT DEFAULT 0 NOT NULL" in made["fence"]
    assert "SERIAL" not in " ".join(made.values())
    assert "STRICT" not in " ".join(made.values())


def test_plain_batch_is_one_statement() -> None:
    """Rows alone, or changes of the fence row alone, are one statement and one round trip."""
    rows = [put(2, 0, b"a"), put(3, 0, b"b", lease=5)]
    ((text, given),) = sql.steps(batch(rows=rows), epoch=7, writes=9)
    assert sql.INSERT_ROWS == text
    assert (*HELD, *zip(*rows, strict=True)) == given
    ((text, given),) = sql.steps(batch(reserved=8, compact_revision=2), epoch=7, writes=9)
    assert sql.ADVANCE == text
    assert (*HELD[:4], 2, 8) == given


@pytest.mark.parametrize("count", [sql.COPY_ROWS_MIN - 1, sql.COPY_ROWS_MIN])
def test_many_rows_are_copied(count: int) -> None:
    """From some number of rows on they follow the update of the fence row; below they are one
    statement with it.
    """
    rows = [put(2, n, b"a") for n in range(count)]
    first, *others = sql.steps(batch(rows=rows, redo_drops=[2]), epoch=7, writes=9)
    if count < sql.COPY_ROWS_MIN:
        assert (sql.INSERT_ROWS, (*HELD, *zip(*rows, strict=True))) == first
        assert [sql.DELETE_REDO] == [text for text, _ in others]
    else:
        assert (sql.ADVANCE, HELD) == first
        assert [(sql.COPY_ROWS, (rows,)), (sql.DELETE_REDO, ([2],))] == others


def test_parts_follow_in_their_order() -> None:
    """Other parts are statements of the same transaction: what leaves comes before what is put in
    its place.
    """
    lease, record = LeaseRow(5, 60, 0), ShardRecord("events", 3, "o")
    full = batch(
        rows=[put(2, 0, b"a")],
        drops=[(1, 0), (1, 1)],
        lease_puts={5: lease},
        lease_deletes=[4, 5],
        records={"events": record},
        redo=[("events", put(3, 1, b"x"))],
        redo_drops=[2],
        shard_map="m",
    )
    first, *others = sql.steps(full, epoch=7, writes=9)
    assert sql.INSERT_ROWS == first[0]
    assert [
        (sql.DELETE_ROWS, ((1, 1), (0, 1))),
        (sql.DELETE_LEASES, ([4, 5],)),
        (sql.PUT_LEASES, ((5,), (60,), (0,))),
        (sql.PUT_RECORDS, (("events",), (3,), ("o",))),
        (sql.DELETE_REDO, ([2],)),
        (sql.INSERT_REDO, (("events",), (3,), (1,), (b"x",), (3,), (1,), (0,), (b"v",))),
        (sql.PUT_SHARD_MAP, ("m",)),
    ] == others


@pytest.fixture
async def session(postgres_storage: PostgresStorage) -> Session:
    """A session over a store of so few rows, as PostgreSQL knows, that to scan it is cheapest."""
    opened = await Opened(postgres_storage.backend()).open()
    rows = [put(2 + n // 3, n % 3, b"%d" % n, value=Random(n).randbytes(100)) for n in range(6)]
    await opened.commit(opened.batch(rows))
    await opened.close()
    await postgres_storage.sql("ANALYZE revisions")
    target = read_url(postgres_storage.cluster.url(postgres_storage.schema))
    return await connect(target, QUICK, writes=True)


async def plan(session: Session, text: str, *given: object) -> list[str]:
    """The nodes of a plan that look at the table of revisions."""
    name = f"planned_{abs(hash(text))}"
    await session.command(f"PREPARE {name} AS {text}")
    written = ", ".join(map(_literal, given))
    await session.command("SET plan_cache_mode = force_generic_plan")
    rows = (await session.run(f"EXPLAIN EXECUTE {name} ({written})")).rows
    lines = [row[0].strip() for row in rows]
    return [line for line in lines if re.search(r"(Scan|Index).* on (revisions|fence)", line)]


def _literal(value: object) -> str:
    if isinstance(value, list | tuple):
        return "ARRAY[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, bytes):
        return f"'\\x{value.hex()}'::bytea"
    return "NULL" if value is None else str(value)


IDS = ([2, 3, 4], [0, 1, 2])
ROW = ([9_000], [0], [b"k"], [1], [1], [0], [b"v"])
PLANS: dict[str, tuple[str, tuple[object, ...]]] = {
    "values": (sql.SELECT_VALUES, IDS),
    "drops": (sql.DELETE_ROWS, IDS),
    "index": (sql.SELECT_INDEX, (2, 0, 5_000)),
    "rows": (sql.SELECT_ROWS, (2, 0, 500)),
    "insert": (sql.INSERT_ROWS, (1, 2_001, 9_000, 2, None, None, *ROW)),
    "advance": (sql.ADVANCE, (1, 2_001, 9_000, 2, None, None)),
    "renew": (sql.RENEW, (2, 1, 5)),
}


@pytest.mark.postgres
@pytest.mark.parametrize("name", PLANS)
async def test_rows_are_found_by_key(session: Session, name: str) -> None:
    """Plans for any parameters, made while the table is small, go by the primary key: no table is
    read from end to end, and nothing is sorted.
    """
    text, given = PLANS[name]
    found = await plan(session, text, *given)
    await session.close()
    assert found
    assert all("using revisions_pkey" in line or "using fence_pkey" in line for line in found)


@pytest.mark.postgres
async def test_pages_are_not_sorted(session: Session) -> None:
    """A page comes from the index in its order."""
    for text in (sql.SELECT_INDEX, sql.SELECT_ROWS):
        await session.command(f"PREPARE page AS {text}")
        rows = (await session.run("EXPLAIN EXECUTE page (2, 0, 500)")).rows
        await session.command("DEALLOCATE page")
        assert not any("Sort" in row[0] for row in rows)
    await session.close()
