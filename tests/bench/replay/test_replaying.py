"""A recorded trace, replayed to a fresh server, ends in the same state, and its judges hold."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from bench.plan import Verb
from bench.records import EVENTS, MESSAGES, OPS, WATCHES, MessageKind, Records
from bench.replay import proxy
from bench.replay.session import Playing, Replayed, Wish, replay
from bench.replay.trace import Kind, Row, TraceWriter
from bench.targets import Target, TargetError
from kvstore.pb import rpc_pb2 as pb
from tests.bench.replay.stand import (
    ABOUT,
    KEEP_ALIVE,
    KV,
    LEASE,
    SUMMARY,
    WATCH,
    Client,
    client,
    create,
    delete,
    recording,
    update,
    watch_from,
)
from tests.house import House, living, memory

pytestmark = pytest.mark.slow
PODS = b"/registry/pods/"
END = b"/registry/pods0"


async def everything(port: int) -> list[tuple[bytes, bytes, int]]:
    """Key, value and version of all that a server has."""
    async with client(port) as user:
        found = await user.range(pb.RangeRequest(key=b"\0", range_end=b"\0"))
        return [(kv.key, kv.value, kv.version) for kv in found.kvs]


async def use(port: int) -> None:
    """What apiservers do: watches, writes, conflicts, pages, leases, a compaction."""
    async with client(port) as one, client(port) as two:
        watch = one.stream(WATCH)
        await watch.write(watch_from(PODS))
        await watch.read()
        revisions = []
        for n in range(7):
            made = await one.txn(create(PODS + b"%d" % n, b"value %d" % n))
            revisions.append(made.header.revision)
        for n in range(3):
            await two.txn(update(PODS + b"%d" % n, b"again", revisions[n]))
        lost = await two.txn(update(PODS + b"0", b"lost", revisions[0]))
        (now,) = lost.responses[0].response_range.kvs
        await one.txn(update(PODS + b"0", b"won", now.mod_revision))
        await one.txn(delete(PODS + b"6", revisions[6]))
        page = await one.range(pb.RangeRequest(key=PODS, range_end=END, limit=4))
        at, start = page.header.revision, page.kvs[-1].key + b"\0"
        await one.range(pb.RangeRequest(key=start, range_end=END, limit=4, revision=at))
        await one.range(pb.RangeRequest(key=PODS, range_end=END, count_only=True))
        lease = await one.grant(600)
        await two.txn(create(b"/registry/events/a", b"event", lease))
        kept = one.stream(KEEP_ALIVE)
        await kept.write(pb.LeaseKeepAliveRequest(ID=lease).SerializeToString())
        await kept.read()
        await kept.done_writing()
        gone = await one.grant(600)
        await one.txn(create(b"/registry/events/b", b"event", gone))
        await one.call(f"{LEASE}/LeaseRevoke", pb.LeaseRevokeRequest(ID=gone).SerializeToString())
        resumed = two.stream(WATCH)
        await resumed.write(watch_from(PODS, at + 1))
        await resumed.read()
        await one.txn(create(PODS + b"9", b"last"))
        await resumed.read()
        compact = pb.CompactionRequest(revision=at - 2).SerializeToString()
        await one.call(f"{KV}/Compact", compact)
        old = two.stream(WATCH)
        await old.write(watch_from(PODS, 3))
        await old.read()
        assert pb.WatchResponse.FromString(await old.read()).compact_revision == at - 2


@asynccontextmanager
async def target() -> AsyncIterator[tuple[House, Target]]:
    """A fresh server to replay to."""
    async with living(House([memory()])) as house:
        yield house, Target(name="fresh", port=house.port)


async def replayed(folder: Path, to: Target, *, speed: float = 5.0) -> Replayed:
    """The folder's trace, replayed to a target."""
    wish = Wish(trace=folder / "trace", targets=[to], out=folder / "out", speed=speed)
    stop = asyncio.Event()
    playing = Playing(wish, stop, lambda *_: None)
    await playing.check()
    return await playing.play(to)


def wrong(done: Replayed) -> dict[str, list[str]]:
    """What judges found, by judge."""
    assert done.verdicts
    return {v.judge: list(v.evidence) for v in done.verdicts if not v.passed}


