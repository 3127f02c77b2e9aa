"""``kvstore-bench replay``: a trace against one server or several, judged like a storm.

    trace --> script --> [target: preload -> load -> drain -> final list -> records -> verdicts]

Every target gets the same trace, on empty data, one after the other; repetitions take turns as
those of a storm do (A B, B A, ...), and figures are compared by their medians. The folder of a run
has the records of ``bench/records.py``, ``verdicts.json``, and ``replay.json``: what was sent, and
everything that could not be translated, sent or judged, by kind. Whatever ends a replay early (the
server, the user), what there is by then is recorded and judged, and the facts say why.
"""

import asyncio
import gc
import json
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import file_digest
from pathlib import Path

from bench.capsule import Capsule, Speeds, capsule, speeds
from bench.client.asking import AskError, Asking, reach
from bench.clock import MICROSECONDS, now_us, wait_until, wall_seconds
from bench.judges import judge
from bench.records import FINAL, PRELOADED, SAMPLES, TABLES, Facts, Recorder, Records, row_counts
from bench.replay.calls import UNJUDGED, Counts, named
from bench.replay.player import Player
from bench.replay.script import read_script
from bench.replay.trace import Trace, TraceError
from bench.replay.translation import LEASES, Translation
from bench.report.session import Session, run_folder, write_session, write_verdicts
from bench.targets import SLOW_SECONDS, START_TIMEOUT, Running, Target, TargetError
from bench.values import digest
from bench.verdicts import Verdict
from bench.wording import counted
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb

STORM = "replay"
LEAD_US = 200_000
SAMPLE_US = 250_000
PROGRESS_US = 200_000
DRAIN_SECONDS = 15.0
PRELOAD_PARALLEL = 64
PUT = b"/etcdserverpb.KV/Put"


