"""What the SQLite backend costs: run `python -m tests.backends.bench_sqlite [NAME ...]`.

Prints one table per name, all of them by default. The figures in `backends/DESIGN.md` come from
here. Files are made in a temporary directory below `--directory` (default: the current one), which
must be on the disk in question.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from queue import SimpleQueue

import apsw

from backends import sqlite_file
from backends.schema import SCHEMA_VERSION, Statements, migrations, sqlite_dialect
from backends.sqlite_reader import Reader
from backends.sqlite_writer import Writer
from kvstore.backend import Batch, Outcome, Row
from kvstore.config import SqliteConfig

KIB = 1024
STATEMENTS = Statements(sqlite_dialect())
BLOCK = os.urandom(1 << 20)


def rows(first: int, count: int, value_bytes: int = KIB) -> list[Row]:
    """Rows as agents' writes make them: a key of 40 bytes, an incompressible value."""
    made: list[Row] = []
    for revision in range(first, first + count):
        key = b"/registry/pods/default/pod-%013d" % (revision * 7919 % 100_000_007)
        start = revision * 37 % (len(BLOCK) - value_bytes)
        made.append((revision, 0, key, revision, 1, 0, BLOCK[start : start + value_bytes]))
    return made


def quantile(values: list[float], q: float) -> float:
    """The value below which the fraction `q` lies, of a non-empty list."""
    return sorted(values)[min(int(len(values) * q), len(values) - 1)]


def spread(times: list[float]) -> str:
    """Quantiles of some durations in seconds."""
    figures = ((0.1, "p10"), (0.5, "p50"), (0.99, "p99"))
    return "  ".join(f"{name} {quantile(times, q) * 1e3:7.3f}" for q, name in figures) + " ms"


