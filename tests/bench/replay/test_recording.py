"""A client behind the proxy is served as without it, and the file holds what was said."""

import asyncio
import os
import re
import resource
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from bench.replay.methods import RPCS
from bench.replay.trace import GROUP_BYTES_MAX, Kind, Row, Trace, TraceError, TraceWriter
from kvstore.pb import rpc_pb2 as pb
from tests.bench.replay.stand import (
    ABOUT,
    KEEP_ALIVE,
    KV,
    LEASE,
    SUMMARY,
    WATCH,
    client,
    create,
    record_to,
    recording,
    update,
    watch_from,
)
from tests.house import House, living, memory, page

pytestmark = pytest.mark.slow
PREFIX = b"/registry/pods/"
KEY = PREFIX + b"a/1"


async def test_unary_calls_are_served_and_kept_byte_for_byte(tmp_path: Path) -> None:
    """What a client sends and gets are the bytes in the file, with times in order."""
    sent = create(KEY, b"v" * 200_000)
    async with recording(tmp_path / "trace") as stand, client(stand.port) as user:
        got = await user.call(f"{KV}/Txn", sent, ("hasleader", "true"))
        assert pb.TxnResponse.FromString(got).succeeded
        lost = await user.txn(create(KEY, b"w"))
        shown = await user.range(pb.RangeRequest(key=KEY))
    assert not lost.succeeded
    assert [kv.value for kv in shown.kvs] == [b"v" * 200_000]
    begin, end = stand.of(0)
    assert (begin.path, begin.message, begin.leader) == (f"{KV}/Txn".encode(), sent, True)
    assert (end.kind, end.code, end.message) == (Kind.END, 0, got)
    assert 0 < begin.timeout_us <= 20_000_000
    assert begin.at < end.at
    assert [row.at for row in stand.rows] == sorted(row.at for row in stand.rows)
    assert len(stand.rows) == 6
    assert stand.summary is not None
    assert (stand.summary["calls"], stand.summary["connections"]) == (3, 1)


async def test_errors_come_through(tmp_path: Path) -> None:
    """A refusal has the server's code and text, for the client and in the file."""
    async with recording(tmp_path / "trace") as stand, client(stand.port) as user:
        revoke = pb.LeaseRevokeRequest(ID=77).SerializeToString()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await user.call(f"{LEASE}/LeaseRevoke", revoke)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    (_, end) = stand.of(0)
    assert (end.code, end.text) == (5, refused.value.details())
    assert "lease not found" in end.text


async def watchers(house: House) -> int:
    """How many watches the server has."""
    _, text = await page(house.metrics_port, "/metrics")
    (line,) = re.findall(r"^etcd_debugging_mvcc_watcher_total (.*)$", text, re.MULTILINE)
    return int(float(line))


async def test_watch_is_served_and_kept(tmp_path: Path) -> None:
    """A watch gets its events through the proxy; every message is in the file; a cancel too."""
    async with recording(tmp_path / "trace") as stand, client(stand.port) as user:
        stream = user.stream(WATCH)
        await stream.write(watch_from(PREFIX))
        created = await stream.read()
        assert pb.WatchResponse.FromString(created).created
        await user.txn(create(KEY, b"one"))
        shown = await stream.read()
        assert [e.kv.key for e in pb.WatchResponse.FromString(shown).events] == [KEY]
        assert await watchers(stand.house) == 1
        stream.cancel()
        await user.range(pb.RangeRequest(key=KEY))
        assert await watchers(stand.house) == 0
    (watching,) = stand.calls("Watch")
    rows = [(row.kind, row.message) for row in stand.of(watching.call)]
    up = (Kind.UP, watch_from(PREFIX))
    down = [(Kind.DOWN, created), (Kind.DOWN, shown)]
    assert rows == [(Kind.BEGIN, b""), up, *down, (Kind.CANCEL, b"")]


