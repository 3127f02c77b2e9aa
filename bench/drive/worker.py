"""One generator process: ``python -m bench.drive.worker FOLDER PART``.

It is told what to do by lines of JSON on its standard input and answers in kind:

    -> {"do": "prepare"}            connect; write the objects that exist beforehand
    <- {"said": "progress", ...}    twice a second from now on
    <- {"said": "prepared"}
    -> {"do": "watch"}              fill the caches, begin all watches
    <- {"said": "ready"}
    -> {"do": "load", "zero_us": n} begin the plan at that time
    <- {"said": "loaded"}           no step is left
    -> {"do": "drain", "revision": n}  see that every watch has come so far
    <- {"said": "drained"}
    -> {"do": "finish"}             write the records; the process ends
    <- {"said": "finished", ...}    what of them could not be written, if anything

``stop`` ends what is under way and the load, and ``finish`` whatever comes before it; what there is
by then is recorded.
The collector of cyclic garbage is off, and where the system allows it (root, or CAP_SYS_NICE) the
process is a real-time one, which runs as soon as it is woken: what it is late by would be charged
to the server, or make the run invalid. Niceness alone is little: Linux shares the CPU between
sessions first and within each by niceness then (sched(7), autogroup), and servers have their own.
"""

import asyncio
import gc
import json
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, TypedDict

import uvloop

from bench import plan, records
from bench.client.connection import SMALL_WINDOW_BYTES, WINDOW_BYTES, Connection
from bench.clock import now_us
from bench.drive.actor import Acting
from bench.drive.apiserver import Apiserver
from bench.drive.preload import Preload
from bench.drive.site import Line, Making, Site
from bench.drive.ticker import Ticker
from bench.drive.watching import Watching

NICENESS = -10
"""Of a generator process that may be nice to nobody, and may not be a real-time one."""
_NEVER_US = 1 << 62
SWEEP_US = 50_000
LOOK_US = 50_000
SAY_US = 500_000
PROGRESS_US = 200_000
READY_TIMEOUT = 60.0
DRAIN_TIMEOUT = 15.0
"""Seconds to wait for lag to drain; whether it did in time is the judge's business."""
DRAIN_STOPPED = 5.0
"""Likewise if the user has ended the run: no longer than the judge allows."""
GRACE = 15.0
"""Seconds after the plan's end in which what has begun may finish, beside a call's timeout."""


class Assignment(TypedDict):
    """``assignment.json`` in the folder: what all processes of a run need."""

    plan: str
    """File with the pickled plan."""
    host: str
    port: int
    run: str
    prefix: str
    seed: int
    parts: int
    timeout_us: int
    client: str
    """``lean``, or ``grpcio`` to check it by."""
    range_stream: bool
    """Do all targets have RangeStream?"""


def _making(client: str) -> Making:
    """How connections are made by that client."""
    if client == "lean":
        return Connection
    from bench.client.grpcio import GrpcioConnection  # noqa: PLC0415 - optional, and large

    return GrpcioConnection


