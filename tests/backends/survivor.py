"""A process that commits until it is killed: `python -m tests.backends.survivor FILE`.

What it commits depends on nothing but the number of the batch, so that whoever kills it knows what
must be there. It prints each tip once it is committed.
"""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

from backends.sqlite import SqliteBackend
from kvstore.backend import Batch, HomeRows, LeaseRow, Outcome, Row, RowId, ShardRecord
from kvstore.config import SqliteConfig
from tests.backends.storage import Session

CONFIG = SqliteConfig(checkpoint_bytes=256 * 1024)
"""Checkpoints often enough to be killed in the middle of one."""
DROP_DELAY = 5


def rows_of(number: int, tip_before: int) -> list[Row]:
    """What batch ``number`` adds."""
    return [
        (revision, 0, b"key/%d" % (revision % 50), revision, 1, number, b"%d" % revision * 200)
        for revision in range(tip_before + 1, tip_before + 2 + number * 7 % 23)
    ]


def add_home_parts(batch: Batch, number: int) -> None:
    """What batch ``number`` changes of what home keeps for all shards, if it does."""
    if number % 3 == 1:
        batch.reserved = number * 1_000
    if number % 7 == 2:
        name = f"shard {number % 5}"
        batch.records[name] = ShardRecord(name, batch.tip, f"{number}/1")
    if number % 29 == 4:
        batch.shard_map = f"map {number}\n"
    if number % 4 == 3:
        batch.tip += 1 + number % 3
        batch.redo = [
            (f"shard {sub % 2}", (batch.tip, sub, b"over", batch.tip, 1, 0, b"%d" % sub * 200))
            for sub in range(1 + number % 13)
        ]


class History:
    """All batches, from the first, and what is there after each."""

    def __init__(self) -> None:
        self.number = 0
        self.tip = 1
        self.rows: dict[RowId, Row] = {}
        self.leases: dict[int, LeaseRow] = {}
        self.reserved = 0
        self._shard_map = ""
        self._records: dict[str, ShardRecord] = {}
        self._redo: list[tuple[str, Row]] = []
        self._added: list[list[Row]] = []

    def home(self) -> HomeRows:
        """What home keeps for all shards, records by name."""
        return HomeRows(self._shard_map, sorted(self._records.values()), list(self._redo))

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The next batches; each is in what this tells once it is yielded."""
        while True:
            rows = rows_of(self.number, self.tip)
            old = self._added[-DROP_DELAY] if len(self._added) >= DROP_DELAY else []
            drops = [(row[0], 0) for row in old if row[0] % 2 == 0 and self.number % 3]
            lease = LeaseRow(self.number % 4, self.number, 0)
            batch = Batch(epoch, self.tip, rows[-1][0], rows, drops)
            if self.number % 2:
                batch.lease_puts[lease.id] = lease
            if self.number % 8 == 5:
                batch.redo_drops = sorted({row[0] for _, row in self._redo[:20]})
            add_home_parts(batch, self.number)
            self._add_home(batch)
            self._added.append(rows)
            self.rows.update({(row[0], 0): row for row in rows})
            for id_ in drops:
                del self.rows[id_]
            self.leases.update(batch.lease_puts)
            self.number += 1
            self.tip = batch.tip
            yield batch

    def _add_home(self, batch: Batch) -> None:
        if batch.reserved is not None:
            self.reserved = batch.reserved
        if batch.shard_map is not None:
            self._shard_map = batch.shard_map
        self._records.update(batch.records)
        self._redo = [(to, row) for to, row in self._redo if row[0] not in batch.redo_drops]
        self._redo += batch.redo


async def main(path: Path) -> None:
    """Go on from what the file holds."""
    session = await Session(SqliteBackend(path, config=CONFIG)).open()
    history = History()
    batches = history.batches(session.fence.epoch)
    while history.tip < session.tip:
        next(batches)
    assert history.tip == session.tip, "the tip ends a batch"
    for batch in batches:
        result = await session.commit(batch)
        assert result.outcome is Outcome.COMMITTED, result
        sys.stdout.write(f"{batch.tip}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
