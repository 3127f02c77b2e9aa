"""The world of the simulation: databases that are slow, hang, die, return, or are replaced, and
whose commit points write the log.

A database does what it was asked in **steps** that wait until the simulation runs one, in any
order; its answer then waits in the loop of the process that asked. So a process that is paused
hears nothing while its database goes on working, and what a dead one had asked for may still be
done, unless another has raised the epoch. How it fails is told in ``sim_backend``.
"""

from collections import deque
from copy import copy
from dataclasses import fields
from random import Random
from typing import TYPE_CHECKING, Any

from backends.memory import MemoryDisk, Steps
from kvstore.backend import (
    Batch,
    CommitResult,
    Outcome,
)
from kvstore.clock import ManualClock
from kvstore.shard import HOME, ShardMap
from tests.sim_log import Log

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.sim_backend import SimBackend

NAMES = ("core", "events", "agents")
ROUTES = {b"x/": 1, b"y/": 2}


class SimDisk(MemoryDisk):
    """One shard's database."""

    def __init__(self, number: int, world: "World") -> None:
        super().__init__(shard=NAMES[number], origin=f"system {number}, timeline 1")
        self.number = number
        self.world = world
        self.steps = Steps()
        self.hung: deque[Callable[[], None]] = deque()
        """What is stuck until somebody lets it go."""
        self.late_reads: deque[Callable[[], None]] | None = None
        """Reads that wait while it is one of them; None: they are done as ever."""
        self.rate = 0.0
        """How often things go wrong here."""
        self.frozen = False
        """It does nothing, and nobody is told so."""
        self.down = False
        """Nobody is there."""
        self.owner: SimBackend | None = None
        self.led = False
        """The lease was taken and not given back."""
        self.renewals = 0
        self.right: dict[str, Any] | None = None
        """What it should hold, while it is replaced by something else."""
        self.incarnation = 0
        """Grows when something else takes its place; connections to what was there are broken."""
        self.users: list[SimBackend] = []
        """Backends of living processes that have opened it."""

    def store(self, batch: Batch, epoch: int) -> CommitResult:
        """The commit point."""
        tip_before = self.tip
        result = super().store(batch, epoch)
        if result.outcome is Outcome.COMMITTED:
            self.world.judge(self, batch, tip_before)
        return result

    def fate(self, *fates: str) -> str:
        """What happens now: "well", or one of ``fates``."""
        random = self.world.random
        if self.rate and random.random() < self.rate:
            return random.choice(fates)
        return "well"

    def step(self) -> bool:
        """Do any one thing that was asked for; False when there was none, or it is frozen."""
        waiting = self.steps.waiting
        if self.frozen or not waiting:
            return False
        waiting.rotate(self.world.random.randrange(len(waiting)))
        return self.steps.run_next()

    def fall(self) -> None:
        """Nobody is there any more; some of those who use it notice at once."""
        self.down = True
        self.world.let_go(self)
        for user in self.users:
            if self.world.random.random() < 0.5:
                user.notice()

    def rise(self) -> None:
        """It is back; those who had noticed that it was away come again."""
        self.down = self.frozen = False
        for user in self.users:
            user.come_back()

    @property
    def held(self) -> bool:
        """Is the one that has taken it last still there?"""
        return self.owner is not None

    def copy(self) -> dict[str, Any]:
        """A copy of all that is stored."""
        return {each.name: copy(getattr(self, each.name)) for each in fields(MemoryDisk)}

    def replace(self, other: dict[str, Any]) -> None:
        """Put something else in the place of what is stored."""
        self._break_connections()
        self.right = self.copy()
        self._restore(other)

    def put_right(self) -> None:
        """Put back what was there before it was replaced."""
        if self.right is not None:
            self._break_connections()
            self._restore(self.right)
            self.right = None

    def _break_connections(self) -> None:
        """Nothing of what was asked for is done any more."""
        self.world.let_go(self)
        down, self.down = self.down, True
        self.steps.run_all()
        self.down = down
        self.incarnation += 1

    def _restore(self, other: dict[str, Any]) -> None:
        for name, value in other.items():
            setattr(self, name, copy(value))


class World:
    """What outlives a process: time, databases, the log."""

    def __init__(self, random: Random, *, shards: int, locks: bool) -> None:
        self.random = random
        self.clock = ManualClock()
        self.locks = locks
        self.routes = {prefix: number for prefix, number in ROUTES.items() if number < shards}
        self.shards = ShardMap(self.routes)
        self.log = Log(NAMES[:shards], self._owner)
        self.returned = 0
        """Missing shards that came back."""
        self.disks = [SimDisk(number, self) for number in range(shards)]

    def _owner(self, key: bytes) -> int:
        """By the map of now."""
        return self.shards.of(key)

    def reroute(self) -> None:
        """The shards that are not home take each other's keys, from the next start on."""
        turned = dict(zip(self.routes, reversed(self.routes.values()), strict=True))
        self.routes, self.shards = turned, ShardMap(turned)

    def judge(self, disk: SimDisk, batch: Batch, tip_before: int) -> None:
        """A batch was stored: log it, and look at what it says about other shards."""
        home = self.disks[HOME]
        now = self.clock.now
        self.log.committed(disk.number, batch, tip_before, home.leases, now)
        if len(self.disks) > 1 and batch.rows:
            assert batch.rows[-1][0] <= home.reserved, "issued after it was reserved"
        for each in self.disks:
            record = batch.records.get(NAMES[each.number])
            ahead = record is not None and each.right is None and record.tip > each.tip
            assert not ahead, f"{record} is ahead of its shard"

    def let_go(self, disk: SimDisk) -> None:
        """What hung goes on."""
        while disk.hung:
            disk.hung.popleft()()
