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
from kvstore.backend import (
    Batch,
    CommitResult,
    Fence,
    HomeRows,
    LeaseRow,
    Outcome,
    Row,
    RowId,
    ShardRecord,
)
from kvstore.config import SqliteConfig

STATEMENTS = Statements(sqlite_dialect())
CONFIG = SqliteConfig(checkpoint_bytes=64 * 1024)
IDS = (7, 8)

OWN = ""
Change = tuple[str, bytes, int, int, int, bytes]
"""The shard that the row is for, OWN or another's name, and the row behind its id."""


class Step(TypedDict):
    """What a batch carries, relative to the tip (only rows if plain, and only of this shard), and
    whether all is opened anew after it.
    """

    revisions: list[tuple[int, list[Change]]]
    drops: list[RowId]
    lease_puts: list[LeaseRow]
    lease_deletes: list[int]
    compact_revision: int | None
    tip_beyond: int
    reserved: int | None
    records: list[ShardRecord]
    redo_drops: list[int]
    shard_map: str | None
    tip_error: int
    plain: bool
    reopen: bool


INT64 = st.one_of(st.integers(0, 9), st.integers(-(1 << 63), (1 << 63) - 1))
SHARDS = st.sampled_from(["a", "b", "\u00fc"])
TARGETS = st.one_of(st.just(OWN), st.just(OWN), SHARDS)
KEYS, VALUES = st.binary(max_size=6), st.binary(max_size=40)
CHANGES = st.tuples(TARGETS, KEYS, INT64, INT64, INT64, VALUES)
REVISIONS = st.tuples(st.integers(1, 3), st.lists(CHANGES, min_size=1, max_size=4))
LEASES = st.builds(LeaseRow, st.integers(0, 5), INT64, INT64)
RECORDS = st.builds(ShardRecord, SHARDS, INT64, st.text("\u00e41/", max_size=4))
STEPS: st.SearchStrategy[Step] = st.builds(
    Step,
    revisions=st.lists(REVISIONS, max_size=6),
    drops=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 4)), max_size=8),
    lease_puts=st.lists(LEASES, max_size=3),
    lease_deletes=st.lists(st.integers(0, 5), max_size=3),
    compact_revision=st.none() | st.integers(0, 20),
    tip_beyond=st.sampled_from([0, 0, 0, 3]),
    reserved=st.none() | INT64,
    records=st.lists(RECORDS, max_size=3),
    redo_drops=st.lists(st.integers(0, 25), max_size=8),
    shard_map=st.none() | st.text("\u00e4: \n", max_size=9),
    tip_error=st.sampled_from([0, 0, 0, 1, -1]),
    plain=st.booleans(),
    reopen=st.booleans(),
)


def batch_of(fence: Fence, tip: int, step: Step) -> Batch:
    """The batch that ``step`` makes on top of ``tip``."""
    placed: list[tuple[str, Row]] = []
    revision = tip
    for distance, changes in step["revisions"]:
        revision += distance
        placed += [(change[0], (revision, sub, *change[1:])) for sub, change in enumerate(changes)]
    before = tip + step["tip_error"]
    if step["plain"]:
        return Batch(fence.epoch, before, revision, [row for _, row in placed])
    return Batch(
        epoch=fence.epoch,
        tip_before=before,
        tip=revision + step["tip_beyond"],
        rows=[row for shard, row in placed if shard == OWN],
        drops=step["drops"],
        lease_puts={lease.id: lease for lease in step["lease_puts"]},
        lease_deletes=step["lease_deletes"],
        compact_revision=step["compact_revision"],
        reserved=step["reserved"],
        records={record.shard: record for record in step["records"]},
        redo=[(shard, row) for shard, row in placed if shard != OWN],
        redo_drops=step["redo_drops"],
        shard_map=step["shard_map"],
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
        self._writer.tidy()
        return result

    def contents(self) -> tuple[list[Row], list[LeaseRow], HomeRows]:
        """Rows, by every way of reading, leases, and what home keeps for all shards."""
        rows = self._reader.rows((0, -1), 1_000)
        assert [row[6] for row in rows] == self._reader.values([(row[0], row[1]) for row in rows])
        assert [row[:6] for row in rows] == self._reader.index_rows((0, -1), 1_000)
        return rows, sorted(self._reader.leases()), self._reader.home()


def contents(disk: MemoryDisk) -> tuple[list[Row], list[LeaseRow], HomeRows]:
    """The same of the reference."""
    home = HomeRows(disk.shard_map, sorted(disk.records.values()), disk.redo)
    return list(disk.rows.values()), sorted(disk.leases.values()), home


def opened(disk: MemoryDisk) -> Fence:
    """What opening makes of the reference."""
    disk.epoch += 1
    place = (disk.epoch, disk.tip, disk.compact_revision, disk.reserved)
    return Fence(*IDS, disk.shard, *place)


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
            assert contents(disk) == stored.contents()
            if step["reopen"]:
                stored.close()
                fence = opened(disk)
                assert fence == stored.open()._replace(cluster_id=IDS[0], member_id=IDS[1])
        stored.close()
