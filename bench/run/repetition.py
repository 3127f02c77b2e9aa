"""One repetition: a server with fresh data, the plan's load, the records of it.

    start --> prepare --> watch --> load (+ troubles, samples) --> drain --> final list --> records

Whatever ends it early (the server, a generator process, the user), what there is by then is
recorded, and the facts say why. What is measured begins at ``zero_us``, told to all generator
processes beforehand. Judges read the records that this leaves behind, nothing else.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

from bench.client.asking import AskError, Asking, reach
from bench.clock import MICROSECONDS, now_us, wait_until
from bench.drive.worker import GRACE, Assignment
from bench.plan import Disturbance, Plan, Trouble
from bench.records import FINAL, INCIDENTS, SAMPLES, Facts, Recorder
from bench.run.crew import Crew, CrewError
from bench.targets import START_TIMEOUT, Running, TargetError

LEAD_US = 500_000
"""From the order to begin to the beginning."""
SAMPLE_US = 250_000
CLEAN_TIMEOUT = 10.0
OWN_KEYS = (b"/registry/", b"compact_rev_key")
"""What a run without a prefix writes below."""


_BROKEN = (TargetError, CrewError, AskError)
"""What ends a repetition and not the session."""


@dataclass(slots=True)
class Progress:
    """How far a repetition is, for who watches."""

    stage: str = ""
    operations: int = 0
    events: int = 0
    elapsed_us: int = 0
    duration_us: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one repetition is to do."""

    folder: Path
    """Empty; takes the records."""
    plan: Plan
    plan_file: Path
    facts: Facts
    """As far as they are known beforehand."""
    seed: int
    range_stream: bool
    """Lists are streams."""
    stop: asyncio.Event
    """Set when the user wants to end: records are kept."""
    show: Callable[[Progress], None]


