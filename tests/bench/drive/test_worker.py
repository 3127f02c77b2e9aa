"""One generator process: the plan from its first object to the records; what ends it early."""

import asyncio
import json
import pickle
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bench import plan
from bench.client.connection import Connection
from bench.clock import now_us
from bench.drive.preload import Preload, PreloadError
from bench.drive.worker import Assignment, Worker
from bench.plan import Actor, Disturbance, Object, Plan, Step, Trouble, Verb, Watcher
from bench.records import (
    EVENTS,
    INCIDENTS,
    OPS,
    PRELOADED,
    WATCHES,
    Outcome,
    Records,
)
from bench.run.crew import Crew, CrewError
from bench.values import digest
from kvstore.transport.server import Server
from tests.bench.drive.world import PODS, Store, living
from tests.transport.limits import TEST_LIMITS
from tests.transport.running import bound, eventually

KEYS = [PODS + b"%02d" % n for n in range(100)]
UPDATE = Step(Verb.UPDATE, KEYS[0], "update", think_us=5000, shape="pod", size=300)


ONCE = pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"])
"""For tests of a process that has a loop of its own."""


def plan_of(*actors: Sequence[Step], duration_us: int = 100_000, **more: object) -> Plan:
    """A plan of actors over some objects, two apiservers and a watcher."""
    made = Plan(
        duration_us=duration_us,
        apiservers=2,
        resources=(PODS,),
        preload=tuple(Object(key, "pod", 200) for key in KEYS),
        actors=tuple(Actor(f"a{n}", n % 2, tuple(steps)) for n, steps in enumerate(actors)),
        watchers=(Watcher("own", b"/registry/"),),
    )
    fields = {name: getattr(made, name) for name in Plan.__dataclass_fields__}
    return Plan(**(fields | more))


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Store, int]]:
    """The fake etcd on a port."""
    store = Store()
    server = Server(
        methods=store.methods(),
        http_handler=lambda _: None,
        limits=TEST_LIMITS,
        clock=time.monotonic,
        wall=time.time,
        on_failure=lambda what, error: pytest.fail(f"{what}: {error!r}"),
    )
    sock = bound()
    server.listen(sock)
    try:
        yield store, sock.getsockname()[1]
    finally:
        await server.drain(0.0, message="server stopped")


def assign(folder: Path, made: Plan, port: int, **more: object) -> None:
    """What a process of the run needs, and what readers of its records need."""
    folder.mkdir(exist_ok=True)
    (folder / "plan.pickle").write_bytes(pickle.dumps(made))
    assignment = Assignment(
        plan=str(folder / "plan.pickle"),
        host="127.0.0.1",
        port=port,
        run="r",
        prefix="",
        seed=1,
        parts=1,
        timeout_us=300_000,
        client="lean",
        range_stream=False,
    )
    (folder / "assignment.json").write_text(json.dumps({**assignment, **more}))
    (folder / "run.json").write_text("{}")


async def work(worker: Worker, load: float = 10.0) -> None:
    """All that a process is told in a run."""
    async with asyncio.timeout(load + 10), asyncio.TaskGroup() as group:
        await worker.prepare(group)
        await worker.watch(group)
        await worker.load(now_us() + 20_000)
        await worker.drain(worker.site.head_revision)
        worker.finish()


@pytest.mark.slow
async def test_watches_lost_at_the_end_are_waited_for(tmp_path: Path) -> None:
    """A connection that is lost after the last event has its watch again when lag has drained."""
    async with serving() as (_, port):
        assign(tmp_path, plan_of([UPDATE] * 2), port)
        worker = Worker(tmp_path, 0, lambda **_: None)
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            await worker.watch(group)
            await worker.load(now_us() + 20_000)
            for line in worker._lines:
                line.close(reset=True)
            await eventually(lambda: not any(w.created for w in worker._watchings))
            await worker.drain(worker.site.head_revision)
            there = [watching.created for watching in worker._watchings]
            worker.finish()
    assert there
    assert all(there)


