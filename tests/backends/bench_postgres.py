"""What a commit to PostgreSQL takes, beside what it could take: ``python -m
tests.backends.bench_postgres``. It starts a PostgreSQL of its own; numbers are printed as a table.

- ``commits``: rows per second, p50 and this process's CPU per row, by rows per commit.
- ``single``: one-row commits against a bare INSERT on the same kind of connection, in turns.
- ``copy``: the statement over arrays against BEGIN, UPDATE, COPY, COMMIT.
- ``load``: the index of 200,000 rows.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from random import Random
from statistics import median

import uvloop

from backends import postgres_statements as sql
from backends.postgres_session import connect, read_url
from backends.schema import revisions
from kvstore.config import PostgresConfig
from tests.backends.postgres_cluster import find_programs, temporary_cluster
from tests.backends.postgres_storage import PostgresStorage
from tests.backends.storage import Session, put

VALUE_BYTES = 1_024
SECONDS = 3.0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def rows_from(first: int, count: int) -> list[tuple[int, int, bytes, int, int, int, bytes]]:
    """As a busy server would store them."""
    value = Random(first).randbytes(VALUE_BYTES)
    return [
        put(first + n, 0, b"/registry/pods/tenant/pod-%014d" % n, value=value) for n in range(count)
    ]


async def commits(storage: PostgresStorage) -> None:
    """Group commit."""
    _say(f"{'rows':>6} {'rows/s':>8} {'p50 ms':>8} {'us/row':>8}")
    session = await Session(storage.backend()).open()
    for count in (1, 8, 32, 64, 100, 512, 2_000):
        times: list[float] = []
        started, cpu = time.monotonic(), time.process_time()
        while time.monotonic() - started < SECONDS:
            batch = session.batch(rows_from(session.tip + 1, count))
            began = time.monotonic()
            await session.commit(batch)
            times.append(time.monotonic() - began)
        spent, worked = time.monotonic() - started, time.process_time() - cpu
        done = count * len(times)
        _say(
            f"{count:>6} {done / spent:>8.0f} {median(times) * 1e3:>8.2f}"
            f" {worked / done * 1e6:>8.1f}"
        )
    await session.close()


async def single(storage: PostgresStorage) -> None:
    """One client, in turns with the least that a durable row takes."""
    session = await Session(storage.backend()).open()
    bare = await storage.connect()
    await bare.execute("CREATE TABLE bare (id BIGINT PRIMARY KEY, key BYTEA, value BYTEA)")
    insert = await bare.prepare("INSERT INTO bare VALUES ($1, $2, $3)")
    ours: list[float] = []
    least: list[float] = []
    for n in range(1_000):
        row = rows_from(session.tip + 1, 1)
        began = time.monotonic()
        await insert.fetch(n, row[0][2], row[0][6])
        least.append(time.monotonic() - began)
        began = time.monotonic()
        await session.commit(session.batch(row))
        ours.append(time.monotonic() - began)
    _say(
        f"p50 of a bare INSERT {median(least) * 1e3:.2f} ms, of a commit"
        f" {median(ours) * 1e3:.2f} ms: {median(ours) / median(least):.2f} times"
    )
    await bare.close()
    await session.close()


async def copy(storage: PostgresStorage) -> None:
    """One statement over arrays, or COPY between three others."""
    session = await Session(storage.backend()).open()
    await session.close()
    target = read_url(storage.cluster.url(storage.schema))
    writing = await connect(target, PostgresConfig(), writes=True)
    raw = writing._connection
    columns = [column.name for column in revisions.columns]
    tip, writes = session.tip, 1_000
    (epoch,) = await writing.one("SELECT epoch FROM fence")
    _say(f"{'rows':>6} {'arrays ms':>10} {'COPY ms':>8}")
    for count in (64, 256, 512, 1_000, 2_000, 10_000):
        arrays: list[float] = []
        copied: list[float] = []
        for turn in range(20):
            rows = rows_from(tip + 1, count)
            last = tip + count
            began = time.monotonic()
            if turn % 2:
                given = (epoch, tip, last, writes, None, None, *zip(*rows, strict=True))
                await writing.run(sql.INSERT_ROWS, *given)
                arrays.append(time.monotonic() - began)
            else:
                await writing.command("BEGIN")
                await writing.run(sql.ADVANCE, epoch, tip, last, writes, None, None)
                await raw.copy_records_to_table("revisions", records=rows, columns=columns)
                await writing.command("COMMIT")
                copied.append(time.monotonic() - began)
            tip, writes = last, writes + 1
        _say(f"{count:>6} {median(arrays) * 1e3:>10.2f} {median(copied) * 1e3:>8.2f}")
    await writing.close()


async def load(storage: PostgresStorage) -> None:
    """A start."""
    session = await Session(storage.backend()).open()
    for start in range(0, 200_000, 10_000):
        await session.commit(session.batch(rows_from(2 + start, 10_000)))
    await session.close()
    began = time.monotonic()
    await session.open()
    opened = time.monotonic()
    count = sum(map(len, await session.index()))
    _say(
        f"opened in {opened - began:.2f} s, {count} rows loaded in"
        f" {time.monotonic() - opened:.2f} s"
    )
    await session.close()


TABLES: dict[str, Callable[[PostgresStorage], Coroutine[None, None, None]]] = {
    "commits": commits,
    "single": single,
    "copy": copy,
    "load": load,
}


def main() -> None:
    """Run the tables that are named, or all."""
    programs = find_programs()
    if programs is None:
        sys.exit("no PostgreSQL")
    with temporary_cluster(programs, max_wal_size="4GB") as cluster:
        for name in sys.argv[1:] or TABLES:
            _say(f"\n{name}")
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(
                    TABLES[name](PostgresStorage(cluster, f"bench_{name}", PostgresConfig()))
                )


if __name__ == "__main__":
    main()
