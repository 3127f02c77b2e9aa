"""``/shards``: what a server tells of its shards and routes."""

import asyncio
import json

import pytest

from backends.memory import MemoryBackend, MemoryDisk
from kvstore.shard_config import RouteSpec, ShardConfig, ShardSpec, prefix_bytes
from tests.house import QUICK, House, living, page, put
from tests.transport.peer import connected

SHARDS = ShardConfig(
    [ShardSpec(name, "memory:") for name in ("core", "events")],
    [
        RouteSpec(b"/events/", "events"),
        RouteSpec(b"/events/mine/", "core"),
        RouteSpec(b"/\xff/", "events"),
    ],
)
KEYS = (b"/a", b"/events/a", b"/events/mine/a", b"/events/z", b"/z")


pytestmark = pytest.mark.usefixtures("interpreter", "loop_handler")


def housed(*disks: MemoryDisk) -> House:
    """A server over these."""
    soon = asyncio.get_running_loop().call_soon
    disks[0].shard_map = SHARDS.document()
    return House([MemoryBackend(disk, later=soon) for disk in disks], QUICK, SHARDS)


async def test_every_shard_and_route() -> None:
    """Keys are counted where they are, by the route that decides, however routes nest; both
    listeners tell the same.
    """
    core, events = MemoryDisk(shard="core"), MemoryDisk(shard="events", epoch=1)
    async with living(housed(core, events)) as house, connected(house.port) as peer:
        for key in KEYS:
            assert (await peer.answer(put(peer, key))).status == (0, "")
        status, body = await page(house.port, "/shards")
        assert (status, body) == await page(house.metrics_port, "/shards")
        told = json.loads(body)
        assert told["revision"] == events.tip + 1 == core.tip
        assert [(s["name"], s["home"], s["keys"], s["tip"]) for s in told["shards"]] == [
            ("core", True, 3, core.tip),
            ("events", False, 2, events.tip),
        ]
        assert [(s["state"], s["trouble"], s["frontier_lag"]) for s in told["shards"]] == [
            ("serving", "", 0),
            ("serving", "", 0),
        ]
        assert [s["bytes"] for s in told["shards"]] == [core.used_bytes, events.used_bytes]
        assert [(prefix_bytes(r["prefix"]), r["shard"], r["keys"]) for r in told["routes"]] == [
            (b"/events/", "events", 2),
            (b"/events/mine/", "core", 1),
            (b"/\xff/", "events", 0),
        ]


async def test_missing_shard() -> None:
    """What only a missing shard could tell is null, and the reason is told."""
    gone = MemoryDisk(shard="events", reachable=False)
    async with living(housed(MemoryDisk(shard="core"), gone)) as house:
        told = json.loads((await page(house.port, "/shards"))[1])
        shard = told["shards"][1]
        assert (shard["state"], shard["trouble"]) == (
            "missing",
            "the memory of shard events cannot be reached",
        )
        assert {shard[name] for name in ("keys", "bytes", "tip", "frontier_lag")} == {None}
        assert [route["keys"] for route in told["routes"]] == [None, 0, None]