class Worker:
    """See the module's text."""

    def __init__(self, folder: Path, part: int, say: Callable[..., None]) -> None:
        assignment: Assignment = json.loads((folder / "assignment.json").read_text())
        with Path(assignment["plan"]).open("rb") as file:
            self.plan: plan.Plan = pickle.load(file)  # noqa: S301 - written by our own command
        self._folder, self._part, self._say = folder, part, say
        loop = asyncio.get_running_loop()
        self.site = Site(
            loop=loop,
            host=assignment["host"],
            port=assignment["port"],
            part=part,
            run=assignment["run"],
            prefix=assignment["prefix"].encode(),
            timeout_us=assignment["timeout_us"],
            make=_making(assignment["client"]),
            range_stream=assignment["range_stream"],
            ticker=Ticker(loop),
            recorders={table.name: records.Recorder(table) for table in records.TABLES},
        )
        parts = assignment["parts"]
        self._parts = parts
        self._draw = Random(assignment["seed"] * 1000 + part)
        self._apiservers = {
            n: Apiserver(self.site, n, self.plan)
            for n in range(self.plan.apiservers)
            if n % parts == part
        }
        self._acting = [
            Acting(actor, n, self._apiservers[actor.apiserver])
            for n, actor in enumerate(self.plan.actors)
            if actor.apiserver in self._apiservers
        ]
        self._stopped = False
        self._preload: Preload | None = None
        self._watchers = [
            self._watcher(watcher)
            for n, watcher in enumerate(self.plan.watchers)
            if n % parts == part
        ]

    def _watcher(self, watcher: plan.Watcher) -> Watching:
        slow = watcher.events_per_second > 0
        line = Line(self.site, window_bytes=SMALL_WINDOW_BYTES if slow else WINDOW_BYTES)
        return Watching(self.site, line, watcher, -1, lambda *_: None)

    @property
    def _watchings(self) -> list[Watching]:
        mine = [w for apiserver in self._apiservers.values() for w in apiserver.watchings]
        return mine + self._watchers

    @property
    def _lines(self) -> list[Line]:
        lines = [line for apiserver in self._apiservers.values() for line in apiserver.lines()]
        lines += [watching.line for watching in self._watchers]
        if self._preload is not None and self._preload.line.wanted:
            lines.append(self._preload.line)
        return lines

    @property
    def _connected(self) -> bool:
        """Is there a connection, or nobody who wants one yet?"""
        wanted = [line for line in self._lines if line.wanted]
        return not wanted or any(line.connection is not None for line in wanted)

    async def prepare(self, group: asyncio.TaskGroup) -> None:
        """Write this process's share of the objects that exist beforehand."""
        self._sweep()
        self._report()
        objects = self.plan.preload[self._part :: self._parts]
        if objects and not self.site.over:
            self._preload = Preload(self.site, objects)
            await self._preload.run(group)

    def stop(self) -> None:
        """Begin nothing more, whatever is under way."""
        self._stopped = True
        self.site.over = True
        if self._preload is not None:
            self._preload.give_up()

    async def watch(self, group: asyncio.TaskGroup) -> None:
        """Fill the caches and begin all watches."""
        for apiserver in self._apiservers.values():
            apiserver.up(group)
        for watching in self._watchers:
            watching.line.up(group)
        await self._until(lambda: self.site.over or self._is_ready(), READY_TIMEOUT)
        if not self.site.over and not self._is_ready():
            raise TimeoutError("the watches were not established in time")

    def _is_ready(self) -> bool:
        return all(a.ready for a in self._apiservers.values()) and all(
            watching.synced for watching in self._watchers
        )

    async def load(self, zero_us: int) -> None:
        """Run the plan to its end."""
        site = self.site
        site.zero_us = zero_us
        for acting in self._acting:
            acting.begin()
        for trouble in self.plan.disturbances:
            if trouble.trouble == plan.Trouble.DROP:
                site.ticker.at(zero_us + trouble.at_us, self._dropper(trouble))
        if self.plan.progress_requests_us:
            self._ask_progress()
        end_us = zero_us + self.plan.duration_us
        await self._until(lambda: now_us() >= end_us or site.over, 1e9)
        await self._until(self._is_done, GRACE + site.timeout_us / 1e6)
        site.over = True
        await self._until(self._is_quiet, site.timeout_us / 1e6 + 1)
        for acting in self._acting:
            acting.leave()

    def _is_done(self) -> bool:
        return self.site.over or all(acting.done for acting in self._acting)

    def _is_quiet(self) -> bool:
        """Nothing that the plan asked for is under way: what is there now, stays."""
        return not any(acting.busy for acting in self._acting)

    def _dropper(self, trouble: plan.Disturbance) -> Callable[[], None]:
        def drop() -> None:
            begun_us = now_us()
            for apiserver in self._apiservers.values():
                apiserver.drop(trouble, self._draw)
            for watching in self._watchers:
                watching.drop(trouble, self._draw)
            add = self.site.recorders["incidents"].add
            add(begun_us, now_us(), trouble.trouble)

        return drop

    def _ask_progress(self) -> None:
        for watching in self._watchings:
            if watching.watcher.progress:
                watching.ask_progress()
        if not self.site.stopping:
            due_us = now_us() + self.plan.progress_requests_us
            self.site.ticker.at(due_us, self._ask_progress)

    def _report(self) -> None:
        self._say(
            said="progress",
            calls=len(self.site.recorders["ops"]),
            events=len(self.site.recorders["events"]),
            connected=self._connected,
        )
        if not self.site.stopping:
            self.site.ticker.at(now_us() + SAY_US, self._report)

    def _sweep(self) -> None:
        """End calls whose time is up."""
        now = now_us()
        for line in self._lines:
            line.expire(now)
        if not self.site.stopping:
            self.site.ticker.at(now + SWEEP_US, self._sweep)

    async def drain(self, revision: int) -> None:
        """Wait until every watch is there, and has come to ``revision`` if it is read at once."""
        enough_us = now_us() + int(DRAIN_STOPPED * 1e6)
        waiting = [w for w in self._watchings if not w.watcher.events_per_second]

        def drained() -> bool:
            here = all(watching.created for watching in self._watchings)
            come = all(watching.seen >= revision for watching in waiting)
            enough = self._stopped and now_us() >= enough_us
            return self.site.stopping or enough or (here and come)

        def ask() -> None:
            for watching in waiting:
                if watching.seen < revision:
                    watching.ask_progress()
            if not drained():
                self.site.ticker.at(now_us() + PROGRESS_US, ask)

        ask()
        await self._until(drained, DRAIN_TIMEOUT)

    def finish(self) -> str:
        """Close everything and write the records; gives why some could not be, or nothing."""
        site = self.site
        site.stopping = True
        site.over = True
        for watching in self._watchings:
            watching.finish()
        for line in self._lines:
            line.expire(_NEVER_US)  # what is unanswered may have been done
            line.close()
        for acting in self._acting:
            acting.leave()
        site.ticker.stop()
        return records.write_all(site.recorders.values(), self._folder, self._part, site.zero_us)

    async def _until(self, holds: Callable[[], bool], seconds: float) -> None:
        """Wait for a condition; return when it holds or the time is up."""
        over = asyncio.Event()
        end_us = now_us() + int(seconds * 1e6)

        def look() -> None:
            if holds() or now_us() >= end_us:
                over.set()
            else:
                self.site.ticker.at(now_us() + LOOK_US, look)

        look()
        await over.wait()


