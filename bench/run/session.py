"""A session: one plan, several targets, in turns: A B, B A, A B, ... each time on fresh data.

Turns cancel drift of the machine; who goes first changes, because the first finds other caches.
"""

import asyncio
import pickle
import random
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.capsule import bouts, capsule, typical
from bench.client.asking import AskError, reach
from bench.clock import MICROSECONDS, wall_seconds
from bench.judges import judge
from bench.plan import Disturbance, Plan, Trouble
from bench.records import Facts, Records
from bench.report.session import Session, run_folder, write_session, write_verdicts
from bench.run.ceiling import measure as measure_ceiling
from bench.run.repetition import Order, Progress, Repetition, clean
from bench.storms import Storm
from bench.storms import idle_background as background
from bench.targets import START_TIMEOUT, Running, Target, TargetError
from bench.verdicts import Verdict

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
    harm = [d for d in plan.disturbances if d.trouble != Trouble.DROP]
    for target in wish.targets:
        if harm and not target.started:
            raise TargetError(
                f"{wish.storm.NAME} kills or pauses its server: {target.name} was not started here"
            )
    compacts = any(step.verb.name == "COMPACT" for actor in plan.actors for step in actor.steps)
    attached = [target.name for target in wish.targets if not target.started]
    if compacts and wish.prefix and attached:
        raise TargetError(f"the plan compacts, which no --prefix of {attached[0]} confines")


