"""A session: one plan, several targets, in turns: A B, B A, A B, ... each time on fresh data.

Turns cancel drift of the machine; who goes first changes, because the first finds other caches.
"""

import asyncio
import pickle
import random
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from bench.capsule import Capsule, Speeds, capsule, speeds
from bench.client.asking import AskError, reach
from bench.clock import MICROSECONDS, wall_seconds
from bench.judges import judge
from bench.plan import Disturbance, Plan, Trouble
from bench.records import Facts, Records, unkept, write_facts
from bench.report.session import (
    RUN,
    SESSION,
    VERDICTS,
    Session,
    run_folder,
    write_session,
    write_verdicts,
)
from bench.run.ceiling import measure as measure_ceiling
from bench.run.repetition import Order, Progress, Repetition, clean, granted
from bench.storms import Storm
from bench.storms import idle_background as background
from bench.targets import SLOW_SECONDS, START_TIMEOUT, Running, Target, TargetError
from bench.verdicts import Verdict
from bench.wording import counted

T = TypeVar("T")
UNMEASURED = "stopped before anything was measured"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
WARM_UP_PARTS = 10
"""A run's first tenth, at most ``WARM_UP_US_MAX``, stays out of latencies."""
WARM_UP_US_MAX = 30 * MICROSECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user asked for."""

    storm: Storm[Any]
    preset: str
    parameters: Any
    """Of the storm's ``Parameters``."""
    targets: Sequence[Target]
    repetitions: int
    seed: int
    duration_us: int
    out: Path
    prefix: str = ""
    processes: int = 2
    timeout_us: int = 10 * MICROSECONDS
    background: bool = True
    client: str = "lean"
    """Or ``grpcio``, to check the lean one by."""
    kills: int = 0
    ceiling: bool = True
    drift: bool = True
    """The machine is measured again in the end, and must be as it was."""
    command_line: Sequence[str] = field(default_factory=lambda: sys.argv)