@pytest.mark.slow
async def test_a_plan_is_done(tmp_path: Path) -> None:
    """Objects exist first, every step is taken, every watch is told of everything."""
    made = plan_of([UPDATE] * 5, [UPDATE._replace(key=KEYS[1])] * 5)
    said: list[dict[str, object]] = []
    async with serving() as (store, port):
        assign(tmp_path, made, port)
        await work(Worker(tmp_path, 0, lambda **facts: said.append(facts)))
    records = Records(tmp_path)
    ops = records.frame(OPS)
    assert 10 == ((ops["verb"] == Verb.UPDATE) & (ops["outcome"] == Outcome.OK)).sum()
    assert (ops["sent"][ops["actor"] >= 0] >= ops["due"][ops["actor"] >= 0]).all()
    assert sorted(KEYS) == sorted(
        records.frame(PRELOADED).text("key")[code] for code in records.frame(PRELOADED)["key"]
    )
    events, watches = records.frame(EVENTS), records.frame(WATCHES)
    assert [10] * 3 == [int((events["watch"] == watch).sum()) for watch in watches["watch"]]
    assert store.revision == 1 + 100 + 10
    assert {"progress"} == {facts["said"] for facts in said}


@pytest.mark.slow
async def test_parts_share_a_plan(tmp_path: Path) -> None:
    """Two processes do all of a plan, nothing twice, and number without asking each other."""
    made = plan_of(*[[UPDATE._replace(key=KEYS[n])] * 3 for n in range(4)])
    async with serving() as (_, port):
        assign(tmp_path, made, port, parts=2)
        workers = [Worker(tmp_path, part, lambda **_: None) for part in range(2)]
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                await worker.prepare(group)
            for worker in workers:
                await worker.watch(group)
            loads = [group.create_task(worker.load(now_us() + 20_000)) for worker in workers]
            await asyncio.gather(*loads)
            for worker in workers:
                worker.finish()
    records = Records(tmp_path)
    ops, watches = records.frame(OPS), records.frame(WATCHES)
    assert 100 == len(records.frame(PRELOADED))
    assert 12 == (ops["verb"] == Verb.UPDATE).sum()
    assert len(set(ops["op"].tolist())) == len(ops)
    assert 3 == len(set(watches["watch"].tolist())) == len(watches)
    assert not set(watches["connection"][watches["apiserver"] == 0].tolist()) & set(
        watches["connection"][watches["apiserver"] == 1].tolist()
    )


@pytest.mark.slow
async def test_what_is_under_way_at_the_end_is_recorded(tmp_path: Path) -> None:
    """Told to stop, a process waits for answers, and records calls that got none as unknown."""
    made = plan_of([UPDATE] * 1000, duration_us=60_000_000)
    async with serving() as (store, port):
        assign(tmp_path, made, port)
        worker = Worker(tmp_path, 0, lambda **_: None)
        async with asyncio.TaskGroup() as group:
            await worker.prepare(group)
            await worker.watch(group)
            load = group.create_task(worker.load(now_us()))
            await eventually(lambda: store.revision > 103)
            store.silent.add(b"/etcdserverpb.KV/Txn")
            asked = len(store.asked)
            await eventually(lambda: len(store.asked) > asked)
            worker.site.over = True
            await load
            worker.finish()
    ops = Records(tmp_path).frame(OPS)
    updates = ops["outcome"][ops["verb"] == Verb.UPDATE].tolist()
    assert [Outcome.UNKNOWN] == updates[-1:]
    assert store.revision == 101 + updates.count(Outcome.OK)
    assert len(updates) == updates.count(Outcome.OK) + 1


@pytest.mark.slow
async def test_finish_records_calls_in_flight(tmp_path: Path) -> None:
    """A process that is ended in the midst of a call records it as one that may have been done."""
    made = plan_of([UPDATE], duration_us=60_000_000)
    async with serving() as (store, port):
        assign(tmp_path, made, port)
        worker = Worker(tmp_path, 0, lambda **_: None)
        async with asyncio.TaskGroup() as group:
            await worker.prepare(group)
            await worker.watch(group)
            store.silent.add(b"/etcdserverpb.KV/Txn")
            asked = len(store.asked)
            load = group.create_task(worker.load(now_us()))
            await eventually(lambda: len(store.asked) > asked)
            worker.finish()
            load.cancel()
    ops = Records(tmp_path).frame(OPS)
    assert [Outcome.UNKNOWN] == ops["outcome"][ops["verb"] == Verb.UPDATE].tolist()


