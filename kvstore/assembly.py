"""Puts the parts of one store together, in the order in which they need one another.

Opening the shards (``opening``) raises their epochs: from then on this process owns them. The
index, then the leases are loaded, what a crash left behind is cleaned up, and the services are
ready to be served. Shards that are missing come back while they are (``Assembly.returning``);
another than home whose database is lost while it is loaded is missing from then on.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from kvstore.backend import Backend, Cluster, IndexRow, RowId
from kvstore.clock import Clock
from kvstore.commit import Commits
from kvstore.compaction import Compactor
from kvstore.config import Config
from kvstore.errors import BackendError, UnreachableError
from kvstore.kv import Header
from kvstore.lease import Lessor
from kvstore.opening import ABSENT, Opened, Returning
from kvstore.reservation import Reservation
from kvstore.rpc.cluster import ClusterService
from kvstore.rpc.health import HealthService
from kvstore.rpc.kv import KvService
from kvstore.rpc.lease import LeaseService
from kvstore.rpc.maintenance import MaintenanceService
from kvstore.rpc.watch import WatchService
from kvstore.shard import HOME, ShardMap
from kvstore.store import Store
from kvstore.transport.api import Method
from kvstore.watch import WatchHub


class LoadStoppedError(Exception):
    """The server is to stop before it has loaded everything."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """One store, loaded, with the handlers of its services."""

    header: Header
    commits: Commits
    reservation: Reservation | None
    """None with one shard."""
    store: Store
    lessor: Lessor
    hub: WatchHub
    compactor: Compactor
    health: HealthService
    methods: list[Method]
    returning: list[Returning]
    """One for each shard that serves nobody yet."""


async def assemble(
    backends: Sequence[Backend],
    opened: Opened,
    shard_map: ShardMap,
    config: Config,
    *,
    name: str,
    client_urls: Sequence[str],
    clock: Clock,
    random: Random,
    stopped: Callable[[], bool],
) -> Assembly:
    """Load the store from shards that ``open_shards`` has taken.

    Raises ``BackendError``, and ``LoadStoppedError`` soon after ``stopped()`` has become true.
    """
    home = opened.fences[HOME]
    loop = asyncio.get_running_loop()
    commits = Commits(
        list(zip(backends, opened.fences, strict=True)),
        clock=clock,
        config=config.commit,
        call_soon=loop.call_soon,
        call_later=loop.call_later,
    )
    _bind(commits, opened)
    reservation = _reserve(commits, opened, clock, config)
    header = Header(cluster_id=home.cluster_id, member_id=home.member_id, raft_term=home.epoch)
    hub = WatchHub(
        header, clock=clock, random=random, config=config.watch, call_soon=loop.call_soon
    )
    lessor = Lessor(clock, random, config.lease)
    store = Store(commits, shard_map, lessor, hub, config.store)
    hub.bind(store)
    lessor.bind(store)
    left = await _load(store, stopped)
    lessor.load(await backends[HOME].load_leases())
    await _delete_orphans(commits, lessor, config.server.commit_tick_interval, stopped)
    compactor = Compactor(store, config.compaction, loop.call_soon, hub.compacted)
    for queue in commits.queues:
        if not queue.missing:
            compactor.recover(queue.number, left.pop(queue.number))
    health = HealthService()
    services = (
        KvService(
            store,
            compactor,
            header,
            request=config.request,
            reads=config.store,
            call_soon=loop.call_soon,
        ),
        WatchService(hub),
        LeaseService(store, lessor, header, config.lease, call_soon=loop.call_soon),
        MaintenanceService(store, header, config.server),
        ClusterService(header, name=name, client_urls=client_urls),
        health,
    )
    methods = [method for service in services for method in service.methods()]
    parts = (header, commits, reservation, store, lessor, hub, compactor, health, methods)
    return Assembly(*parts, _returning(opened, store, lessor, compactor, config, left))


def _returning(
    opened: Opened,
    store: Store,
    lessor: Lessor,
    compactor: Compactor,
    config: Config,
    left: dict[int, list[RowId]],
) -> list[Returning]:
    """The way back of each missing shard; ``left`` are rows that a compaction left behind there, if
    it was loaded.
    """
    home = opened.fences[HOME]
    return [
        Returning(
            queue.number,
            queue.backend,
            opened.redo.get(queue.number, ()),
            cluster=Cluster(home.cluster_id, home.member_id),
            record=opened.records.get(queue.name),
            store=store,
            lessor=lessor,
            compactor=compactor,
            pause_seconds=config.server.commit_tick_interval,
            left=left.get(queue.number, []),
        )
        for queue in store.commits.queues
        if queue.missing
    ]


def _bind(commits: Commits, opened: Opened) -> None:
    """Say what is known of the shards that are missing, and hear what becomes of the others."""
    for queue in commits.queues:
        queue.trouble = opened.missing.get(queue.number, "")
        queue.backend.on_broken = partial(commits.give_up, queue.number)
        queue.backend.on_out = partial(commits.lost, queue.number)
        queue.backend.on_back = partial(commits.found, queue.number)
    owed = Counter(
        revision for rows in opened.redo.values() for revision in dict.fromkeys(r[0] for r in rows)
    )
    for revision, shards in owed.items():
        commits.redo.expect(revision, shards)


def _reserve(commits: Commits, opened: Opened, clock: Clock, config: Config) -> Reservation | None:
    """Take over what home has stored for all shards; with one there is nothing."""
    if len(commits.queues) == 1:
        return None
    return Reservation(
        commits,
        clock,
        reserved=opened.fences[HOME].reserved,
        records=opened.records.values(),
        record_interval=config.commit.record_interval,
    )


async def _load(store: Store, stopped: Callable[[], bool]) -> dict[int, list[RowId]]:
    """Load the index from the shards that are there; returns rows that an interrupted compaction
    left behind, by shard.
    """
    left: dict[int, list[RowId]] = {}
    for queue in store.commits.queues:
        if queue.missing:
            continue
        found = left[queue.number] = list[RowId]()

        def sink(
            rows: list[IndexRow], shard: int = queue.number, found: list[RowId] = found
        ) -> None:
            if stopped():
                raise LoadStoppedError
            found.extend(store.load_rows(shard, rows))

        try:
            await queue.backend.load_index(sink)
        except UnreachableError as error:
            if queue.number == HOME:
                raise
            await queue.backend.close()
            store.commits.part(queue.number)
            queue.meet(queue.backend, ABSENT._replace(shard=queue.name))  # to be taken anew
            queue.trouble = str(error)
    return left


async def _delete_orphans(
    commits: Commits, lessor: Lessor, tick_interval: float, stopped: Callable[[], bool]
) -> None:
    """Delete keys without a lease before anyone sees them: as many as the queues take, until all
    are gone. A shard that hangs meanwhile is missing from now on, until its own are.
    """
    parted = {queue.number for queue in commits.queues if queue.missing}
    while lessor.orphans.delete(parted):
        if stopped():
            raise LoadStoppedError
        for queue in commits.queues:
            if queue.broken:
                raise BackendError(queue.broken)
        await asyncio.sleep(tick_interval)  # noqa: TID251 - commits take real time
        commits.tick()
        for queue in commits.queues[HOME + 1 :]:
            if queue.out and not queue.missing:
                commits.part(queue.number)
                parted.add(queue.number)
