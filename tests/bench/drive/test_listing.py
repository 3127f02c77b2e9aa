"""Lists as apiservers page them, with errors on every page."""

import pytest

from bench.client import requests
from bench.clock import now_us
from bench.drive.listing import STREAM_TIMEOUT_US, Listing, Origin
from bench.plan import Verb
from bench.records import ITEMS, OPS, Outcome
from tests.bench.drive.world import PODS, World, living
from tests.transport.running import eventually


async def listed(world: World, limit: int, revision: int = 0) -> tuple[int, list[bytes]]:
    """What a list reports, and the keys that it showed."""
    told: list[int] = []
    shown: list[bytes] = []
    origin = Origin(-1 if world.site.range_stream else 3, 4, b"test")
    line = world.apiserver.line(PODS)
    listing = Listing(
        world.site, line, PODS, origin, told.append, lambda key, *_: shown.append(key)
    )
    listing.begin(now_us(), limit=limit, revision=revision)
    await eventually(lambda: bool(told))
    assert len(told) == 1
    return told[0], shown


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 6])
async def test_pages(limit: int) -> None:
    """Pages of any size show every key below the prefix once, and no other."""
    keys = [PODS + b"%d" % n for n in range(5)]
    async with living(prefix=b"/mine") as world:
        for key in [*keys, b"/registry/podsets/x"]:
            world.store.put(b"/mine" + key, b"{}")
        world.store.put(keys[0], b"not ours")
        head = world.store.revision
        assert (head, keys) == await listed(world, limit)
        assert keys == world.column(ITEMS, "key")
        pages = world.rows(OPS, verb=Verb.LIST)
        assert len(pages) == (-(-5 // limit) if limit else 1)
        assert [0, *[head] * (len(pages) - 1)] == [page["at"] for page in pages]
        assert [*[1] * (len(pages) - 1), 0] == [page["found"] for page in pages]
        assert {(3, 4, b"test", PODS)} == {
            (page["actor"], page["step"], page["role"], page["key"]) for page in pages
        }


async def test_later_pages_are_of_the_first_ones_revision() -> None:
    """What is written while pages are read does not show in them."""
    async with living() as world:
        keys = [PODS + b"%d" % n for n in range(4)]
        revisions = [world.store.put(key, b"{}") for key in keys]
        world.store.after_range = lambda: world.store.put(PODS + b"3", b"new")
        assert (revisions[-1], keys) == await listed(world, 2)
        assert revisions == world.column(ITEMS, "mod")
        assert world.store.revision == revisions[-1] + 2


@pytest.mark.parametrize("page", [0, 1])
async def test_error(page: int) -> None:
    """A page that cannot be had ends the list with its code; pages before it are recorded."""
    async with living() as world:

        def compacted() -> None:
            world.store.compacted = world.store.put(PODS + b"0", b"{}")

        for n in range(4):
            world.store.put(PODS + b"%d" % n, b"{}")
        if page:
            world.store.after_range = compacted
        else:
            world.store.refusals[requests.RANGE].append((8, "too many requests"))
        revision, _ = await listed(world, 2)
        assert revision == (-11 if page else -8)
        wanted = [Outcome.OK] * page + [Outcome.REFUSED]
        assert wanted == world.column(OPS, "outcome", verb=Verb.LIST)


async def test_no_connection() -> None:
    """A list without a connection is over at once, and recorded."""
    async with living() as world:
        for line in world.lines():
            line.give_up()
        await eventually(lambda: all(line.connection is None for line in world.lines()))
        assert (-14, []) == await listed(world, 2)
        assert [Outcome.REFUSED] == world.column(OPS, "outcome", verb=Verb.LIST)


async def test_stream() -> None:
    """Where there is RangeStream an apiserver's list is one call, whole and at one revision."""
    keys = [PODS + b"%d" % n for n in range(5)]
    async with living(prefix=b"/mine") as world:
        world.site.range_stream = True
        for key in [*keys, b"/registry/podsets/x"]:
            world.store.put(b"/mine" + key, b"{}")
        assert (world.store.revision, keys) == await listed(world, 2)
        (row,) = world.rows(OPS, verb=Verb.LIST)
        assert (5, world.store.revision, Outcome.OK) == (
            row["count"],
            row["revision"],
            row["outcome"],
        )
        assert keys == world.column(ITEMS, "key", op=row["op"])
        assert [requests.RANGE_STREAM] == [path for path, _ in world.store.asked]
        world.site.range_stream = False
        assert (world.store.revision, keys) == await listed(world, 2)


@pytest.mark.parametrize("lost", [False, True])
async def test_stream_that_fails(lost: bool) -> None:  # noqa: FBT001 - a parameter
    """A list that breaks off, or is refused, has shown nothing, and is recorded."""
    async with living() as world:
        world.site.range_stream = True
        world.store.put(PODS + b"a", b"{}")
        if lost:
            line = world.apiserver.line(PODS)
            world.store.after_range = lambda: line.close(reset=True)
        else:
            world.store.refusals[requests.RANGE_STREAM].append((8, "too many requests"))
        assert (-14 if lost else -8, []) == await listed(world, 2)
        wanted = Outcome.UNKNOWN if lost else Outcome.REFUSED
        assert [wanted] == world.column(OPS, "outcome", verb=Verb.LIST)


async def test_stream_of_nothing() -> None:
    """A list of no object has a revision too."""
    async with living() as world:
        world.site.range_stream = True
        assert (world.store.revision, []) == await listed(world, 2)


async def test_stream_that_hangs() -> None:
    """A stream that never ends is over after its time, and is recorded as a call is."""
    async with living() as world:
        world.site.range_stream = True
        world.store.silent.add(requests.RANGE_STREAM)
        told: list[int] = []
        line = world.apiserver.line(PODS)
        origin = Origin(-1, -1, b"test")
        listing = Listing(world.site, line, PODS, origin, told.append, lambda *_: None)
        listing.begin(now_us())
        await eventually(lambda: bool(world.store.asked))
        line.expire(now_us() + STREAM_TIMEOUT_US - 1_000_000)
        assert not told
        line.expire(now_us() + STREAM_TIMEOUT_US)
        assert [-4] == told
        assert [(Outcome.UNKNOWN, 4)] == [
            (row["outcome"], row["code"]) for row in world.rows(OPS, verb=Verb.LIST)
        ]
