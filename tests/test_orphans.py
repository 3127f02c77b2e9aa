"""Keys whose lease is gone: how they are deleted, and what that is bounded by."""

from dataclasses import replace

from kvstore.config import CommitConfig, Config
from tests.engine import Engine


def engine_of(**limits: int) -> Engine:
    """Home and shards for keys under x/ and y/."""
    config = replace(Config(), commit=replace(CommitConfig(), **limits))
    return Engine(routes={b"x/": 1, b"y/": 2}, config=config)


def load(engine: Engine, shard: int, prefix: bytes, count: int) -> None:
    """Keys of leases that are not there, one each."""
    for n in range(count):
        revision = 10 + 1000 * shard + n
        row = (revision, 0, prefix + b"%03d" % n, revision, 1, 1_000 + n)
        engine.store.load_rows(shard, [row])
    engine.store.revision = 10_000


# -- a shard that returns --------------------------------------------------------------------------


def test_a_shard_that_returns_queues_no_more_than_others() -> None:
    """While it does not commit, its queue gets full and no fuller; then the others follow."""
    engine = engine_of(queue_rows_max=20)
    load(engine, 1, b"x/", 100)
    engine.commits.part(1)
    queue = engine.commits.queues[1]
    for _ in range(50):
        assert engine.lessor.orphans.delete_of(1)
        assert queue.rows <= 20
    rounds = 0
    while engine.lessor.orphans.delete_of(1):
        engine.settle()
        rounds += 1
    assert (engine.live(), rounds) == ([], 4)


def test_a_shard_that_returns_queues_no_more_bytes_than_others() -> None:
    """Long keys fill it as well."""
    engine = engine_of(queue_bytes_max=2_000)
    load(engine, 1, b"x/" + b"k" * 500, 20)
    engine.commits.part(1)
    for _ in range(10):
        assert engine.lessor.orphans.delete_of(1)
    assert engine.commits.queues[1].size <= 2_000 + 1_000


# -- a start ---------------------------------------------------------------------------------------


def rounds_until_served(engine: Engine) -> int:
    """How often a start has to look."""
    rounds = 1
    while engine.lessor.orphans.delete():
        engine.settle()
        rounds += 1
    engine.settle()
    return rounds


def test_keys_on_several_shards_share_their_turns() -> None:
    """A revision for each lease, and few looks for all of them."""
    engine = engine_of()
    load(engine, 1, b"x/", 100)
    load(engine, 2, b"y/", 100)
    assert rounds_until_served(engine) <= 4
    assert engine.live() == []
    assert len({revision for _, revision in engine.deaths()}) == 100
    assert engine.crash().live() == []


def test_more_than_can_wait_for_their_turn() -> None:
    """They come later."""
    engine = engine_of(barrier_requests_max=10)
    load(engine, 1, b"x/", 100)
    load(engine, 2, b"y/", 100)
    assert 5 <= rounds_until_served(engine) <= 20
    assert engine.live() == []


def test_those_of_one_shard_do_not_wait_for_those_of_several() -> None:
    """Or not for longer than a turn takes; and all are deleted."""
    engine = engine_of(held_requests_max=5)
    load(engine, 1, b"x/", 30)
    load(engine, 2, b"y/", 60)
    assert rounds_until_served(engine) <= 12
    assert engine.live() == []
    assert len({revision for _, revision in engine.deaths()}) == 60


def test_a_shard_that_is_lost_while_they_wait() -> None:
    """Those that waited for it are deleted on the others; its own when it joins."""
    engine = engine_of()
    load(engine, 1, b"x/", 10)
    load(engine, 2, b"y/", 10)
    assert engine.lessor.orphans.delete()
    engine.clock.advance(6)
    queue = engine.commits.queues[2]
    engine.backends[2].commit = lambda *_: None  # type: ignore[method-assign]
    engine.settle()
    engine.clock.advance(6)
    engine.commits.tick()
    assert queue.late
    engine.commits.part(2)
    while engine.lessor.orphans.delete({2}):
        engine.settle()
    assert engine.live() == [b"y/%03d" % n for n in range(1, 10)]
