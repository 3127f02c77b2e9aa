"""A whole server over two shards, and requests that touch both, over a socket."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from backends.memory import MemoryBackend, MemoryDisk, Steps
from kvstore.backend import Batch, CommitResult
from kvstore.config import Config
from kvstore.pb import rpc_pb2 as pb
from kvstore.shard_config import RouteSpec, ShardConfig, ShardSpec
from tests.house import QUICK, House, get, living, put
from tests.transport.peer import Peer, connected
from tests.transport.running import eventually

TXN = "/etcdserverpb.KV/Txn"
GRANT, REVOKE = "/etcdserverpb.Lease/LeaseGrant", "/etcdserverpb.Lease/LeaseRevoke"
NAMES = ("core", "events")
SHARDS = ShardConfig(
    [ShardSpec(name, "memory:") for name in NAMES], [RouteSpec(b"/events/", "events")]
)


pytestmark = pytest.mark.usefixtures("interpreter", "loop_handler")


class Gate:
    """A backend's ``later`` that can be closed: steps then wait."""

    def __init__(self) -> None:
        self._steps: Steps | None = None

    def __call__(self, step: Callable[[], None]) -> None:
        """Run it soon, or keep it."""
        (self._steps or asyncio.get_running_loop().call_soon)(step)

    def close(self) -> None:
        """Keep what comes."""
        self._steps = Steps()

    def open(self) -> None:
        """Let it go on."""
        steps, self._steps = self._steps, None
        assert steps is not None, "it was closed"
        steps.run_all()


class Patient(MemoryBackend):
    """Waits for the commit that is under way before it closes."""

    def __init__(self, disk: MemoryDisk, *, later: Gate) -> None:
        super().__init__(disk, later=later)
        self._idle = asyncio.Event()
        self._idle.set()

    def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """As ever."""
        self._idle.clear()

        def ended(result: CommitResult) -> None:
            self._idle.set()
            done(result)

        super().commit(batch, ended)

    async def close(self) -> None:
        """When nothing is under way."""
        await self._idle.wait()
        await super().close()


class Two:
    """A house over two shards; the second one commits while ``gate`` is open."""

    def __init__(self, config: Config = QUICK) -> None:
        self.gate = Gate()
        self.disks = [MemoryDisk(shard=name, epoch=1) for name in NAMES]
        self.disks[0].shard_map = SHARDS.document()
        home = MemoryBackend(self.disks[0], later=asyncio.get_running_loop().call_soon)
        self.house = House([home, Patient(self.disks[1], later=self.gate)], config, SHARDS)


def puts(peer: Peer, *keys: bytes, lease: int = 0) -> int:
    """Send a Txn that puts these; gives its stream."""
    request = pb.TxnRequest()
    for key in keys:
        request.success.add().request_put.CopyFrom(
            pb.PutRequest(key=key, value=b"new", lease=lease)
        )
    return peer.start(TXN, request.SerializeToString())


@pytest.mark.slow
async def test_a_txn_over_both() -> None:
    """Answered when both have their part, which a stop does not lose."""
    two = Two()
    async with living(two.house) as house, connected(house.port) as peer:
        answer = await peer.answer(puts(peer, b"/a", b"/events/a"))
        assert answer.status == (0, "")
        assert await get(peer, b"/a") == await get(peer, b"/events/a") == [b"new"]
    assert [[row[2] for row in disk.rows.values()] for disk in two.disks] == [
        [b"/a"],
        [b"/events/a"],
    ]
    assert two.disks[0].redo == []


@pytest.mark.slow
async def test_a_stop_lets_those_who_wait_come_to_their_end() -> None:
    """A Txn waits for a shard to settle and a put waits behind it when the server is told to stop:
    both are executed and answered.
    """
    two = Two()
    async with living(two.house) as house, connected(house.port) as peer:
        two.gate.close()
        calls = [
            put(peer, b"/events/a"),
            puts(peer, b"/a", b"/events/a"),
            put(peer, b"/events/b"),
        ]
        await peer.settle()
        house.server.stop()
        await asyncio.sleep(0)
        two.gate.open()
        for call in calls:
            assert (await peer.answer(call)).status == (0, "")
    assert len(two.disks[1].rows) == 3


@pytest.mark.slow
async def test_a_stop_while_the_shard_hangs() -> None:
    """They are refused within the bounds, and the server ends."""
    two = Two()
    async with living(two.house) as house, connected(house.port) as peer:
        two.gate.close()
        calls = [
            put(peer, b"/events/a"),
            puts(peer, b"/a", b"/events/a"),
            put(peer, b"/events/b"),
        ]
        await peer.settle()
        house.server.stop()
        for call in calls:
            assert (await peer.answer(call)).status == (14, "etcdserver: request timed out")
        two.gate.open()


@pytest.mark.slow
async def test_a_stop_that_is_over_before_their_turn_comes() -> None:
    """Those who wait are given up, their calls are cut off, and nothing is executed for them: it
    would be beyond what is reserved.
    """
    two = Two(replace(QUICK, server=replace(QUICK.server, stop_timeout=0.05)))
    async with living(two.house) as house, connected(house.port) as peer:
        granted = peer.start(GRANT, pb.LeaseGrantRequest(ID=7, TTL=60).SerializeToString())
        await peer.answer(granted)
        attached = [puts(peer, key, lease=7) for key in (b"/a", b"/events/a")]
        for call in attached:
            assert (await peer.answer(call)).status == (0, "")
        two.gate.close()
        put(peer, b"/events/b")
        puts(peer, b"/a", b"/events/a")
        peer.start(REVOKE, pb.LeaseRevokeRequest(ID=7).SerializeToString())
        await peer.settle()
        house.server.stop()
        await eventually(lambda: two.disks[0].reserved == 4)
        two.gate.open()
    assert sorted(two.disks[0].rows | two.disks[1].rows) == [(2, 0), (3, 0), (4, 0)]
    assert two.disks[0].leases
