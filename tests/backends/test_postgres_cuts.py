"""Connections to PostgreSQL are cut and frozen where it hurts most: afterwards all is exact.

500 injuries in all, over two assemblies and two seeds; more with ``CUTS`` (of each run) and with
``CUT_SEEDS``.
"""

import asyncio
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Final

import pytest

from backends.postgres_session import Session, end_abandoned
from tests.backends.cut_history import End
from tests.backends.cut_world import Injury, World, cut_world, living
from tests.backends.postgres_held import holding
from tests.backends.postgres_proxy import CUTS, Fault, Round, proxying
from tests.backends.postgres_storage import QUICK, PostgresStorage, eventually

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

CUTS_PER_RUN: Final = int(os.environ.get("CUTS", "125"))
SEEDS: Final = int(os.environ.get("CUT_SEEDS", "2"))

FROZEN: Final = (Fault.FROZEN_BEFORE, Fault.FROZEN_AFTER)
MENU: Final = (*CUTS, *CUTS, Fault.DELAYED, Fault.WARNED, Fault.ROLLED_BACK)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The loop of production; under the other one in debug mode a cut takes five times as long."""
    return ("asyncio", {"use_uvloop": True})


def any_round(_: Round) -> bool:
    """The settings of a session, and the parts of a transaction, too."""
    return True


def committing(asked: Round) -> bool:
    """Of a batch, of a renewal, or of the shard's being taken anew."""
    return asked.commits


def a_commit(asked: Round) -> bool:
    """In so many words."""
    return asked.texts == ("COMMIT",)


def choose(random: Random) -> list[Injury]:
    """One injury or several, the later ones hitting what is done about the first. A good one is a
    commit that arrives when the shard has been taken anew, and before it is tried again.
    """
    if random.random() < 0.05:
        late = Injury(Fault.LATE, committing, random.randrange(6))
        return [late, Injury(Fault.DELAYED, committing, 0)]
    chosen = []
    for turn in range(random.choice((1, 1, 2, 3))):
        fault = random.choice(FROZEN if random.random() < 0.03 else MENU)
        wanted: Callable[[Round], bool] = committing
        if fault is Fault.ROLLED_BACK:
            wanted = a_commit
        elif fault is not Fault.WARNED and random.random() < 0.2:
            wanted = any_round
        chosen.append(Injury(fault, wanted, 0 if turn else random.randrange(6)))
    return chosen


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("beside", [False, True])
async def test_the_history_is_exact_after_each_cut(
    postgres_storage: PostgresStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    beside: bool,  # noqa: FBT001 - pytest hands it over
) -> None:
    """Whatever connection is cut wherever, again and again: what was acknowledged is there once,
    what was refused is not, the rest is one of the two; the order has no gap, and watches and reads
    have shown what is stored. PostgreSQL serves again each time.
    """
    random = Random(seed)

    async def sometimes(session: Session, processes: Collection[int]) -> None:
        if random.random() < 0.5:
            await end_abandoned(session, processes)

    monkeypatch.setattr("backends.postgres_statements.COPY_ROWS_MIN", 5)
    monkeypatch.setattr("backends.postgres_writer.end_abandoned", sometimes)
    home = tmp_path / "core.db" if beside else None
    async with cut_world(postgres_storage, home, random) as world, living(world):
        while len(world.proxy.done) < CUTS_PER_RUN:
            world.injuries.left.extend(choose(random))
            await world.until_back()
            await world.verify()
            world.proxy.thaw()
    assert {End.DONE, End.NOTHING, End.UNKNOWN} == ends(world)
    assert {fault for fault, _ in world.proxy.done} >= set(MENU)


def ends(world: World) -> set[End]:
    """All that became of requests."""
    return {asked.end for asked in world.history.asked}


@pytest.mark.parametrize("whole", [True, False], ids=["network", "session"])
async def test_what_stands_still_stops_nobody_else(
    postgres_storage: PostgresStorage,
    tmp_path: Path,
    whole: bool,  # noqa: FBT001 - pytest hands it over
) -> None:
    """PostgreSQL falls silent, as a whole or on the connection that commits: the shard is known to
    be out when an answer is late, while the other shard's writes and reads go on. A session alone
    is replaced; a network has to come back. Then all is exact.
    """
    async with cut_world(postgres_storage, tmp_path / "core.db", Random(1)) as world, living(world):
        await world.until_back()
        queue = world.store.commits.queues[1]
        if whole:
            world.proxy.freeze()
        else:
            world.injuries.left.append(Injury(Fault.FROZEN_BEFORE, committing, 0))
        before = world.elsewhere
        await eventually(lambda: queue.away)
        assert world.elsewhere > before
        if whole:
            stuck, before = world.in_postgres, world.elsewhere
            await eventually(lambda: world.elsewhere > before + 100)
            assert queue.away
            assert stuck == world.in_postgres
            world.proxy.thaw()
        await world.until_back()
        assert not queue.out
        await world.verify()


async def test_a_reader_that_stands_still_is_replaced(postgres_storage: PostgresStorage) -> None:
    """A read whose connection falls silent is answered over another one, when its time is up, and
    commits go on meanwhile.
    """
    postgres_storage.config = replace(QUICK, answer_timeout=0.5)
    async with proxying(postgres_storage.cluster.port, Random(1)) as proxy:
        postgres_storage.port = proxy.port
        async with holding(postgres_storage) as held:
            await held.session.put(b"first", value=b"one")
            proxy.plan = lambda asked: (
                Fault.FROZEN_AFTER if "value" in str(asked.texts) and not proxy.done else None
            )
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(held.session.values((2, 0)))
                await eventually(lambda: bool(proxy.frozen))
                await held.session.put(b"second")
                assert not reading.done()
            assert [b"one"] == reading.result()
            assert 1 == proxy.frozen