class Repetition:
    """Runs once; ``server`` is None for a target that runs already."""

    def __init__(self, order: Order, host: str, port: int, server: Running | None) -> None:
        self._order = order
        self._host, self._port = host, port
        self._server = server
        self._progress = Progress(duration_us=order.plan.duration_us)
        self._heard: dict[int, tuple[int, int]] = {}
        self._crew = Crew(order.folder, order.facts["processes"], self._hear)
        self._final = Recorder(FINAL)
        self._samples = Recorder(SAMPLES)
        self._incidents = Recorder(INCIDENTS)
        self._zero_us = 0
        self._troubling: asyncio.Task[None] | None = None

    async def run(self) -> bool:
        """Do it all, or as much as can be done; gives whether there is something to judge.

        What ended it early becomes the ``reason`` in the facts. There is nothing to judge if the
        load never began, or if a generator process ended and took its records with it: of what
        that one wrote, the server would be accused.
        """
        order, facts = self._order, self._order.facts
        assignment = Assignment(
            plan=str(order.plan_file),
            host=self._host,
            port=self._port,
            run=facts["run"],
            prefix=facts["prefix"],
            seed=order.seed,
            parts=facts["processes"],
            timeout_us=facts["timeout_us"],
            client=facts["client"],
            range_stream=order.range_stream,
        )
        (order.folder / "assignment.json").write_text(json.dumps(assignment))
        try:
            await self._attempt(self._go())
            await self._attempt(self._finish())
        except asyncio.CancelledError:
            self._crew.kill()
            raise
        finally:
            await self._crew.end()
        part = facts["processes"]
        for recorder in (self._final, self._samples, self._incidents):
            recorder.write(order.folder, part, self._zero_us)
        stopped = order.stop.is_set()
        facts["state"] = "INCOMPLETE" if stopped or facts["reason"] else "COMPLETE"
        (order.folder / "assignment.json").unlink()
        (order.folder / "run.json").write_text(json.dumps(facts, indent=1))
        return self._zero_us > 0 and self._crew.whole

    async def _attempt(self, part: Coroutine[None, None, None]) -> None:
        """Do a part of it; the first error that is nobody's fault here is the reason."""
        try:
            await part
        except _BROKEN as error:
            self._because(error)
        except ExceptionGroup as group:
            broken, others = group.split(_BROKEN)
            if others is not None or broken is None:
                raise
            self._because(_first(broken))

    def _because(self, error: Exception) -> None:
        """Note why it ended early, unless the user stopped it."""
        facts, server = self._order.facts, self._server
        if facts["reason"] or self._order.stop.is_set():
            return
        if server is not None and not server.alive:
            facts["reason"] = self._ended(server)
        else:
            facts["reason"] = str(error).partition("\n")[0].strip()

    def _ended(self, server: Running) -> str:
        last = server.log_tail().splitlines()[-1:]
        return ": ".join([f"{self._order.facts['target']} ended", *last])

    async def _reach(self, *, heed_stop: bool = False) -> Asking:
        """Raises ``TargetError``: nobody answers in time, or there is nobody any more."""
        server, stop = self._server, self._order.stop

        def hopeful() -> bool:
            return (server is None or server.alive) and not (heed_stop and stop.is_set())

        try:
            return await reach(self._host, self._port, START_TIMEOUT, hopeful)
        except AskError as error:
            name = self._order.facts["target"]
            raise TargetError(f"{name} at {self._host}:{self._port} {error.text}") from error

    def _hear(self, part: int, said: "dict[str, int] | object") -> None:
        assert isinstance(said, dict)
        self._heard[part] = (said["operations"], said["events"])
        self._progress.operations = sum(operations for operations, _ in self._heard.values())
        self._progress.events = sum(events for _, events in self._heard.values())

    def _stage(self, stage: str) -> None:
        self._progress.stage = stage
        self._order.show(self._progress)

    async def _tell(self, do: str, said: str) -> None:
        self._crew.order(do)
        await self._crew.until(said)

    async def _go(self) -> None:
        """Everything up to the final list, minding the server and the user meanwhile."""
        facts = self._order.facts
        asking = await self._reach(heed_stop=True)
        facts["version"] = await asking.version()
        asking.close()
        await self._crew.start()
        async with asyncio.TaskGroup() as group:
            beside = [
                group.create_task(self._mind_server()),
                group.create_task(self._heed_stop()),
            ]
            if await self._prepare():
                await self._load(group)
            for task in beside:
                task.cancel()

    async def _prepare(self) -> bool:
        """All that comes before the load; gives whether to go on."""
        stages = (("filling", "prepare", "prepared"), ("watching", "watch", "ready"))
        for stage, do, said in stages:
            self._stage(stage)
            await self._tell(do, said)
            if self._order.stop.is_set():
                return False
        return True

    async def _load(self, group: asyncio.TaskGroup) -> None:
        order, facts = self._order, self._order.facts
        self._zero_us = facts["zero_us"] = now_us() + LEAD_US
        self._crew.order("load", zero_us=self._zero_us)
        self._stage("load")
        sampling = group.create_task(self._sample())
        self._troubling = group.create_task(self._make_trouble())
        limit = order.plan.duration_us + facts["timeout_us"] + (GRACE + 60) * MICROSECONDS
        loaded = await self._crew.until("loaded", limit / MICROSECONDS)
        facts["load_end_us"] = max(said["at_us"] for said in loaded) - self._zero_us
        self._troubling.cancel()
        self._stage("draining")
        await self._drain()
        sampling.cancel()
        facts["finished_us"] = now_us() - self._zero_us

    async def _finish(self) -> None:
        """Have the records written by who is left."""
        self._stage("recording")
        self._crew.order("finish")
        finished = await self._crew.until("finished")
        failed = sum(said["connections_failed"] for said in finished)
        self._order.facts["connections_failed"] = failed

    async def _drain(self) -> None:
        """Let every watch come to the head, then read everything as it is."""
        asking = await self._reach()
        prefix = self._order.facts["prefix"].encode()
        _, revision = await asking.count(prefix)
        self._crew.order("drain", revision=revision)
        await self._crew.until("drained")
        revision, objects = await asking.objects(prefix)
        self._order.facts["final_revision"] = revision
        asking.close()
        cut = len(prefix)
        for kv in objects:
            self._final.add(
                *(revision, kv.mod_revision, kv.create_revision, kv.version, kv.lease),
                *(kv.key[cut:], kv.value),
            )

    # Beside the load.

    async def _sample(self) -> None:
        due_us = now_us()
        while True:
            at_us = now_us() - self._zero_us
            server = self._server
            usage = server.usage() if server is not None else (-1, -1, -1, -1)
            self._samples.add(self._zero_us + at_us, *usage, *self._crew.cpu_us())
            self._progress.elapsed_us = at_us
            self._order.show(self._progress)
            due_us += SAMPLE_US
            await wait_until(due_us)

    async def _mind_server(self) -> None:
        """One that ended by itself ends the run; one killed on purpose is there again at once."""
        server = self._server
        while server is not None:
            if not server.alive:
                raise TargetError(self._ended(server))
            await wait_until(now_us() + SAMPLE_US)

    async def _make_trouble(self) -> None:
        """Kill and pause the server as planned, until the load is over."""
        for trouble in sorted(self._order.plan.disturbances):
            if trouble.trouble == Trouble.DROP or self._server is None:
                continue
            await wait_until(self._zero_us + trouble.at_us)
            begun_us = now_us()
            try:
                await self._disturb(self._server, trouble)
            finally:
                self._incidents.add(begun_us, now_us(), trouble.trouble)

    async def _disturb(self, server: Running, trouble: Disturbance) -> None:
        if trouble.trouble == Trouble.KILL:
            server.kill()
            server.start()
            (await self._reach()).close()
            return
        server.pause()
        try:
            await wait_until(now_us() + trouble.lasts_us)
        finally:
            server.go_on()

    async def _heed_stop(self) -> None:
        await self._order.stop.wait()
        if self._troubling is not None:
            self._troubling.cancel()
        self._crew.order("stop")


def _first(group: ExceptionGroup[Exception]) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


async def clean(host: str, port: int, prefix: bytes) -> None:
    """Delete what a run has left on a server that goes on without us; raises ``AskError``."""
    asking = await reach(host, port, CLEAN_TIMEOUT)
    try:
        for key in (prefix,) if prefix else OWN_KEYS:
            await asking.delete(key)
    finally:
        asking.close()
