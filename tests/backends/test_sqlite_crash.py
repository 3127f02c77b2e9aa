"""A store whose process is killed or whose machine loses power: everything acknowledged is there,
in whole batches.
"""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from backends.sqlite import SqliteBackend
from kvstore.backend import CommitResult, Outcome
from tests.backends.faults import faults_under_sqlite
from tests.backends.storage import Session
from tests.backends.survivor import CONFIG, History

ROUNDS = 6
ROOT = Path(__file__).parents[2]


def kill_after(path: Path, lines: int) -> int:
    """Let the survivor commit, kill it after so many acknowledgements; returns the last tip that
    it acknowledged.
    """
    command = [sys.executable, "-m", "tests.backends.survivor", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(lines)]
        process.kill()
        rest = process.stdout.read().splitlines(keepends=True)
    acknowledged += [int(line) for line in rest if line.endswith(b"\n")]
    return acknowledged[-1]


@pytest.mark.slow
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_acknowledged_batches_survive_kill(tmp_path: Path) -> None:
    """After each kill -9 the store holds exactly the batches up to its tip, and its tip is not
    below the last acknowledgement; it opens in the same way however often it is killed.
    """
    path = tmp_path / "kvstore.db"
    random = Random(20)
    for _ in range(ROUNDS):
        acknowledged = kill_after(path, random.randrange(1, 120))
        assert acknowledged <= await tip_of_whole_batches(path)


async def tip_of_whole_batches(path: Path) -> int:
    """The tip of a store, which must hold exactly the batches up to it."""
    session = await Session(SqliteBackend(path)).open()
    history = History()
    batches = history.batches(0)
    while history.tip < session.tip:
        next(batches)
    assert history.tip == session.tip
    assert sorted(history.rows.values()) == await session.rows()
    assert sorted(history.leases.values()) == await session.leases()
    assert history.home() == await session.home()
    assert history.reserved == session.fence.reserved
    await session.close()
    return session.tip


def lay_out(path: Path, database: bytes, log: bytes) -> None:
    """The files as a power cut leaves them."""
    path.parent.mkdir()
    path.write_bytes(database)
    path.with_name(f"{path.name}-wal").write_bytes(log)


@pytest.mark.slow
async def test_acknowledged_batches_survive_a_power_cut(tmp_path: Path) -> None:
    """Whenever the power goes, nothing is left of what was written after the last sync of a file,
    and yet each batch is there from its acknowledgement on, and whole; checkpoints come between.
    """
    path = tmp_path / "running" / "kvstore.db"
    cuts: list[tuple[int, bytes, bytes]] = []
    with faults_under_sqlite() as faults:
        session = await Session(SqliteBackend(path, config=CONFIG)).open()
        durable = faults.durable
        durable[str(path)] = durable[f"{path}.new"]
        faults.on_sync = lambda: cuts.append(
            (session.tip, durable[str(path)], durable[f"{path}-wal"])
        )
        batches = History().batches(session.fence.epoch)
        for _ in range(200):
            assert CommitResult(Outcome.COMMITTED) == await session.commit(next(batches))
        await session.close()
    assert 200 < len(cuts)
    for number, (acknowledged, database, log) in enumerate(cuts):
        if number % 7 == 0:
            after = tmp_path / str(number) / path.name
            lay_out(after, database, log)
            assert acknowledged <= await tip_of_whole_batches(after)
