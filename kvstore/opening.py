"""Taking the shards at a start, and taking back those that come later.

**Start.** Every shard that can be reached is opened, which raises its epoch: an older server can
commit nothing there any more. Home comes first; its cluster is everybody's. A shard that cannot be
reached is **missing**: the others are served without it. One that is there and is not what home
remembers is refused, and then nothing is served: it is another store's, or has lost what was
acknowledged, and whoever looks for the right one should not have to look for a server that runs
without it. So is home, when a shard has what was issued after all that home knows of: it is an
older copy of itself.

**Redo records** above a shard's tip are applied to it (see ``redo``), and dropped once all that
they name are there.

**One start rule.** The order goes on at *base*, the highest reserved revision or tip in any fence
row that was read. No later revision was ever shown: with several shards none is committed that home
has not reserved before (``reservation``), on a shard that is missing either. One statement on home
stores base as its tip and the next reservation before anything is issued. With one shard base is
its tip, and nothing is stored.

    home      tip 7   reserved 2^30 + 2            base = 2^30 + 2: the first write is 2^30 + 3
    events    tip 9
    agents    missing, at 12                       12 is not issued again

**Return.** A missing shard is asked for again and again. When it is there it goes the same way, its
rows are loaded while the others are served, keys whose lease has gone meanwhile are deleted, and
then it joins. A load that breaks off goes on where it stopped: nobody else writes there. One that
was loaded at the start, and hung before such keys of it were deleted, is only waited for.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.backend import (
    Backend,
    Batch,
    Cluster,
    CommitResult,
    Fence,
    HomeRows,
    IndexRow,
    Outcome,
    Row,
    RowId,
    ShardRecord,
)
from kvstore.compaction import Compactor
from kvstore.errors import BackendError, UnreachableError
from kvstore.lease import Lessor
from kvstore.map_check import TIP_OF_NEW, hidden
from kvstore.reservation import AHEAD
from kvstore.shard import HOME
from kvstore.shard_config import DEFAULT_SHARD, ShardConfig, read_document
from kvstore.store import Store

LOSS_BUMP = 1 << 40
"""Revisions skipped, and compacted, when a loss of data is accepted: whoever has seen any of what
is lost is told that it is compacted. Nobody knows how many were lost; this is more than any server
writes, and than a thousand starts reserve. Millions of such losses fit into the numbers there are.
"""

ABSENT = Fence(cluster_id=0, member_id=0, shard="", epoch=0, tip=0, compact_revision=-1)
"""The fence of a missing shard, but for its name."""


@dataclass(slots=True)
class Opened:
    """What ``open_shards`` has found."""

    fences: list[Fence]
    """By shard number; ``ABSENT`` with its name where a shard is missing."""
    missing: dict[int, str]
    """Why, by number."""
    records: dict[str, ShardRecord]
    """What home has stored of the others, by name."""
    redo: dict[int, list[Row]] = field(default_factory=dict)
    """Rows of redo records of missing shards, by number, in order."""
    losses: list[str] = field(default_factory=list)
    """What was found lost, and accepted; each would have been refused otherwise."""


async def open_shards(
    backends: Sequence[Backend], shards: ShardConfig, *, accept_loss: bool = False
) -> Opened:
    """Take every shard that can be reached; ``backends`` are by number, home first.

    ``accept_loss``: take shards that have lost data as they are; every revision before is compacted
    then. Raises ``BackendError`` when the store cannot be served: home cannot be reached, or a
    shard or the map of the shards is refused. Those that were taken by then are let go again.
    """
    taken: list[Backend] = []
    try:
        return await _Opening(backends, shards, taken, accept_loss=accept_loss).run()
    except BaseException:
        await close_shards(taken)
        raise


async def close_shards(backends: Sequence[Backend]) -> None:
    """Let every shard go, the home shard last. Raises the first ``BackendError`` after all."""
    failures: list[Exception] = []
    for backend in reversed(backends):
        try:
            await backend.close()
        except Exception as error:  # noqa: BLE001 - the others must be closed as well
            failures.append(error)
    if failures:
        raise failures[0]


class _Opening:
    """One start. ``taken`` are the backends that are open, home first."""

    def __init__(
        self,
        backends: Sequence[Backend],
        shards: ShardConfig,
        taken: list[Backend],
        *,
        accept_loss: bool,
    ) -> None:
        self._backends = backends
        self._shards = shards
        self._names = shards.names
        self._taken = taken
        self._accept_loss = accept_loss
        self._missing: dict[int, str] = {}
        self._losses: list[str] = []

    async def run(self) -> Opened:
        """In the order of the module's text."""
        home = self._backends[HOME]
        fence = await home.open()
        self._taken.append(home)
        stored = await home.load_home()
        records = {record.shard: record for record in stored.records}
        named = read_document(stored.shard_map, home=self._names[HOME]).names
        cluster = Cluster(fence.cluster_id, fence.member_id)
        fences = [fence, *await self._open_others(cluster, () if self._accept_loss else named)]
        await self._check(fences, stored, records, named)
        redo = self._redo_by_shard(stored)
        for number, rows in redo.items():
            await self._apply(number, fences, rows)
        document = self._shards.document()
        missing = self._missing
        await hidden(
            stored.shard_map,
            self._shards.shard_map(),
            document=document,
            names=self._names,
            backends=[None if n in missing else b for n, b in enumerate(self._backends)],
            home_tip=fence.tip,
            compact_revision=fence.compact_revision,
        )
        left = {number: rows for number, rows in redo.items() if number in missing}
        owed = {row[0] for rows in left.values() for row in rows}
        drops = {row[0] for _, row in stored.redo} - owed
        fences[HOME] = await self._begin(fences, stored, records, sorted(drops), document)
        return Opened(fences, missing, records, left, self._losses)

    async def _check(
        self,
        fences: list[Fence],
        stored: HomeRows,
        records: Mapping[str, ShardRecord],
        named: Collection[str],
    ) -> None:
        """Raise ``BackendError`` unless every shard that is there is the one that home knows, and
        home itself has all that it knew.

        A new database of a shard that is not ``named`` in the stored map has nothing to lose,
        though there may be a record of one that had its name.
        """
        home = fences[HOME]
        known = max(home.reserved, home.tip)
        for number, backend in enumerate(self._backends):
            name, found = self._names[number], fences[number]
            if not found.epoch:
                continue
            fresh = found.tip <= TIP_OF_NEW and name not in named
            check_name(name, found)
            self._lose("" if fresh else find_loss(name, found, records.get(name)))
            if number == HOME:
                continue
            try:
                await check_not_home(name, backend)
            except UnreachableError as error:
                await self._part(number, fences, error)
                continue
            if stored.shard_map and found.tip > known:
                self._lose(
                    f"shard {self._names[HOME]} has lost data: shard {name} is at revision"
                    f" {found.tip}, and {self._names[HOME]} knows of none after {known}"
                )

    def _lose(self, loss: str) -> None:
        """Refuse to start with this loss, if it is one, or note that it was accepted."""
        if loss and not self._accept_loss:
            raise BackendError(loss)
        if loss:
            self._losses.append(loss)

    async def _open_others(self, cluster: Cluster, known: Collection[str]) -> list[Fence]:
        """All at the same time: each that cannot be reached takes a while to be sure of. Those that
        are ``known`` are not made.
        """
        async with asyncio.TaskGroup() as group:
            opening = [
                group.create_task(self._open(number, cluster, known=self._names[number] in known))
                for number in range(1, len(self._backends))
            ]
        found = [task.result() for task in opening]
        for number, outcome in enumerate(found, start=1):
            if isinstance(outcome, UnreachableError):
                self._missing[number] = str(outcome)
            elif isinstance(outcome, BackendError):
                raise outcome
        absent = (ABSENT._replace(shard=name) for name in self._names[1:])
        return [f if isinstance(f, Fence) else a for f, a in zip(found, absent, strict=True)]

    async def _open(self, number: int, cluster: Cluster, *, known: bool) -> Fence | BackendError:
        backend = self._backends[number]
        try:
            fence = await backend.open(cluster, known=known)
        except BackendError as error:
            return error
        self._taken.append(backend)
        return fence

    def _redo_by_shard(self, stored: HomeRows) -> dict[int, list[Row]]:
        numbers = {name: number for number, name in enumerate(self._names)}
        redo: dict[int, list[Row]] = {}
        for name, row in stored.redo:
            if name not in numbers:
                home = self._names[HOME]
                raise BackendError(
                    f"shard {home} holds changes for shard {name}, which the configuration leaves"
                    " out: start once more with it"
                )
            redo.setdefault(numbers[name], []).append(row)
        return redo

    async def _apply(self, number: int, fences: list[Fence], rows: Sequence[Row]) -> None:
        """Bring a shard up to home's redo records; one that does not take them is missing."""
        if number in self._missing:
            return
        backend = self._backends[number]
        try:
            fences[number] = await apply_redo(backend, fences[number], rows)
        except UnreachableError as error:
            await self._part(number, fences, error)

    async def _part(self, number: int, fences: list[Fence], error: UnreachableError) -> None:
        """One that was there is out of reach: it is missing, too."""
        backend = self._backends[number]
        self._missing[number] = str(error)
        fences[number] = ABSENT._replace(shard=self._names[number])
        self._taken.remove(backend)
        await backend.close()

    async def _begin(
        self,
        fences: Sequence[Fence],
        stored: HomeRows,
        records: dict[str, ShardRecord],
        redo_drops: list[int],
        document: str,
    ) -> Fence:
        """Store where the order goes on from; updates ``records``. Returns home's fence."""
        home = fences[HOME]
        several = len(fences) > 1
        base = max(home.reserved, *(fence.tip for fence in fences))
        compacted = None
        if self._accept_loss:
            base += LOSS_BUMP
            compacted = base
        records |= {
            fence.shard: ShardRecord(fence.shard, fence.tip, fence.origin)
            for fence in fences[1:]
            if fence.epoch
        }
        known = several or stored.shard_map or self._names[HOME] != DEFAULT_SHARD
        changed_map = bool(known) and stored.shard_map != document
        if not several and base == home.tip and not changed_map:
            return home
        reserved = base + AHEAD if several else base
        batch = Batch(
            epoch=home.epoch,
            tip_before=home.tip,
            tip=base,
            compact_revision=compacted,
            reserved=reserved,
            records=dict(records),
            redo_drops=redo_drops,
            shard_map=document if changed_map else None,
        )
        await commit_now(self._backends[HOME], self._names[HOME], batch)
        return home._replace(
            tip=base,
            reserved=reserved,
            compact_revision=home.compact_revision if compacted is None else compacted,
        )


