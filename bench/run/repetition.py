"""One repetition: a server with fresh data, the plan's load, the records of it.

    start --> prepare --> watch --> load (+ troubles, samples) --> drain --> final list --> records

Whatever ends it early (the server, a generator process, the user), what there is by then is
recorded, as far as the disk takes it, and the facts say why.
A server that was started here is lost when its process ends. One that was there already may come
back, and is measured if it does so within the load; before and after that it is given up when
nothing is connected to it for ``LOST_SECONDS``.
What is measured begins at ``zero_us``, told to all generator processes beforehand. Judges read the
records that this leaves behind, nothing else.
"""

import asyncio
import json
import shlex
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.client.asking import AskError, Asking, reach
from bench.clock import MICROSECONDS, now_us, wait_until
from bench.drive.worker import DRAIN_TIMEOUT, GRACE, Assignment
from bench.plan import Disturbance, Plan, Trouble, Verb
from bench.records import (
    FINAL,
    INCIDENTS,
    NEVER_US,
    OPS,
    SAMPLES,
    Facts,
    Outcome,
    Recorder,
    Records,
    row_counts,
    write_all,
    write_facts,
)
from bench.run.crew import Crew, CrewError
from bench.targets import START_TIMEOUT, Running, Target, TargetError

LEAD_US = 500_000
"""From the order to begin to the beginning."""
SAMPLE_US = 250_000
CLEAN_TIMEOUT = 5.0
LOST_SECONDS = 5.0
"""Without a connection, outside of the load: a server that nobody here can start again is gone."""
LOST_SHOWN = 1.0
"""After so many seconds without one the user is told."""
OWN_KEYS = (b"/registry/", b"compact_rev_key")
"""What a run without a prefix writes below."""


_BROKEN = (TargetError, CrewError, AskError)
"""What ends a repetition and not the session."""