class Store:
    """A store in a directory of its own, written without threads."""

    def __init__(
        self,
        directory: Path,
        config: SqliteConfig | None = None,
        create: Callable[[Path, str], None] = sqlite_file.create,
    ) -> None:
        self.path = Path(tempfile.mkdtemp(dir=directory)) / "kvstore.db"
        self.config = config or SqliteConfig()
        create(self.path, "bench")
        connection = sqlite_file.open_writer(self.path, STATEMENTS, self.config)
        self.connection = connection
        self.writer = Writer(self.path, connection, STATEMENTS, self.config)
        self.fence = self.writer.take()
        self.tip = self.fence.tip

    def batch(self, count: int, value_bytes: int = KIB) -> Batch:
        """The next batch of `count` rows."""
        made = rows(self.tip + 1, count, value_bytes)
        before, self.tip = self.tip, self.tip + count
        return Batch(self.fence.epoch, before, self.tip, made)

    def fill(self, count: int, value_bytes: int = KIB) -> "Store":
        """Commit `count` rows."""
        for _ in range(count // 500):
            assert self.writer.commit(self.batch(500, value_bytes)).outcome is Outcome.COMMITTED
            self.writer.tidy()
        return self

    def reader(self) -> Reader:
        """A reader with a connection of its own."""
        return Reader(sqlite_file.open_reader(self.path, self.config), STATEMENTS)

    def close(self) -> None:
        """Close and delete."""
        self.writer.close()
        for file in self.path.parent.iterdir():
            file.unlink()
        self.path.parent.rmdir()


def written_pages(store: Store) -> int:
    """Pages appended to the log so far."""
    return store.connection.status(apsw.SQLITE_DBSTATUS_CACHE_WRITE)[0]


def single(directory: Path) -> Iterator[str]:
    """A commit of one row of 1 KiB against a bare write and sync of 4 KiB, appended to a file and
    overwritten in place: in turns, so that all meet the same disk.
    """
    store = Store(directory).fill(30_000)
    path = directory / "bare"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    kinds: dict[str, Callable[[int], object]] = {
        "sync, appended": lambda n: _write_and_sync(descriptor, n * 4096),
        "sync, overwritten": lambda n: _write_and_sync(descriptor, n // 2 * 4096),
        "commit, 1 row": lambda _: store.writer.commit(store.batch(1)),
    }
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for n in range(1_000):
        for kind, run in kinds.items():
            began = time.perf_counter()
            run(n)
            taken[kind].append(time.perf_counter() - began)
        store.writer.tidy()
    for kind, times in taken.items():
        yield f"{kind:18} {spread(times)}"
    store.close()
    os.close(descriptor)
    path.unlink()


def _write_and_sync(descriptor: int, offset: int) -> None:
    os.pwrite(descriptor, BLOCK[:4096], offset)
    os.fdatasync(descriptor)


def commits(directory: Path) -> Iterator[str]:
    """Commits by size of value and of batch: latency without checkpoints, rows/s and CPU of the
    writer's thread with them, bytes appended to the log.
    """
    for value_bytes in (KIB, 2 * KIB, 16 * KIB):
        for count, total in ((1, 2_000), (10, 10_000), (100, 50_000), (1_000, 50_000)):
            store = Store(directory).fill(1_000)
            taken, spent, elapsed = [], 0.0, 0.0
            pages = written_pages(store)
            for _ in range(max(total * KIB // value_bytes // count, 10)):
                batch = store.batch(count, value_bytes)
                began, cpu = time.perf_counter(), time.thread_time()
                assert store.writer.commit(batch).outcome is Outcome.COMMITTED
                taken.append(time.perf_counter() - began)
                store.writer.tidy()
                elapsed += time.perf_counter() - began
                spent += time.thread_time() - cpu
            stored = count * len(taken)
            log = (written_pages(store) - pages) * sqlite_file.PAGE_BYTES
            store.close()
            yield (
                f"{value_bytes:6} B  batch {count:5}  {spread(taken)}"
                f"  {stored / elapsed:8.0f} rows/s"
                f"  {spent / stored * 1e6:6.1f} us CPU/row  {log / stored:7.0f} log B/row"
            )


def layouts(directory: Path) -> Iterator[str]:
    """Other layouts than the chosen one: page sizes, and the key as the table itself (WITHOUT
    ROWID) instead of an index beside it; 1 and 2 KiB values, batches of 1, 10, 100, 1,000.
    """
    for value_bytes in (KIB, 2 * KIB):
        for without_rowid in (False, True):
            for page_bytes in (4096, 8192, 16384):
                store = Store(directory, create=partial(_create, page_bytes, without_rowid))
                kind = "WITHOUT ROWID" if without_rowid else "rowid + index"
                figures = [_layout_commits(store, value_bytes, n) for n in (1, 10, 100, 1_000)]
                store.fill(40_000, value_bytes)
                reader = store.reader()
                ids = [(2 + n * 17 % 40_000, 0) for n in range(5_000)]
                read = min(_cpu(partial(reader.values, ids)) for _ in range(3)) / len(ids)
                size = store.writer.sizes.total / store.tip
                reader.close()
                store.close()
                yield (
                    f"{value_bytes} B  {kind:13}  page {page_bytes:5}  {'  '.join(figures)}"
                    f"  read {read * 1e6:4.1f} us  file {size:5.0f} B/row"
                )


def _create(page_bytes: int, without_rowid: bool, path: Path, shard: str) -> None:  # noqa: FBT001
    connection = apsw.Connection(str(path))
    connection.pragma("page_size", page_bytes)
    for statement in chain.from_iterable(m.statements for m in migrations(sqlite_dialect())):
        option = ", WITHOUT ROWID" if without_rowid and "TABLE revisions" in statement else ""
        connection.execute(statement + option)
    connection.execute(STATEMENTS.insert_meta, (1, SCHEMA_VERSION))
    connection.execute(STATEMENTS.insert_fence, (1, 1, 1, shard, 0, 1, -1, 0))
    connection.close()


def _layout_commits(store: Store, value_bytes: int, count: int) -> str:
    store.fill(1_000, value_bytes)
    taken, spent, pages = [], 0.0, written_pages(store)
    for _ in range(max(200, 1_000 // count) if count < 1_000 else 20):
        batch = store.batch(count, value_bytes)
        began, cpu = time.perf_counter(), time.thread_time()
        assert store.writer.commit(batch).outcome is Outcome.COMMITTED
        taken.append(time.perf_counter() - began)
        store.writer.tidy()
        spent += time.thread_time() - cpu
    stored = count * len(taken)
    log = (written_pages(store) - pages) * int(store.connection.pragma("page_size")) / stored
    return f"{quantile(taken, 0.5) * 1e3:6.2f} ms {spent / stored * 1e6:5.1f} us {log:5.0f} B"


def python_cost(directory: Path) -> Iterator[str]:
    """CPU per row that holds the interpreter's lock: flattening and binding, without SQLite's step
    (a statement that takes the parameters and does nothing with them).
    """
    store = Store(directory)
    for count in (1, 10, 100, 500):
        batch = rows(2, count)
        _, given = STATEMENTS.insert_rows.fitting(batch, 1, 1)
        holes = ",".join("?" * len(given))
        nothing = f"SELECT 1 WHERE 0 AND 1 IN ({holes})"
        store.connection.execute(nothing, given)
        times = 20_000 // count
        began = time.thread_time()
        for _ in range(times):
            _, given = STATEMENTS.insert_rows.fitting(batch, 1, 1)
            store.connection.execute(nothing, given)
        spent = (time.thread_time() - began) / times
        yield f"batch {count:4}  {spent * 1e6:7.1f} us  {spent / count * 1e6:6.2f} us/row"
    store.close()


def spin(until: Callable[[], bool]) -> int:
    """Keep the interpreter busy, as a loop with much to do would; returns turns of work done."""
    turns = 0
    while not until():
        for _ in range(20):
            pass
        turns += 1
    return turns


def busy_loop(directory: Path) -> Iterator[str]:
    """Commits and reads while the main thread never rests: the wait for the interpreter's lock, by
    switch interval, and what the main thread still gets done (100 % is without any commit). A
    commit of `parts` is a transaction of four statements, any other commit is one statement.
    """
    before = sys.getswitchinterval()
    began = time.perf_counter()
    full = spin(lambda: time.perf_counter() - began > 1.0)
    for interval in (0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001):
        sys.setswitchinterval(interval)
        for name, count in (("commit", 1), ("commit", 100), ("parts", 1), ("read", 500)):
            yield f"switch {interval * 1e3:4.1f} ms  {name:6} {count:4}  " + _busy(
                directory, name, count, full
            )
    sys.setswitchinterval(before)


def _busy(directory: Path, name: str, count: int, full: int) -> str:
    store = Store(directory)
    store.fill(5_000)
    reader = store.reader()
    work: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
    done: SimpleQueue[None] = SimpleQueue()

    def run() -> None:
        while (job := work.get()) is not None:
            job()
            done.put(None)

    thread = threading.Thread(target=run)
    thread.start()
    taken: list[float] = []
    turns, started = 0, time.perf_counter()
    ids = [(n, 0) for n in range(1_000, 1_000 + count)]
    while time.perf_counter() - started < 1.0:
        job: Callable[[], object] = partial(reader.values, ids)
        if name != "read":
            batch = store.batch(count)
            batch.compact_revision = 1 if name == "parts" else None
            job = partial(store.writer.commit, batch)
        began = time.perf_counter()
        work.put(job)
        turns += spin(lambda: not done.empty())
        done.get()
        taken.append(time.perf_counter() - began)
    elapsed = time.perf_counter() - started
    work.put(None)
    thread.join()
    reader.close()
    store.close()
    return f"{spread(taken)}  {len(taken):5}/s  main thread {turns / full / elapsed:5.0%}"


def reads(directory: Path) -> Iterator[str]:
    """Values by id, contiguous and scattered over 200,000 rows of 1 KiB; the file is in the page
    cache of the kernel. And the index: everything but values, as at a start.
    """
    store = Store(directory).fill(200_000)
    reader = store.reader()
    for count in (1, 500, 10_000):
        for step, how in ((1, "contiguous"), (17, "scattered")):
            ids = [(2 + n * step % 199_999, 0) for n in range(count)]
            best = min(_cpu(partial(reader.values, ids)) for _ in range(5))
            each = best / count * 1e6
            yield f"{count:6} values {how:10}  {best * 1e3:8.3f} ms  {each:6.2f} us/value"
    spent = min(_cpu(lambda: _load(reader)) for _ in range(3))
    yield f"index of 200000 rows     {spent * 1e3:8.1f} ms  {spent / 200_000 * 1e6:6.2f} us/row"
    reader.close()
    store.close()


def _load(reader: Reader) -> None:
    after, count = (-1, -1), 0
    while page := reader.index_rows(after, SqliteConfig().load_chunk_rows):
        after, count = page[-1][:2], count + len(page)
    assert count == 200_000


def _cpu(function: Callable[[], object]) -> float:
    began = time.thread_time()
    function()
    return time.thread_time() - began


def drops(directory: Path) -> Iterator[str]:
    """Deleting 20,000 of 100,000 rows, 1,000 per batch, in order and scattered; then VACUUM."""
    for step, how in ((1, "in order"), (17, "scattered")):
        store = Store(directory).fill(100_000)
        ids = [(2 + n * step % 99_999, 0) for n in range(20_000)]
        pages = written_pages(store)
        spent, began = time.thread_time(), time.perf_counter()
        for start in range(0, len(ids), 1_000):
            batch = Batch(store.fence.epoch, store.tip, store.tip, drops=ids[start : start + 1_000])
            assert store.writer.commit(batch).outcome is Outcome.COMMITTED
            store.writer.tidy()
        wall, spent = time.perf_counter() - began, time.thread_time() - spent
        pages = written_pages(store) - pages
        yield (
            f"{how:10} {spent / len(ids) * 1e6:6.1f} us CPU/row"
            f"  {wall / len(ids) * 1e6:6.1f} us/row"
            f"  {pages * sqlite_file.PAGE_BYTES / len(ids):7.0f} log B/row"
        )
        began = time.perf_counter()
        before = store.writer.sizes
        assert store.writer.vacuum() is None
        after = store.writer.sizes
        yield (
            f"  VACUUM   {time.perf_counter() - began:6.2f} s"
            f"  {before.total >> 20} MiB, {before.in_use >> 20} in use -> {after.total >> 20} MiB"
        )
        store.close()


def checkpoints(directory: Path) -> Iterator[str]:
    """By size of the log: latency of commits, checkpoints included, for 1 and 100 rows."""
    for count, total in ((1, 6_000), (100, 100_000)):
        for mib in (1, 4, 16, 64):
            config = SqliteConfig(checkpoint_bytes=mib << 20)
            store = Store(directory, config)
            store.fill(5_000)
            taken: list[float] = []
            for _ in range(total // count):
                batch = store.batch(count)
                began = time.perf_counter()
                assert store.writer.commit(batch).outcome is Outcome.COMMITTED
                store.writer.tidy()
                taken.append(time.perf_counter() - began)
            store.close()
            worst, rate = quantile(taken, 0.999) * 1e3, total / sum(taken)
            yield (
                f"{mib:3} MiB  batch {count:3}  {spread(taken)}  p99.9 {worst:7.2f} ms"
                f"  {rate:8.0f} rows/s"
            )


TABLES: dict[str, Callable[[Path], Iterator[str]]] = {
    table.__name__: table
    for table in (single, commits, layouts, python_cost, busy_loop, reads, drops, checkpoints)
}


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TABLES))
    parser.add_argument("--directory", type=Path, default=Path.cwd())
    options = parser.parse_args()
    show = partial(print, flush=True)
    show(f"SQLite {apsw.sqlite_lib_version()}, apsw {apsw.apsw_version()}, Python {sys.version}")
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for name in options.names or TABLES:
            show(f"\n{name}: {' '.join((TABLES[name].__doc__ or '').split())}")
            for line in TABLES[name](Path(directory)):
                show("  " + line)


if __name__ == "__main__":
    main()
