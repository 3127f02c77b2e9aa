"""Watches: list and watch, resume, compaction, slow readers, what is recorded of each."""

import itertools

import pytest

from bench.client.connection import SMALL_WINDOW_BYTES
from bench.clock import now_us
from bench.plan import Start, Watcher
from bench.records import EVENTS, MESSAGES, OPS, WATCHES, MessageKind
from bench.values import digest
from tests.bench.drive.world import PODS, living
from tests.transport.running import eventually

KEY = PODS + b"one"
ALL = Watcher("all", PODS)


async def test_list_then_watch() -> None:
    """What was there comes by the list, what comes later by the watch: no gap, no overlap."""
    async with living(prefix=b"/mine") as world:
        for n in range(3):
            world.store.put(b"/mine" + PODS + b"%d" % n, b"old")
        listed = world.store.revision
        watching = world.watch(ALL)
        await eventually(lambda: watching.synced)
        assert watching.seen == listed
        put = world.store.put(b"/mine" + KEY, b"new")
        world.store.put(KEY, b"not ours")
        world.store.delete(b"/mine" + KEY)
        await eventually(lambda: watching.seen == put + 2)
        assert [b"watcher.list"] == world.column(OPS, "role")
        first, second = world.rows(EVENTS)
        assert (KEY, put, 0, digest(b"new"), -1, -1) == tuple(
            first[name] for name in ("key", "mod", "type", "digest", "prev_mod", "prev_digest")
        )
        assert (KEY, put + 2, 1, -1, put, digest(b"new")) == tuple(
            second[name] for name in ("key", "mod", "type", "digest", "prev_mod", "prev_digest")
        )
        kinds = [MessageKind.CREATED, MessageKind.EVENTS, MessageKind.EVENTS]
        assert kinds == world.column(MESSAGES, "kind")
        assert [0, 1, 2] == world.column(MESSAGES, "message")
        watching.finish()
        (row,) = world.rows(WATCHES)
        assert (-1, listed + 1, PODS, -1, b"all") == (
            row["apiserver"],
            row["start"],
            row["key"],
            row["code"],
            row["name"],
        )
        assert {row["watch"]} == set(world.column(EVENTS, "watch"))


async def test_now() -> None:
    """A watcher from now has no list, and knows where it began."""
    async with living() as world:
        head = world.store.put(KEY, b"old")
        watching = world.watch(Watcher("now", PODS, Start.NOW, prev_kv=False))
        await eventually(lambda: watching.seen == head)
        world.store.put(KEY, b"new")
        await eventually(lambda: len(world.rows(EVENTS)) == 1)
        assert ([], [-1]) == (world.rows(OPS), world.column(EVENTS, "prev_mod"))


@pytest.mark.parametrize("no_put", [False, True])
async def test_filters(no_put: bool) -> None:  # noqa: FBT001 - a parameter
    """A watcher gets the kinds that it wants, and its record says which."""
    async with living() as world:
        watcher = Watcher("some", PODS, no_put=no_put, no_delete=not no_put)
        watching = world.watch(watcher)
        await eventually(lambda: watching.synced)
        world.store.put(KEY, b"a")
        world.store.delete(KEY)
        await eventually(lambda: len(world.rows(EVENTS)) == 1)
        assert [int(no_put)] == world.column(EVENTS, "type")
        watching.finish()
        (row,) = world.rows(WATCHES)
        assert (no_put, not no_put) == (row["no_put"], row["no_delete"])


async def test_resume_after_a_loss() -> None:
    """After a lost connection the watch goes on behind what it has seen, as a new watch."""
    async with living() as world:
        watching = world.watch(ALL)
        await eventually(lambda: watching.synced)
        seen = world.store.put(KEY, b"one")
        await eventually(lambda: watching.seen == seen)
        watching.line.close(reset=True)
        world.store.put(KEY, b"two")
        await eventually(lambda: watching.seen == seen + 1)
        assert [seen, seen + 1] == world.column(EVENTS, "mod")
        assert 2 == len(set(world.column(EVENTS, "watch")))
        (lost,) = world.rows(WATCHES)
        assert (14, b"connection lost") == (lost["code"], lost["message"])
        assert watching._opened[1] == seen + 1
        assert [b"watcher.list"] == world.column(OPS, "role")


async def test_progress() -> None:
    """Progress tells how far everything was delivered, and is asked for on an open stream."""
    async with living(PODS) as world:
        (cache,) = world.apiserver.watchings
        revision = world.store.put(b"/registry/other", b"")
        cache.ask_progress()
        await eventually(lambda: cache.seen == revision)
        assert [MessageKind.CREATED, MessageKind.PROGRESS] == world.column(MESSAGES, "kind")
        assert world.site.head_revision == revision


