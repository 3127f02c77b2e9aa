"""kill -9 of the real server, again and again, under writers and a watcher: over one SQLite file,
over three, over two and a PostgreSQL.

What was acknowledged must be there afterwards, at its revision and on all its shards; what was not
may be there once or not at all; the watcher, which resumes after each crash from the last revision
it saw, must have seen one unbroken history, and the final state must be its replay.
``KILL9_CYCLES`` sets how often the server dies.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest

from tests import program
from tests.backends.postgres_cluster import MISSING, find_programs, temporary_cluster
from tests.writers import (
    END,
    PREFIX,
    Attempt,
    Watcher,
    Writer,
    check_attempts,
    check_history,
    check_revisions,
    find,
    three_shards,
)

CYCLES = int(os.environ.get("KILL9_CYCLES", "10"))
WRITERS = 4

pytestmark = pytest.mark.slow


class Lives:
    """The lives of a server with these flags, one after the other over the same data."""

    def __init__(self, data: Path, *flags: str, seed: int) -> None:
        self.data = data
        self.flags = flags
        self.random = random.Random(seed)
        self.writers = [Writer(n, random.Random(seed + n)) for n in range(WRITERS)]
        self.watcher = Watcher()
        self.bases: list[int] = []
        self.asked: list[int] = []
        """Requests up to the end of each life."""

    @property
    def attempts(self) -> list[Attempt]:
        """All that was tried."""
        return [attempt for writer in self.writers for attempt in writer.attempts]

    def live(self, seconds: float) -> None:
        """Start, let everybody work for a while, then kill the server."""
        stop = threading.Event()
        with program.serving(self.data, *self.flags) as running:
            self._begin(running)
            channel = grpc.insecure_channel(program.url(running))
            workers = [threading.Thread(target=w.work, args=(channel, stop)) for w in self.writers]
            workers.append(threading.Thread(target=self.watcher.work, args=(channel,)))
            for worker in workers:
                worker.start()
            time.sleep(seconds)
            running.process.send_signal(signal.SIGKILL)
            running.process.wait(program.PATIENCE)
        stop.set()
        channel.close()
        for worker in workers:
            worker.join(program.PATIENCE)
            assert not worker.is_alive(), "everybody notices that the server is gone"
        self.asked.append(len(self.attempts))

    def _begin(self, running: program.Program) -> None:
        base = running.log[-1]["revision"]
        assert isinstance(base, int)
        self.bases.append(base)

    def die_while_starting(self, seconds: float) -> None:
        """Kill a server that is opening its files, or loading, or just ready."""
        words = ("serve", "--data-dir", str(self.data), "--listen-client-urls=http://127.0.0.1:0")
        with subprocess.Popen(
            [sys.executable, "-m", "kvstore", *words, *self.flags],
            cwd=program.ROOT,
            stderr=subprocess.DEVNULL,
        ) as process:
            time.sleep(seconds)
            process.kill()

    def run(self) -> None:
        """Die ``CYCLES`` times, then look at everything."""
        for _ in range(CYCLES):
            if self.random.random() < 0.2:
                self.die_while_starting(self.random.uniform(0.3, 1.0))
            self.live(self.random.uniform(0.1, 0.6))
        with program.serving(self.data, *self.flags) as running:
            self._begin(running)
            self._look(program.url(running))
            assert running.stop() == 0
        code, out, _ = program.run("check", "--data-dir", str(self.data), *self.flags)
        assert code == 0, out

    def _look(self, address: str) -> None:
        """The last server's state is what the history leads to."""
        with grpc.insecure_channel(address) as channel:
            key = self.writers[0].places[0] + b"the end"
            last = program.put(channel, key, b"at last").header.revision
            self.writers[0].attempts.append(Attempt({key: b"at last"}, last))
            self.asked.append(len(self.attempts))
            final = find(channel, PREFIX, END)
            watching = threading.Thread(target=self.watcher.work, args=(channel,))
            watching.start()
            self.watcher.wait_for(last)
        watching.join(program.PATIENCE)
        events = self.watcher.events
        state = check_history(events)
        check_attempts(events, self.attempts)
        check_revisions(events, self.bases, self.asked)
        assert sorted(state) == [pair.key for pair in final.kvs]
        assert [state[pair.key] for pair in final.kvs] == list(final.kvs)
        answered = [attempt for attempt in self.attempts if attempt.revision is not None]
        assert len(answered) > CYCLES, "the writers did get something done"


def test_one_file(tmp_path: Path) -> None:
    """No crash loses what was acknowledged, repeats a revision, skips one, or tears the watcher's
    history.
    """
    lives = Lives(tmp_path, seed=20261125)
    lives.run()
    revisions = {event.kv.mod_revision for event in lives.watcher.events}
    assert revisions == set(range(2, lives.watcher.last + 1))


def test_three_files(tmp_path: Path) -> None:
    """Likewise over three shards: what touches several is whole on all of them or on none."""
    Lives(tmp_path / "data", three_shards(tmp_path), seed=20261128).run()


@pytest.mark.postgres
def test_two_files_and_postgres(tmp_path: Path) -> None:
    """Likewise where a statement of the killed server may still be on its way to one shard."""
    programs = find_programs()
    if programs is None:
        pytest.skip(MISSING)
    with temporary_cluster(programs) as cluster:
        config = three_shards(tmp_path, cluster.url("agents"))
        Lives(tmp_path / "data", config, seed=20261129).run()