async def test_keep_alive_ends_with_its_client_s_half(tmp_path: Path) -> None:
    """A keep-alive is answered; a client that says it is done gets the server's end."""
    async with recording(tmp_path / "trace") as stand, client(stand.port) as user:
        lease = await user.grant(60)
        stream = user.stream(KEEP_ALIVE)
        await stream.write(pb.LeaseKeepAliveRequest(ID=lease).SerializeToString())
        kept = pb.LeaseKeepAliveResponse.FromString(await stream.read())
        assert (kept.ID, kept.TTL) == (lease, 60)
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK
    (begun,) = stand.calls("LeaseKeepAlive")
    kinds = [row.kind for row in stand.of(begun.call)]
    assert kinds == [Kind.BEGIN, Kind.UP, Kind.DOWN, Kind.HALF_CLOSE, Kind.END]


async def test_stream_of_answers_ends(tmp_path: Path) -> None:
    """A server's stream comes whole and ends as the server ends it."""
    async with recording(tmp_path / "trace") as stand, client(stand.port) as user:
        for n in range(3):
            await user.txn(create(PREFIX + b"%d" % n, b"v" * 10))
        wish = pb.RangeRequest(key=PREFIX, range_end=b"/registry/pods0").SerializeToString()
        whole = pb.RangeResponse()
        async for raw in user.answers(f"{KV}/RangeStream", wish):
            whole.MergeFrom(pb.RangeStreamResponse.FromString(raw).range_response)
        assert len(whole.kvs) == 3
    (begun,) = stand.calls("RangeStream")
    kinds = [row.kind for row in stand.of(begun.call)]
    assert kinds[:2] == [Kind.BEGIN, Kind.UP]
    assert kinds[-1] == Kind.END
    assert set(kinds[2:-1]) == {Kind.DOWN}


async def test_what_was_there_comes_first(tmp_path: Path) -> None:
    """The objects that a recording finds are in the file, and the revision at which."""
    async with (
        recording(
            tmp_path / "trace", before=lambda direct: direct.txn(create(KEY, b"old"))
        ) as stand,
        client(stand.port) as user,
    ):
        await user.txn(update(KEY, b"new", 2))
    first = stand.rows[0]
    assert first.kind == Kind.OBJECTS
    page = pb.RangeResponse.FromString(first.message)
    assert [(kv.key, kv.value, kv.mod_revision) for kv in page.kvs] == [(KEY, b"old", 2)]
    assert Trace(tmp_path / "trace").about["revision"] == 2


async def test_each_client_has_its_own_connection(tmp_path: Path) -> None:
    """Calls of two clients are of two connections, upstream as in the file."""
    async with recording(tmp_path / "trace") as stand:
        async with client(stand.port) as one, client(stand.port) as two:
            await one.txn(create(PREFIX + b"1", b""))
            await two.txn(create(PREFIX + b"2", b""))
        async with client(stand.port) as three:
            await three.txn(create(PREFIX + b"3", b""))
    begun = [row.connection for row in stand.rows if row.kind == Kind.BEGIN]
    assert begun == [0, 1, 2]


def test_upstream_that_is_not_there(tmp_path: Path) -> None:
    """Nobody listens: one line that says so, and no file."""
    with pytest.raises(TraceError, match=r"the upstream 127\.0\.0\.1:1 cannot be reached"):
        asyncio.run(record_to(tmp_path / "trace", "127.0.0.1:1", asyncio.Event()))
    assert not list(tmp_path.iterdir())


async def test_upstream_that_becomes_another(tmp_path: Path) -> None:
    """Who listens now does not speak HTTP/2: that ends the recording, it is not tried for ever."""
    told: asyncio.Queue[str] = asyncio.Queue()
    stop = asyncio.Event()
    async with living(House([memory()])) as house:
        port = house.port
        out = record_to(tmp_path / "trace", f"127.0.0.1:{port}", stop, told=told.put_nowait)
        task = asyncio.create_task(out)
        address = await told.get()
    async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port):
        async with client(int(address.rpartition(":")[2])) as user:
            with pytest.raises(grpc.aio.AioRpcError) as lost:
                await user.txn(create(KEY, b"v"))
        assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(TraceError, match="ends connections at once"):
            await task
    assert [row.kind for row in Trace(tmp_path / "trace")] == [Kind.BEGIN, Kind.END]


async def test_file_that_exists_is_kept(tmp_path: Path) -> None:
    """A recording never overwrites another."""
    (tmp_path / "trace").write_bytes(b"dear")
    async with living(House([memory()])) as house:
        with pytest.raises(TraceError, match="exists"):
            await record_to(tmp_path / "trace", f"127.0.0.1:{house.port}", asyncio.Event())
    assert (tmp_path / "trace").read_bytes() == b"dear"


