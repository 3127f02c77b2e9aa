"""Simulated apiservers: shared leases, caches, drops."""

from random import Random

from bench.client import requests
from bench.drive.apiserver import LEASE_OBJECTS_MAX
from bench.plan import Disturbance, Step, Trouble, Verb, Watcher
from bench.records import OPS, WATCHES, Outcome
from kvstore.pb import rpc_pb2 as pb
from tests.bench.drive.world import EVENTS, PODS, living
from tests.transport.running import eventually

EVENT = Step(Verb.CREATE, EVENTS + b"e", "event", shape="event", size=200, lease_ttl=100)


async def test_objects_share_a_lease() -> None:
    """Objects of one TTL get one lease, of another TTL another; each is asked for once."""
    async with living(EVENTS) as world:
        for n in range(3):
            world.act(EVENT._replace(key=EVENTS + b"%d" % n), number=n)
        world.act(EVENT._replace(key=EVENTS + b"3", lease_ttl=50), number=3)
        await eventually(lambda: len(world.rows(OPS, verb=Verb.CREATE)) == 4)
        one, two = world.rows(OPS, verb=Verb.GRANT)
        assert (100, 50, -1) == (one["ttl"], two["ttl"], one["actor"])
        leases = {int(row["key"][-1:]): row["lease"] for row in world.rows(OPS, verb=Verb.CREATE)}  # type: ignore[index]
        assert {0: one["lease"], 1: one["lease"], 2: one["lease"], 3: two["lease"]} == leases


async def test_a_lease_is_shared_for_a_while() -> None:
    """After a twentieth of its TTL, or a thousand objects, there is a new one."""
    got: list[int] = []
    async with living() as world:
        world.apiserver.lease(100, got.append)
        await eventually(lambda: len(got) == 1)
        shared = world.apiserver._leases[100]
        shared.objects = LEASE_OBJECTS_MAX - 1
        world.apiserver.lease(100, got.append)
        assert got[0] == got[1]
        world.apiserver.lease(100, got.append)
        await eventually(lambda: len(got) == 3)
        assert got[2] != got[0]
        world.apiserver._leases[100].until_us -= 5_000_001
        world.apiserver.lease(100, got.append)
        await eventually(lambda: len(got) == 4)
        assert got[3] != got[2]


async def test_a_lease_that_cannot_be_had() -> None:
    """Everybody who waits for a lease that is refused is told; the next one asks anew."""
    got: list[int] = []
    async with living() as world:
        world.store.refusals[requests.GRANT].append((14, "no leader"))
        world.apiserver.lease(100, got.append)
        world.apiserver.lease(100, got.append)
        await eventually(lambda: len(got) == 2)
        assert [0, 0] == got
        world.apiserver.lease(100, got.append)
        await eventually(lambda: len(got) == 3)
        assert got[2] > 0
        assert [Outcome.UNKNOWN, Outcome.OK] == world.column(OPS, "outcome", verb=Verb.GRANT)


async def test_a_lease_without_a_connection() -> None:
    """While the server is away a step that needs a lease fails as others do, and is over."""
    async with living(EVENTS) as world:
        for line in world.lines():
            line.give_up()
        await eventually(lambda: all(line.connection is None for line in world.lines()))
        await world.done(EVENT)
        assert [b"no lease"] == world.column(OPS, "message", verb=Verb.CREATE)


async def test_a_late_refusal_of_an_old_lease() -> None:
    """A refusal of a lease that another has replaced takes nothing from that one."""
    got: list[int] = []
    async with living() as world:
        world.store.silent.add(requests.GRANT)
        world.apiserver.lease(100, got.append)
        world.apiserver._leases[100].until_us = 0
        await eventually(lambda: len(world.store.asked) == 1)
        world.store.silent.clear()
        world.apiserver.lease(100, got.append)
        await eventually(lambda: len(got) == 1)
        connection = world.apiserver.line(b"").connection
        assert connection is not None
        connection.expire(1 << 62)
        assert [got[0], 0] == got
        world.apiserver.lease(100, got.append)
        assert got[2] == got[0]


async def test_the_cache_knows_the_newest() -> None:
    """A cache goes forward only, and remembers deletions."""
    async with living(PODS) as world:
        world.apiserver.changed(b"a", 5, b"five")
        world.apiserver.changed(b"a", 4, b"four")
        assert world.apiserver.known(b"a") == (5, b"five")
        world.apiserver.changed(b"a", 6, None)
        assert world.apiserver.known(b"a") == (6, None)
        assert world.apiserver.known(b"b") is None


async def test_revisions_by_time() -> None:
    """The newest revision seen until then; the oldest if that is too long ago."""
    async with living() as world:
        world.apiserver.revisions.clear()
        assert world.apiserver.revision_at(1) == 0
        for at, revision in ((1_000_000, 10), (2_000_000, 20), (2_000_001, 21), (3_000_000, 30)):
            world.apiserver.saw(at, revision)
        found = [world.apiserver.revision_at(at) for at in (0, 1_500_000, 2_000_000, 9_000_000)]
        assert [10, 10, 20, 30] == found


async def test_drop() -> None:
    """After a drop each watch comes back as it was told: resumed, listed, or stale."""
    ways = {
        "resume": Disturbance(0, Trouble.DROP, resume=100),
        "list": Disturbance(0, Trouble.DROP, resume=0),
        "stale": Disturbance(0, Trouble.DROP, resume=0, stale=100),
    }
    async with living(PODS) as world:
        own = world.watch(Watcher("own", PODS))
        revision = world.store.put(PODS + b"a", b"{}")
        (cache,) = world.apiserver.watchings
        for number, (way, trouble) in enumerate(ways.items(), 1):
            await eventually(lambda: {revision} == {own.seen, cache.seen})
            world.apiserver.drop(trouble, Random(number))
            own.drop(trouble, Random(number))
            await eventually(lambda n=number: len(world.rows(WATCHES)) == 2 * n)  # type: ignore[misc]
            await eventually(lambda: cache.synced and own.synced and cache.seen > 0 < own.seen)
            starts = {watching._opened[1] for watching in (own, cache)}
            assert {1 if way == "stale" else revision + 1} == starts
        watcher = world.column(OPS, "role")
        assert 4 == watcher.count(b"apiserver.list") + watcher.count(b"watcher.list")


async def test_compacted_history_is_listed() -> None:
    """A watch that starts in compacted history is canceled, and begins with a list."""
    async with living(PODS) as world:
        for n in range(5):
            world.store.put(PODS + b"%d" % n, b"{}")
        request = pb.CompactionRequest(revision=world.store.revision).SerializeToString()
        world.store.compacted = pb.CompactionRequest.FromString(request).revision
        (cache,) = world.apiserver.watchings
        world.apiserver.drop(Disturbance(0, Trouble.DROP, resume=0, stale=100), Random(1))
        await eventually(lambda: len(world.rows(WATCHES)) == 2)
        await eventually(lambda: cache.synced and cache.seen == world.store.revision)
        assert 2 == len(world.rows(OPS, role=b"apiserver.list"))