def check_name(name: str, fence: Fence) -> None:
    """Raise ``BackendError`` unless the database with ``fence`` is that of shard ``name``."""
    if fence.shard != name:
        raise BackendError(f"the database of shard {name} is that of shard {fence.shard}")


def find_loss(name: str, fence: Fence, record: ShardRecord | None) -> str:
    """What the database of shard ``name`` lacks of what it had when ``record`` was made; empty if
    it has all of that.
    """
    if record is None:
        return ""
    if system_of(fence.origin) != system_of(record.origin):
        return (
            f"the database of shard {name} is another one than it was:"
            f" {fence.origin or 'unnamed'} instead of {record.origin or 'unnamed'}"
        )
    if fence.tip < record.tip:
        return f"shard {name} has lost data: it is at revision {fence.tip} and was at {record.tip}"
    return ""


def system_of(origin: str) -> str:
    """The part of a ``Fence.origin`` that no failover changes: after one, the backend itself has
    seen that nothing is missing, and home may not have heard of it.
    """
    return origin.partition("/")[0]


async def check_not_home(name: str, backend: Backend) -> None:
    """Raise ``BackendError`` if a shard that is not the first has been one: it has revisions of an
    order of its own.
    """
    if (await backend.load_home()).shard_map:
        raise BackendError(
            f"shard {name} is the home of another store: the shard that was the first of a store"
            " stays its first"
        )


