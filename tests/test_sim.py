"""Seeds of the simulation, and that its oracle sees what it is there to see.

``SIM_SEEDS=n`` runs n seeds per number of shards instead of a hundred; ``SIM_FIRST=n`` begins at
another one. A failure names its seed: ``tests.sim.run`` repeats it.
"""

import os
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import pytest

from backends.memory import MemoryDisk
from kvstore.answers import Answer
from kvstore.backend import Batch, CommitResult, IndexRow, Outcome, RowId
from kvstore.commit import NOTHING_PENDING, Commits, ShardQueue
from kvstore.compaction import Compactor
from kvstore.fetch import Holds
from kvstore.history import History
from kvstore.pb import rpc_pb2 as pb
from kvstore.store import Store
from tests.sim import PromiseBrokenError, run
from tests.stack import Stack, serve

FIRST = int(os.environ.get("SIM_FIRST", "0"))
SEEDS = range(FIRST, FIRST + int(os.environ.get("SIM_SEEDS", "100")))
HAPPENS = {
    *("PutRequest", "TxnRequest", "DeleteRangeRequest", "RangeRequest", "CompactionRequest"),
    *("answered", "unknown", "crashes", "fenced", "broken"),
    "etcdserver: mvcc: required revision has been compacted",
    "etcdserver: mvcc: required revision is a future revision",
    "etcdserver: request timed out",
    "etcdserver: server stopped",
    "etcdserver: too many requests",
}


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_promises_hold_whatever_goes_wrong(shards: int) -> None:
    """Every seed keeps every promise, and a hundred have met every kind of trouble."""
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        seen += run(seed, shards=shards)
    if shards == 1 and len(SEEDS) >= 100:
        assert HAPPENS - seen.keys() == set(), "each kind of thing happens"


def test_a_seed_is_one_life() -> None:
    """The same seed does the same again: a failure can be looked at."""
    assert run(3, shards=3) == run(3, shards=3)


# -- what the oracle sees --------------------------------------------------------------------------


def _answer_now(commits: Commits, shards: object, answer: Answer, body: bytes) -> None:
    del commits, shards
    answer.reply(body)


def _believe(commits: Commits, queue: ShardQueue, batch: Batch) -> None:
    commits._returned(queue, batch, CommitResult(Outcome.COMMITTED))


_start, _load_rows = Store.__init__, Store.load_rows


def _start_behind(store: Store, *parts: Any) -> None:  # noqa: ANN401
    _start(store, *parts)
    store.revision = max(1, store.revision - 1)


def _load_all_but_one(store: Store, rows: list[IndexRow]) -> list[RowId]:
    return _load_rows(store, rows[:-1])


FAULTS: dict[str, tuple[type, str, Callable[..., object]]] = {
    "answers before it is durable": (Commits, "release", _answer_now),
    "takes unknown for committed": (Commits, "_resolve", _believe),
    "issues a revision again": (Store, "__init__", _start_behind),
    "loses a row in recovery": (Store, "load_rows", _load_all_but_one),
    "forgets keys that die during a read": (History, "newest", lambda *_: 0),
    "drops rows that a read still wants": (Holds, "passed", lambda *_: True),
    "forgets a compaction that timed out": (Compactor, "_take_effect", lambda *_: None),
    "shows what is not visible": (Commits, "frontier", lambda *_: NOTHING_PENDING),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that breaks a promise does not get through 1,000 seeds; the failure names one."""
    owner, name, broken = FAULTS[fault]
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(PromiseBrokenError, match=r"^run\(seed=\d+, shards=\d\): "):
        deque(run(seed, shards=1 + seed % 3) for seed in range(1_000))


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