@pytest.mark.parametrize("scrub", [False, True], ids=["whole", "scrubbed"])
async def test_replay_ends_in_the_same_state(tmp_path: Path, scrub: bool) -> None:  # noqa: FBT001
    """Same keys and versions, same values unless they were scrubbed, and all judges hold."""
    async with recording(tmp_path / "trace", scrub=scrub) as stand:
        await use(stand.port)
        due = await everything(stand.house.port)
    async with target() as (house, to):
        # Keys are recorded at revisions of their own: the other store has another history.
        async with client(house.port) as other:
            for n in range(5):
                await other.txn(create(b"x%d" % n, b""))
                await other.txn(delete(b"x%d" % n, 2 * n + 2))
        done = await replayed(tmp_path, to)
        got = await everything(house.port)
    assert wrong(done) == {}
    if scrub:
        assert [(k, len(v), n) for k, v, n in got] == [(k, len(v), n) for k, v, n in due]
        assert not {v for _, v, _ in got} & {v for _, v, _ in due}
    else:
        assert got == due
    assert (done.state, dict(done.unmapped)) == ("COMPLETE", {})
    assert not done.counts.otherwise
    assert not done.counts.unjudged
    checked = {verdict.judge for verdict in done.verdicts if verdict.checked}
    assert {"Reliable", "Resumable", "CAS chains", "Final state", "Snapshot"} <= checked
    ops = Records(done.folder).frame(OPS)
    verbs = {Verb(verb) for verb in ops["verb"].tolist()}
    assert {Verb.CREATE, Verb.UPDATE, Verb.DELETE, Verb.LIST, Verb.COUNT, Verb.GRANT} <= verbs
    assert {Verb.REVOKE, Verb.COMPACT, Verb.OTHER} <= verbs
    pages = ops.where(ops["verb"] == Verb.LIST)
    assert pages["attempt"].tolist() == [0, 1]
    # Revisions that were told and asked for again are those of this store, ten further on.
    assert pages["at"].tolist() == [0, pages["revision"][0]]
    starts = Records(done.folder).frame(WATCHES)["start"].tolist()
    assert sorted(starts)[0::2] == [0, pages["revision"][0] + 1]
    (compact,) = ops.where((ops["verb"] == Verb.COMPACT) & (ops["at"] > 0))["at"].tolist()
    # Writes of others that are not answered yet may keep it back; it is never ahead.
    assert 0 < compact < pages["revision"][0]


async def test_however_fast_nothing_is_sent_before_what_it_follows_from(tmp_path: Path) -> None:
    """A thousand times as fast: a client's next call waits for its answer, a compare for its write.

    Each client here waits for every answer, so its calls never overlap; and the state is the same.
    """
    async with recording(tmp_path / "trace") as stand:
        await use(stand.port)
        due = await everything(stand.house.port)
    async with target() as (house, to):
        done = await replayed(tmp_path, to, speed=1000)
        assert await everything(house.port) == due
    assert wrong(done) == {}
    assert (dict(done.counts.otherwise), dict(done.unmapped)) == ({}, {})
    ops = Records(done.folder).frame(OPS)
    ops = ops.where(ops["verb"] != Verb.OTHER)  # a keep-alive is no call that is waited for
    for connection in set(ops["connection"].tolist()):
        mine = ops.where(ops["connection"] == connection)
        mine = mine.where(mine["sent"].argsort(kind="stable"))
        assert (mine["sent"][1:] >= mine["done"][:-1]).all()
        assert (mine["due"][1:] >= mine["done"][:-1] - 1000).all()


async def test_objects_that_were_there_are_put_first(tmp_path: Path) -> None:
    """A recording of a store in use begins a replay with what it held: compares still hold."""

    async def before(user: Client) -> None:
        made = await user.txn(create(PODS + b"old", b"one"))
        await user.txn(update(PODS + b"old", b"two", made.header.revision))
        await user.txn(create(PODS + b"same", b"same"))

    async with (
        recording(tmp_path / "trace", before=before) as stand,
        client(stand.port) as user,
    ):
        await user.txn(update(PODS + b"old", b"three", 3))
        compare = pb.Compare(target=pb.Compare.VERSION, key=PODS + b"old", version=3)
        put = pb.RequestOp(request_put=pb.PutRequest(key=PODS + b"old", value=b"four"))
        txn = pb.TxnRequest(compare=[compare], success=[put])
        assert (await user.txn(txn.SerializeToString())).succeeded
    async with target() as (house, to):
        done = await replayed(tmp_path, to)
        got = await everything(house.port)
    assert got == [(PODS + b"old", b"four", 3), (PODS + b"same", b"same", 1)]
    assert wrong(done) == {}
    assert (dict(done.counts.otherwise), dict(done.unmapped)) == ({}, {})


