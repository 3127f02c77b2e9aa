"""A server's life: it serves, it stops in order, it ends when it must."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest
from hyperframe.frame import DataFrame

from backends.memory import MemoryBackend, MemoryDisk, Steps
from kvstore.backend import Batch, Cluster, CommitResult, Fence, IndexRow, Outcome, Sizes
from kvstore.clock import ManualClock
from kvstore.commit import Commits
from kvstore.config import CommitConfig
from kvstore.errors import BackendError
from kvstore.lease import Lessor
from kvstore.listen import ListenError
from kvstore.pb import rpc_pb2 as pb
from kvstore.shard_config import ShardConfig, ShardSpec
from kvstore.store_health import StoreHealth
from tests.house import (
    PUT,
    QUICK,
    STATUS,
    WATCH,
    House,
    get,
    living,
    memory,
    page,
    put,
)
from tests.transport.peer import connected, message
from tests.transport.running import eventually

STOPPED = (14, "etcdserver: server stopped")


pytestmark = pytest.mark.usefixtures("interpreter", "loop_handler")


async def test_serving() -> None:
    """Puts and gets over a socket, pages beside them, all of it durable after the stop."""
    disk = MemoryDisk()
    backend = MemoryBackend(disk, later=asyncio.get_running_loop().call_soon)
    async with living(House([backend])) as house, connected(house.port) as peer:
        assert (await peer.answer(put(peer, b"k"))).status == (0, "")
        assert await get(peer, b"k") == [b"v"]
        assert await page(house.port, "/readyz") == (200, "ok\n")
        assert await page(house.metrics_port, "/livez") == (200, "ok\n")
        assert (await page(house.metrics_port, "/version"))[0] == 404
    assert [row[2] for row in disk.rows.values()] == [b"k"]
    assert disk.holder is None


class TestStop:
    """The way out, in order."""

    async def test_what_was_begun_ends(self) -> None:
        """A put that waits for its commit is answered, a watch is told why it ends, and nobody new
        gets in.
        """
        steps = Steps()
        house = House([memory(steps)])
        async with living(house), connected(house.port) as peer:
            watching = peer.start(WATCH)
            create = pb.WatchCreateRequest(key=b"k")
            body = pb.WatchRequest(create_request=create).SerializeToString()
            peer.send(DataFrame(watching, message(body)))
            putting = put(peer, b"k")
            await eventually(lambda: len(steps.waiting) > 0)
            house.server.stop()
            ended = await peer.answer(watching)
            assert ended.status == STOPPED
            assert len(ended.messages) == 1  # created; the put is not durable
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", house.port)
            assert not house.said("stopped")
            steps.run_all()
            assert (await peer.answer(putting)).status == (0, "")
        assert house.log[-1]["msg"] == "stopped"

    async def test_commits_without_a_client(self) -> None:
        """What was appended becomes durable even if its client has gone."""
        steps, disk = Steps(), MemoryDisk()
        at_close: list[int] = []

        class Closing(MemoryBackend):
            """Notes what is stored when it is closed."""

            async def close(self) -> None:
                at_close.append(len(disk.rows))
                await super().close()

        house = House([Closing(disk, later=steps)])
        async with living(house):
            async with connected(house.port) as peer:
                put(peer, b"k")
                await eventually(lambda: len(steps.waiting) > 0)
            house.server.stop()
            await eventually(lambda: house.sockets.metrics[0].sock.fileno() < 0)
            assert not disk.rows
            steps.run_all()
        assert at_close == [1]

    async def test_health_is_told(self) -> None:
        """GRPC health says NOT_SERVING while the server drains."""
        steps = Steps()
        house = House([memory(steps)])
        async with living(house), connected(house.port) as peer:
            health = peer.start("/grpc.health.v1.Health/Watch", b"")
            await peer.until(lambda f: isinstance(f, DataFrame))
            house.server.stop()
            assert (await peer.answer(health)).messages == [b"\x08\x02"]

    async def test_stop_has_an_end(self) -> None:
        """A client that never ends its request does not keep the server beyond the stop's bound."""
        config = replace(QUICK, server=replace(QUICK.server, stop_timeout=0.05))
        async with living(House([memory()], config)) as house, connected(house.port) as peer:
            endless = peer.start(PUT)
            peer.send(DataFrame(endless, message(b"half")[:3]))
            await peer.settle()
            house.server.stop()
            await peer.read_all()

    async def test_storage_that_does_not_close(self) -> None:
        """A database that hangs does not keep the server beyond the stop's bounds, exit code 1."""

        class Hanging(MemoryBackend):
            """Its disk does not answer any more."""

            def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
                """Never ends."""

            async def close(self) -> None:
                await asyncio.Event().wait()

        server = replace(QUICK.server, stop_timeout=0.1, close_timeout=0.1)
        hanging = Hanging(MemoryDisk(), later=asyncio.get_running_loop().call_soon)
        house = House([hanging], replace(QUICK, server=server))
        async with (
            asyncio.timeout(10),
            living(house, exit_code=1),
            connected(house.port) as peer,
        ):
            put(peer, b"k")
            await peer.settle()
        assert house.said("storage could not be closed")
        assert house.log[-1]["msg"] == "stopped"

    async def test_stop_while_loading(self) -> None:
        """A server that is told to stop before it is ready loads no further and never listens."""

        class Long(MemoryBackend):
            """Has endless rows, and stops the server after some."""

            async def load_index(self, sink: Callable[[list[IndexRow]], None]) -> None:
                for revision in range(2, 1_000_000):
                    if revision == 10:
                        house.server.stop()
                    sink([(revision, 0, b"%d" % revision, revision, 1, 0)])

        disk = MemoryDisk()
        house = House([Long(disk, later=asyncio.get_running_loop().call_soon)])
        assert await house.server.serve() == 0
        assert not house.said("ready to serve client requests")
        assert disk.holder is None


