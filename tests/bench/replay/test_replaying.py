"""A recorded trace, replayed to a fresh server, ends in the same state, and its judges hold."""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from google.protobuf.message import Message

from bench.capsule import Speeds
from bench.plan import WRITES, Verb
from bench.records import EVENTS, MESSAGES, OPS, WATCHES, MessageKind, Outcome, Records
from bench.replay.calls import CUT_OFF, EMPTY, UNJUDGED, WITHHELD
from bench.replay.player import Line, Player
from bench.replay.script import Act
from bench.replay.session import Playing, Replayed, Wish, replay
from bench.replay.trace import Kind, Row, TraceWriter
from bench.replay.watching import WatchStream
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
from tests.bench.stopping import connections_when_stopped
from tests.house import House, living, memory

pytestmark = pytest.mark.slow
PODS = b"/registry/pods/"
END = b"/registry/pods0"
MACHINE = Speeds(100.0, 200.0, 10.0)
LATE = 0.03
"""Seconds; longer than a few calls of another client take."""


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
    return await playing.play(to, MACHINE)


def wrong(done: Replayed) -> dict[str, list[str]]:
    """What judges found, by judge."""
    assert done.verdicts
    return {v.judge: list(v.evidence) for v in done.verdicts if not v.passed}


async def late_do(
    self: Player,
    line: Line,
    act: Act,
    request: Message | None,
    due_us: int,
    _do: Callable[..., Awaitable[None]] = Player._do,
) -> None:
    """The second client is slower than it was: the first is ahead of it where it may be."""
    if act.call.connection == 1:
        await asyncio.sleep(LATE)
    await _do(self, line, act, request, due_us)