@pytest.mark.slow
async def test_progress_tells_whether_there_is_a_connection(tmp_path: Path) -> None:
    """Before anybody wants one all is well; with a server that is gone it is told that none is."""
    said: list[bool] = []

    def say(**facts: object) -> None:
        if facts["said"] == "progress":
            said.append(bool(facts["connected"]))

    made = plan_of([UPDATE], duration_us=60_000_000)
    async with serving() as (_, port):
        assign(tmp_path, made, port)
        worker = Worker(tmp_path, 0, say)
        async with asyncio.TaskGroup() as group:
            await worker.prepare(group)
            await worker.watch(group)
            load = group.create_task(worker.load(now_us()))
            await eventually(lambda: said[-2:] == [True, True])
            worker.site.port = 1
            for line in worker._lines:
                line.close(reset=True)
            await eventually(lambda: said[-2:] == [False, False])
            worker.finish()
            load.cancel()
    assert said[0]


async def test_finish_records_calls_of_a_connection_that_closes(tmp_path: Path) -> None:
    """What is under way on a connection that takes no more calls is recorded as well."""
    made = plan_of([UPDATE], duration_us=60_000_000)
    async with serving() as (store, port):
        assign(tmp_path, made, port)
        worker = Worker(tmp_path, 0, lambda **_: None)
        async with asyncio.TaskGroup() as group:
            await worker.prepare(group)
            await worker.watch(group)
            store.silent.add(b"/etcdserverpb.KV/Txn")
            asked = len(store.asked)
            load = group.create_task(worker.load(now_us()))
            await eventually(lambda: len(store.asked) > asked)
            for line in worker._lines:
                connection = line.connection
                assert isinstance(connection, Connection)
                connection._closing = True
            worker.finish()
            load.cancel()
            for line in worker._lines:
                connection = line._connection
                if isinstance(connection, Connection) and connection._transport is not None:
                    connection._transport.abort()
    ops = Records(tmp_path).frame(OPS)
    assert [Outcome.UNKNOWN] == ops["outcome"][ops["verb"] == Verb.UPDATE].tolist()


@pytest.mark.slow
async def test_filling_that_hangs_is_over_after_its_time(tmp_path: Path) -> None:
    """A server that answers nothing while it is filled ends the preparation, with an error."""
    async with serving() as (store, port):
        assign(tmp_path, plan_of([UPDATE]), port)
        store.silent.add(b"/etcdserverpb.KV/Txn")
        worker = Worker(tmp_path, 0, lambda **_: None)
        with pytest.raises(ExceptionGroup) as failed:
            async with asyncio.timeout(5), asyncio.TaskGroup() as group:
                await worker.prepare(group)
        worker.finish()
    assert failed.group_contains(PreloadError, match="timeout|deadline")  # the server's, or ours


@pytest.mark.slow
async def test_nothing_is_written_after_the_load(tmp_path: Path) -> None:
    """A step that would be due long after the load's end is not taken."""
    made = plan_of([UPDATE, UPDATE._replace(think_us=60_000_000)])
    async with serving() as (_, port):
        assign(tmp_path, made, port)
        worker = Worker(tmp_path, 0, lambda **_: None)
        acting = worker._acting[0]
        async with asyncio.TaskGroup() as group:
            await worker.prepare(group)
            await worker.watch(group)
            load = group.create_task(worker.load(now_us()))
            await eventually(lambda: acting._index == 1)
            worker.site.over = True  # as when the time for what has begun is up
            await load
            assert not acting.busy
            worker.finish()
    ops = Records(tmp_path).frame(OPS)
    assert 1 == (ops["verb"] == Verb.UPDATE).sum()


@pytest.mark.slow
async def test_a_drop_is_told(tmp_path: Path) -> None:
    """Connections are lost and come back during the load; the records say when and how."""
    drop = Disturbance(50_000, Trouble.DROP, resume=100)
    made = plan_of([UPDATE] * 20, duration_us=400_000, disturbances=(drop,))
    async with serving() as (store, port):
        assign(tmp_path, made, port)
        await work(Worker(tmp_path, 0, lambda **_: None))
    records = Records(tmp_path)
    watches = records.frame(WATCHES)
    assert [Trouble.DROP] == records.frame(INCIDENTS)["trouble"].tolist()
    assert 50_000 <= records.frame(INCIDENTS)["at"][0] < 100_000
    assert 6 == len(watches)
    assert [14] * 3 == sorted(watches["code"].tolist())[3:]
    assert store.revision > 101


