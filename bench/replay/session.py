"""``kvstore-bench replay``: a trace against one server or several, judged like a storm.

    trace --> script --> [target: preload -> load -> drain -> final list -> records -> verdicts]

Every target gets the same trace, on empty data, one after the other. Its folder has the records of
``bench/records.py``, ``verdicts.json``, and ``replay.json``: what was sent, and everything that
could not be translated, sent or judged, by kind.
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

from bench.capsule import Capsule, capsule
from bench.client.asking import AskError, Asking, reach
from bench.clock import MICROSECONDS, now_us, wait_until, wall_seconds
from bench.judges import judge
from bench.records import FINAL, PRELOADED, SAMPLES, TABLES, Facts, Recorder, Records
from bench.replay.calls import Counts
from bench.replay.player import Player
from bench.replay.script import read_script
from bench.replay.trace import Trace
from bench.replay.translation import LEASES, Translation
from bench.report.session import Session, run_folder, write_session, write_verdicts
from bench.targets import START_TIMEOUT, Running, Target, TargetError
from bench.values import digest
from bench.verdicts import Verdict
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb

STORM = "replay"
LEAD_US = 200_000
SAMPLE_US = 250_000
PROGRESS_US = 200_000
DRAIN_SECONDS = 15.0
PRELOAD_PARALLEL = 64
PUT = b"/etcdserverpb.KV/Put"


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of one target."""

    target: str
    folder: Path
    state: str
    """``COMPLETE`` or ``INCOMPLETE``."""
    counts: Counts
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
    speed: float = 1.0
    timeout_us: int = 10 * MICROSECONDS
    command_line: Sequence[str] = field(default_factory=lambda: sys.argv)


Show = Callable[[str, str], None]
"""Told of a target and the stage that it is in."""
Told = Callable[[Replayed], None]


async def replay(wish: Wish, *, stop: asyncio.Event, show: Show, told: Told) -> list[Replayed]:
    """Replay to each target in turn, as a session that can be reported and compared.

    Raises ``TraceError`` if the file is no trace, ``TargetError`` if a target cannot be had, is not
    empty, or ends; ``ValueError`` for a speed that is none.
    """
    played = Playing(wish, stop, show)
    await played.check()
    wish.out.mkdir(parents=True, exist_ok=True)
    session = played.session(capsule(wish.out, {}))
    write_session(wish.out, session)
    done: list[Replayed] = []
    for target in wish.targets:
        if not stop.is_set():
            done.append(await played.play(target))
            told(done[-1])
    session["after"] = capsule(wish.out, {})
    session["state"] = "INCOMPLETE" if stop.is_set() else "COMPLETE"
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
        with wish.trace.open("rb") as file:
            self.fingerprint = file_digest(file, "sha256").hexdigest()

    async def check(self) -> None:
        """Raises ``TargetError`` if a target that runs already is not to be used."""
        for target in self.wish.targets:
            if not target.started:
                await _check_empty(target)

    async def play(self, target: Target) -> Replayed:
        """From a server on empty data to verdicts."""
        return await _Run(self, target).run()

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
            repetitions=1,
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
        raise TargetError(f"{where} is not empty: {keys} keys; a trace begins with what it holds")