@pytest.mark.parametrize("late", [False, True], ids=["in-time", "late"])
@pytest.mark.parametrize("scrub", [False, True], ids=["whole", "scrubbed"])
async def test_replay_ends_in_the_same_state(
    tmp_path: Path,
    scrub: bool,  # noqa: FBT001 - a parameter
    late: bool,  # noqa: FBT001 - likewise
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Same keys and versions, same values unless they were scrubbed, and all judges hold.

    Whichever client is faster: nothing orders the reads of one after the writes of the other.
    """
    if late:
        monkeypatch.setattr(Player, "_do", late_do)
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
    assert (done.state, dict(done.unmapped), dict(done.not_sent)) == ("COMPLETE", {}, {})
    assert done.counts.sent == done.recorded, "streams are calls, too"
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
    # On the other connection that revision stands for all writes of pods up to it, but the last.
    names = [ops.text("key")[code] for code in ops["key"].tolist()]
    early = [name.startswith(PODS) and name != PODS + b"9" for name in names]
    wrote = np.isin(ops["verb"], WRITES) & (ops["outcome"] == Outcome.OK) & early
    written = ops["revision"][wrote].max()
    starts = Records(done.folder).frame(WATCHES)["start"].tolist()
    assert sorted(starts)[0::2] == [0, written + 1]
    (compact,) = ops.where((ops["verb"] == Verb.COMPACT) & (ops["at"] > 0))["at"].tolist()
    # Writes of others that are not answered yet may keep it back; it is never ahead.
    assert 0 < compact <= written


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
    """A put of whatever value there is is sent and counted; there are no verdicts to mistake."""
    keep = pb.PutRequest(key=PODS, ignore_value=True).SerializeToString()
    trace_of(tmp_path, (f"{KV}/Txn", create(PODS, b"value"), 14), (f"{KV}/Put", keep, 14))
    async with target() as (house, to):
        done = await replayed(tmp_path, to)
        assert await everything(house.port) == [(PODS, b"value", 2)]
    assert done.counts.unjudged == {"KV/Put": 1}
    assert done.verdicts == []
    assert Records(done.folder).facts["reason"] == f"{UNJUDGED}: 1 KV/Put"
    assert not (done.folder / "verdicts.json").exists()


async def test_what_is_no_call_for_a_target_is_withheld(tmp_path: Path) -> None:
    """Nobody's members are changed, and no login is switched on; every call is accounted for."""
    trace_of(
        tmp_path,
        ("/etcdserverpb.Auth/AuthEnable", b"", 0),
        ("/etcdserverpb.Cluster/MemberRemove", b"", 0),
        (f"{KV}/Txn", create(PODS, b""), 14),
        (WATCH, b"", 0),
    )
    async with target() as (_, to):
        done = await replayed(tmp_path, to)
    assert done.not_sent == {
        WITHHELD: {"Auth/AuthEnable": 1, "Cluster/MemberRemove": 1},
        EMPTY: {"Watch/Watch": 1},
    }
    assert (done.recorded, done.counts.sent) == (4, 1)


async def test_target_that_is_not_empty_or_not_there(tmp_path: Path) -> None:
    """One line before anything is sent."""
    trace_of(tmp_path, (f"{KV}/Txn", create(PODS, b""), 14))
    async with target() as (house, to):
        async with client(house.port) as other:
            await other.txn(create(b"x", b""))
        with pytest.raises(TargetError, match=r"fresh at .* is not empty: 1 key;"):
            await replayed(tmp_path, to)
        assert [key for key, _, _ in await everything(house.port)] == [b"x"]
    with pytest.raises(TargetError, match=r"gone at .* cannot be reached"):
        await replayed(tmp_path, Target(name="gone", port=1))


async def test_a_server_that_never_answers_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soon that it is being started, then the limit in one line; and it has ended by then."""
    monkeypatch.setattr("bench.replay.session.START_TIMEOUT", 0.3)
    monkeypatch.setattr("bench.replay.session.SLOW_SECONDS", 0.1)
    trace_of_a_call(tmp_path / "trace")
    command = f"sh -c 'echo $$ > {tmp_path}/pid; sleep 500; : {{port}} {{dir}}'"
    silent = Target(name="x", command=command)
    wish = Wish(trace=tmp_path / "trace", targets=[silent], out=tmp_path / "out")
    told: list[tuple[str, str]] = []
    with pytest.raises(TargetError, match=r"^x does not answer on port \d+ after 0\.3 s: .*$"):
        await replay(wish, stop=asyncio.Event(), show=lambda *said: told.append(said))
    assert told == [("x", "starting")]
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


async def test_waiting_for_a_server_heeds_the_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who does not want to wait for it any longer is not told that a limit was reached."""
    monkeypatch.setattr("bench.replay.session.SLOW_SECONDS", 0.1)
    trace_of_a_call(tmp_path / "trace")
    silent = Target(name="x", command="sh -c 'sleep 500; : {port} {dir}'")
    wish = Wish(trace=tmp_path / "trace", targets=[silent], out=tmp_path / "out")
    stop = asyncio.Event()
    with pytest.raises(TargetError, match=r"^stopped while x was waited for$"):
        await replay(wish, stop=stop, show=lambda *_: stop.set())


def trace_of_a_call(path: Path) -> None:
    """One write, which nobody answered."""
    writer = TraceWriter(path, ABOUT)
    message = create(PODS, b"")
    writer.add(Row(0, Kind.BEGIN, 0, 0, f"{KV}/Txn".encode(), message=message))
    writer.close(SUMMARY)


async def test_server_is_stopped_when_nobody_asks_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the replay, when it is only looked at, and after it."""
    left = connections_when_stopped(monkeypatch)
    trace_of_a_call(tmp_path / "trace")
    command = f"{sys.executable} -m tests.bench.fake_etcd {{port}} none 1 {{dir}}"
    fake = Target(name="fake", command=command)
    wish = Wish(trace=tmp_path / "trace", targets=[fake], out=tmp_path / "out")
    await replay(wish, stop=asyncio.Event(), show=lambda *_: None)
    assert left == [0, 0]


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

        (done,) = await replay(wish, stop=stop, show=show)
    assert (done.state, done.counts.sent) == ("INCOMPLETE", 1)
    assert done.not_sent == {CUT_OFF: {"KV/Txn": 1}}
    facts = Records(done.folder).facts
    assert facts["state"] == "INCOMPLETE"
    assert min(facts["fsync_us"], facts["loopback_us"]) > 0, "of the machine, just before"


async def test_waiting_for_a_watch_heeds_the_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watch that the server never says to have created holds nobody up who wants to stop."""
    stop = asyncio.Event()

    def lost(*_: object) -> None:
        asyncio.get_running_loop().call_later(0.5, stop.set)

    monkeypatch.setattr(WatchStream, "message", lost)
    writer = TraceWriter(tmp_path / "trace", ABOUT)
    created = pb.WatchResponse(created=True).SerializeToString()
    writer.add(Row(0, Kind.BEGIN, 0, 0, WATCH.encode()))
    writer.add(Row(1, Kind.UP, 0, 0, message=watch_from(PODS)))
    writer.add(Row(2, Kind.DOWN, 0, 0, message=created))
    writer.add(Row(3, Kind.UP, 0, 0, message=watch_from(PODS)))
    writer.add(Row(4, Kind.CANCEL, 0, 0))
    writer.close(SUMMARY)
    async with target() as (_, to):
        out = tmp_path / "out"
        wish = Wish(trace=tmp_path / "trace", targets=[to], out=out, timeout_us=600_000_000)
        async with asyncio.timeout(30) as patience:
            (done,) = await replay(wish, stop=stop, show=lambda *_: None)
    assert not patience.expired()
    assert (done.state, done.counts.sent) == ("INCOMPLETE", 1)
