"""The barrier over real commits whose backends answer by hand, and requests that only append a row
to each of their shards.
"""

from kvstore.backend import Row
from kvstore.barrier import Barrier
from kvstore.config import CommitConfig
from kvstore.errors import HeldError, StoreError, UnreadyError
from tests.commit_world import COMMITTED, World


class Requests(World):
    """Four shards, home among them, and the requests that are sent to them."""

    def __init__(self, *, config: CommitConfig | None = None) -> None:
        super().__init__(4, config=config)
        self.barrier = Barrier(self.commits)
        self.executed: list[str] = []
        self.refused: dict[str, tuple[int, str]] = {}

    def send(self, name: str, *shards: int, size: int = 1, changes: int | None = None) -> None:
        """A request over these shards that changes a key of each, or only of the shard given; it
        waits in the barrier if it must.
        """

        def refuse(error: StoreError) -> None:
            assert name not in self.refused, "refused once"
            self.refused[name] = (error.code, error.text)

        def attempt() -> None:
            try:
                if len(shards) == 1:
                    self.commits.check_room(*shards)
                else:
                    self.barrier.check(shards)
            except HeldError:
                self.barrier.run(shards, attempt, refuse, size)
            except UnreadyError as error:
                refuse(error)
            else:
                assert name not in self.executed, "executed once"
                assert name not in self.refused, "executed or refused"
                self.executed.append(name)
                self.change(shards, shards if changes is None else (changes,))

        attempt()

    def change(self, shards: tuple[int, ...], changed: tuple[int, ...]) -> None:
        """The change itself."""
        self.revision += 1
        parts = {shard: [self.row(sub)] for sub, shard in enumerate(changed)}
        if len(shards) == 1:
            self.commits.append(shards[0], parts[shards[0]], 1)
        else:
            self.check_settled(shards)
            self.commits.append_over(self.revision, parts, len(parts))

    def row(self, sub: int) -> Row:
        """A change of the newest revision."""
        return (self.revision, sub, b"k", self.revision, 1, 0, b"")

    def check_settled(self, shards: tuple[int, ...]) -> None:
        """What a request over several shards rests on survives a crash, or it does not either."""
        for shard in shards:
            for pending in self.commits.queues[shard].pending if shard else ():
                assert {row[0] for row in pending.rows} <= set(pending.redone)

    def run(self) -> None:
        """Turns of the loop, and timers that are due at once; no commit returns."""
        while self.turns.waiting or any(not seconds for seconds, _ in self.timers):
            self.turns.run_all()
            due = [step for seconds, step in self.timers if not seconds]
            self.timers = [timer for timer in self.timers if timer[0]]
            for step in due:
                step()

    def commit(self, *shards: int) -> None:
        """One commit of each of these shards returns."""
        for shard in shards:
            self.run()
            self.backends[shard].end(COMMITTED)
        self.run()

    def settle(self, *shards: int) -> None:
        """Commits of these shards return, of all if none is named, until none is under way."""
        chosen = shards or range(4)
        self.run()
        while busy := [shard for shard in chosen if self.backends[shard].asked]:
            self.commit(*busy)

    def held(self) -> list[int]:
        """Shards whose writes are refused with HeldError."""
        return [queue.number for queue in self.commits.queues if queue.held]

    def pass_time(self, seconds: float) -> None:
        """Time goes by, with ticks at its end."""
        super().pass_time(seconds)
        self.barrier.tick()
        self.run()

    def at_rest(self) -> bool:
        """Does nobody wait, and is nothing held?"""
        lines = self.barrier._lines
        waiting = [line for line in lines if line.waiting or line.holders or line.held]
        left = self.barrier._overs or self.barrier._count or self.barrier._size
        return not (waiting or left or self.held())