async def _serve(worker: Worker, read: asyncio.StreamReader, say: Callable[..., None]) -> str:
    """Do as told until ``finish``; gives why records could not be written, or nothing."""
    orders: asyncio.Queue[dict[str, Any]] = asyncio.Queue(maxsize=100)

    async def listen() -> None:
        while line := await read.readline():
            order = json.loads(line)
            if order["do"] in ("stop", "finish"):
                worker.stop()
                worker.site.stopping = order["do"] == "finish"
            await orders.put(order)
        worker.stop()
        worker.site.stopping = True
        await orders.put({"do": "finish"})

    async with asyncio.TaskGroup() as group:
        listening = group.create_task(listen())
        while True:
            order = await orders.get()
            match order["do"]:
                case "prepare":
                    await worker.prepare(group)
                    say(said="prepared")
                case "watch":
                    await worker.watch(group)
                    say(said="ready")
                case "load":
                    await worker.load(order["zero_us"])
                    say(said="loaded", at_us=now_us(), revision=worker.site.head_revision)
                case "drain":
                    await worker.drain(order["revision"])
                    say(said="drained")
                case "finish":
                    break
        why = worker.finish()
        listening.cancel()
    return why


async def _main(folder: Path, part: int) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_fail)
    read = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(read), sys.stdin)

    def say(**facts: object) -> None:
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()

    worker = Worker(folder, part, say)
    _go_first()
    gc.collect()
    gc.disable()
    why = await _serve(worker, read, say)
    say(said="finished", connections_failed=worker.site.connections_failed, unkept=why)


def _go_first() -> None:
    """Run before the server does; it keeps the place that it would have without us."""
    try:
        os.sched_setscheduler(
            0, os.SCHED_FIFO, os.sched_param(os.sched_get_priority_min(os.SCHED_FIFO))
        )
    except PermissionError:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


def _fail(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An error of ours that reached the loop ends the process: it is not the server's fault."""
    error = context.get("exception")
    if isinstance(error, OSError):  # of a connection, which is told that it is lost
        return
    if isinstance(error, BaseException):
        traceback.print_exception(error)
    else:
        sys.stderr.write(f"{context['message']}\n")
    sys.stderr.flush()
    os._exit(1)


def run(folder: Path, part: int) -> None:
    """Be that process; what ends it early is told in the last line of stderr."""
    try:
        uvloop.run(_main(folder, part))
    except ExceptionGroup as group:
        traceback.print_exception(group)
        sys.exit(str(group.exceptions[0]))


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