async def test_who_lost_a_race_loses_it_again(tmp_path: Path) -> None:
    """Of two at once the one that found the other's write waits for it, on any connection.

    They are recorded as begun at once, among others.
    """
    writer = TraceWriter(tmp_path / "trace", ABOUT)
    txn = f"{KV}/Txn".encode()
    put = pb.ResponseOp(response_put=pb.PutResponse())
    ok = pb.TxnResponse(succeeded=True, responses=[put])
    ok.header.revision = 2
    found = pb.ResponseOp()
    found.response_range.kvs.add(key=PODS, mod_revision=2)
    lost = pb.TxnResponse(responses=[found])
    lost.header.revision = 2
    for n in range(20):
        writer.add(Row(n, Kind.BEGIN, n + 2, n, txn, message=create(b"x%d" % n, b"")))
    writer.add(Row(30, Kind.BEGIN, 0, 20, txn, message=create(PODS, b"winner")))
    writer.add(Row(30, Kind.BEGIN, 1, 21, txn, message=create(PODS, b"loser")))
    writer.add(Row(40, Kind.END, 0, 20, message=ok.SerializeToString()))
    writer.add(Row(40, Kind.END, 1, 21, message=lost.SerializeToString()))
    writer.close(SUMMARY)
    async with target() as (house, to):
        done = await replayed(tmp_path, to)
        got = {key: value for key, value, _ in await everything(house.port)}
    assert got[PODS] == b"winner"
    ops = Records(done.folder).frame(OPS)
    winner, loser = (int(np.flatnonzero(ops["actor"] == call)[0]) for call in (20, 21))
    assert ops["sent"][loser] >= ops["done"][winner]
    assert wrong(done) == {}


async def test_one_of_several_watches_of_a_stream_is_cancelled(tmp_path: Path) -> None:
    """The server's own ids are used: the watch that ends is the one that ended when recorded."""
    async with recording(tmp_path / "trace") as stand, client(stand.port) as user:
        stream = user.stream(WATCH)
        ids = []
        for key in (PODS, b"/registry/events/"):
            await stream.write(watch_from(key))
            ids.append(pb.WatchResponse.FromString(await stream.read()).watch_id)
        cancel = pb.WatchCancelRequest(watch_id=ids[1])
        await stream.write(pb.WatchRequest(cancel_request=cancel).SerializeToString())
        assert pb.WatchResponse.FromString(await stream.read()).canceled
        await user.txn(create(PODS + b"1", b"one"))
        await stream.read()
        stand.stop.set()
        await stream.code()  # the recording ended with the other watch open
    async with target() as (_, to):
        done = await replayed(tmp_path, to)
    assert wrong(done) == {}
    assert not done.unmapped
    records = Records(done.folder)
    watches, messages = records.frame(WATCHES), records.frame(MESSAGES)
    keys = [watches.text("key")[code] for code in watches["key"].tolist()]
    codes = dict(zip(keys, watches["code"].tolist(), strict=True))
    assert codes == {PODS: -1, b"/registry/events/": 1}
    canceled = messages.where(messages["kind"] == MessageKind.CANCELED)["watch"].tolist()
    assert canceled == watches["watch"][watches["code"] == 1].tolist()
    assert len(records.frame(EVENTS)) == 1


def trace_of(folder: Path, *calls: tuple[str, bytes, int]) -> None:
    """A trace of unary calls of one client, each with a code, without their answers."""
    writer = TraceWriter(folder / "trace", ABOUT)
    for n, (path, message, code) in enumerate(calls):
        writer.add(Row(n * 2000, Kind.BEGIN, 0, n, path.encode(), message=message))
        writer.add(Row(n * 2000 + 1000, Kind.END, 0, n, code=code))
    writer.close(SUMMARY)


async def test_what_cannot_be_translated_is_counted(tmp_path: Path) -> None:
    """A revision and a lease that the trace does not explain; the newest revision stands in."""
    trace_of(
        tmp_path,
        (f"{KV}/Txn", create(PODS + b"1", b"one"), 14),
        (f"{KV}/Txn", update(PODS + b"1", b"two", 77), 14),
        (f"{KV}/Txn", create(PODS + b"2", b"leased", 4711), 14),
    )
    async with target() as (house, to):
        done = await replayed(tmp_path, to)
        got = await everything(house.port)
    assert done.unmapped == {"compared revisions": 1, "leases": 1}
    assert got == [(PODS + b"1", b"two", 2), (PODS + b"2", b"leased", 1)]
    assert done.counts.otherwise == {"KV/Txn": 3}
    assert wrong(done) == {}