async def apply_redo(backend: Backend, fence: Fence, rows: Sequence[Row]) -> Fence:
    """Store those of ``rows`` that the shard of ``fence`` lacks; its fence then.

    Raises as ``commit_now``.
    """
    lacking = [row for row in rows if row[0] > fence.tip]
    if not lacking:
        return fence
    tip = lacking[-1][0]
    batch = Batch(epoch=fence.epoch, tip_before=fence.tip, tip=tip, rows=lacking)
    await commit_now(backend, fence.shard, batch)
    return fence._replace(tip=tip)


async def commit_now(backend: Backend, name: str, batch: Batch) -> None:
    """Commit ``batch`` on a shard that has no queue yet.

    Raises ``UnreachableError`` when it is not stored, or that is not known: to open the shard again
    tells. ``BackendError`` when the shard is lost.
    """
    done: asyncio.Future[CommitResult] = asyncio.get_running_loop().create_future()

    def returned(result: CommitResult) -> None:
        if not done.done():
            done.set_result(result)

    backend.commit(batch, returned)
    result = await done
    if result.outcome is Outcome.COMMITTED:
        return
    told = f"shard {name} does not commit: {result.outcome.value}: {result.reason}"
    if result.outcome in {Outcome.UNKNOWN, Outcome.NOT_COMMITTED}:
        raise UnreachableError(told)
    raise BackendError(told)