async def test_upstream_that_goes_away(tmp_path: Path) -> None:
    """The recording ends with one line that says so; what there was until then is in the file."""
    told: asyncio.Queue[str] = asyncio.Queue()
    stop = asyncio.Event()
    async with living(House([memory()])) as house:
        upstream = f"127.0.0.1:{house.port}"
        task = asyncio.create_task(
            record_to(tmp_path / "trace", upstream, stop, told=told.put_nowait)
        )
        port = int((await told.get()).rpartition(":")[2])
        async with client(port) as user:
            await user.txn(create(KEY, b"v"))
            stream = user.stream(WATCH)
            await stream.write(watch_from(PREFIX))
            await stream.read()
            house.server.stop()
            with pytest.raises(TraceError, match=r"went away.*holds what was recorded"):
                await task
            assert await stream.code() is grpc.StatusCode.UNAVAILABLE
    rows = list(Trace(tmp_path / "trace"))
    assert [row.path for row in rows if row.path] == [f"{KV}/Txn".encode(), WATCH.encode()]
    assert rows[-1].kind == Kind.END
    assert "went away" in Trace(tmp_path / "trace").summary["error"]
    assert not stop.is_set()


def test_rows_in_memory_are_bounded(tmp_path: Path) -> None:
    """However many messages there are, few are in memory."""
    writer = TraceWriter(tmp_path / "trace", ABOUT)
    row = Row(0, Kind.DOWN, 0, 0, message=b"m" * 100_000)
    held = []
    for _ in range(200):
        writer.add(row)
        held.append(writer.held)
    writer.close(SUMMARY)
    assert max(size for _, size in held) < GROUP_BYTES_MAX
    assert len(list(Trace(tmp_path / "trace"))) == 200


def test_file_that_is_no_trace(tmp_path: Path) -> None:
    """Something else is refused by one line of ours, as is a recording that has lost its end."""
    (tmp_path / "other").write_bytes(b"something else")
    with pytest.raises(TraceError, match="is not a recording of kvstore-bench"):
        Trace(tmp_path / "other")
    writer = TraceWriter(tmp_path / "whole", ABOUT)
    writer.add(Row(0, Kind.DOWN, 0, 0, message=secrets.token_bytes(100_000)))
    writer.close(SUMMARY)
    whole = (tmp_path / "whole").read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(TraceError, match="a recording that was not finished"):
            Trace(tmp_path / "cut")
    changed = whole[:50_000] + bytes([whole[50_000] ^ 1]) + whole[50_001:]
    for damaged in (whole[:4] + bytes(50_000) + whole[50_004:], changed):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(TraceError, match="is damaged in its part 0"):
            list(Trace(tmp_path / "damaged"))


@contextmanager
def files_hold(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writes", [1, 6], ids=["at its end", "before"])
async def test_disk_that_is_full_is_said(tmp_path: Path, writes: int) -> None:
    """The one line says why, once, and that nothing is kept; nothing is."""
    out, stop = tmp_path / "trace", asyncio.Event()
    told: asyncio.Queue[str] = asyncio.Queue()
    async with living(House([memory()])) as house:
        upstream = f"127.0.0.1:{house.port}"
        task = asyncio.create_task(record_to(out, upstream, stop, told=told.put_nowait))
        port = int((await told.get()).rpartition(":")[2])
        with files_hold(100_000):
            async with client(port) as user:
                with suppress(grpc.aio.AioRpcError):  # the recording ends once it cannot go on
                    for number in range(writes):
                        value = secrets.token_bytes(1_000_000)
                        await user.txn(create(KEY + b"%d" % number, value))
                stop.set()
                with pytest.raises(TraceError) as raised:
                    await task
    assert str(raised.value) == f"{out} cannot be written: file too large; nothing is kept"
    assert await asyncio.to_thread(os.listdir, tmp_path) == []


def test_all_of_the_api_is_recorded() -> None:
    """No method of etcd's services is left out."""
    names = {rpc.name.decode() for rpc in RPCS.values()}
    assert {"KV/Txn", "Watch/Watch", "Maintenance/Snapshot", "Cluster/MemberList"} <= names
    assert len(names) == 42
