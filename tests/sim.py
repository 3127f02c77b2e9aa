"""The whole server but for its sockets, in a world that goes wrong, one seed at a time.

A seed decides everything: what several clients ask for and watch, which of the waiting steps runs
next, how each commit ends, which databases are slow, hang, die, return or are replaced by an older
copy, when a process dies, is paused or is told to stop, how far its recovery gets, and when a
second one wants to lead. Time is moved by hand and there are no threads, so that a seed that fails
fails again.

The oracle needs no search. Every batch passes its database's commit point exactly once, and there
the log writes it down (``sim_log``); whatever a client is told is compared with the log when it is
told (``sim_requests``, ``sim_watch``), and again at the end, when nothing goes wrong any more.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any
from unittest.mock import patch

from kvstore import history, opening, reservation
from kvstore.shard import HOME
from tests.sim_process import Process
from tests.sim_requests import ALL, NAMES, Clients, Sent
from tests.sim_scenes import calm, leave, overtake, reroute
from tests.sim_watch import Stream, Watcher, check_complete
from tests.sim_world import NAMES as SHARDS
from tests.sim_world import SimDisk, World
from tests.stack import all_versions

AHEAD = 100
"""Revisions that are reserved: a life issues more than half of that, and starts over anew."""
TICKS = (0.05, 0.05, 0.2, 0.2, 0.5, 3.0)
WATCHED = ((b"a", b""), (b"a", b"e"), (b"x/", b"x0"), (b"x/a", b"z"), ALL)


class PromiseBrokenError(Exception):
    """What went wrong, after the call that repeats it."""


class Simulation:
    """One seed. See the module's text."""

    def __init__(self, seed: int, *, shards: int = 3) -> None:
        self.name = f"run(seed={seed}, shards={shards})"
        self.random = random = Random(seed)
        self.world = World(random, shards=shards, locks=random.random() < 0.5)
        self.clients = Clients(self.world)
        self.counts = self.clients.counts
        self.world.log.absent = self._absent
        self.world.log.frontier = self._frontier
        self.crash_rate = random.choice([0.0, 0.005, 0.02])
        self.deck = self._deal()
        self.replacing = random.choice([0.0, 0.0, 0.2])
        """How often a crash is one after which a database is not what it was."""
        for disk in self.world.disks:
            disk.rate = random.choice([0.0, 0.0, 0.05, 0.2, 0.5])
        self.processes: list[Process] = []
        self.copies: list[dict[str, Any] | None] = [None] * shards
        """Of each database, as it was some time ago."""
        watched = random.sample(WATCHED, random.randrange(4))
        self.watchers = [Watcher(*where, previous=random.random() < 0.5) for where in watched]
        self.streams: list[Stream] = []
        self._start()

    def run(self, actions: int = 250) -> Counter[str]:
        """Live through it, then heal and compare everything; what happened, counted.

        Raises PromiseBrokenError.
        """
        try:
            for _ in range(actions):
                self._act()
            self._heal()
            self._compare()
            if self.random.random() < 0.3:
                self._outlive_leases()
            self._crash(self.processes[0])
            self._heal()
            self._compare()
            self._check_the_past()
        except Exception as error:
            raise PromiseBrokenError(f"{self.name}: {error!r}") from error
        finally:
            for process in self.processes:
                process.crash()
        self.counts["committed over several shards"] += self.world.log.redone
        self.counts["shards returned"] += self.world.returned
        self.counts["leases ended"] += len(self.world.log.ended)
        return self.counts

    # -- what happens ------------------------------------------------------------------------------

    def _deal(self) -> list[Callable[[Process], object]]:
        """What may happen, as often as it is likely."""
        trouble = self.random.choice([0, 1, 3])
        return [
            *[self._send] * 27,
            *[Process.run_next] * 25,
            *[self._step] * 27,
            *[self._pass_time] * 6,
            *[self._watch] * 3,
            *[Process.evict] * 8,
            *[self._let_go] * 2,
            *[self._copy, self._pause, self._challenge, self._depose],
            *[partial(overtake, self), partial(leave, self), partial(reroute, self)],
            *[self._trouble] * trouble,
        ]

    def _act(self) -> None:
        """Any one thing."""
        process = self._any_process()
        if self.random.random() < self.crash_rate:
            self._end(process)
        elif not process.serving and self.random.random() < 0.6:
            self._hurry(process)
        else:
            self.random.choice(self.deck)(process)
        self._settle()

    def _send(self, process: Process) -> None:
        if process.serving and len(self.clients.sent) < 10:
            self.clients.send(process)

    def _step(self, _: Process) -> None:
        self.random.choice(self.world.disks).step()

    def _pass_time(self, _: Process) -> None:
        self._tick(self.random.choice(TICKS))

    def _let_go(self, _: Process) -> None:
        self.world.let_go(self.random.choice(self.world.disks))

    def _hurry(self, process: Process) -> None:
        """Go on with a start, which takes many steps, for some of them."""
        for _ in range(self.random.randrange(25)):
            process.run_next()
            for disk in self.world.disks:
                disk.step()

    def _any_process(self) -> Process:
        if not self.processes:
            self._start()
        return self.random.choice(self.processes)

    def _settle(self) -> None:
        """After each thing: look at what was said, and bury the dead."""
        self.clients.collect()
        for process in list(self.processes):
            if process.over:
                self.counts[f"ended: {process.over.split(':')[0]}"] += 1
                if process.over.startswith("refused") and self.random.random() < 0.5:
                    self._put_right()
                self._bury(process)
            elif process.serving:
                for disk in self.world.disks:
                    wrong = disk.right is not None and disk.number not in process.absent
                    assert not wrong, f"{disk.shard} is served, and is not what it was"
        self.streams = [stream for stream in self.streams if not stream.finished]
        if not self.streams and self.watchers and self.random.random() < 0.2:
            self._watch_again()

    def _tick(self, seconds: float) -> None:
        """Time goes by; those who are paused do not see it yet."""
        self.world.clock.advance(seconds)
        for process in self.processes:
            process.tick()

    def _start(self) -> None:
        self.processes.append(Process(self.world))

    def _end(self, process: Process) -> None:
        """Die, or stop in good order."""
        if process.serving and not process.paused and self.random.random() < 0.3:
            self.counts["stops"] += 1
            process.stop()
        else:
            self._crash(process)

    def _crash(self, process: Process) -> None:
        self.counts["crashes"] += 1
        self._bury(process)
        for disk in self.world.disks[1:]:
            if self.random.random() < self.replacing:
                self._replace(disk)

    def _bury(self, process: Process) -> None:
        self.clients.lose(process)
        for stream in self.streams:
            stream.finished |= stream.process is process
        self.streams = [stream for stream in self.streams if stream.process is not process]
        self.processes.remove(process)
        process.crash()

    def _pause(self, process: Process) -> None:
        """Stop a process where it is, or let it go on; time has gone by meanwhile."""
        process.paused = not process.paused
        if process.paused:
            self.counts["pauses"] += 1
            if self.random.random() < 0.5:
                self._tick(self.random.choice([1.0, 7.0]))

    def _challenge(self, _: Process) -> None:
        """A second server wants to lead; the first one may be paused."""
        if len(self.processes) < 2 and not self.world.locks:
            self.counts["challenges"] += 1
            self._start()

    def _depose(self, process: Process) -> None:
        """The leader stands still for so long that another one takes over, and goes on then."""
        if self.world.locks or len(self.processes) > 1 or not process.serving:
            return
        process.paused = True
        self._start()
        other = self.processes[-1]
        for _ in range(4):
            self._tick(2.0)
            self._run(other, self.world.disks, rounds=2)
        key = self.random.choice(self.clients.prefixes) + self.random.choice(NAMES)
        if other.serving:
            self.counts["leaders deposed"] += 1
            self.clients.put(other, key)
            self._run(other, self.world.disks, rounds=1)
        process.paused = False
        self.clients.read(process, key)

    def _trouble(self, _: Process) -> None:
        """A database dies, freezes or comes back; home seldom."""
        disk = self.random.choice(self.world.disks[self.random.random() < 0.8 :] or [None])
        if disk is None:
            return
        if disk.down or disk.frozen:
            self._back(disk)
        elif self.random.random() < 0.5:
            self.counts["databases frozen"] += 1
            disk.frozen = True
        else:
            self.counts["databases lost"] += 1
            disk.fall()
        if disk.number != HOME and self.random.random() < 0.3:
            self._probe(disk)

    def _back(self, disk: SimDisk) -> None:
        if self.random.random() < 0.5:
            disk.put_right()
        disk.rise()

    # -- databases that are not what they were -----------------------------------------------------

    def _copy(self, _: Process) -> None:
        """Keep a copy of a database for later; home is the one that knows of the others."""
        disk = self.random.choice(self.world.disks)
        if disk.number != HOME and disk.right is None:
            self.copies[disk.number] = disk.copy()

    def _replace(self, disk: SimDisk) -> None:
        """Put an older copy or a foreign database in a shard's place, that the server can know for
        one.
        """
        record = self.world.disks[HOME].records.get(SHARDS[disk.number])
        older = self.copies[disk.number]
        used = any(disk.number not in each.absent for each in self.processes)
        if record is None or used or disk.right is not None:
            return
        if older is not None and older["tip"] < record.tip:
            disk.replace(older)
        else:
            other = self.random.choice(["cluster_id", "shard", "origin"])
            wrong = {"cluster_id": 77, "shard": "other", "origin": f"{disk.origin}+"}
            disk.replace({**disk.copy(), other: wrong[other]})
        self.counts["databases replaced"] += 1

    def _put_right(self) -> None:
        for disk in self.world.disks:
            disk.put_right()

    def _absent(self) -> set[int]:
        """Shards that some living process has not loaded."""
        return set().union(*(process.absent for process in self.processes))

    def _frontier(self, shard: int) -> int:
        serving = [process for process in self.processes if process.assembly is not None]
        return min((each.store.commits.frontier((shard,)) for each in serving), default=0)

    # -- watching ----------------------------------------------------------------------------------

    def _watch_again(self) -> None:
        """All watchers begin, or go on, with a server that serves."""
        serving = [each for each in self.processes if each.serving and not each.paused]
        if serving:
            process = self.random.choice(serving)
            self.streams.append(Stream(self.clients, process, self.watchers))

    def _watch(self, process: Process) -> None:
        for stream in self.streams:
            if stream.process is not process or process.paused:
                continue
            match self.random.randrange(4):
                case 0:
                    stream.stop_reading()
                case 1:
                    stream.read()
                case _:
                    stream.ask_progress()

    # -- other shards' troubles --------------------------------------------------------------------

    def _probe(self, lost: SimDisk) -> None:
        """While one database is away, the keys of another are written and read at once."""
        world, clients = self.world, self.clients
        well = [disk for disk in world.disks if disk is not lost]
        process = self._any_process()
        across = any(len(sent.shards) > 1 and not sent.read_only for sent in clients.sent)
        if (
            len(self.processes) > 1
            or not process.serving
            or process.paused
            or across
            or any(disk.down or disk.frozen for disk in well)
        ):
            return
        with calm(well):
            self._run(process, well, rounds=14)
            target = self.random.choice(well)
            if process.over or target.number in process.absent | process.out | process.broken:
                return
            key = self.random.choice([p for p in clients.prefixes if self._on(p, target)]) + b"a"
            put, get = clients.put(process, key, leases=0), clients.read(process, key)
            self._run(process, well, rounds=2)
            if not process.over:
                self._answered(put, get)
                self.counts["probes"] += 1

    def _on(self, prefix: bytes, disk: SimDisk) -> bool:
        return self.world.shards.of(prefix + NAMES[0]) == disk.number

    def _answered(self, *sent: Sent) -> None:
        for each in sent:
            failed = each.call.failed
            done = each.call.done and (failed is None or "timed out" not in failed[1])
            assert done, f"another shard's trouble delays it: {failed}"

    def _run(self, process: Process, disks: list[SimDisk], *, rounds: int) -> None:
        """Let time go by in which everything else does what it has to."""
        for _ in range(rounds):
            self._tick(0.15)
            for _ in range(40):
                busy = process.run_next()
                for disk in disks:
                    self.world.let_go(disk)
                    busy |= disk.step()
                if not busy:
                    break
            self.clients.collect()
            if process.over:
                return

    # -- in the end --------------------------------------------------------------------------------

    def _heal(self) -> None:
        """Nothing goes wrong any more: everything that waits is answered in bounded work."""
        world = self.world
        self._put_right()
        for disk in world.disks:
            disk.rate = 0.0
            disk.rise()
        for stream in self.streams:
            stream.read()
        for process in self.processes:
            process.paused = False
        for _ in range(120):
            self._any_process()
            self._tick(0.25)
            for process in list(self.processes):
                self._run(process, world.disks, rounds=1)
                if process.broken and not process.over:
                    self._bury(process)  # its operator starts it anew
            self._settle()
            if self._is_calm() and self._is_held():
                break
        assert self._is_calm(), "everything is answered"
        if self.watchers:
            self._let_watchers_see()

    def _is_calm(self) -> bool:
        if len(self.processes) != 1:
            return False
        process = self.processes[0]
        return process.calm and not self.clients.sent

    def _is_held(self) -> bool:
        """Does the one process still have all databases? If not, a write is what tells it."""
        process, held = self.processes[0], True
        for disk in self.world.disks:
            if not disk.held:
                held = False
                prefix = self.random.choice([p for p in self.clients.prefixes if self._on(p, disk)])
                self.clients.put(process, prefix + NAMES[0])
        return held

    def _let_watchers_see(self) -> None:
        if not self.streams:
            self._watch_again()
        for _ in range(20):
            self._run(self.processes[0], self.world.disks, rounds=1)
        for _ in range(40):  # of a lease that ends just now
            if self._is_calm():
                break
            self._run(self.processes[0], self.world.disks, rounds=1)
        for watcher in self.watchers:
            check_complete(self.clients, watcher, tip=self.world.log.tip)

    def _outlive_leases(self) -> None:
        """All leases end if nobody renews them, and their keys with them."""
        for _ in range(30):
            self._run(self.processes[0], self.world.disks, rounds=4)
        log, home = self.world.log, self.world.disks[HOME]
        assert not home.leases, "leases end"
        alive = log.range(*ALL, log.tip)
        assert not [row for row in alive if row[5]], "and their keys with them"

    def _compare(self) -> None:
        """The store, its databases and the log are one, at every revision that may be read."""
        process, log, clients = self.processes[0], self.world.log, self.clients
        self._run(process, self.world.disks, rounds=2)
        store = process.store
        assert store.compact_revision == self.world.disks[HOME].compact_revision
        first = max(clients.compacted, store.compact_revision, 1)
        later = [revision for revision in log.order if revision >= first]
        for revision in (0, *self.random.sample(later, min(len(later), 5))):
            sent = clients.read(process, *ALL, revision)
            self._run(process, self.world.disks, rounds=1)
            assert sent.call.body is not None, f"{revision}: {sent.call.failed}"
        for _ in range(50):
            if not process.dropping:
                break
            self._run(process, self.world.disks, rounds=1)
        versions = all_versions(store).values()
        known = {(entry[0], entry[1]) for entries in versions for entry in entries}
        stored = {row for disk in self.world.disks for row in disk.rows}
        assert known == stored, "the index knows all"
        assert known == log.kept(store.compact_revision), "no row too many"
        assert not any(log.owed), "every shard has what was recorded for it"
        home = self.world.disks[HOME]
        assert not home.redo, "redo records are dropped"
        alive = log.range(*ALL, log.tip)
        assert {row[5] for row in alive} <= {0, *home.leases}, "keys end with their leases"

    def _check_the_past(self) -> None:
        """What was shown once is as true as it was."""
        for read in self.clients.reads:
            read()
        self.clients.check_guards()
        self.clients.leases.check_floors()


def run(seed: int, *, shards: int = 3) -> Counter[str]:
    """Live through one seed, with small blocks of history and small reservations; what happened,
    counted.
    """
    with (
        patch.object(history, "BLOCK_CHANGES", 4),
        patch.object(reservation, "AHEAD", AHEAD),
        patch.object(opening, "AHEAD", AHEAD),
    ):
        return Simulation(seed, shards=shards).run()