async def test_preload_refused() -> None:
    """What exists already, or is refused, ends the preparation with its key and reason."""
    async with living() as world:
        group = world.group
        assert group is not None
        objects = [Object(PODS + b"a", "pod", 100), Object(PODS + b"b", "pod", 100)]
        await Preload(world.site, objects).run(group)
        assert [PODS + b"a", PODS + b"b"] == world.column(PRELOADED, "key")
        kv = world.store.get(PODS + b"b")
        assert kv is not None
        assert [3, digest(kv.value)] == [
            world.rows(PRELOADED)[1]["mod"],
            world.rows(PRELOADED)[1]["digest"],
        ]
        with pytest.raises(PreloadError, match="/registry/pods/a exists already"):
            await Preload(world.site, objects).run(group)
        world.store.refusals[b"/etcdserverpb.KV/Txn"].append((8, "etcdserver: no space"))
        with pytest.raises(PreloadError, match=r"pods/c: etcdserver: no space \(code 8\)"):
            await Preload(world.site, [plan.Object(PODS + b"c", "pod", 100)]).run(group)


@pytest.mark.slow
@ONCE
async def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    """What ends a process is told in one line first, and then whole."""
    made = plan_of([UPDATE])
    async with serving() as (store, port):
        store.put(KEYS[0], b"somebody else's")
        assign(tmp_path, made, port)
        crew = Crew(tmp_path, 1, lambda *_: None)
        await crew.start()
        try:
            crew.order("prepare")
            with pytest.raises(CrewError) as failed:
                await crew.until("prepared", 20)
        finally:
            await crew.end()
    first = str(failed.value).splitlines()[0]
    assert first == "generator process 0: /registry/pods/00 exists already"


@pytest.mark.slow
@ONCE
async def test_an_error_of_our_own_ends_the_process(tmp_path: Path) -> None:
    """A fault of the generator is not taken for one of the server: the process ends with it."""
    made = plan_of([UPDATE._replace(shape="no such shape")])
    async with serving() as (_, port):
        assign(tmp_path, made, port)
        crew = Crew(tmp_path, 1, lambda *_: None)
        await crew.start()
        try:
            for do, said in (("prepare", "prepared"), ("watch", "ready")):
                crew.order(do)
                await crew.until(said, 20)
            crew.order("load", zero_us=now_us() + 50_000)
            with pytest.raises(CrewError, match="KeyError: 'no such shape'"):
                await crew.until("loaded", 30)
        finally:
            await crew.end()


async def told(folder: Path, made: Plan, client: str) -> Counter[tuple[object, ...]]:
    """A plan done by a process with that client: all calls, but for times and revisions."""
    async with serving() as (_, port):
        assign(folder, made, port, client=client)
        crew = Crew(folder, 1, lambda *_: None)
        await crew.start()
        try:
            for do, said in (("prepare", "prepared"), ("watch", "ready")):
                crew.order(do)
                await crew.until(said, 20)
            crew.order("load", zero_us=now_us() + 50_000)
            await crew.until("loaded", 30)
            crew.order("finish")
            await crew.until("finished", 30)
        finally:
            await crew.end()
    records = Records(folder)
    ops, events = records.frame(OPS), records.frame(EVENTS)
    keys, roles = ops.text("key"), ops.text("role")
    found: Counter[tuple[object, ...]] = Counter(
        (roles[role], actor, step, attempt, verb, outcome, keys[key], mark)
        for role, actor, step, attempt, verb, outcome, key, mark in zip(
            *(ops["role"], ops["actor"], ops["step"], ops["attempt"]),
            *(ops["verb"], ops["outcome"], ops["key"], ops["digest"]),
            strict=True,
        )
    )
    return found + Counter(zip(events["digest"].tolist(), events["type"].tolist(), strict=True))


@pytest.mark.slow
@ONCE
async def test_both_clients_do_the_same(tmp_path: Path) -> None:
    """Whoever's client it is, a plan is the same calls with the same answers and events."""
    steps = [
        Step(Verb.CREATE, PODS + b"new", "create", 0, shape="pod", size=40_000),
        UPDATE._replace(key=PODS + b"new", size=100_000),
        Step(Verb.LIST, PODS, "list", limit=30),
        Step(Verb.DELETE, PODS + b"new", "delete"),
        Step(Verb.GET, PODS + b"new", "get"),
    ]
    made = plan_of([UPDATE] * 5, steps)
    lean = await told(tmp_path / "lean", made, "lean")
    grpcio = await told(tmp_path / "grpcio", made, "grpcio")
    assert lean == grpcio
    assert lean.total() > 30