class TestFailure:
    """When the server must not go on, and when it must."""

    async def test_storage_lost(self) -> None:
        """A broken shard: waiting writes hear that their outcome is unknown, exit code 1."""

        class Breaking(MemoryBackend):
            """Its disk fails with the first commit."""

            def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
                self._later(lambda: done(CommitResult(Outcome.BROKEN, "I/O error")))

        backend = Breaking(MemoryDisk(), later=asyncio.get_running_loop().call_soon)
        async with (
            living(House([backend]), exit_code=1) as house,
            connected(house.port) as peer,
        ):
            assert (await peer.answer(put(peer, b"k"))).status == STOPPED
            await eventually(lambda: house.said("stopped"))
        (line,) = (line for line in house.log if line["level"] == "error")
        assert line["msg"] == "storage failed; shutting down"
        assert "I/O error" in str(line["reason"])

    async def test_idle_storage_lost(self) -> None:
        """Storage that breaks between two commits ends the server without waiting for a third."""
        backend = memory()
        async with living(House([backend]), exit_code=1) as house:
            backend.on_broken("the checkpoint failed")
            await eventually(lambda: house.said("stopped"))
        (line,) = (line for line in house.log if line["level"] == "error")
        assert "the checkpoint failed" in str(line["reason"])

    async def test_stuck_storage(self) -> None:
        """A commit that hangs: not ready, but alive, until it returns."""
        steps = Steps()
        async with living(House([memory(steps)])) as house, connected(house.port) as peer:
            putting = put(peer, b"k")
            assert (await peer.answer(putting)).status == (14, "etcdserver: request timed out")
            status, body = await page(house.port, "/readyz")
            assert status == 503
            failed = "etcdserver: request timed out (shard default: storage does not answer)"
            assert f"[-]linearizable_read failed: {failed}\n" in body
            assert (await page(house.port, "/livez"))[0] == 200
            assert (await page(house.port, "/health"))[0] == 503
            steps.run_all()
            assert (await page(house.port, "/readyz"))[0] == 200
        stuck, back = (line for line in house.log if "shard" in line)
        told = ("error", "shard does not commit", "default", "storage does not answer")
        assert tuple(stuck[name] for name in ("level", "msg", "shard", "reason")) == told
        assert (back["level"], back["msg"], back["shard"]) == (
            "info",
            "shard commits again",
            "default",
        )
        assert isinstance(back["seconds"], float)

    async def test_storage_that_refuses(self) -> None:
        """A full disk is told at the first refusal, not when clients give up, and once until a
        commit succeeds.
        """
        full, refused = True, 0

        class Full(MemoryBackend):
            """Commits nothing while it is full."""

            def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
                nonlocal refused
                if full:
                    refused += 1
                    later(lambda: done(CommitResult(Outcome.NOT_COMMITTED, "SQLITE_FULL")))
                else:
                    super().commit(batch, done)

        later = asyncio.get_running_loop().call_soon
        house = House([Full(MemoryDisk(), later=later)])
        async with living(house), connected(house.port) as peer:
            putting = put(peer, b"k")
            await eventually(lambda: refused > 2)
            (line,) = (line for line in house.log if line["level"] == "error")
            assert (line["msg"], line["reason"]) == ("shard does not commit", "SQLITE_FULL")
            assert (await peer.answer(putting)).status == (14, "etcdserver: request timed out")
            assert "(shard default: SQLITE_FULL)" in (await page(house.port, "/readyz"))[1]
            full = False
            await eventually(lambda: house.said("shard commits again"))
            assert (await page(house.port, "/readyz"))[0] == 200
        assert sum("shard" in line for line in house.log) == 2

    async def test_checks_of_a_lost_shard(self) -> None:
        """When home is lost for good no read is answered, serializable or not."""
        backend = memory()
        later = asyncio.get_running_loop().call_soon
        fence = await backend.open()
        commits = Commits(
            [(backend, fence)],
            clock=ManualClock(),
            config=CommitConfig(),
            call_soon=later,
            call_later=asyncio.get_running_loop().call_later,
        )
        verdicts: list[str | None] = []
        commits.append(0, [(2, 0, b"k", 2, 1, 0, b"v")], 1)
        commits.give_up(0, "I/O error")
        for serializable in (True, False):
            StoreHealth(commits).check_read(verdicts.append, serializable=serializable)
        assert verdicts == [STOPPED[1], STOPPED[1]]

    async def test_check_waits_for_the_commit_under_way(self) -> None:
        """A linearizable check is answered when what is pending is durable."""
        steps = Steps()
        async with living(House([memory(steps)])) as house, connected(house.port) as peer:
            putting = put(peer, b"k")
            await eventually(lambda: len(steps.waiting) > 0)
            checking = asyncio.create_task(page(house.port, "/readyz?verbose"))
            steps.run_all()
            assert (await checking)[0] == 200
            assert (await peer.answer(putting)).status == (0, "")

    @pytest.mark.parametrize(
        ("error", "exit_code"), [(ValueError("one request's"), 0), (AssertionError("ours"), 1)]
    )
    async def test_handler_fails(self, error: Exception, exit_code: int) -> None:
        """An exception costs its request; a broken assertion means that memory may be wrong."""

        class Odd(MemoryBackend):
            """Cannot tell its size."""

            def sizes(self) -> Sizes:
                raise error

        backend = Odd(MemoryDisk(), later=asyncio.get_running_loop().call_soon)
        async with (
            living(House([backend]), exit_code=exit_code) as house,
            connected(house.port) as peer,
        ):
            answer = await peer.call(STATUS)
            assert answer.status[0] == 13
            assert str(error) not in answer.status[1]
            if exit_code:
                await eventually(lambda: house.said("stopped"))
            else:
                assert (await peer.answer(put(peer, b"k"))).status == (0, "")
        (line,) = (line for line in house.log if line["level"] == "error")
        assert str(error) in str(line["exception"])

    async def test_tick_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A periodic task that raises ends the server."""

        def broken(_: Lessor) -> float:
            raise RuntimeError("planted")

        monkeypatch.setattr(Lessor, "tick", broken)
        async with living(House([memory()]), exit_code=1) as house:
            await eventually(lambda: house.said("stopped"))
        assert house.said("a periodic task failed")

    @pytest.mark.parametrize(("error", "exit_code"), [(OSError("reset"), 0), (KeyError("k"), 1)])
    async def test_callback_fails(self, error: Exception, exit_code: int) -> None:
        """An exception that reaches the loop ends the server, unless it is a connection's."""

        def callback() -> None:
            raise error

        async with living(House([memory()]), exit_code=exit_code) as house:
            asyncio.get_running_loop().call_soon(callback)
            await eventually(lambda: any(line["level"] == "error" for line in house.log))
            if exit_code:
                await eventually(lambda: house.said("stopped"))

    async def test_failures_are_not_a_flood(self) -> None:
        """A thousand failures of one kind are one line, and counted."""
        async with living(House([memory()])) as house:
            for _ in range(1000):
                house.server._handler_failed("handler failed", ValueError("again"))
            house.server._handler_failed("handler failed", KeyError("another kind"))
            body = (await page(house.port, "/metrics"))[1]
        assert sum(line["level"] == "error" for line in house.log) == 2
        assert "kvstore_failures_total 1001.0" in body


