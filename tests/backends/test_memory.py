"""The memory backend under a test's hand: where a commit can be stopped, and what a crash keeps."""

import pytest

from backends.memory import MemoryBackend, MemoryDisk, Steps, at_once
from kvstore.backend import Batch, CommitResult, Outcome
from kvstore.errors import BackendError, UnreachableError
from tests.backends.storage import put

BATCH = Batch(epoch=1, tip_before=1, tip=2, rows=[put(2, 0, b"a")])


async def opened(disk: MemoryDisk, steps: Steps) -> MemoryBackend:
    """A backend over ``disk`` whose steps wait in ``steps``."""
    backend = MemoryBackend(disk, later=steps)
    await backend.open()
    return backend


async def test_crash_before_the_commit_point_stores_nothing() -> None:
    """A commit that was only begun is not there after a crash, and nobody is told."""
    disk, steps, told = MemoryDisk(), Steps(), list[CommitResult]()
    backend = await opened(disk, steps)
    backend.commit(BATCH, told.append)
    backend.crash()
    steps.run_all()
    again = MemoryBackend(disk, later=steps)
    assert (2, 1) == ((fence := await again.open()).epoch, fence.tip)
    assert {} == disk.rows
    assert [] == told


async def test_crash_after_the_commit_point_keeps_all() -> None:
    """A commit that passed its commit point is there after a crash though nobody was told."""
    disk, steps, told = MemoryDisk(), Steps(), list[CommitResult]()
    backend = await opened(disk, steps)
    backend.commit(BATCH, told.append)
    assert steps.run_next()
    backend.crash()
    steps.run_all()
    again = MemoryBackend(disk, later=steps)
    assert 2 == (await again.open()).tip
    assert [put(2, 0, b"a")] == list(disk.rows.values())
    assert [] == told


async def test_resolve_overtakes_a_commit_under_way() -> None:
    """A commit that had not reached its commit point when it was resolved never does, so that the
    same revisions can be sent again; the engine goes on with the epoch that it knows.
    """
    disk, steps, told = MemoryDisk(), Steps(), list[CommitResult]()
    backend = await opened(disk, steps)
    backend.commit(BATCH, told.append)
    stuck = steps.waiting.popleft()
    backend.resolve(BATCH, told.append)
    steps.run_all()
    assert [Outcome.NOT_COMMITTED] == [result.outcome for result in told]
    stuck()
    steps.run_all()
    assert [Outcome.NOT_COMMITTED, Outcome.FENCED] == [result.outcome for result in told]
    backend.commit(BATCH, told.append)
    steps.run_all()
    assert Outcome.COMMITTED is told[-1].outcome
    assert [put(2, 0, b"a")] == list(disk.rows.values())


async def test_resolve_finds_a_commit_that_nobody_was_told_of() -> None:
    """A commit that passed its commit point resolves as committed."""
    disk, steps, told = MemoryDisk(), Steps(), list[CommitResult]()
    backend = await opened(disk, steps)
    backend.commit(BATCH, list[CommitResult]().append)
    steps.run_next()
    backend.resolve(BATCH, told.append)
    steps.run_all()
    assert [CommitResult(Outcome.COMMITTED)] == told


async def test_a_crashed_backend_answers_no_more() -> None:
    """Steps of a dead process do nothing, whatever they were for."""
    disk, steps, told = MemoryDisk(), Steps(), list[object]()
    backend = await opened(disk, steps)
    backend.read_values([(2, 0)], told.append)
    backend.read_rows((0, 0), 1, told.append)
    backend.resolve(BATCH, told.append)
    backend.defragment(told.append)
    backend.crash()
    steps.run_all()
    assert [] == told
    assert 1 == disk.epoch


async def test_at_once_answers_inside_the_call() -> None:
    """With ``at_once`` the answer is there when the call returns."""
    backend = MemoryBackend(MemoryDisk(), later=at_once)
    await backend.open()
    told: list[CommitResult] = []
    backend.commit(BATCH, told.append)
    assert [CommitResult(Outcome.COMMITTED)] == told


async def test_a_disk_that_is_out_of_reach_is_not_opened() -> None:
    """Nobody at the other end is told apart from a refusal, and changes nothing; once there is
    somebody, the disk is opened.
    """
    disk = MemoryDisk(reachable=False)
    with pytest.raises(UnreachableError):
        await MemoryBackend(disk, later=at_once).open()
    assert (0, None) == (disk.epoch, disk.holder)
    disk.reachable = True
    fence = await MemoryBackend(disk, later=at_once).open()
    assert 1 == fence.epoch
    with pytest.raises(BackendError) as refused:
        await MemoryBackend(disk, later=at_once).open()
    assert not isinstance(refused.value, UnreachableError)


async def test_the_disks_origin_is_told() -> None:
    """A test may give a disk an origin and change it, as a failover does."""
    disk = MemoryDisk(origin="1/1")
    backend = MemoryBackend(disk, later=at_once)
    assert "1/1" == (await backend.open()).origin
    await backend.close()
    disk.origin = "1/2"
    assert "1/2" == (await backend.open()).origin
