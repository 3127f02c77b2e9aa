"""A backend of the simulation: one process's hold on a database (``sim_world``).

A world has one of two ways to keep a second server out, as SQLite and PostgreSQL do:

- ``locks``: a database that somebody holds cannot be opened;
- a **lease** on home's fence row: its leader renews it every second, ``open`` watches it for
  LEASE_SECONDS and gives up if it is being renewed.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeVar

from kvstore.backend import (
    Batch,
    Cluster,
    CommitResult,
    Fence,
    HomeRows,
    IndexRow,
    LeaseRow,
    Outcome,
    Row,
    RowId,
    Sizes,
)
from kvstore.errors import BackendError, UnreachableError
from tests.sim_loop import Loop
from tests.sim_world import SimDisk

ResultT = TypeVar("ResultT")

LEASE_SECONDS = 5.0
RENEW_SECONDS = 1.0
FATES = ("refused", "refused", "lost", "lost", "late", "late", "hang", "hang", "broken")


class SimBackend:
    """``kvstore.backend.Backend``: one process's hold on a ``SimDisk``."""

    def __init__(self, disk: SimDisk, loop: Loop) -> None:
        self.on_broken: Callable[[str], None] = _nobody_listens
        self.on_out: Callable[[str], None] = _nobody_listens
        self.on_back: Callable[[], None] = _nobody_hears
        self.disk = disk
        self.committing = False
        self._world = disk.world
        self._loop = loop
        self._epoch = 0
        self._epoch_opened = 0
        self._renewed = -math.inf
        self._leads = False
        self._noticed = False
        self._outages = 0
        self._life = 0
        """Grows when it is closed: answers to what was asked before reach nobody."""
        self._held = False
        self._incarnation = -1

    # -- taking it ---------------------------------------------------------------------------------

    async def open(self, cluster: Cluster | None = None, *, known: bool = False) -> Fence:
        """See ``Backend.open``."""
        disk, watched = self.disk, -1
        if cluster is None and not self._world.locks:
            watched = await self._watch_leader()
        began = self._loop.time()

        def take() -> Fence:
            if self._world.locks and disk.owner is not None:
                raise BackendError(f"shard {disk.shard} is in use")
            renewed = disk.led and disk.renewals != watched
            if cluster is None and renewed and not self._world.locks:
                raise BackendError("another server leads")
            if known and disk.epoch == 0:
                raise UnreachableError(f"shard {disk.shard} is not there")
            if cluster is not None and disk.epoch == 0:
                disk.cluster_id, disk.member_id = cluster
            if cluster is not None and disk.cluster_id != cluster.cluster_id:
                raise BackendError(f"shard {disk.shard} belongs to another cluster")
            return self._take(leads=cluster is None)

        fence = await self._do(take)
        if cluster is None and not self._world.locks:
            self._renewed = began
            self._loop.call_later(RENEW_SECONDS, self._renew)
        return fence

    def _take(self, *, leads: bool) -> Fence:
        disk = self.disk
        self._held = True
        self._incarnation = disk.incarnation
        self._noticed = False
        disk.owner = self
        disk.users.append(self)
        disk.epoch += 1
        self._epoch = self._epoch_opened = disk.epoch
        if leads:
            self._leads = disk.led = True
            disk.renewals += 1
        return Fence(
            cluster_id=disk.cluster_id,
            member_id=disk.member_id,
            shard=disk.shard,
            epoch=disk.epoch,
            tip=disk.tip,
            compact_revision=disk.compact_revision,
            reserved=disk.reserved,
            origin=disk.origin,
        )

    async def _watch_leader(self) -> int:
        """Look at the lease for as long as it may last; the renewals seen at the beginning."""
        disk = self.disk
        led, renewals = await self._do(lambda: (disk.led, disk.renewals))
        if led:
            await asyncio.sleep(LEASE_SECONDS)
        return renewals

    def _renew(self) -> None:
        """Renew the lease on home, and again in a second."""
        if not self._held:
            return
        began = self._loop.time()

        def renew() -> bool:
            ours = self.disk.epoch == self._epoch
            self.disk.renewals += ours
            return ours

        def told(ours: bool | None) -> None:  # noqa: FBT001 - an answer
            if ours:
                self._renewed = began
            elif ours is not None:
                self.on_broken("fenced: another server leads")

        self._ask(renew, told, lambda: None)
        self._loop.call_later(RENEW_SECONDS, self._renew)

    @property
    def origin(self) -> str:
        """See ``Backend.origin``."""
        return self.disk.origin

    def lease_until(self) -> float:
        """See ``Backend.lease_until``."""
        return math.inf if self._world.locks else self._renewed + LEASE_SECONDS

    async def close(self) -> None:
        """Let go; a leader gives its lease back."""
        if self._held and self.disk.epoch == self._epoch and self._leads:
            self.disk.led = False
        self.crash()

    def crash(self) -> None:
        """Die without a word."""
        self._held = self.committing = False
        self._life += 1
        if self.disk.owner is self:
            self.disk.owner = None
        if self in self.disk.users:
            self.disk.users.remove(self)

    # -- loading -----------------------------------------------------------------------------------

    async def load_index(self, sink: Callable[[list[IndexRow]], None]) -> None:
        """Every row without its value, a few at a time."""
        rows = await self._do(lambda: [row[:6] for row in self.disk.rows.values()])
        chunk = self._world.random.choice([3, 1000])
        for start in range(0, len(rows), chunk):
            sink(rows[start : start + chunk])
            await self._do(lambda: None)

    async def load_leases(self) -> list[LeaseRow]:
        """Every stored lease."""
        return await self._do(lambda: list(self.disk.leases.values()))

    async def load_home(self) -> HomeRows:
        """What home keeps for all shards."""
        disk = self.disk
        return await self._do(
            lambda: HomeRows(disk.shard_map, list(disk.records.values()), list(disk.redo))
        )

    # -- writing -----------------------------------------------------------------------------------

    def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Commit ``batch``, or not."""
        disk, epoch = self.disk, self._epoch
        assert batch.epoch == self._epoch_opened, "a batch carries the epoch that open returned"
        assert not self.committing, "one at a time"
        self.committing = True

        def store() -> CommitResult:
            return disk.store(batch, epoch)

        def lost() -> CommitResult:
            if self._world.random.random() < 0.3:
                store()
            return CommitResult(Outcome.UNKNOWN, "the connection was lost")

        def ended(result: CommitResult) -> None:
            self.committing = False
            done(result)

        match disk.fate(*FATES):
            case "refused":
                self._ask(lambda: CommitResult(Outcome.NOT_COMMITTED, "disk full"), ended, lost)
            case "lost":
                self._ask(lambda: CommitResult(Outcome.UNKNOWN, "no answer"), ended, lost)
            case "late":
                # On its way although nobody listens any more, perhaps beyond the process's end.
                disk.steps(lambda: _ignore(store()) if self._connected() else None)
                self._tell(lambda: ended(CommitResult(Outcome.UNKNOWN, "no answer")))
            case "hang":
                disk.hung.append(lambda: self._ask(store, ended, lost))
            case "broken":
                if self._world.random.random() < 0.5:
                    disk.steps(lambda: _ignore(store()) if self._connected() else None)
                self._tell(lambda: ended(CommitResult(Outcome.BROKEN, "I/O error")))
            case _:
                self._ask(store, ended, lost)

    def resolve(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Say what became of ``batch``, or not yet."""
        disk = self.disk
        assert not self.committing, "one at a time"
        self.committing = True
        self._incarnation = disk.incarnation  # on a new connection

        def look() -> CommitResult:
            if disk.right is not None:
                return CommitResult(Outcome.BROKEN, "another database")
            if disk.epoch != self._epoch or disk.tip not in (batch.tip_before, batch.tip):
                return CommitResult(Outcome.FENCED, f"epoch {disk.epoch}, tip {disk.tip}")
            disk.epoch += 1
            self._epoch = disk.epoch
            stored = disk.holds(batch)
            return CommitResult(Outcome.COMMITTED if stored else Outcome.NOT_COMMITTED)

        def unknown() -> CommitResult:
            return CommitResult(Outcome.UNKNOWN, "still no answer")

        def ended(result: CommitResult) -> None:
            self.committing = False
            done(result)

        match disk.fate("lost", "hang"):
            case "lost":
                self._ask(unknown, ended, unknown)
            case "hang":
                disk.hung.append(lambda: self._ask(look, ended, unknown))
            case _:
                self._ask(look, ended, unknown)

    # -- reading -----------------------------------------------------------------------------------

    def read_values(
        self, ids: Sequence[RowId], done: Callable[[list[bytes | None] | BackendError], None]
    ) -> None:
        """The values, perhaps much later, or an error."""
        disk, wanted = self.disk, list(ids)

        def read() -> list[bytes | None] | BackendError:
            rows = disk.rows
            return [rows[id_][6] if id_ in rows else None for id_ in wanted]

        def lost() -> list[bytes | None] | BackendError:
            return UnreachableError(f"shard {disk.shard} cannot be reached")

        if disk.late_reads is not None:
            disk.late_reads.append(lambda: self._ask(read, done, lost))
            return
        match disk.fate("broken", "hang", "hang", "hang"):
            case "broken":
                self._ask(lambda: BackendError("cannot read"), done, lost)
            case "hang":
                disk.hung.append(lambda: self._ask(read, done, lost))
            case _:
                self._ask(read, done, lost)

    def read_rows(
        self, after: RowId, rows_max: int, done: Callable[[list[Row] | BackendError], None]
    ) -> None:
        """Rows greater than ``after``, at most ``rows_max``."""
        rows = self.disk.rows

        def read() -> list[Row] | BackendError:
            return [rows[id_] for id_ in islice((id_ for id_ in rows if id_ > after), rows_max)]

        self._ask(read, done, lambda: UnreachableError("no answer"))

    def sizes(self) -> Sizes:
        """Bytes of the rows."""
        return Sizes(self.disk.used_bytes + self.disk.freed_bytes, self.disk.used_bytes)

    def defragment(self, done: Callable[[BackendError | None], None]) -> None:
        """Nothing is to be given back."""
        self._tell(lambda: done(None))

    # -- being there -------------------------------------------------------------------------------

    def notice(self) -> None:
        """The connection has broken."""
        if not self._noticed:
            self._noticed = True
            self._outages += 1
            self._tell(lambda: self.on_out("connection refused"))

    def come_back(self) -> None:
        """The database can be reached again: say so if the shard is still ours."""
        if not self._noticed:
            return

        outage = self._outages

        def told(ours: bool | None) -> None:  # noqa: FBT001 - an answer
            if ours is None or not self._noticed or outage != self._outages:
                return
            self._noticed = False
            if ours:
                self.on_back()
            else:
                self.on_broken("fenced: another server leads")

        self._incarnation = self.disk.incarnation
        ours = self.disk.right is None
        self._ask(lambda: ours and self.disk.epoch == self._epoch, told, lambda: None)

    # -- steps -------------------------------------------------------------------------------------

    def _ask(
        self,
        work: Callable[[], ResultT],
        told: Callable[[ResultT], None],
        lost: Callable[[], ResultT],
    ) -> None:
        """Have the database do ``work``, then this process hear of it; ``lost`` when it is down."""
        life = self._life

        def step() -> None:
            result = work() if self._connected() else lost()
            if life == self._life:
                self._tell(lambda: told(result))

        self.disk.steps(step)

    def _tell(self, step: Callable[[], None]) -> None:
        life = self._life
        self._loop.call_soon(lambda: step() if life == self._life else None)

    def _connected(self) -> bool:
        current = not self._held or self._incarnation == self.disk.incarnation
        return current and not self.disk.down

    async def _do(self, work: Callable[[], ResultT]) -> ResultT:
        """Have the database do ``work``; what it says or raises."""
        future, life = self._loop.create_future(), self._life

        def step() -> None:
            if future.done() or life != self._life:
                return
            try:
                if not self._connected():
                    raise UnreachableError(f"shard {self.disk.shard} cannot be reached")
                future.set_result(work())
            except BackendError as error:
                future.set_exception(error)

        self.disk.steps(step)
        result: ResultT = await future
        return result


def _ignore(result: CommitResult) -> None:
    """Nobody hears of it."""


def _nobody_listens(reason: str) -> None:
    """Set by the server."""


def _nobody_hears() -> None:
    """Likewise."""
