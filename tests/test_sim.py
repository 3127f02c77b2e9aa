"""Seeds of the simulation, and that its oracle sees what it is there to see.

``SIM_SEEDS=n`` runs n seeds over three shards, and a tenth as many over one and over two;
``SIM_FIRST=n`` begins at another one. They are spread over the processors. A failure names its
seed: ``tests.sim.run`` repeats it.
"""

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from backends.memory import MemoryDisk
from kvstore.errors import TimedOutError
from kvstore.pb import rpc_pb2 as pb
from kvstore.txn import DeleteRange
from tests.engine import Engine
from tests.sim import PromiseBrokenError, run
from tests.sim_faults import FAULTS
from tests.stack import PromptReads, Stack, serve
from tests.watch_world import World

FIRST = int(os.environ.get("SIM_FIRST", "0"))
SEEDS = int(os.environ.get("SIM_SEEDS", "20000" if "CI" in os.environ else "300"))
CHUNK = 100
PART = 2_000
"""Seeds of one test, which is not to look as if it hung."""
PARTS = [
    (shards, first, min(PART, count - first))
    for shards, count in ((1, SEEDS // 10), (2, SEEDS // 10), (3, SEEDS))
    for first in range(0, count, PART)
]
"""(shards, first seed, seeds)."""
HAPPENS = {
    *("PutRequest", "TxnRequest", "DeleteRangeRequest", "RangeRequest", "CompactionRequest"),
    *("LeaseGrantRequest", "LeaseRevokeRequest", "LeaseKeepAliveRequest"),
    *("LeaseTimeToLiveRequest", "LeaseLeasesRequest"),
    *("answered", "unknown", "over several shards", "committed over several shards"),
    *("overtaken", "returned to fewer leases", "rerouted"),
    *("refused at once", "events over several shards", "progress", "watchers overtaken"),
    *("crashes", "stops", "pauses", "challenges", "shards returned", "probes"),
    *(
        "databases lost",
        "databases frozen",
        "databases replaced",
        "leases ended",
        "leaders deposed",
    ),
    *("ended: fenced", "ended: broken", "ended: refused", "ended: stopped"),
    "etcdserver: mvcc: required revision has been compacted",
    "etcdserver: mvcc: required revision is a future revision",
    "etcdserver: request timed out",
    "etcdserver: requested lease not found",
    "etcdserver: server stopped",
    "etcdserver: too many requests",
}


def _run_some(first: int, count: int, shards: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in range(first, first + count):
        seen += run(seed, shards=shards)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "first", "count"), PARTS)
def test_promises_hold_whatever_goes_wrong(shards: int, first: int, count: int) -> None:
    """Every seed keeps every promise, and some hundred have met every kind of trouble."""
    first += FIRST
    processors = len(os.sched_getaffinity(0))
    seen: Counter[str] = Counter()
    with ProcessPoolExecutor(processors, mp_context=get_context("spawn")) as pool:
        firsts = range(first, first + count, CHUNK)
        counts = [min(CHUNK, first + count - each) for each in firsts]
        for some in pool.map(_run_some, firsts, counts, [shards] * len(firsts)):
            seen += some
    if shards == 3 and count >= 300:
        assert HAPPENS - seen.keys() == set(), "each kind of thing happens"


def test_a_seed_is_one_life() -> None:
    """The same seed does the same again: a failure can be looked at."""
    assert run(3) == run(3)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that breaks a promise does not get through 1,000 seeds; the failure names one."""
    owner, name, broken = FAULTS[fault]
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(PromiseBrokenError, match=r"^run\(seed=\d+, shards=\d\): "):
        _run_some(0, 1_000, 3)


def test_a_key_that_dies_during_a_long_read_is_still_listed() -> None:
    """A list at a revision shows what was alive then, whatever is deleted between its steps."""
    stack = Stack([MemoryDisk()])
    for name in (b"a", b"b", b"c", b"d"):
        serve(stack.kv.put, pb.PutRequest(key=name, value=name).SerializeToString())
    stack.settle()
    call = serve(stack.kv.range, pb.RangeRequest(key=b"a", range_end=b"z").SerializeToString())
    assert not call.done
    for name in (b"a", b"c"):
        serve(stack.kv.delete_range, pb.DeleteRangeRequest(key=name).SerializeToString())
    stack.settle()
    assert call.body is not None
    answer = pb.RangeResponse.FromString(call.body)
    assert [pair.key for pair in answer.kvs] == [b"a", b"b", b"c", b"d"]
    assert answer.count == 4


def test_a_lease_does_not_end_before_the_loss_of_its_keys_is_durable() -> None:
    """A lease whose last key was deleted on another shard waits for that: a crash could undo it."""
    engine = Engine(routes={b"x/": 1})
    lease = engine.granted(1, 10)
    engine.put(b"x/a", lease)
    engine.settle()
    deleted = engine.store.delete_range(DeleteRange(b"x/a", None)).revision
    engine.lessor.revoke(lease)
    while engine.steps.waiting:
        engine.steps.waiting.rotate(1)  # the newest first: home is quicker
        engine.steps.run_next()
        assert lease in engine.disks[0].leases or (deleted, 0) in engine.disks[1].rows
    assert lease not in engine.disks[0].leases


class _Deposed(PromptReads):
    """Another process may own the shard."""

    def lease_until(self) -> float:
        """Until long ago."""
        return 0.0


def test_a_deposed_leader_does_not_know_what_is_the_future() -> None:
    """A revision that it has not seen may have been shown by another one."""
    stack = Stack([MemoryDisk()], backend=_Deposed)
    call = serve(stack.kv.range, pb.RangeRequest(key=b"a", revision=99).SerializeToString())
    assert call.failed == (TimedOutError.code, TimedOutError.text)


def test_a_deposed_leader_begins_no_watch() -> None:
    """Its "from now on" may be before what another one has shown."""
    world = World()
    world.commits.leased = True
    world.backends[0].lease_until = lambda: 0.0  # type: ignore[method-assign]
    client = world.client()
    with pytest.raises(TimedOutError):
        client.create(b"a")
    assert not client.messages