@dataclass(slots=True)
class Progress:
    """How far a repetition is, for who watches."""

    stage: str = ""
    calls: int = 0
    events: int = 0
    elapsed_us: int = 0
    duration_us: int = 1
    kills: int = 0
    """Of the server, on purpose."""
    note: str = ""
    """What is waited for, if the stage does not say it."""


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
        self._heard: dict[int, Mapping[str, Any]] = {}
        """What each generator process has said of its progress."""
        self._lost_us = 0
        """Since when none of them has a connection; 0: some have."""
        self._crew = Crew(order.folder, order.facts["processes"], self._hear)
        self._restoring = False
        self._final = Recorder(FINAL)
        self._samples = Recorder(SAMPLES)
        self._incidents = Recorder(INCIDENTS)
        self._zero_us = 0
        self._troubling: asyncio.Task[None] | None = None
        self._incident: tuple[int, Trouble] | None = None
        """What the server suffers on purpose, and since when."""
        self.unkept = ""
        """Why some of the records could not be written; empty: all were."""

    async def run(self) -> bool:
        """Do it all, or as much as can be done; gives whether there is something to judge.

        What ended it early becomes the ``reason`` in the facts. There is nothing to judge if the
        load never began, or if a generator process ended and took its records with it, or they
        could not be written: of what is not there, the server would be accused.
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
        self._recovered(2 * NEVER_US)
        part = facts["processes"]
        own = (self._final, self._samples, self._incidents)
        self.unkept = write_all(own, order.folder, part, self._zero_us) or self.unkept
        if self.unkept and not facts["reason"]:
            facts["reason"] = f"not all records could be written: {self.unkept}"
        stopped = order.stop.is_set()
        facts["state"] = "INCOMPLETE" if stopped or facts["reason"] else "COMPLETE"
        (order.folder / "assignment.json").unlink()
        facts["rows"] = row_counts(order.folder)
        self.unkept = write_facts(order.folder, facts) or self.unkept
        return self._zero_us > 0 and self._crew.whole and not self.unkept

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
        return ": ".join([f"{self._order.facts['target']} {server.end}", *last])

    @property
    def _where(self) -> str:
        return f"{self._order.facts['target']} at {self._host}:{self._port}"

    async def _reach(self, *, heed_stop: bool = False) -> Asking:
        """Raises ``TargetError``: nobody answers in time, or there is nobody any more."""
        server, stop = self._server, self._order.stop

        def hopeful() -> bool:
            return (server is None or server.alive) and not (heed_stop and stop.is_set())

        seconds = LOST_SECONDS if server is None else START_TIMEOUT
        try:
            return await reach(self._host, self._port, seconds, hopeful)
        except AskError as error:
            raise TargetError(f"{self._where} {error.text}") from error

    def _hear(self, part: int, said: Mapping[str, Any]) -> None:
        self._heard[part] = said
        heard = self._heard.values()
        self._progress.calls = sum(one["calls"] for one in heard)
        self._progress.events = sum(one["events"] for one in heard)
        if any(one["connected"] for one in heard):
            self._lost_us = 0
        else:
            self._lost_us = self._lost_us or now_us()

    def _stage(self, stage: str) -> None:
        self._progress.stage, self._progress.note = stage, ""
        self._order.show(self._progress)

    async def _tell(self, do: str, said: str) -> None:
        self._crew.order(do)
        await self._crew.until(said)

    async def _go(self) -> None:
        """Everything up to the final list, minding the server and the user meanwhile."""
        facts = self._order.facts
        self._stage("starting")
        asking = await self._reach(heed_stop=True)
        facts["version"] = await asking.version()
        asking.close()
        await self._crew.start()
        async with asyncio.TaskGroup() as group:
            beside = [
                group.create_task(self._mind_server()),
                group.create_task(self._mind_connection()),
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
        self._end_trouble()
        await asyncio.wait([self._troubling])  # a shard that is away comes back
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
        self.unkept = next((said["unkept"] for said in finished if said["unkept"]), "")

    async def _drain(self) -> None:
        """Let every watch come to the head, then read everything as it is."""
        asking = await self._reach(heed_stop=self._server is None)
        self._recovered()  # of a kill that was shortly before the end
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
            due_us += SAMPLE_US
            await wait_until(due_us)

    async def _mind_server(self) -> None:
        """One that ended by itself ends the run; one killed on purpose is there again at once."""
        server = self._server
        while server is not None:
            if not server.alive:
                raise TargetError(self._ended(server))
            await wait_until(now_us() + SAMPLE_US)

    async def _mind_connection(self) -> None:
        """Show how it goes; end the run if a server that was there already is gone for good."""
        progress, stop = self._progress, self._order.stop
        while True:
            await wait_until(now_us() + SAMPLE_US)
            lost = (now_us() - self._lost_us) / MICROSECONDS if self._lost_us else 0.0
            patience = LOST_SHOWN if stop.is_set() else LOST_SECONDS
            if self._server is None and lost > patience and not self._loading:
                since = (self._lost_us - self._zero_us) / MICROSECONDS
                when = f"since {since:.0f} s into the load" if self._zero_us else "any more"
                raise TargetError(f"{self._where}: no connection {when}")
            progress.note = f"no connection for {lost:.0f} s" if lost > LOST_SHOWN else self._note
            self._order.show(progress)

    @property
    def _loading(self) -> bool:
        """Is it the time of the load?"""
        progress = self._progress
        early = progress.stage == "load" and progress.elapsed_us < progress.duration_us
        return early and not self._order.stop.is_set()

    @property
    def _note(self) -> str:
        """What is waited for, if nothing is wrong."""
        if self._order.stop.is_set():
            return "ends in order; another signal ends it at once"
        if self._progress.stage == "load" and not self._loading:
            most = GRACE + self._order.facts["timeout_us"] / MICROSECONDS
            return f"the last answers have {most:.0f} s"
        if self._progress.stage == "draining":
            return f"watches have {DRAIN_TIMEOUT:.0f} s to come to the head"
        return ""

    async def _make_trouble(self) -> None:
        """Kill and pause the server as planned, until the load is over."""
        for trouble in sorted(self._order.plan.disturbances):
            if trouble.trouble == Trouble.DROP or self._server is None:
                continue
            await wait_until(self._zero_us + trouble.at_us)
            if trouble.trouble == Trouble.PAUSE and self._server.target.shard_stop:
                await self._stop_shard(self._server.target, trouble.lasts_us)
                continue
            self._incident = (now_us(), trouble.trouble)
            await self._disturb(self._server, trouble)

    async def _disturb(self, server: Running, trouble: Disturbance) -> None:
        if trouble.trouble == Trouble.KILL:
            server.kill()
            self._progress.kills += 1
            server.start()
            (await self._reach()).close()
            self._recovered()
            return
        server.pause()
        try:
            await wait_until(now_us() + trouble.lasts_us)
        finally:
            server.go_on()
            self._recovered()

    def _recovered(self, until_us: int = 0) -> None:
        """The server is there again, from now on if ``until_us`` is 0."""
        if self._incident is not None:
            begun_us, trouble = self._incident
            self._incidents.add(begun_us, until_us or now_us(), trouble)
            self._incident = None

    async def _stop_shard(self, target: Target, lasts_us: int) -> None:
        """From when it was certainly away to when it was there again, served or not.

        Whatever ends the run, a shard that was told to stop is told to start.
        """
        begun_us = 0
        try:
            await _command(target.shard_stop)
            begun_us = now_us()
            await wait_until(now_us() + lasts_us)
        finally:
            self._restoring = True
            await _command(target.shard_start)
            if begun_us:
                self._incidents.add(begun_us, now_us(), Trouble.SHARD)
                await self._all_served()
            self._restoring = False

    def _end_trouble(self) -> None:
        """No more of it; but what is being made good is made good."""
        troubling = self._troubling
        if troubling is not None and not (self._restoring or troubling.cancelling()):
            troubling.cancel()

    async def _all_served(self) -> None:
        """Wait until all keys can be counted: what comes after the load needs all of them."""
        asking, given_up_us = await self._reach(), now_us() + int(START_TIMEOUT * MICROSECONDS)
        while now_us() < given_up_us:
            with suppress(AskError):
                await asking.count(self._order.facts["prefix"].encode())
                break
            await wait_until(now_us() + SAMPLE_US)
        asking.close()

    async def _heed_stop(self) -> None:
        await self._order.stop.wait()
        self._end_trouble()
        self._crew.order("stop")


async def _command(line: str) -> None:
    """Run a command of the user's to its end, cancelled or not, which another cancellation cuts
    short. Raises ``TargetError``: it failed.
    """
    running = asyncio.get_running_loop().create_task(_run(line))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        running.exception()  # it is the end that counts
        raise


async def _run(line: str) -> None:
    try:
        process = await asyncio.create_subprocess_exec(*shlex.split(line))
    except OSError as error:
        raise TargetError(f"{line}: {error.strerror}") from error
    code = await process.wait()
    if code:
        raise TargetError(f"{line}: exit code {code}")


def _first(group: ExceptionGroup[Exception]) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


async def clean(
    host: str, port: int, prefix: bytes, leases: Iterable[int], hopeful: Callable[[], bool]
) -> None:
    """Delete what a run has left on a server that goes on without us; raises ``AskError``."""
    asking = await reach(host, port, CLEAN_TIMEOUT, hopeful)
    try:
        for key in (prefix,) if prefix else OWN_KEYS:
            await asking.delete(key)
        for lease in leases:
            await asking.revoke(lease)
    finally:
        asking.close()


def granted(folder: Path) -> list[int]:
    """The leases that a run is known to have got; none if its records could not be kept."""
    try:
        ops = Records(folder).frame(OPS)
    except (OSError, ValueError):  # pyarrow's errors are either
        return []
    got = (ops["verb"] == Verb.GRANT) & (ops["outcome"] == Outcome.OK)
    return [int(lease) for lease in np.unique(ops["lease"][got])]