class Runner:
    """Runs a session; ``show`` is told how far it is, ``told`` of each run that is over.

    ``told`` gets the verdicts, none if nothing could be judged, and what ended the run early.
    SIGINT or SIGTERM ends the session in order, with what there is; another ends it at once.
    """

    def __init__(
        self,
        wish: Wish,
        show: Callable[[str, int, Progress], None],
        told: Callable[[str, int, Sequence[Verdict], str], None],
    ) -> None:
        self._wish = wish
        self._show = show
        self._told = told
        self._stop = asyncio.Event()
        self._range_stream = True
        self._measuring = False
        self._hurried = False
        self._complete = True
        self._remark = ""
        """What went wrong beside the run."""

    @property
    def stopped(self) -> bool:
        """Did the user end it early?"""
        return self._stop.is_set()

    async def run(self) -> Session:
        """Raises ``TargetError`` before anything is measured; later errors are the runs'."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def end() -> None:
            if self._stop.is_set() or not self._measuring:
                self._hurried = True
                task.cancel()
            self._stop.set()

        for number in _SIGNALS:
            loop.add_signal_handler(number, end)
        try:
            return await self._run()
        except asyncio.CancelledError as error:
            if not self._hurried:
                raise
            task.uncancel()
            raise TargetError("stopped before anything was measured") from error
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    async def _run(self) -> Session:
        wish = self._wish
        plan = make_plan(wish)
        refuse_impossible(wish, plan)
        for target in wish.targets:
            await self._check(target)
        wish.out.mkdir(parents=True, exist_ok=True)
        plan_file = wish.out / "plan.pickle"
        plan_file.write_bytes(pickle.dumps(plan))
        try:
            session = await self._session(plan)
            write_session(wish.out, session)
            await self._measure(plan, plan_file)
        finally:
            plan_file.unlink()
        if self._complete and not self._stop.is_set():
            session["state"] = "COMPLETE"
        session["after"] = capsule(wish.out, self._commands())
        write_session(wish.out, session)
        return session

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

    async def _repeat(self, plan: Plan, plan_file: Path) -> None:
        targets = list(self._wish.targets)
        for repetition in range(self._wish.repetitions):
            for target in targets if repetition % 2 == 0 else reversed(targets):
                if self._stop.is_set():
                    return
                await self._once(plan, plan_file, target, repetition)

    async def _once(self, plan: Plan, plan_file: Path, target: Target, repetition: int) -> None:
        wish = self._wish
        folder = run_folder(wish.out, target.name, repetition)
        folder.mkdir(parents=True)

        def show(progress: Progress) -> None:
            self._show(target.name, repetition, progress)

        order = Order(
            folder=folder,
            plan=plan,
            plan_file=plan_file,
            facts=self._facts(plan, target, repetition),
            seed=wish.seed,
            range_stream=self._range_stream,
            stop=self._stop,
            show=show,
        )
        self._remark = ""
        judged = await self._repetition(order, target)
        facts = order.facts
        self._complete = self._complete and facts["state"] == "COMPLETE"
        verdicts: list[Verdict] = []
        if judged:
            show(Progress("judging", duration_us=plan.duration_us, elapsed_us=plan.duration_us))
            records = Records(folder)
            verdicts = [*judge(records), *wish.storm.checks(records, wish.parameters)]
            write_verdicts(folder, verdicts)
        remarks = [remark for remark in (facts["reason"], self._remark) if remark]
        self._told(target.name, repetition, verdicts, "; ".join(remarks))

    async def _repetition(self, order: Order, target: Target) -> bool:
        """Give the repetition its server; gives whether there is something to judge."""
        if target.started:
            with Running(target) as server:
                return await Repetition(order, server.host, server.port, server).run()
        try:
            return await Repetition(order, target.host, target.port, None).run()
        finally:
            try:
                await clean(target.host, target.port, self._wish.prefix.encode())
            except AskError as error:
                self._remark = f"what it wrote was not deleted: {error.text}"

    async def _check(self, target: Target) -> None:
        """See that a target can be had, and what it has; raises ``TargetError``."""
        if not target.started:
            await self._look_at(target, target.host, target.port, 0)
            return
        with Running(target) as server:
            try:
                await self._look_at(
                    target, server.host, server.port, START_TIMEOUT, lambda: server.alive
                )
            except TargetError as error:
                raise TargetError(f"{error} {server.log_tail()}".strip()) from error

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
            keys, _ = await asking.count(prefix.encode())
            has = await asking.has_range_stream(prefix.encode() or b"\0")
            self._range_stream = self._range_stream and has
            asking.close()
        except AskError as error:
            where = f"{host}:{port}"
            raise TargetError(f"{target.name} at {where} {error.text}") from error
        if keys and not target.started:  # what kine begins with is its own
            below = f" below {prefix}" if prefix else "; --prefix keeps a run apart"
            raise TargetError(f"{target.name} is not empty: {keys} keys{below}")

    def _commands(self) -> Mapping[str, Sequence[str]]:
        """How started servers tell their version; who does not know the flag tells it by RPC."""
        commands = {t.name: shlex.split(t.command)[0] for t in self._wish.targets if t.started}
        return {name: [program, "--version"] for name, program in commands.items()}

    async def _session(self, plan: Plan) -> Session:
        wish = self._wish
        return Session(
            command_line=list(wish.command_line),
            storm=wish.storm.NAME,
            preset=wish.preset,
            parameters=asdict(wish.parameters),
            seed=wish.seed,
            duration_us=wish.duration_us,
            fingerprint=plan.fingerprint(),
            targets=[target.name for target in wish.targets],
            repetitions=wish.repetitions,
            started=datetime.fromtimestamp(wall_seconds(), UTC).isoformat(timespec="seconds"),
            state="INCOMPLETE",
            before=capsule(wish.out, self._commands()),
            after=None,
            ceiling_per_second=(await measure_ceiling()).per_second if wish.ceiling else 0.0,
        )

    def _facts(self, plan: Plan, target: Target, repetition: int) -> Facts:
        wish = self._wish
        syncs, round_trips = bouts(wish.out)
        return Facts(
            run=f"{wish.storm.NAME}-{wish.seed}-{repetition}",
            storm=wish.storm.NAME,
            preset=wish.preset,
            parameters=asdict(wish.parameters),
            seed=wish.seed,
            duration_us=plan.duration_us,
            warm_up_us=plan.warm_up_us,
            fingerprint=plan.fingerprint(),
            apiservers=plan.apiservers,
            resources=[prefix.decode() for prefix in plan.resources],
            target=target.name,
            command=target.command,
            version="",
            durability=target.durability,
            repetition=repetition,
            fsync_us=typical(syncs),
            loopback_us=typical(round_trips),
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