class TestStart:
    """Nobody is let in too early, and what keeps a server from starting leaves nothing behind."""

    async def test_refused_until_loaded(self) -> None:
        """Before the store can answer, connections are refused: they do not wait in a queue."""
        loaded = asyncio.Event()

        class Slow(MemoryBackend):
            """Takes its time to load."""

            async def load_index(self, sink: Callable[[list[IndexRow]], None]) -> None:
                with pytest.raises(ConnectionRefusedError):
                    await asyncio.open_connection("127.0.0.1", house.port)
                loaded.set()

        later = asyncio.get_running_loop().call_soon
        house = House([Slow(MemoryDisk(), later=later)])
        async with living(house), connected(house.port) as peer:
            assert loaded.is_set()
            assert await get(peer, b"k") == []

    async def test_shard_that_is_in_use(self) -> None:
        """When one shard cannot be taken, those taken before are let go."""

        class Taken(MemoryBackend):
            """Somebody has it."""

            async def open(self, cluster: Cluster | None = None, *, known: bool = False) -> Fence:
                raise BackendError("in use")

        disk = MemoryDisk()
        later = asyncio.get_running_loop().call_soon
        backends = [MemoryBackend(disk, later=later), Taken(MemoryDisk(), later=later)]
        shards = ShardConfig([ShardSpec("default", "memory:"), ShardSpec("other", "memory:")])
        house = House(backends, shards=shards)
        with pytest.raises(BackendError, match="in use"):
            await house.server.serve()
        assert disk.holder is None
        assert house.log == []

    async def test_port_taken_meanwhile(self) -> None:
        """A port that somebody else listens on by the time of ours is an error, not a hang."""
        disk = MemoryDisk()
        house = House([MemoryBackend(disk, later=asyncio.get_running_loop().call_soon)])
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", house.port))
            other.listen()
            with pytest.raises(ListenError, match="cannot listen"):
                await house.server.serve()
        assert disk.holder is None
        assert house.log == []

    async def test_close_that_fails(self) -> None:
        """A database that cannot be closed is told; nothing acknowledged is lost, exit code 1."""

        class Sticky(MemoryBackend):
            """Its last checkpoint fails."""

            async def close(self) -> None:
                raise BackendError("disk full")

        backend = Sticky(MemoryDisk(), later=asyncio.get_running_loop().call_soon)
        async with living(House([backend]), exit_code=1) as house, connected(house.port) as peer:
            assert (await peer.answer(put(peer, b"k"))).status == (0, "")
        assert house.said("storage could not be closed")


async def test_put_is_not_answered_by_a_page() -> None:
    """Calls that HTTP/1.1 cannot make are not served there."""
    async with living(House([memory()])) as house:
        assert (await page(house.port, PUT))[0] == 404
