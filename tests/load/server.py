"""A server under load: one process on a loopback port with data of its own."""

import json
import os
import random
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Final, Self

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
LOAD: Final = HERE / "bin" / "etcdload"
REFERENCE: Final = (
    f"{ROOT}/tests/compat/bin/etcdref36 -dir {{dir}} -listen http://127.0.0.1:{{port}}"
    f" -quota-backend-bytes {8 << 30}"
)
"""etcd with the largest quota that it recommends: a million objects pass the default one."""
SUBJECT: Final = (
    f"{ROOT}/.venv/bin/kvstore serve --data-dir {{dir}}"
    " --listen-client-urls http://127.0.0.1:{port}"
)
START_TIMEOUT: Final = 300.0
STOP_TIMEOUT: Final = 60.0
PORTS: Final = (20_000, 32_000)
"""Below those that the system gives to connections."""

Run = dict[str, float | str]
"""What one run of etcdload has printed."""


def free_port() -> int:
    """A port that nobody has and that the system gives to no connection unasked."""
    while True:
        port = random.randrange(*PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class LoadError(Exception):
    """The server or etcdload failed, so that there is nothing to report."""


class Server:
    """Starts at once on empty data; ends, and takes its data along, with the context."""

    def __init__(self, command: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="load-")
        self._log = Path(self._folder.name) / "log"
        self._port = free_port()
        data = Path(self._folder.name) / "data"
        self._command = shlex.split(command.format(dir=data, port=self._port))
        self._process = self._spawn()
        self._wait_for_port()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    @property
    def endpoint(self) -> str:
        """Where clients connect."""
        return f"127.0.0.1:{self._port}"

    @property
    def pids(self) -> list[int]:
        """The process and all that it has started."""
        found, rest = [], [self._process.pid]
        while rest:
            pid = rest.pop()
            found.append(pid)
            children = Path(f"/proc/{pid}/task/{pid}/children")
            if children.exists():
                rest += map(int, children.read_text().split())
        return found

    @property
    def rss_mib(self) -> float:
        """Resident memory of all its processes."""
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids)
        return sum(pages) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def load(self, arguments: str) -> Run:
        """Run etcdload to its end and return what it printed; raises LoadError."""
        return self.finish(self.begin(arguments))

    def begin(self, arguments: str) -> subprocess.Popen[str]:
        """Start etcdload, to run beside others."""
        pids = ",".join(map(str, self.pids))
        command = [str(LOAD), "-endpoint", self.endpoint, "-pids", pids, *arguments.split()]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, running: subprocess.Popen[str]) -> Run:
        """Wait for a run that was begun and return what it printed; raises LoadError."""
        output, complaint = running.communicate()
        if running.returncode:
            raise LoadError(f"{complaint.strip()}\n{self._log.read_text()[-2000:]}")
        printed: Run = json.loads(output)
        return printed

    def restart(self) -> Run:
        """Stop, start on the same data, and time it from exec to the first successful read."""
        self.stop()
        since = time.time_ns()
        self._process = self._spawn()
        return self.load(f"-mode first -since {since}")

    def stop(self) -> None:
        """End the server; raises LoadError if it does not end in time."""
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            raise LoadError(f"{self._command[0]} did not stop") from error

    def metrics(self) -> str:
        """The text of /metrics."""
        with urllib.request.urlopen(f"http://{self.endpoint}/metrics", timeout=30) as answer:
            text: bytes = answer.read()
        return text.decode()

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def _wait_for_port(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise LoadError(f"{self._command[0]} did not start:\n{self._log.read_text()[-2000:]}")