class _Run:
    """One target's."""

    def __init__(self, playing: Playing, target: Target) -> None:
        wish, script = playing.wish, playing.script
        self._wish, self._target, self._script = wish, target, script
        self._stop, self._show = playing.stop, playing.show
        self._translation = Translation(script, playing.revision, wish.speed)
        self._recorders = {table.name: Recorder(table) for table in TABLES}
        self._zero_us = 0
        self._server: Running | None = None
        self._host, self._port = target.host, target.port
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
            repetition=0,
            fsync_us=0.0,
            loopback_us=0.0,
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
        """From a server on empty data to verdicts."""
        with ExitStack() as stack:
            if self._target.started:
                self._server = stack.enter_context(Running(self._target))
                self._host, self._port = self._server.host, self._server.port
            try:
                player = await self._play()
            except ExceptionGroup as group:
                raise _first(group) from group
            except AskError as error:
                raise TargetError(f"{self._target.name}: {error.text}") from error
        folder = run_folder(self._wish.out, self._target.name, 0)
        folder.mkdir(parents=True)
        for recorder in self._recorders.values():
            recorder.write(folder, 0, self._zero_us)
        (folder / "run.json").write_text(json.dumps(self._facts, indent=1))
        unmapped = dict(self._translation.unmapped)
        counts = player.counts
        said = {
            "sent": counts.sent,
            "unmapped": unmapped,
            "withheld": counts.withheld,
            "unjudged": counts.unjudged,
            "otherwise": counts.otherwise,
        }
        (folder / "replay.json").write_text(json.dumps(said, indent=1) + "\n")
        self._show(self._target.name, "judging")
        verdicts = [] if counts.unjudged else judge(Records(folder))
        if verdicts:
            write_verdicts(folder, verdicts)
        return Replayed(self._target.name, folder, self._facts["state"], counts, unmapped, verdicts)

    async def _play(self) -> Player:
        """The load and what belongs to it, against a server that is there."""
        facts = self._facts
        asking = await self._reach()
        facts["version"] = await asking.version()
        self._show(self._target.name, "filling")
        await self._preload(asking)
        _, revision = await asking.count(b"")
        self._translation.begin(revision)
        player = Player(
            self._script,
            self._translation,
            self._recorders,
            host=self._host,
            port=self._port,
            speed=self._wish.speed,
            timeout_us=self._wish.timeout_us,
            stop=self._stop,
        )
        self._show(self._target.name, "load")
        gc.collect()
        self._zero_us = facts["zero_us"] = now_us() + LEAD_US
        async with asyncio.TaskGroup() as group:
            sampling = group.create_task(self._sample())
            await self._load(player)
            facts["load_end_us"] = now_us() - self._zero_us
            self._show(self._target.name, "draining")
            await self._drain(player, asking)
            sampling.cancel()
        asking.close()
        facts["finished_us"] = now_us() - self._zero_us
        facts["state"] = "INCOMPLETE" if self._stop.is_set() else "COMPLETE"
        facts["connections_failed"] = player.connections_failed
        player.finish()
        return player

    async def _load(self, player: Player) -> None:
        """Without the collector of cyclic garbage: its pauses would be charged to the server."""
        gc.disable()
        try:
            await player.run(self._zero_us)
        finally:
            gc.enable()

    async def _reach(self) -> Asking:
        try:
            return await reach(self._host, self._port, START_TIMEOUT)
        except AskError as error:
            said = self._server.log_tail() if self._server is not None else ""
            raise TargetError(
                f"{self._target.name} at {self._host}:{self._port} {error.text} {said}"
            ) from error

    async def _preload(self, asking: Asking) -> None:
        """Put what was there when the recording began, some at a time."""
        objects = self._script.objects
        for first in range(0, len(objects), PRELOAD_PARALLEL):
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

    async def _drain(self, player: Player, asking: Asking) -> None:
        """Let every watch come to the head, then read everything as it is."""
        _, head = await asking.count(b"")
        end_us = now_us() + int(DRAIN_SECONDS * MICROSECONDS)
        while not self._stop.is_set() and now_us() < end_us:
            behind = player.behind
            if behind is None or behind >= head:
                break
            player.ask_progress()
            await wait_until(now_us() + PROGRESS_US)
        revision, objects = await asking.objects(b"")
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
                raise TargetError(f"{self._target.name} ended: {server.log_tail()}")
            due_us += SAMPLE_US
            await wait_until(due_us)


def _first(group: ExceptionGroup[Exception]) -> Exception:
    """What went wrong first, as one line if it is the target's fault."""
    error = group.exceptions[0]
    if isinstance(error, ExceptionGroup):
        return _first(error)
    return TargetError(error.text) if isinstance(error, AskError) else error
