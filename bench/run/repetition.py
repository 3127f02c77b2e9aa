"""One repetition: a server with fresh data, the plan's load, the records of it.

    start --> prepare --> watch --> load (+ troubles, samples) --> drain --> final list --> records

What is measured begins at ``zero_us``, told to all generator processes beforehand. Judges read the
records that this leaves behind, nothing else.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.client.asking import AskError, Asking, reach
from bench.clock import MICROSECONDS, now_us, wait_until
from bench.drive.worker import GRACE, Assignment
from bench.plan import Plan, Trouble
from bench.records import FINAL, INCIDENTS, SAMPLES, Facts, Recorder
from bench.run.crew import Crew, CrewError
from bench.targets import START_TIMEOUT, Running, TargetError

LEAD_US = 500_000
"""From the order to begin to the beginning."""
SAMPLE_US = 250_000
OWN_KEYS = (b"/registry/", b"compact_rev_key")
"""What a run without a prefix writes below."""


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
        self._loading = False

    async def run(self) -> Facts:
        """Do it all; raises ``TargetError`` or ``CrewError`` when there is nothing to judge."""
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
        asking = await self._reach()
        facts["version"] = await asking.version()
        asking.close()
        try:
            await self._crew.start()
            await self._go()
        finally:
            await self._crew.end()
        part = facts["processes"]
        for recorder in (self._final, self._samples, self._incidents):
            recorder.write(order.folder, part, self._zero_us)
        (order.folder / "assignment.json").unlink()
        (order.folder / "run.json").write_text(json.dumps(facts, indent=1))
        return facts

    async def _reach(self) -> Asking:
        try:
            return await reach(self._host, self._port, START_TIMEOUT)
        except AskError as error:
            said = self._server.log_tail() if self._server is not None else ""
            name = self._order.facts["target"]
            raise TargetError(f"{name} at {self._host}:{self._port} {error.text} {said}") from error

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
        order, facts = self._order, self._order.facts
        self._stage("filling")
        await self._tell("prepare", "prepared")
        self._stage("watching")
        await self._tell("watch", "ready")
        self._zero_us = facts["zero_us"] = now_us() + LEAD_US
        self._crew.order("load", zero_us=self._zero_us)
        self._stage("load")
        self._loading = True
        async with asyncio.TaskGroup() as group:
            beside = [
                group.create_task(self._sample()),
                group.create_task(self._make_trouble()),
                group.create_task(self._heed_stop()),
            ]
            limit = order.plan.duration_us + facts["timeout_us"] + (GRACE + 60) * MICROSECONDS
            loaded = await self._crew.until("loaded", limit / MICROSECONDS)
            facts["load_end_us"] = max(said["at_us"] for said in loaded) - self._zero_us
            self._stage("draining")
            await self._drain()
            for task in beside:
                task.cancel()
        facts["finished_us"] = now_us() - self._zero_us
        facts["state"] = "INCOMPLETE" if order.stop.is_set() else "COMPLETE"
        self._stage("recording")
        self._crew.order("finish")
        finished = await self._crew.until("finished")
        facts["connections_failed"] = sum(said["connections_failed"] for said in finished)

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
            self._samples.add(self._zero_us + at_us, *usage, self._crew.cpu_us())
            self._progress.elapsed_us = at_us
            self._order.show(self._progress)
            if server is not None and not server.alive and not self._killed(at_us):
                raise TargetError(f"{self._order.facts['target']} ended: {server.log_tail()}")
            due_us += SAMPLE_US
            await wait_until(due_us)

    def _killed(self, at_us: int) -> bool:
        """May the server be down now on purpose?"""
        kills = [d.at_us for d in self._order.plan.disturbances if d.trouble == Trouble.KILL]
        return any(kill <= at_us <= kill + START_TIMEOUT * MICROSECONDS for kill in kills)

    async def _make_trouble(self) -> None:
        """Kill and pause the server as planned."""
        server = self._server
        for trouble in sorted(self._order.plan.disturbances):
            if trouble.trouble == Trouble.DROP or server is None:
                continue
            await wait_until(self._zero_us + trouble.at_us)
            begun_us = now_us()
            if trouble.trouble == Trouble.KILL:
                server.kill()
                server.start()
                (await self._reach()).close()
            else:
                server.pause()
                await wait_until(now_us() + trouble.lasts_us)
                server.go_on()
            self._incidents.add(begun_us, now_us(), trouble.trouble)

    async def _heed_stop(self) -> None:
        await self._order.stop.wait()
        self._crew.order("stop")


async def clean(host: str, port: int, prefix: bytes) -> None:
    """Delete what a run has left on a server that goes on without us."""
    asking = await reach(host, port, START_TIMEOUT)
    for key in (prefix,) if prefix else OWN_KEYS:
        await asking.delete(key)
    asking.close()


__all__ = ["CrewError", "Order", "Progress", "Repetition", "clean"]
