"""Judges of a replay follow every key that a call wrote, and catch a target's fault."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from bench.figures import figures
from bench.plan import WRITES
from bench.records import OPS, Records
from bench.replay import proxy
from bench.targets import Target
from kvstore.pb import rpc_pb2 as pb
from tests.bench.replay.stand import KV, WATCH, client, create, recording, watch_from
from tests.bench.replay.test_replaying import PODS, replayed, target, use, wrong

pytestmark = pytest.mark.slow


def put(key: bytes, value: bytes) -> pb.RequestOp:
    """One of a Txn."""
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value))


async def use_many(port: int) -> None:
    """Calls that write several keys: Txns, in both branches and inside others, range deletes."""
    clear = pb.DeleteRangeRequest(key=PODS, range_end=PODS + b"3")
    all_there_is = pb.DeleteRangeRequest(key=b"\0", range_end=b"\0")
    absent = pb.Compare(target=pb.Compare.CREATE, key=PODS + b"0", create_revision=0)
    inner = pb.TxnRequest(success=[put(b"inner", b"i"), pb.RequestOp(request_delete_range=clear)])
    many = pb.TxnRequest(
        compare=[absent],
        success=[put(PODS + b"%d" % n, b"value %d" % n) for n in range(5)],
        failure=[put(b"lost", b"l"), pb.RequestOp(request_txn=inner)],
    )
    async with client(port) as one:
        watch = one.stream(WATCH)
        await watch.write(watch_from(PODS))
        await watch.read()
        assert (await one.txn(many.SerializeToString())).succeeded
        assert not (await one.txn(many.SerializeToString())).succeeded
        for keys in (clear, all_there_is, all_there_is):
            await one.call(f"{KV}/DeleteRange", keys.SerializeToString())
        await one.txn(create(PODS + b"last", b"last"))
        shown = 0
        while shown < 5 + 3 + 2 + 1:
            shown += len(pb.WatchResponse.FromString(await watch.read()).events)


async def test_calls_that_write_several_keys_are_judged(tmp_path: Path) -> None:
    """Each key that they put or deleted has a row, so judges know all; figures count calls."""
    async with recording(tmp_path / "trace") as stand:
        await use_many(stand.port)
    async with target() as (_, to):
        done = await replayed(tmp_path, to)
    assert wrong(done) == {}
    assert not done.counts.unjudged
    ops = Records(done.folder).frame(OPS)
    wrote = ops.where(np.isin(ops["verb"], WRITES))
    together = np.unique(wrote["op"], return_counts=True)[1].tolist()
    # Five puts; two and the deletes of three; of those three nothing is left; the rest; the last.
    assert together == [5, 5, 4, 1]
    assert figures(Records(done.folder)).values["calls"] == 6
    checked = {verdict.judge for verdict in done.verdicts if verdict.checked}
    assert {"Atomic", "Reliable", "Acknowledged writes durable", "Final state"} <= checked


Tamper = Callable[[bytes, bytes], list[bytes]]
"""Path and answer: what the client gets instead."""


def lose_event(path: bytes, answer: bytes) -> list[bytes]:
    """One event never comes."""
    if path == WATCH.encode():
        response = pb.WatchResponse.FromString(answer)
        if any(event.kv.key == PODS + b"3" for event in response.events):
            return []
    return [answer]


def repeat_event(path: bytes, answer: bytes) -> list[bytes]:
    """One event comes twice."""
    again = path == WATCH.encode() and b"/3" in answer
    return [answer, answer] if again else [answer]


def wrong_value(path: bytes, answer: bytes) -> list[bytes]:
    """A read shows what nobody wrote."""
    return [answer.replace(b"value 4", b"value 5")] if path.endswith(b"/Range") else [answer]


def wrong_count(path: bytes, answer: bytes) -> list[bytes]:
    """A list says that there is one object more."""
    if not path.endswith(b"/Range"):
        return [answer]
    response = pb.RangeResponse.FromString(answer)
    response.count += len(response.kvs) > 0
    return [response.SerializeToString()]


def wrong_more(path: bytes, answer: bytes) -> list[bytes]:
    """A list's last page says that more follows."""
    if not path.endswith(b"/Range"):
        return [answer]
    response = pb.RangeResponse.FromString(answer)
    response.more = len(response.kvs) > 0
    return [response.SerializeToString()]


def wrong_before(path: bytes, answer: bytes) -> list[bytes]:
    """An event's prev_kv is of another version."""
    response = pb.WatchResponse.FromString(answer) if path == WATCH.encode() else None
    if response is None or not any(e.HasField("prev_kv") for e in response.events):
        return [answer]
    response.events[0].prev_kv.version += 1
    return [response.SerializeToString()]


def lose_delete(path: bytes, answer: bytes) -> list[bytes]:
    """Of several keys deleted at once one is not shown."""
    response = pb.WatchResponse.FromString(answer) if path == WATCH.encode() else None
    if response is None or [event.type for event in response.events] != [1, 1]:
        return [answer]
    del response.events[0]
    return [response.SerializeToString()]


def hide_delete(path: bytes, answer: bytes) -> list[bytes]:
    """A range delete tells of one key less than it deleted, and a watch shows all."""
    response = pb.DeleteRangeResponse.FromString(answer) if path.endswith(b"/DeleteRange") else None
    if response is None or not response.prev_kvs:
        return [answer]
    response.deleted -= 1
    del response.prev_kvs[0]
    return [response.SerializeToString()]


@asynccontextmanager
async def tampering(
    folder: Path, tamper: Tamper, patch: pytest.MonkeyPatch
) -> AsyncIterator[Target]:
    """A target that is right but for what ``tamper`` does to its answers."""
    streamed, unary = proxy._Streamed.answer, proxy._Unary.message

    def answer(self: proxy._Streamed, message: bytes) -> None:
        for instead in tamper(self._rpc.path, message):
            streamed(self, instead)

    def message(self: proxy._Unary, message: bytes, received_us: int, /) -> None:
        (instead,) = tamper(self._rpc.path, message)
        unary(self, instead, received_us)

    async with recording(folder / "tampered") as stand:
        patch.setattr(proxy._Streamed, "answer", answer)
        patch.setattr(proxy._Unary, "message", message)
        yield Target(name="faulty", port=stand.port)


@pytest.mark.parametrize(
    ("tamper", "judge"),
    [
        (lose_event, "Reliable"),
        (repeat_event, "Unique"),
        (wrong_value, "Snapshot"),
        (wrong_count, "Snapshot"),
        (wrong_more, "Snapshot"),
        (wrong_before, "PrevKV"),
        (lose_delete, "Reliable"),
        (hide_delete, "Errors attributable"),
    ],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
async def test_faults_of_a_target_are_caught(
    tmp_path: Path, tamper: Tamper, judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that loses, repeats or invents fails its judge, with evidence."""
    several = tamper in (lose_delete, hide_delete)
    async with recording(tmp_path / "trace") as stand:
        await (use_many if several else use)(stand.port)
    async with tampering(tmp_path, tamper, monkeypatch) as to:
        done = await replayed(tmp_path, to)
    assert done.failed
    assert wrong(done).get(judge)