async def test_what_judges_cannot_follow_is_not_judged(tmp_path: Path) -> None:
    """A Txn that writes two keys is sent and counted, and there are no verdicts to mistake."""
    puts = [pb.RequestOp(request_put=pb.PutRequest(key=b"k%d" % n, value=b"v")) for n in range(2)]
    both = pb.TxnRequest(success=puts).SerializeToString()
    trace_of(tmp_path, (f"{KV}/Txn", both, 14), (f"{KV}/Txn", create(PODS, b""), 14))
    async with target() as (house, to):
        done = await replayed(tmp_path, to)
        assert [key for key, _, _ in await everything(house.port)] == [PODS, b"k0", b"k1"]
    assert done.counts.unjudged == {"KV/Txn": 1}
    assert done.verdicts == []
    assert not (done.folder / "verdicts.json").exists()


async def test_what_is_no_call_for_a_target_is_withheld(tmp_path: Path) -> None:
    """Nobody's members are changed, and no login is switched on; that is counted."""
    trace_of(
        tmp_path,
        ("/etcdserverpb.Auth/AuthEnable", b"", 0),
        ("/etcdserverpb.Cluster/MemberRemove", b"", 0),
        (f"{KV}/Txn", create(PODS, b""), 14),
    )
    async with target() as (_, to):
        done = await replayed(tmp_path, to)
    assert done.counts.withheld == {"Auth/AuthEnable": 1, "Cluster/MemberRemove": 1}
    assert done.counts.sent == 1


async def test_target_that_is_not_empty_or_not_there(tmp_path: Path) -> None:
    """One line before anything is sent."""
    trace_of(tmp_path, (f"{KV}/Txn", create(PODS, b""), 14))
    async with target() as (house, to):
        async with client(house.port) as other:
            await other.txn(create(b"x", b""))
        with pytest.raises(TargetError, match=r"fresh at .* is not empty: 1 keys"):
            await replayed(tmp_path, to)
        assert [key for key, _, _ in await everything(house.port)] == [b"x"]
    with pytest.raises(TargetError, match=r"gone at .* cannot be reached"):
        await replayed(tmp_path, Target(name="gone", port=1))


async def test_replay_can_be_stopped(tmp_path: Path) -> None:
    """Told to stop it ends in order: INCOMPLETE, with what there is."""
    writer = TraceWriter(tmp_path / "trace", ABOUT)
    txn = f"{KV}/Txn".encode()
    writer.add(Row(0, Kind.BEGIN, 0, 0, txn, message=create(PODS, b"")))
    writer.add(Row(9, Kind.END, 0, 0, code=14))
    writer.add(Row(10**9, Kind.BEGIN, 0, 1, txn, message=create(PODS + b"1", b"")))
    writer.close(SUMMARY)
    async with target() as (_, to):
        wish = Wish(trace=tmp_path / "trace", targets=[to], out=tmp_path / "out")
        stop = asyncio.Event()

        def show(_: str, stage: str) -> None:
            if stage == "load":
                asyncio.get_running_loop().call_later(0.5, stop.set)

        (done,) = await replay(wish, stop=stop, show=show, told=lambda _: None)
    assert (done.state, done.counts.sent) == ("INCOMPLETE", 1)
    assert Records(done.folder).facts["state"] == "INCOMPLETE"


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


def wrong_before(path: bytes, answer: bytes) -> list[bytes]:
    """An event's prev_kv is of another version."""
    response = pb.WatchResponse.FromString(answer) if path == WATCH.encode() else None
    if response is None or not any(e.HasField("prev_kv") for e in response.events):
        return [answer]
    response.events[0].prev_kv.version += 1
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
        (wrong_before, "PrevKV"),
    ],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
async def test_faults_of_a_target_are_caught(
    tmp_path: Path, tamper: Tamper, judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that loses, repeats or invents fails its judge, with evidence."""
    async with recording(tmp_path / "trace") as stand:
        await use(stand.port)
    async with tampering(tmp_path, tamper, monkeypatch) as to:
        done = await replayed(tmp_path, to)
    assert done.failed
    assert wrong(done).get(judge)
