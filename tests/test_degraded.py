"""A whole server over several shards of which some are missing, out, lost or wrong."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from backends.memory import MemoryBackend, MemoryDisk, Steps
from kvstore.backend import Batch, CommitResult, Outcome
from kvstore.errors import BackendError
from kvstore.shard_config import RouteSpec, ShardConfig, ShardSpec
from tests.house import QUICK, House, get, living, page, put
from tests.transport.peer import Peer, connected
from tests.transport.running import eventually

NAMES = ("core", "events")
SHARDS = ShardConfig(
    [ShardSpec(name, "memory:") for name in NAMES], [RouteSpec(b"/events/", "events")]
)
CONFIG = replace(QUICK, commit=replace(QUICK.commit, return_interval=0.01, record_interval=0.02))
TIMED_OUT = (14, "etcdserver: request timed out")
STOPPED = (14, "etcdserver: server stopped")


pytestmark = pytest.mark.usefixtures("interpreter", "loop_handler")


class Failing(MemoryBackend):
    """Its commits end as ``outcome`` says, if it says something."""

    outcome: Outcome | None = None

    def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Commit, or not."""
        if self.outcome is None:
            super().commit(batch, done)
        else:
            result = CommitResult(self.outcome, "as told")
            self._later(lambda: done(result))


class Two:
    """A house over two shards."""

    def __init__(self, later: Callable[[Callable[[], None]], object] | None = None) -> None:
        soon = asyncio.get_running_loop().call_soon
        self.home, self.events = [MemoryDisk(shard=name, epoch=1) for name in NAMES]
        self.home.shard_map = SHARDS.document()
        self.backends = [Failing(self.home, later=soon), Failing(self.events, later=later or soon)]
        self.house = House(self.backends, CONFIG, SHARDS)

    def lines(self, message: str) -> list[dict[str, object]]:
        """What was logged with ``message``."""
        return [line for line in self.house.log if line["msg"] == message]


async def status(peer: Peer, key: bytes) -> tuple[int, str]:
    """How a put of ``key`` ends."""
    return (await peer.answer(put(peer, key))).status


@pytest.fixture
async def two() -> Two:
    """Not started."""
    return Two()


async def test_all_are_there(two: Two) -> None:
    """Keys are on their shards, health knows each, and a clean stop takes back what was reserved,
    so that the next start goes on where this one stopped.
    """
    async with living(two.house) as house, connected(house.port) as peer:
        for key in (b"/a", b"/events/a", b"/b"):
            assert await status(peer, key) == (0, "")
        assert await get(peer, b"/events/a") == [b"v"]
        assert (await page(house.port, "/readyz"))[1] == "ok\n"
        verbose = (await page(house.port, "/readyz?verbose"))[1]
        assert "[+]shard_core ok\n[+]shard_events ok\nok\n" in verbose
        assert two.home.reserved > 1_000
    assert [[row[2] for row in disk.rows.values()] for disk in (two.home, two.events)] == [
        [b"/a", b"/b"],
        [b"/events/a"],
    ]
    assert (two.home.reserved, two.home.records["events"].tip) == (4, 3)
    again = Two()
    again.backends[0].disk, again.backends[1].disk = two.home, two.events
    async with living(again.house) as house, connected(house.port) as peer:
        assert await status(peer, b"/events/b") == (0, "")
    assert two.events.tip == 5


async def test_a_shard_is_missing_and_returns(two: Two) -> None:
    """Its keys are refused at once, the others served; the server is degraded, not down; then it is
    back, and is told so once.
    """
    two.events.reachable = False
    async with living(two.house) as house, connected(house.port) as peer:
        assert await status(peer, b"/events/a") == TIMED_OUT
        assert await status(peer, b"/a") == (0, "")
        code, body = await page(house.port, "/readyz")
        assert code == 200
        told = "the memory of shard events cannot be reached"
        assert f"[-]shard_events failed: missing: {told}\nok (degraded)\n" in body
        assert (await page(house.port, "/readyz/shard_events"))[0] == 503
        assert (await page(house.port, "/health")) == (200, '{"health":"true","reason":""}')
        assert (await page(house.port, "/livez"))[0] == 200
        two.events.reachable = True
        await eventually(lambda: house.said("shard is back"))
        assert await status(peer, b"/events/a") == (0, "")
        assert (await page(house.port, "/readyz"))[1] == "ok\n"
        assert (await page(house.port, "/readyz/shard_events"))[0] == 200
    (line,) = two.lines("shard is missing; its keys are refused")
    assert (line["shard"], line["reason"]) == ("events", told)
    assert len(two.lines("shard is back")) == 1
    assert not two.lines("shard is still missing")
    assert (two.home.reserved, two.events.tip) == (3, 3)


async def test_a_shard_stays_missing(two: Two) -> None:
    """The server stops in order without it."""
    two.events.reachable = False
    async with living(two.house) as house, connected(house.port) as peer:
        assert await status(peer, b"/a") == (0, "")
    assert two.home.reserved == 2
    assert house.log[-1]["msg"] == "stopped"


