"""Requests over several shards: what they wait for, and who waits for them.

**Why.** The rows of such a request are committed as one redo record on the home shard; the other
shards apply theirs afterwards (``redo``). A record that is committed is applied whatever happens,
so it must not rest on anything that a crash may still forget: the request executes only when every
shard that it touches is **settled**, with nothing uncommitted but parts of earlier records. Home
need not be: its own changes and the records are committed in the order in which they were appended.

**How.** A busy shard never settles by itself. So it is **held**: its new writes are refused with
HeldError and wait here in its **line** until the hold ends. To hold all shards until the slowest
has settled would make the others as slow, so they take turns:

    M is over A and B, A is quick, B is slow
    A and B are held    A has settled first: it is let go and its line runs; B settles, and is kept
    A is held           A has settled: M executes, the holds end, the lines run

The last to settle is kept, so that each round needs one less, and nobody's writes wait for a shard
that is slower than their own.

**Order.** Requests over the same shards wait together (``_Over``), and execute together when these
have settled, so that a hundred of them need not settle them a hundred times: what they change goes
into records of home, in their order. Where a change needs no record, because it is of one shard
alone and home has nothing pending, those over that shard wait anew. What is kept for some is
**claimed**: others that came later wait and hold nothing. Writes in a line run in the order in
which they came.

**Bounds.** A request over several shards waits for ``barrier_timeout`` at most and is then refused,
with nothing done; at once if one of its shards is out. What was kept for it is let go. A line runs
whenever its shard is let go, and after requests that executed over it, whatever holds it next: so a
write waits for as long as its shard needs to settle, and then for as long as one request over
several may wait. A long line runs in pieces. Numbers and bytes of either are bounded; above, they
are refused early.

A read needs none of this, nor does a Txn whose taken branch changes nothing: they rest on their
tickets. Values that decide are fetched before the wait and never during a hold; a value that
changed meanwhile is in memory, or else fetched after the hold has ended, before another wait.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from kvstore.answers import Then
from kvstore.commit import NOTHING_PENDING, Commits
from kvstore.errors import (
    HeldError,
    StoppedError,
    StoreError,
    TimedOutError,
    TooManyRequestsError,
    UnreadyError,
)
from kvstore.histogram import Histogram, doubling
from kvstore.shard import HOME

LINE_STEP = 64
"""Requests of a line that run before other work has its turn (some ms)."""


class _Request(NamedTuple):
    """A request over several shards that waits."""

    execute: Callable[[], None]
    refuse: Callable[[StoreError], None]
    size: int
    deadline: float


class _Over:
    """The requests over the same shards. ``late`` and ``kept`` are those that they hold: those that
    have not settled since, and those that have.
    """

    __slots__ = ("kept", "late", "shards", "waiting")

    def __init__(self, shards: tuple[int, ...]) -> None:
        self.shards = shards
        self.waiting: deque[_Request] = deque()
        self.late: set[int] = set()
        self.kept: set[int] = set()


class _Line:
    """The writes of one shard that wait until it is no longer held."""

    __slots__ = ("due", "held", "holders", "scheduled", "size", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[tuple[Callable[[], None], int]] = deque()
        self.size = 0
        self.holders = 0
        """Requests over several shards that hold it; those over the same shards count once."""
        self.due = 0
        """So many run now, whatever holds it."""
        self.held = False
        """As ``Commits`` was told."""
        self.scheduled = False


class Barrier:
    """See the module's text. ``tick`` is to be called a few times a second."""

    def __init__(self, commits: Commits) -> None:
        self._commits = commits
        self._config = commits.config
        self._lines = [_Line() for _ in commits.queues]
        self._overs: dict[tuple[int, ...], _Over] = {}
        """By their shards without home, in the order in which the first of them came."""
        self._count = 0
        self._size = 0
        """Requests over several shards that wait, and their bytes."""
        self._asked: set[int] = set()
        """Shards of which ``Commits`` will tell when they have settled."""
        self._failed: dict[int, StoreError] = {}
        self._open: frozenset[int] = frozenset()
        """Shards that had settled when the requests that execute now were chosen: nothing is
        uncommitted there but what those have changed."""
        self._looking = False
        self._changed = False
        self.seconds = Histogram(doubling(0.001, 12))
        """For how long requests over several shards have waited, those included that did not have
        to, or were refused in the end.
        """
        self.refused = 0
        """Requests over several shards."""

    # -- the store ---------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests over several shards that wait for them."""
        return self._count

    def held(self, shard: int) -> int:
        """Requests over this shard alone that wait for those."""
        return len(self._lines[shard].waiting)

    def check_room(self, shards: Iterable[int]) -> None:
        """Raise what ``Commits.check_room`` raises for one of ``shards`` or home, but for holds."""
        for shard in (HOME, *shards):
            with suppress(HeldError):
                self._commits.check_room(shard)

    def check(self, shards: Sequence[int]) -> None:
        """Likewise for holds, too, and HeldError if one is not settled: then a request over
        ``shards`` executes now or not at all.
        """
        for shard in (HOME, *shards):
            self._commits.check_room(shard)
        if not all(map(self._settled, shards)):
            raise HeldError
        if not self._open:
            self.seconds.observe(0.0)

    def _settled(self, shard: int) -> bool:
        queue = self._commits.queues[shard]
        if shard == HOME or queue.frontier == NOTHING_PENDING:
            return True
        return shard in self._open and queue.settled

    # -- requests that were refused with HeldError -------------------------------------------------

    def run(
        self,
        shards: Sequence[int],
        execute: Callable[[], None],
        refuse: Callable[[StoreError], None],
        size: int,
    ) -> None:
        """Call ``execute`` when a request that writes to ``shards`` may be tried again, or
        ``refuse`` with the reason why that will not be. ``size`` is the bytes it holds meanwhile.
        """
        if len(shards) > 1:
            deadline = self._commits.clock.monotonic() + self._config.barrier_timeout
            self._begin(shards, _Request(execute, refuse, size, deadline))
            return
        line, config = self._lines[shards[0]], self._config
        if len(line.waiting) >= config.held_requests_max or line.size >= config.held_bytes_max:
            refuse(TooManyRequestsError())
            return
        line.waiting.append((execute, size))
        line.size += size
        if not line.holders:
            self._go_on_later(shards[0])

    def _begin(self, shards: Sequence[int], request: _Request) -> None:
        config = self._config
        if self._count >= config.barrier_requests_max or self._size >= config.held_bytes_max:
            self._refuse(request, TooManyRequestsError())
            return
        try:
            self.check_room(shards)
        except UnreadyError as error:
            self._refuse(request, error)
            return
        self._count += 1
        self._size += request.size
        held = tuple(shard for shard in shards if shard != HOME)
        over = self._overs.get(held)
        if over is not None:
            over.waiting.append(request)
            return
        over = self._overs[held] = _Over(held)
        over.waiting.append(request)
        self._look()

    def _next_of(self, over: _Over) -> _Request:
        """The next request of ``over``, which waits no longer."""
        request = over.waiting.popleft()
        self._count -= 1
        self._size -= request.size
        began = request.deadline - self._config.barrier_timeout
        self.seconds.observe(self._commits.clock.monotonic() - began)
        return request

    def _refuse(self, request: _Request, error: StoreError) -> None:
        self.refused += 1
        request.refuse(error)

    def tick(self) -> None:
        """Refuse those that have waited too long; others over their shards are then the last."""
        now = self._commits.clock.monotonic()
        overdue: list[_Request] = []
        for over in list(self._overs.values()):
            if now >= over.waiting[0].deadline:
                self._let_go(over, over.kept)
                del self._overs[over.shards]
                while over.waiting and now >= over.waiting[0].deadline:
                    overdue.append(self._next_of(over))
                if over.waiting:
                    self._overs[over.shards] = over
                else:
                    self._let_go(over, over.late)
        for request in overdue:
            self._refuse(request, TimedOutError())
        if overdue:
            self._look()

    def close(self) -> None:
        """Refuse all who wait; all writes are barred."""
        overs, self._overs = self._overs, {}
        for over in overs.values():
            self._let_go(over, over.late | over.kept)
            while over.waiting:
                self._refuse(self._next_of(over), StoppedError())
        self._look()

    # -- turns -------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Hold, let go and execute as things are now, until nothing changes any more."""
        self._changed = True
        if self._looking:
            return  # called from something executed below, which looks again
        self._looking = True
        try:
            while self._changed:
                self._changed = False
                self._refuse_failed()
                self._execute(self._choose())
                for shard, line in enumerate(self._lines):
                    if line.waiting and not line.scheduled and (line.due or not line.holders):
                        self._run_line(shard)
        finally:
            self._looking = False
        for shard in range(len(self._lines)):
            self._tell(shard)

    def _choose(self) -> list[_Over]:
        """Those that can execute now, in order; the others hold what they have to."""
        ready: list[_Over] = []
        claimed: set[int] = set()
        for over in self._overs.values():
            if not claimed.isdisjoint(over.shards):
                self._let_go(over, over.late | over.kept)
                continue
            self._take_turn(over)
            if over.late:
                claimed |= over.kept
            else:
                ready.append(over)
        return ready

    def _take_turn(self, over: _Over) -> None:
        """A round of ``over``, which ends with ``late`` empty if it can execute."""
        settled = {shard for shard in over.late if self._settled(shard)}
        if settled != over.late:
            self._let_go(over, settled)
        else:
            over.kept |= over.late
            over.late = {shard for shard in over.shards if not self._settled(shard)}
            for shard in over.late - over.kept:
                self._lines[shard].holders += 1
            over.kept -= over.late  # others have executed over them
        for shard in over.late - self._asked:
            self._asked.add(shard)
            self._commits.release((shard,), Then(partial(self._told, shard)), b"")

    def _let_go(self, over: _Over, shards: set[int]) -> None:
        over.late = over.late - shards
        over.kept = over.kept - shards
        for shard in shards:
            self._lines[shard].holders -= 1

    def _told(self, shard: int, error: StoreError | None) -> None:
        """A shard has settled, or it will not."""
        self._asked.discard(shard)
        if error is not None:
            self._failed[shard] = error
        self._look()

    def _refuse_failed(self) -> None:
        failed, self._failed = self._failed, {}
        for shard, error in failed.items():
            for over in [over for over in self._overs.values() if shard in over.late]:
                self._let_go(over, over.late | over.kept)
                del self._overs[over.shards]
                while over.waiting:
                    self._refuse(self._next_of(over), error)

    def _execute(self, ready: list[_Over]) -> None:
        """Let requests execute whose shards have settled."""
        if not ready:
            return
        shards = frozenset(shard for over in ready for shard in over.shards)
        for shard in shards:
            self._open_line(shard)
        self._open = shards
        try:
            for over in ready:
                self._let_go(over, over.kept)
                while over.waiting and all(map(self._settled, over.shards)):
                    self._next_of(over).execute()
                if not over.waiting:
                    del self._overs[over.shards]
        finally:
            self._open = frozenset()
        for shard in shards:
            self._lines[shard].due = len(self._lines[shard].waiting)
        self._changed = True

    # -- lines -------------------------------------------------------------------------------------

    def _run_line(self, shard: int) -> None:
        """Run the first of those who wait for ``shard``, and the next ones soon."""
        line = self._lines[shard]
        if not line.holders:
            line.due = len(line.waiting)
        self._open_line(shard)
        for _ in range(min(LINE_STEP, line.due)):
            execute, size = line.waiting.popleft()
            line.size -= size
            line.due -= 1
            execute()
        if line.waiting and (line.due or not line.holders):
            self._go_on_later(shard)

    def _go_on_later(self, shard: int) -> None:
        line = self._lines[shard]
        if not line.scheduled:
            line.scheduled = True
            self._commits.call_later(0.0, partial(self._go_on, shard))

    def _go_on(self, shard: int) -> None:
        self._lines[shard].scheduled = False
        self._look()

    def _open_line(self, shard: int) -> None:
        """Lift the hold for what is called next."""
        line = self._lines[shard]
        if line.held:
            line.held = False
            self._commits.unhold((shard,))

    def _tell(self, shard: int) -> None:
        """Hold ``shard`` while somebody holds it, or waits for it."""
        line = self._lines[shard]
        held = bool(line.holders or line.waiting)
        if held and not line.held:
            line.held = True
            self._commits.hold((shard,))
        elif not held:
            self._open_line(shard)
