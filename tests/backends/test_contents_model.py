"""Random batches on the memory backend's disk and on SQLite leave equal contents."""

import tempfile
from pathlib import Path
from typing import TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import sqlite_file
from backends.memory import MemoryDisk
from backends.schema import Statements, sqlite_dialect
from backends.sqlite_reader import Reader
from backends.sqlite_writer import Writer
from kvstore.backend import Batch, CommitResult, Fence, LeaseRow, Outcome, Row, RowId
from kvstore.config import SqliteConfig

STATEMENTS = Statements(sqlite_dialect())
CONFIG = SqliteConfig(checkpoint_bytes=64 * 1024)
IDS = (7, 8)

Change = tuple[bytes, int, int, int, bytes]


class Step(TypedDict):
    """What a batch carries, relative to the tip, and whether all is opened anew after it."""

    revisions: list[tuple[int, list[Change]]]
    drops: list[RowId]
    lease_puts: list[LeaseRow]
    lease_deletes: list[int]
    compact_revision: int | None
    tip_error: int
    reopen: bool


INT64 = st.one_of(st.integers(0, 9), st.integers(-(1 << 63), (1 << 63) - 1))
CHANGES = st.tuples(st.binary(max_size=6), INT64, INT64, INT64, st.binary(max_size=40))
REVISIONS = st.tuples(st.integers(1, 3), st.lists(CHANGES, min_size=1, max_size=4))
LEASES = st.builds(LeaseRow, st.integers(0, 5), INT64, INT64)
STEPS: st.SearchStrategy[Step] = st.builds(
    Step,
    revisions=st.lists(REVISIONS, max_size=6),
    drops=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 4)), max_size=8),
    lease_puts=st.lists(LEASES, max_size=3),
    lease_deletes=st.lists(st.integers(0, 5), max_size=3),
    compact_revision=st.none() | st.integers(0, 20),
    tip_error=st.sampled_from([0, 0, 0, 1, -1]),
    reopen=st.booleans(),
)


def batch_of(fence: Fence, tip: int, step: Step) -> Batch:
    """The batch that ``step`` makes on top of ``tip``."""
    rows: list[Row] = []
    revision = tip
    for distance, changes in step["revisions"]:
        revision += distance
        rows += [(revision, sub, *change) for sub, change in enumerate(changes)]
    return Batch(
        epoch=fence.epoch,
        tip_before=tip + step["tip_error"],
        tip=revision if rows else tip,
        rows=rows,
        drops=step["drops"],
        lease_puts={lease.id: lease for lease in step["lease_puts"]},
        lease_deletes=step["lease_deletes"],
        compact_revision=step["compact_revision"],
    )


class InSqlite:
    """A file, its writer and its reader."""

    def __init__(self, path: Path) -> None:
        self._path = path
        sqlite_file.create(path, "default")

    def open(self) -> Fence:
        """Open, and raise the epoch."""
        connection = sqlite_file.open_writer(self._path, STATEMENTS, CONFIG)
        self._writer = Writer(self._path, connection, STATEMENTS, CONFIG)
        self._reader = Reader(sqlite_file.open_reader(self._path, CONFIG), STATEMENTS)
        return self._writer.take()

    def close(self) -> None:
        """Close both."""
        self._reader.close()
        self._writer.close()

    def commit(self, batch: Batch) -> CommitResult:
        """Commit, and checkpoint if it is time."""
        result = self._writer.commit(batch)
        self._writer.checkpoint_if_due()
        return result

    def contents(self) -> tuple[list[Row], list[LeaseRow]]:
        """Rows, by every way of reading, and leases."""
        rows = self._reader.rows((0, -1), 1_000)
        assert [row[6] for row in rows] == self._reader.values([(row[0], row[1]) for row in rows])
        assert [row[:6] for row in rows] == self._reader.index_rows((0, -1), 1_000)
        return rows, sorted(self._reader.leases())


def opened(disk: MemoryDisk) -> Fence:
    """What opening makes of the reference."""
    disk.epoch += 1
    return Fence(*IDS, disk.shard, disk.epoch, disk.tip, disk.compact_revision)


@pytest.mark.slow
@given(st.lists(STEPS, max_size=6))
def test_memory_and_sqlite_are_equal(steps: list[Step]) -> None:
    """The reference and SQLite agree on the outcome of every batch and on all that is stored."""
    with tempfile.TemporaryDirectory() as directory:
        disk, stored = MemoryDisk(), InSqlite(Path(directory) / "kvstore.db")
        fence = opened(disk)
        assert fence == stored.open()._replace(cluster_id=IDS[0], member_id=IDS[1])
        for step in steps:
            batch = batch_of(fence, disk.tip, step)
            expected = Outcome.FENCED if step["tip_error"] else Outcome.COMMITTED
            assert expected is disk.store(batch, disk.epoch).outcome
            assert expected is stored.commit(batch).outcome
            assert (list(disk.rows.values()), sorted(disk.leases.values())) == stored.contents()
            if step["reopen"]:
                stored.close()
                fence = opened(disk)
                assert fence == stored.open()._replace(cluster_id=IDS[0], member_id=IDS[1])
        stored.close()