async def test_a_wrong_shard_returns(two: Two) -> None:
    """It is refused, and that is told once; the right one is taken."""
    two.events.reachable = False
    async with living(two.house) as house, connected(house.port) as peer:
        two.events.shard, two.events.epoch, two.events.reachable = "other", 1, True
        await eventually(lambda: house.said("shard is refused"))
        epoch = two.events.epoch
        await eventually(lambda: two.events.epoch > epoch + 2)
        assert await status(peer, b"/events/a") == TIMED_OUT
        assert "that of shard other" in (await page(house.port, "/readyz"))[1]
        two.events.shard = "events"
        await eventually(lambda: house.said("shard is back"))
        assert await status(peer, b"/events/a") == (0, "")
    assert len(two.lines("shard is refused")) == 1


async def test_a_wrong_shard_at_the_start(two: Two) -> None:
    """Nothing is served."""
    two.events.shard, two.events.epoch = "other", 1
    with pytest.raises(BackendError, match="that of shard other"):
        await two.house.server.serve()
    assert not two.house.said("ready to serve client requests")
    assert (two.home.holder, two.events.holder) == (None, None)


async def test_a_shard_that_is_out_and_back(two: Two) -> None:
    """What its backend knows is acted on at once."""
    async with living(two.house) as house, connected(house.port) as peer:
        two.backends[1].on_out("connection refused")
        assert await status(peer, b"/events/a") == TIMED_OUT
        assert "failed: out: connection refused\n" in (await page(house.port, "/readyz"))[1]
        assert await status(peer, b"/a") == (0, "")
        two.backends[1].on_back()
        assert await status(peer, b"/events/a") == (0, "")
    assert [line["shard"] for line in two.lines("shard does not commit")] == ["events"]
    assert [line["shard"] for line in two.lines("shard commits again")] == ["events"]


async def test_a_shard_that_breaks(two: Two) -> None:
    """Its keys are refused for good, the others are served; the exit code tells of it."""
    async with living(two.house, exit_code=1) as house, connected(house.port) as peer:
        two.backends[1].outcome = Outcome.BROKEN
        assert await status(peer, b"/events/a") == STOPPED
        assert await status(peer, b"/a") == (0, "")
        assert (await page(house.port, "/readyz"))[0] == 200
        assert "failed: broken: as told\n" in (await page(house.port, "/readyz"))[1]
    (line,) = two.lines("shard lost until a restart")
    assert (line["shard"], line["reason"]) == ("events", "broken: as told")
    assert two.home.reserved == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "outcome"), [(1, Outcome.FENCED), (0, Outcome.FENCED), (0, Outcome.BROKEN)]
)
async def test_what_ends_the_server(number: int, outcome: Outcome) -> None:
    """Another process that has taken a shard, whichever it is; home's loss."""
    two = Two()
    async with living(two.house, exit_code=1) as house, connected(house.port) as peer:
        two.backends[number].outcome = outcome
        assert await status(peer, (b"/a", b"/events/a")[number]) == STOPPED
        await eventually(lambda: house.said("stopped"))
    (line,) = two.lines("storage failed; shutting down")
    assert (line["shard"], line["reason"]) == (NAMES[number], f"{outcome.value}: as told")


async def test_a_stop_waits_for_every_shard_that_can() -> None:
    """One that hangs keeps no other's changes from becoming durable, and the stop has its end."""
    soon, slow = asyncio.get_running_loop().call_soon, Steps()
    disks = [MemoryDisk(shard=name) for name in (*NAMES, "agents")]
    backends = [
        Failing(disks[0], later=soon),
        Failing(disks[1], later=Steps()),
        Failing(disks[2], later=slow),
    ]
    shards = ShardConfig(
        [*SHARDS.shards, ShardSpec("agents", "memory:")],
        [*SHARDS.routes, RouteSpec(b"/agents/", "agents")],
    )
    house = House(backends, CONFIG, shards)
    async with living(house):
        async with connected(house.port) as peer:
            assert await status(peer, b"/events/a") == TIMED_OUT
            put(peer, b"/agents/a")
            await eventually(lambda: len(slow.waiting) > 0)
        house.server.stop()
        await eventually(lambda: house.sockets.metrics[0].sock.fileno() < 0)
        assert disks[0].reserved > 1_000
        slow.run_all()
    assert [row[2] for row in disks[2].rows.values()] == [b"/agents/a"]
    assert (disks[0].reserved, house.log[-1]["msg"]) == (3, "stopped")


async def test_tips_are_recorded_while_it_serves(two: Two) -> None:
    """A kill leaves records that are not old."""
    async with living(two.house) as house, connected(house.port) as peer:
        assert await status(peer, b"/events/a") == (0, "")
        await eventually(lambda: two.home.records["events"].tip == two.events.tip > 1)
        assert two.home.reserved > 1_000
