"""The barrier under requests and troubles by chance."""

from collections.abc import Callable
from functools import partial
from random import Random

import pytest

from kvstore.config import CommitConfig
from tests.barrier_world import Requests
from tests.commit_world import COMMITTED, NOT_COMMITTED

Happening = Callable[[], None]


class Storm(Requests):
    """Requests and troubles by chance."""

    def __init__(self, random: Random) -> None:
        config = CommitConfig(
            barrier_requests_max=6, held_requests_max=8, held_bytes_max=40, shard_timeout=2.0
        )
        super().__init__(config=config)
        self.random = random
        self.sent: dict[str, tuple[int, ...]] = {}
        self.sent_at: dict[str, float] = {}

    def step(self) -> None:
        """Something happens."""
        random = self.random
        shard = random.randrange(4)
        happenings: list[tuple[int, Happening]] = [
            (12, self.send_some),
            (8, partial(self.end_some, shard)),
            (2, partial(self.pass_time, random.choice([0.05, 0.4]))),
            (4, self.run),
            (1, partial(self.commits.lost, shard, "gone")),
            (2, partial(self.commits.found, shard)),
        ]
        weights = [weight for weight, _ in happenings]
        _, happening = random.choices(happenings, weights)[0]
        happening()

    def send_some(self) -> None:
        """A request over any shards."""
        many = self.random.choice([1, 1, 1, 2, 3])
        shards = tuple(sorted(self.random.sample(range(4), many)))
        name = f"{len(self.sent)}"
        self.sent[name] = shards
        self.sent_at[name] = self.clock.now
        changes = self.random.choice([None, *shards])
        self.send(name, *shards, size=self.random.randrange(12), changes=changes)

    def end_some(self, shard: int) -> None:
        """A commit ends, well or not yet."""
        self.turns.run_all()
        if self.backends[shard].asked:
            self.backends[shard].end(self.random.choice([COMMITTED, COMMITTED, NOT_COMMITTED]))

    def check_order(self) -> None:
        """Writes to one shard that waited have not overtaken one another; nobody waits for ever."""
        for shard in range(4):
            line = [int(name) for name in self.executed if self.sent[name] == (shard,)]
            assert line == sorted(line)
        gone = {*self.executed, *self.refused}
        for name, shards in self.sent.items():
            if name not in gone and len(shards) > 1:
                assert self.clock.now - self.sent_at[name] <= 1.0 + 0.4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_whatever_happens(seed: int) -> None:
    """Every request is executed or refused, once; in order; over shards that have settled."""
    world = Storm(Random(seed))
    for _ in range(200):
        world.step()
        world.check_order()
    for shard in range(4):
        world.commits.found(shard)
    for _ in range(40):
        world.settle()
        world.pass_time(0.11)
    assert {*world.executed, *world.refused} == set(world.sent)
    assert world.at_rest()
    assert not world.backends[0].disk.redo
