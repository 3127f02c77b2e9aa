"""Puts the parts of one store together, in the order in which they need one another.

Opening the shards raises their epochs: from then on this process owns them. The index, then the
leases are loaded, what a crash left behind is cleaned up, and the services are ready to be served.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from kvstore.backend import Backend, Fence, IndexRow, RowId
from kvstore.clock import Clock
from kvstore.commit import Commits
from kvstore.compaction import Compactor
from kvstore.config import Config
from kvstore.errors import BackendError
from kvstore.kv import Header
from kvstore.lease import Lessor
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
    store: Store
    lessor: Lessor
    hub: WatchHub
    compactor: Compactor
    health: HealthService
    methods: list[Method]


async def open_shards(backends: Sequence[Backend]) -> list[Fence]:
    """Take every shard. Raises ``BackendError``; those that were taken by then are let go again."""
    opened: list[Backend] = []
    fences: list[Fence] = []
    try:
        for backend in backends:
            fences.append(await backend.open())
            opened.append(backend)
    except BaseException:
        await close_shards(opened)
        raise
    return fences


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


async def assemble(
    backends: Sequence[Backend],
    fences: Sequence[Fence],
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
    home = fences[HOME]
    loop = asyncio.get_running_loop()
    commits = Commits(
        list(zip(backends, fences, strict=True)),
        clock=clock,
        config=config.commit,
        call_soon=loop.call_soon,
        call_later=loop.call_later,
    )
    header = Header(cluster_id=home.cluster_id, member_id=home.member_id, raft_term=home.epoch)
    hub = WatchHub(
        header, clock=clock, random=random, config=config.watch, call_soon=loop.call_soon
    )
    lessor = Lessor(clock, random, config.lease)
    store = Store(commits, ShardMap(), lessor, hub, config.store)
    store.compact_revision = home.compact_revision
    hub.bind(store)
    lessor.bind(store)
    left = await _load(store, lessor, backends, stopped)
    await _delete_orphans(commits, lessor, config.server.commit_tick_interval, stopped)
    compactor = Compactor(store, config.compaction, loop.call_soon, hub.compacted)
    compactor.recover(left)
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
    return Assembly(header, commits, store, lessor, hub, compactor, health, methods)


async def _load(
    store: Store, lessor: Lessor, backends: Sequence[Backend], stopped: Callable[[], bool]
) -> list[RowId]:
    """Load index and leases; returns rows that an interrupted compaction left behind."""
    left: list[RowId] = []

    def sink(rows: list[IndexRow]) -> None:
        if stopped():
            raise LoadStoppedError
        left.extend(store.load_rows(rows))

    for backend in backends:
        await backend.load_index(sink)
    lessor.load(await backends[HOME].load_leases())
    return left


async def _delete_orphans(
    commits: Commits, lessor: Lessor, tick_interval: float, stopped: Callable[[], bool]
) -> None:
    """Delete keys without a lease before anyone sees them: as many as the queues take, until all
    are gone.
    """
    while lessor.delete_orphans():
        if stopped():
            raise LoadStoppedError
        for queue in commits.queues:
            if queue.broken:
                raise BackendError(queue.broken)
        await asyncio.sleep(tick_interval)  # noqa: TID251 - commits take real time
        commits.tick()