async def test_canceled_as_compacted() -> None:
    """What starts in compacted history is recorded as canceled, and begins with a list."""
    async with living() as world:
        for n in range(4):
            world.store.put(KEY, b"%d" % n)
        world.store.compacted = 4
        watching = world.watch(ALL)
        await eventually(lambda: watching.synced)
        watching.resume(2)
        watching.line.close()
        await eventually(lambda: len(world.rows(OPS)) == 2 and watching.synced)
        assert [(MessageKind.CANCELED, 4)] == [
            (row["kind"], row["compact_revision"])
            for row in world.rows(MESSAGES)
            if row["kind"] != MessageKind.CREATED
        ]
        _, canceled = world.rows(WATCHES)
        assert (2, 1) == (canceled["start"], canceled["code"])


async def test_list_that_fails_is_tried_again() -> None:
    """A watch whose list is refused begins again, once."""
    async with living() as world:
        world.store.refusals[b"/etcdserverpb.KV/Range"].append((14, "not now"))
        watching = world.watch(ALL)
        await eventually(lambda: watching.synced)
        assert [14, 0] == world.column(OPS, "code")
        await eventually(lambda: len(world.store.watches) == 1)


async def test_events_are_told_in_order() -> None:
    """Whoever keeps a cache is told of each change with its revision and value."""
    async with living(PODS) as world:
        first = world.store.put(KEY, b"a")
        await eventually(lambda: world.apiserver.known(KEY) == (first, b"a"))
        world.store.delete(KEY)
        await eventually(lambda: world.apiserver.known(KEY) == (first + 1, None))


@pytest.mark.slow
async def test_slow_reader() -> None:
    """A slow reader takes no more events a second than it should, and in the end all of them."""
    count, pace = 12, 30
    async with living() as world:
        watcher = Watcher("slow", PODS, events_per_second=pace)
        world.watch(watcher, window_bytes=SMALL_WINDOW_BYTES)
        await eventually(lambda: len(world.rows(MESSAGES)) == 1)
        begun_us = now_us()
        for n in range(count):
            world.store.put(KEY, bytes(30_000) + b"%d" % n)  # more than two fill the window
        await eventually(lambda: len(world.rows(EVENTS)) == count)
        assert now_us() - begun_us > (count - 1) * 1_000_000 // pace
        received = [int(row["received"]) for row in world.rows(MESSAGES)[1:]]
        pauses = [b - a for a, b in itertools.pairwise(received)]
        assert min(pauses) >= 1_000_000 // pace


@pytest.mark.slow
async def test_slow_reader_of_large_events() -> None:
    """A slow reader gets a message that is larger than what it lets a server send ahead."""
    async with living() as world:
        watcher = Watcher("slow", PODS, events_per_second=100)
        watching = world.watch(watcher, window_bytes=SMALL_WINDOW_BYTES)
        await eventually(lambda: watching.synced)
        for n in range(3):
            world.store.put(KEY, bytes(100_000) + b"%d" % n)
        await eventually(lambda: len(world.rows(EVENTS)) == 3)


@pytest.mark.slow
@pytest.mark.parametrize("bytes_before", [0, 40_000])
async def test_slow_reader_of_a_large_event_behind_unread_ones(bytes_before: int) -> None:
    """A large message gets all its room although what came before it was not read yet."""
    async with living() as world:

        def write() -> None:
            world.store.after_range = lambda: None
            for value in (bytes(bytes_before), bytes(100_000), b"last"):
                world.store.put(KEY, value)

        world.store.after_range = write  # they come with the answer that the watch is there
        watcher = Watcher("slow", PODS, events_per_second=20)
        world.watch(watcher, window_bytes=SMALL_WINDOW_BYTES)
        await eventually(lambda: len(world.rows(EVENTS)) == 3)


async def test_a_disturbance_while_listing() -> None:
    """Told to begin anew during its list, a watch does as it was told, once."""
    async with living() as world:
        revision = world.store.put(KEY, b"a")
        world.store.silent.add(b"/etcdserverpb.KV/Range")
        watching = world.watch(ALL)
        await eventually(lambda: bool(world.store.asked))
        watching.resume(revision)
        world.store.silent.clear()
        watching.line.close(reset=True)
        await eventually(lambda: len(world.rows(EVENTS)) == 1)
        assert (revision, 1) == (watching._opened[1], len(world.store.watches))