_BROKEN = (TargetError, AskError)
"""What ends one target's replay and not the session."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of one run."""

    name: str
    """The target, and which of its repetitions if there are several."""
    folder: Path
    state: str
    """``COMPLETE`` or ``INCOMPLETE``."""
    recorded: int
    """Calls in the trace."""
    counts: Counts
    not_sent: Mapping[str, Mapping[str, int]]
    """Calls by why and by method; with ``counts.sent`` these are all that were recorded."""
    unmapped: Mapping[str, int]
    """What had no counterpart, by kind (``bench/replay/translation.py``)."""
    verdicts: Sequence[Verdict] = field(default_factory=list)
    """Empty if there was a call that judges cannot follow (``counts.unjudged``)."""

    @property
    def failed(self) -> bool:
        """Did a judge find something?"""
        return any(not verdict.passed for verdict in self.verdicts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user asked for."""

    trace: Path
    targets: Sequence[Target]
    out: Path
    """A new folder."""
    repetitions: int = 1
    """More only of targets that are started: another one is full after the first."""
    speed: float = 1.0
    timeout_us: int = 10 * MICROSECONDS
    command_line: Sequence[str] = field(default_factory=lambda: sys.argv)


Show = Callable[[str, str], None]
"""Told of a target and the stage that it is in."""


async def replay(wish: Wish, *, stop: asyncio.Event, show: Show) -> list[Replayed]:
    """Replay to the targets in turns, as a session that can be reported and compared.

    ``stop`` ends it in order; cancelled after that it ends at once, with what there is.
    Raises, before anything is sent, ``TraceError`` if the file is no trace, ``TargetError`` if a
    target cannot be had, or is not empty, or if it was stopped; ``ValueError`` for a speed that is
    none.
    """
    played = Playing(wish, stop, show)
    await played.check()
    if stop.is_set():
        raise TargetError("stopped before anything was sent")
    wish.out.mkdir(parents=True, exist_ok=True)
    session = played.session(capsule(wish.out, {}))
    write_session(wish.out, session)
    turns = [
        (target, repetition)
        for repetition in range(wish.repetitions)
        for target in wish.targets[:: 1 if repetition % 2 == 0 else -1]
    ]
    done = [
        await played.play(target, speeds(wish.out), repetition)
        for target, repetition in turns
        if not stop.is_set()
    ]
    session["after"] = capsule(wish.out, {})
    whole = len(done) == len(turns) and all(one.state == "COMPLETE" for one in done)
    session["state"] = "COMPLETE" if whole else "INCOMPLETE"
    write_session(wish.out, session)
    return done


class Playing:
    """One trace, and what is to be done with it."""

    def __init__(self, wish: Wish, stop: asyncio.Event, show: Show) -> None:
        """Raises ``TraceError`` or ``ValueError``."""
        if wish.speed <= 0:
            raise ValueError(f"--speed {wish.speed:g}: more than 0")
        self.wish, self.stop, self.show = wish, stop, show
        trace = Trace(wish.trace)
        self.revision = trace.about["revision"]
        self.script = read_script(trace)
        if not self.script.calls:
            raise TraceError(f"{wish.trace} holds no call: there is nothing to replay")
        with wish.trace.open("rb") as file:
            self.fingerprint = file_digest(file, "sha256").hexdigest()

    async def check(self) -> None:
        """Raises ``TargetError`` if a target cannot be had or is not to be used."""
        for target in self.wish.targets:
            if not target.started:
                if self.wish.repetitions > 1:
                    raise TargetError(
                        f"--reps {self.wish.repetitions}: {target.name} runs already and is not"
                        " empty after the first; --start NAME=COMMAND has it fresh each time"
                    )
                await _check_empty(target)
                continue
            with Running(target) as server:
                await (await self.reach(target, server)).leave()

    async def reach(self, target: Target, server: Running | None) -> Asking:
        """Raises ``TargetError``: nobody answers, or nobody is there any more."""
        host, port = (target.host, target.port) if server is None else (server.host, server.port)

        def hopeful() -> bool:
            return not self.stop.is_set() and (server is None or server.alive)

        loop = asyncio.get_running_loop()
        telling = loop.call_later(SLOW_SECONDS, self.show, target.name, "starting")
        try:
            return await reach(host, port, START_TIMEOUT, hopeful)
        except AskError as error:
            if server is None:
                raise TargetError(f"{target.name} at {host}:{port} {error.text}") from error
            if not server.alive:
                raise TargetError(_ended(target, server)) from error
            if self.stop.is_set():
                raise TargetError(f"stopped while {target.name} was waited for") from error
            limit = f"does not answer on port {port} after {START_TIMEOUT:g} s"
            raise TargetError(f"{target.name} {limit}: {error.text}") from error
        finally:
            telling.cancel()

    async def play(self, target: Target, machine: Speeds, repetition: int = 0) -> Replayed:
        """From a server on empty data to verdicts; ``machine`` is how fast it was just before."""
        return await _Run(self, target, machine, repetition).run()

    def session(self, before: Capsule) -> Session:
        """What is known of the session when it begins."""
        wish = self.wish
        return Session(
            command_line=list(wish.command_line),
            storm=STORM,
            preset=wish.trace.name,
            parameters={"speed": wish.speed},
            seed=0,
            duration_us=int(self.script.duration_us / wish.speed),
            fingerprint=self.fingerprint,
            targets=[target.name for target in wish.targets],
            repetitions=wish.repetitions,
            started=datetime.fromtimestamp(wall_seconds(), UTC).isoformat(timespec="seconds"),
            state="INCOMPLETE",
            before=before,
            after=None,
            ceiling_per_second=0.0,
        )


async def _check_empty(target: Target) -> None:
    where = f"{target.name} at {target.host}:{target.port}"
    try:
        asking = await reach(target.host, target.port, 0)
        keys, _ = await asking.count(b"")
        asking.close()
    except AskError as error:
        raise TargetError(f"{where} {error.text}") from error
    if keys:
        held = counted(keys, "key")
        raise TargetError(f"{where} is not empty: {held}; a trace begins with what it holds")


def _ended(target: Target, server: Running) -> str:
    """How it did, and what it said of that."""
    return ": ".join((f"{target.name} {server.end}", *server.log_tail().splitlines()))


class _Run:
    """One repetition of one target."""

    def __init__(self, playing: Playing, target: Target, machine: Speeds, repetition: int) -> None:
        wish, script = playing.wish, playing.script
        turn = f" {repetition + 1}/{wish.repetitions}" if wish.repetitions > 1 else ""
        self._name = f"{target.name}{turn}"
        self._playing, self._wish, self._target = playing, wish, target
        self._script = script
        self._stop, self._show = playing.stop, playing.show
        self._translation = Translation(script, playing.revision, wish.speed)
        self._recorders = {table.name: Recorder(table) for table in TABLES}
        self._zero_us = 0
        self._server: Running | None = None
        self._facts = Facts(
            run=f"replay of {wish.trace.name}",
            storm=STORM,
            preset=wish.trace.name,
            parameters={"speed": wish.speed},
            seed=0,
            duration_us=int(script.duration_us / wish.speed),
            warm_up_us=0,
            fingerprint=playing.fingerprint,
            apiservers=len(script.acts),
            resources=[],
            target=target.name,
            command=target.command,
            version="",
            durability=target.durability,
            repetition=repetition,
            fsync_us=machine.fsync_p50_us,
            loopback_us=machine.loopback_p50_us,
            prefix="",
            zero_us=0,
            load_end_us=0,
            finished_us=0,
            state="INCOMPLETE",
            processes=1,
            client="lean",
            timeout_us=wish.timeout_us,
            connections_failed=0,
            steps=0,
            final_revision=-1,
            reason="",
        )

    async def run(self) -> Replayed:
        """From a server on empty data to verdicts, or as far as it goes."""
        facts = self._facts
        host, port = self._target.host, self._target.port
        with ExitStack() as stack:
            if self._target.started:
                self._server = stack.enter_context(Running(self._target))
                host, port = self._server.host, self._server.port
            player = Player(
                self._script,
                self._translation,
                self._recorders,
                host=host,
                port=port,
                speed=self._wish.speed,
                timeout_us=self._wish.timeout_us,
                stop=self._stop,
            )
            await self._attempt(player)
            await player.finish()
        facts["connections_failed"] = player.connections_failed
        broken = bool(facts["reason"]) or self._stop.is_set()
        facts["state"] = "INCOMPLETE" if broken else "COMPLETE"
        return self._recorded(player.counts)

    async def _attempt(self, player: Player) -> None:
        """Play; what ends it early, and is no fault of ours, is the reason in the facts."""
        try:
            await self._play(player)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._stop.is_set() or task is None:
                raise
            task.uncancel()
        except _BROKEN as error:
            self._because(error)
        except ExceptionGroup as group:
            broken, others = group.split(_BROKEN)
            if others is not None or broken is None:
                raise
            self._because(_first(broken))

    def _because(self, error: Exception) -> None:
        server, facts = self._server, self._facts
        if self._stop.is_set():
            return
        if server is not None and not server.alive:
            facts["reason"] = _ended(self._target, server)
        else:
            facts["reason"] = str(error).partition("\n")[0].strip()

    def _recorded(self, counts: Counts) -> Replayed:
        """Write down what there is, and have it judged."""
        facts, name = self._facts, self._name
        folder = run_folder(self._wish.out, self._target.name, facts["repetition"])
        folder.mkdir(parents=True)
        for recorder in self._recorders.values():
            recorder.write(folder, 0, self._zero_us)
        if counts.unjudged and not facts["reason"]:
            facts["reason"] = f"{UNJUDGED}: {named(counts.unjudged)}"
        facts["rows"] = row_counts(folder)
        (folder / "run.json").write_text(json.dumps(facts, indent=1))
        calls, state = self._script.calls, facts["state"]
        not_sent = counts.not_sent(calls, whole=state == "COMPLETE")
        unmapped = dict(self._translation.unmapped)
        said = {
            "recorded": len(calls),
            "sent": counts.sent,
            "not_sent": not_sent,
            "unmapped": unmapped,
            "unjudged": counts.unjudged,
            "otherwise": counts.otherwise,
        }
        (folder / "replay.json").write_text(json.dumps(said, indent=1) + "\n")
        self._show(name, "judging")
        verdicts: list[Verdict] = []
        if self._zero_us and not counts.unjudged:
            verdicts = judge(Records(folder))
            write_verdicts(folder, verdicts)
        return Replayed(name, folder, state, len(calls), counts, not_sent, unmapped, verdicts)

    async def _play(self, player: Player) -> None:
        """The load and what belongs to it, against a server that is there."""
        facts = self._facts
        asking = await self._playing.reach(self._target, self._server)
        facts["version"] = await asking.version()
        self._show(self._name, "filling")
        await self._preload(asking)
        _, revision = await asking.count(b"")
        asking.close()
        self._translation.begin(revision)
        self._show(self._name, "load")
        gc.collect()
        self._zero_us = facts["zero_us"] = now_us() + LEAD_US
        async with asyncio.TaskGroup() as group:
            sampling = group.create_task(self._sample())
            await self._load(player)
            facts["load_end_us"] = now_us() - self._zero_us
            self._show(self._name, "draining")
            await self._drain(player)
            sampling.cancel()
        facts["finished_us"] = now_us() - self._zero_us

    async def _load(self, player: Player) -> None:
        """Without the collector of cyclic garbage: its pauses would be charged to the server."""
        gc.disable()
        try:
            await player.run(self._zero_us)
        finally:
            gc.enable()

    async def _preload(self, asking: Asking) -> None:
        """Put what was there when the recording began, some at a time."""
        objects = self._script.objects
        for first in range(0, len(objects), PRELOAD_PARALLEL):
            if self._stop.is_set():
                return
            async with asyncio.TaskGroup() as group:
                for kv in objects[first : first + PRELOAD_PARALLEL]:
                    group.create_task(self._put(asking, kv))

    async def _put(self, asking: Asking, kv: kv_pb2.KeyValue) -> None:
        if kv.lease:
            self._translation.unmapped[LEASES] += 1
        put = pb.PutRequest(key=kv.key, value=kv.value).SerializeToString()
        answer = pb.PutResponse.FromString(await asking.call(PUT, put))
        revision = answer.header.revision
        self._translation.object(kv, revision)
        self._recorders[PRELOADED.name].add(revision, digest(kv.value), kv.key)

    async def _drain(self, player: Player) -> None:
        """Let every watch come to the head, then read everything as it is."""
        target, server = self._target, self._server
        asking = await self._playing.reach(target, server)
        _, head = await asking.count(b"")
        end_us = now_us() + int(DRAIN_SECONDS * MICROSECONDS)
        while not self._stop.is_set() and now_us() < end_us:
            behind = player.behind
            if behind is None or behind >= head:
                break
            player.ask_progress()
            await wait_until(now_us() + PROGRESS_US)
        revision, objects = await asking.objects(b"")
        asking.close()
        self._facts["final_revision"] = revision
        for kv in objects:
            self._recorders[FINAL.name].add(
                *(revision, kv.mod_revision, kv.create_revision, kv.version, kv.lease),
                *(kv.key, kv.value),
            )

    async def _sample(self) -> None:
        """What the server and we use, four times a second."""
        due_us = now_us()
        while True:
            server = self._server
            usage = server.usage() if server is not None else (-1, -1, -1, -1)
            used = resource.getrusage(resource.RUSAGE_SELF)
            own_us = int((used.ru_utime + used.ru_stime) * 1e6)
            self._recorders[SAMPLES.name].add(now_us(), *usage, own_us, own_us)
            if server is not None and not server.alive:
                raise TargetError(_ended(self._target, server))
            due_us += SAMPLE_US
            await wait_until(due_us)


def _first(group: ExceptionGroup[Exception]) -> Exception:
    """What went wrong first."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error