def make_plan(wish: Wish) -> Plan:
    """The plan of a session; the same for the same wish, whatever the targets are."""
    draw = random.Random(f"{wish.seed} {wish.storm.NAME} {wish.preset}")
    plan = wish.storm.schedule(wish.parameters, wish.duration_us, draw)
    if wish.background and wish.storm.NAME != background.NAME:
        beneath = background.PRESETS[wish.preset]
        if wish.prefix and not all(target.started for target in wish.targets):
            beneath = replace(beneath, compaction_s=0.0)  # others' history is theirs
        plan = background.under(plan, beneath, draw)
    kills = tuple(
        Disturbance(wish.duration_us * (n + 1) // (wish.kills + 1), Trouble.KILL)
        for n in range(wish.kills)
    )
    warm_up_us = plan.warm_up_us or min(wish.duration_us // WARM_UP_PARTS, WARM_UP_US_MAX)
    return replace(plan, disturbances=plan.disturbances + kills, warm_up_us=warm_up_us)


def refuse_impossible(wish: Wish, plan: Plan) -> None:
    """Raises ``TargetError`` for what a plan asks of servers that are not ours to do it to."""
    harm = any(trouble.trouble != Trouble.DROP for trouble in plan.disturbances)
    attached = [target.name for target in wish.targets if not target.started]
    if harm and attached:
        who = f"--kill9 {wish.kills}" if wish.kills else wish.storm.NAME
        what = "kills" if wish.kills else "kills or pauses"
        raise TargetError(f"{who} {what} its server: {attached[0]} was not started here")
    compacts = any(step.verb.name == "COMPACT" for actor in plan.actors for step in actor.steps)
    if compacts and wish.prefix and attached:
        raise TargetError(f"the plan compacts, which no --prefix of {attached[0]} confines")


class Runner:
    """Runs a session; ``show`` is told how far it is, ``told`` of each run that is over.

    ``told`` gets the verdicts, none if nothing could be judged, and what ended the run early.
    ``waiting`` is told of a target that was started and does not answer yet.
    SIGINT or SIGTERM ends the session in order, with what there is, of which ``stopping`` is told;
    another ends it at once. The first one is enough while the plan is made.
    A disk that takes no more ends it too, as it says then in ``unkept``: further runs could not be
    kept either. What could be kept is, and as a server's data are gone with it, there mostly is
    room then for the facts of its run.
    """

    def __init__(
        self,
        wish: Wish,
        show: Callable[[str, int, Progress], None],
        told: Callable[[str, int, Sequence[Verdict], str], None],
        stopping: Callable[[], None] = lambda: None,
        waiting: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._wish = wish
        self._show = show
        self._told = told
        self._stopping = stopping
        self._waiting = waiting
        self._stop = asyncio.Event()
        self._range_stream = True
        self._versions: dict[str, str] = {}
        """What each target says by the API."""
        self._fingerprint = ""
        """Of the plan."""
        self._measuring = False
        self._signals = 0
        self._signals_enough = 0
        """So many end what leaves no time to the loop; 0: there is nothing like that."""
        self._hurried = False
        self._complete = True
        self._remark = ""
        """What went wrong beside the run."""
        self.unkept = ""
        """Why not all that was measured could be written; empty: it was."""

    @property
    def stopped(self) -> bool:
        """Did the user end it early?"""
        return self._signals > 0

    async def run(self) -> Session:
        """Raises ``TargetError`` before anything is measured; later errors are the runs'."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def end() -> None:
            if self._stop.is_set() or not self._measuring:
                self._hurried = True
                task.cancel()
            else:
                self._stopping()
            self._stop.set()

        def caught(*_: object) -> None:
            self._signals += 1
            if 0 < self._signals_enough <= self._signals:
                raise KeyboardInterrupt
            loop.call_soon_threadsafe(end)

        before = {number: signal.signal(number, caught) for number in _SIGNALS}
        try:
            return await self._run()
        except asyncio.CancelledError as error:
            if not self._hurried:
                raise
            task.uncancel()
            raise TargetError(UNMEASURED) from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _unless(self, signals: int, do: Callable[[], T]) -> T | None:
        """Do what leaves no time to the loop; nothing comes of it if so many signals end it."""
        self._signals_enough = signals
        try:
            return do()
        except KeyboardInterrupt:
            self._hurried = True
            return None
        finally:
            self._signals_enough = 0

    def _plan(self) -> Plan:
        plan = make_plan(self._wish)
        self._fingerprint = plan.fingerprint()
        return plan

    async def _run(self) -> Session:
        wish, plan = self._wish, self._unless(1, self._plan)
        if plan is None:
            raise TargetError(UNMEASURED)
        refuse_impossible(wish, plan)
        for target in wish.targets:
            await self._check(target)
        wish.out.mkdir(parents=True, exist_ok=True)
        plan_file = wish.out / "plan.pickle"
        try:
            plan_file.write_bytes(pickle.dumps(plan))
            session = await self._session(plan)
            self._write(session)
            await self._measure(plan, plan_file)
        finally:
            plan_file.unlink(missing_ok=True)
        if self._complete and not self.stopped:
            session["state"] = "COMPLETE"
        try:
            if wish.drift and not self._hurried and not self.unkept:
                session["after"] = self._unless(2, self._environment)
            self._write(session)
        except OSError as error:
            self.unkept = unkept(error)
            session["state"] = "INCOMPLETE"
        return session

    def _write(self, session: Session) -> None:
        """In place of what was written before, or not at all; raises ``OSError``."""
        with TemporaryDirectory(dir=self._wish.out) as folder:
            write_session(Path(folder), session)
            (Path(folder) / SESSION).replace(self._wish.out / SESSION)

    async def _measure(self, plan: Plan, plan_file: Path) -> None:
        """All repetitions; ended at once, what is stored by then stays."""
        self._measuring = True
        try:
            await self._repeat(plan, plan_file)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._hurried or task is None:
                raise
            task.uncancel()
        except OSError as error:
            self.unkept, self._complete = unkept(error), False

    async def _repeat(self, plan: Plan, plan_file: Path) -> None:
        targets = list(self._wish.targets)
        for repetition in range(self._wish.repetitions):
            for target in targets if repetition % 2 == 0 else reversed(targets):
                if self.stopped or self.unkept:
                    return
                await self._once(plan, plan_file, target, repetition)

    async def _once(self, plan: Plan, plan_file: Path, target: Target, repetition: int) -> None:
        wish = self._wish
        folder = run_folder(wish.out, target.name, repetition)
        folder.mkdir(parents=True)

        shown = Progress(duration_us=plan.duration_us)

        def show(progress: Progress) -> None:
            nonlocal shown
            shown = progress
            self._show(target.name, repetition, progress)

        order = Order(
            folder=folder,
            plan=plan,
            plan_file=plan_file,
            facts=self._facts(plan, target, repetition, speeds(wish.out)),
            seed=wish.seed,
            range_stream=self._range_stream,
            stop=self._stop,
            show=show,
        )
        self._remark = ""
        judged = await self._repetition(order, target)
        facts = order.facts
        if self.unkept and not (folder / RUN).exists():
            write_facts(folder, facts)
        self._complete = self._complete and facts["state"] == "COMPLETE"
        verdicts: list[Verdict] = []
        if judged:
            show(replace(shown, stage="judging", note=""))
            verdicts = self._judge(folder)
        remarks = [remark for remark in (facts["reason"], self._remark) if remark]
        self._told(target.name, repetition, verdicts, "; ".join(remarks))

    def _judge(self, folder: Path) -> list[Verdict]:
        """The verdicts on a run, which are stored; none if a second signal was too early."""
        wish = self._wish

        def judged() -> list[Verdict]:
            records = Records(folder)
            return [*judge(records), *wish.storm.checks(records, wish.parameters)]

        verdicts = self._unless(2, judged)
        if verdicts is None:
            return []
        try:
            write_verdicts(folder, verdicts)
        except OSError as error:
            (folder / VERDICTS).unlink(missing_ok=True)  # what is cut off says nothing
            self.unkept, self._complete = unkept(error), False
        return verdicts

    async def _repetition(self, order: Order, target: Target) -> bool:
        """Give the repetition its server; gives whether there is something to judge."""
        if target.started:
            with Running(target) as server:
                return await self._run_once(Repetition(order, server.host, server.port, server))
        try:
            return await self._run_once(Repetition(order, target.host, target.port, None))
        finally:
            try:
                prefix, leases = self._wish.prefix.encode(), granted(order.folder)
                await clean(target.host, target.port, prefix, leases, lambda: not self.stopped)
            except AskError as error:
                self._remark = f"what it wrote was not deleted: {error.text}"

    async def _run_once(self, repetition: Repetition) -> bool:
        judged = await repetition.run()
        self.unkept = repetition.unkept
        return judged

    async def _check(self, target: Target) -> None:
        """See that a target can be had, and what it has; raises ``TargetError``."""
        if not target.started:
            await self._look_at(target, target.host, target.port, 0)
            return
        loop = asyncio.get_running_loop()
        with Running(target) as server:
            telling = loop.call_later(SLOW_SECONDS, self._waiting, target.name)
            try:
                await self._look_at(
                    target, server.host, server.port, START_TIMEOUT, lambda: server.alive
                )
            except TargetError as error:
                said = error if server.alive else f"{target.name} {server.end}:"
                raise TargetError(f"{said} {server.log_tail()}".strip(" :")) from error
            finally:
                telling.cancel()

    async def _look_at(
        self,
        target: Target,
        host: str,
        port: int,
        seconds: float,
        hopeful: Callable[[], bool] = lambda: True,
    ) -> None:
        """Raises ``TargetError``: unreachable, not etcd, or not empty."""
        prefix = self._wish.prefix
        try:
            asking = await reach(host, port, seconds, hopeful)
            try:
                keys, _ = await asking.count(prefix.encode())
                has = await asking.has_range_stream(prefix.encode() or b"\0")
                self._versions[target.name] = await asking.version()
                self._range_stream = self._range_stream and has
            finally:
                await asking.leave()
        except AskError as error:
            where = f"{host}:{port}"
            raise TargetError(f"{target.name} at {where} {error.text}") from error
        if keys and not target.started:  # what kine begins with is its own
            below = f" below {prefix}" if prefix else "; --prefix keeps a run apart"
            raise TargetError(f"{target.name} is not empty: {counted(keys, 'key')}{below}")

    def _environment(self) -> Capsule:
        """The environment now, in which every target has a version: what its program tells, if it
        was started here and knows the flag, and which etcd it says it is.
        """
        programs = {t.name: shlex.split(t.command)[0] for t in self._wish.targets if t.started}
        commands = {name: [program, "--version"] for name, program in programs.items()}
        made = capsule(self._wish.out, commands)
        for name, api in self._versions.items():
            told = made["versions"].get(name)
            made["versions"][name] = f"{told}; API {api}" if told else f"API {api}"
        return made

    async def _session(self, plan: Plan) -> Session:
        wish = self._wish
        return Session(
            command_line=list(wish.command_line),
            storm=wish.storm.NAME,
            preset=wish.preset,
            parameters=asdict(wish.parameters),
            seed=wish.seed,
            duration_us=wish.duration_us,
            fingerprint=self._fingerprint,
            targets=[target.name for target in wish.targets],
            repetitions=wish.repetitions,
            started=datetime.fromtimestamp(wall_seconds(), UTC).isoformat(timespec="seconds"),
            state="INCOMPLETE",
            before=self._environment(),
            after=None,
            ceiling_per_second=(await measure_ceiling()).per_second if wish.ceiling else 0.0,
        )

    def _facts(self, plan: Plan, target: Target, repetition: int, machine: Speeds) -> Facts:
        wish = self._wish
        return Facts(
            run=f"{wish.storm.NAME}-{wish.seed}-{repetition}",
            storm=wish.storm.NAME,
            preset=wish.preset,
            parameters=asdict(wish.parameters),
            seed=wish.seed,
            duration_us=plan.duration_us,
            warm_up_us=plan.warm_up_us,
            fingerprint=self._fingerprint,
            apiservers=plan.apiservers,
            resources=[prefix.decode() for prefix in plan.resources],
            target=target.name,
            command=target.command,
            version="",
            durability=target.durability,
            repetition=repetition,
            fsync_us=machine.fsync_p50_us,
            loopback_us=machine.loopback_p50_us,
            prefix=wish.prefix,
            zero_us=0,
            load_end_us=0,
            finished_us=0,
            state="INCOMPLETE",
            processes=min(wish.processes, plan.apiservers),
            client=wish.client,
            timeout_us=wish.timeout_us,
            connections_failed=0,
            steps=plan.steps,
            final_revision=-1,
            reason="",
        )