class Returning:
    """The way back of one missing shard; ``attempt`` until it has joined."""

    def __init__(
        self,
        number: int,
        backend: Backend,
        redo: Sequence[Row],
        *,
        cluster: Cluster,
        record: ShardRecord | None,
        store: Store,
        lessor: Lessor,
        compactor: Compactor,
        pause_seconds: float,
        left: list[RowId],
    ) -> None:
        self._number = number
        self._backend = backend
        self._redo = redo
        self._cluster = cluster
        self._record = record
        self._store = store
        self._commits = store.commits
        self._queue = store.commits.queues[number]
        self._lessor = lessor
        self._compactor = compactor
        self._pause_seconds = pause_seconds
        self._left = left
        """Rows that a compaction had left behind, of what is loaded."""

    @property
    def name(self) -> str:
        """The shard's name."""
        return self._queue.name

    @property
    def trouble(self) -> str:
        """Why the last attempt failed, or the start."""
        return self._queue.trouble

    @property
    def over(self) -> bool:
        """Has it joined, or was it lost for good on the way?"""
        return not self._queue.missing or bool(self._queue.broken)

    async def attempt(self) -> None:
        """Open it, load it, let it join.

        Raises ``UnreachableError`` if it is not there yet, ``BackendError`` if it is refused.
        """
        try:
            await self._attempt()
        except BackendError as error:
            if not self._queue.broken:
                self._queue.trouble = str(error)
            raise

    async def _attempt(self) -> None:
        if not self._queue.epoch:
            await self._take_shard()
        await self._delete_orphans()
        self._commits.join(self._number)
        self._compactor.recover(self._number, self._left)

    async def _take_shard(self) -> None:
        backend = self._backend
        fence = await backend.open(self._cluster, known=True)
        try:
            self._check(fence)
            await check_not_home(self._queue.name, backend)
            fence = await apply_redo(backend, fence, self._redo)
            self._record = ShardRecord(self._queue.name, fence.tip, fence.origin)
            await backend.load_index(self._take)
        except BaseException:
            await backend.close()
            raise
        self._commits.prepare(self._number, backend, fence)
        self._commits.redo.done(dict.fromkeys(row[0] for row in self._redo))

    def _check(self, fence: Fence) -> None:
        name = self._queue.name
        check_name(name, fence)
        loss = find_loss(name, fence, self._record)
        if loss:
            raise BackendError(loss)
        if fence.tip > self._commits.durable:
            raise BackendError(
                f"shard {name} is at revision {fence.tip}, and the order is at"
                f" {self._commits.durable}: the home shard has lost data"
            )

    def _take(self, rows: list[IndexRow]) -> None:
        """Load a chunk; what was loaded before is not loaded again."""
        self._left += self._store.load_rows(self._number, rows)

    async def _delete_orphans(self) -> None:
        """Delete keys whose lease is gone before anyone sees them, as many as the queue takes,
        until all are. From here on the queue deals with the troubles of the database.
        """
        orphans, queue = self._lessor.orphans, self._queue
        while queue.barred or orphans.delete_of(self._number) or queue.pending:
            if self._queue.broken:
                raise BackendError(self._queue.broken)
            await asyncio.sleep(self._pause_seconds)  # noqa: TID251 - commits take real time
