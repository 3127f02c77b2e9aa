"""A PostgreSQL of the tests' own: made, started, frozen, killed and removed again.

It listens on loopback and on a Unix socket below its directory, trusts everybody there, and syncs
to disk as one in production does. PostgreSQL refuses to run as root; as root, it is run by the user
that Debian's package makes, or by nobody.
"""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import psutil

VERSION_MIN = 15
MISSING = "no PostgreSQL 15 or newer is installed (Debian: apt-get install postgresql)"
USER = "kv"
"""The superuser of the cluster."""
PATIENCE = 60.0
"""Seconds that a command may take."""


def find_programs() -> Path | None:
    """The directory of the newest PostgreSQL's programs that is new enough; None without one."""
    places = [*Path("/usr/lib/postgresql").glob("*/bin")]
    on_path = shutil.which("pg_ctl")
    if on_path is not None:
        places.append(Path(on_path).resolve().parent)
    versions = {_version(place): place for place in places if (place / "initdb").exists()}
    newest = max(versions, default=0)
    return versions[newest] if newest >= VERSION_MIN else None


def _version(programs: Path) -> int:
    shown = subprocess.run(
        [programs / "postgres", "--version"], capture_output=True, check=False, text=True
    )
    found = re.search(r"(\d+)", shown.stdout)
    return int(found[1]) if found else 0


def _runner() -> str | None:
    """The user that PostgreSQL runs as; None: ourselves."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    assert isinstance(port, int)
    return port


class Cluster:
    """One server with its data, below ``directory``, which belongs to it alone."""

    def __init__(self, programs: Path, directory: Path) -> None:
        self.programs = programs
        self.directory = directory
        self.data = directory / "data"
        self.port = free_port()
        self._runner = _runner()
        if self._runner is not None:
            shutil.chown(directory, self._runner)

    def run(self, program: str, *words: str, check: bool = True) -> str:
        """Run one of PostgreSQL's programs to its end, as its user; gives what it printed."""
        identity: dict[str, object] = {}
        if self._runner is not None:
            entry = pwd.getpwnam(self._runner)
            identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        # not a pipe: the server would inherit it and keep it open
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                [str(self.programs / program), *words],
                check=False,
                cwd=self.directory,
                env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE,
                **identity,  # type: ignore[call-overload]
            )
            output.seek(0)
            printed = output.read()
        assert not check or done.returncode == 0, f"{program}: {printed}{self.log()}"
        return printed

    def make(self, **settings: str) -> None:
        """Make an empty cluster with these settings beside the usual ones."""
        self.run(
            "initdb",
            *("--pgdata", str(self.data), "--username", USER, "--auth", "trust"),
            *("--no-locale", "--encoding", "UTF8", "--no-sync", "--no-instructions"),
        )
        self.configure(**settings)

    def configure(self, **settings: str) -> None:
        """Write the settings; those of before that are not named again stay."""
        usual = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.directory),
            "fsync": "on",
            "shared_buffers": "32MB",
            "max_connections": "60",
            "timezone": "UTC",
            "log_checkpoints": "off",
        }
        lines = [f"{name} = '{value}'\n" for name, value in (usual | settings).items()]
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(lines)

    def adopt(self, file: Path) -> None:
        """Copy a file into the data directory, readable for the server alone."""
        copy = Path(shutil.copy(file, self.data))
        copy.chmod(0o600)
        if self._runner is not None:
            shutil.chown(copy, self._runner)

    def start(self) -> None:
        """Start, and wait until it takes connections."""
        log = str(self.directory / "log")
        self.run("pg_ctl", "--pgdata", str(self.data), "--log", log, "--wait", "start")

    def stop(self, mode: str = "fast", *, check: bool = True) -> None:
        """Stop: ``fast`` in order, ``immediate`` as a crash would."""
        words = ("--pgdata", str(self.data), "--mode", mode, "--wait", "stop")
        self.run("pg_ctl", *words, check=check)

    def copy_from(self, primary: "Cluster") -> None:
        """Become a standby of ``primary``, which runs, from a copy of it; not started yet."""
        self.run(
            "pg_basebackup",
            *("--host", str(primary.directory), "--port", str(primary.port), "--username", USER),
            *("--pgdata", str(self.data), "--write-recovery-conf", "--no-sync"),
            *("--checkpoint", "fast"),
        )
        self.configure()

    def promote(self) -> None:
        """End being a standby, and wait until that is done."""
        self.run("pg_ctl", "--pgdata", str(self.data), "--wait", "promote")

    def processes(self) -> list[psutil.Process]:
        """The server's main process and those that it has started."""
        pid = int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
        main = psutil.Process(pid)
        return [main, *main.children(recursive=True)]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, every process of the server stands still: connections are there and unanswered.

        The main one is stopped first, so that none is started meanwhile.
        """
        (main, *_) = stopped = self.processes()[:1]
        main.send_signal(signal.SIGSTOP)
        stopped += self.processes()[1:]
        for process in stopped[1:]:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in reversed(stopped):
                if process.is_running():
                    process.send_signal(signal.SIGCONT)

    def log(self) -> str:
        """What the server wrote."""
        file = self.directory / "log"
        return file.read_text(errors="replace") if file.exists() else ""

    def url(
        self,
        schema: str,
        *,
        user: str = USER,
        port: int | None = None,
        options: Mapping[str, str] | None = None,
    ) -> str:
        """Where a store is; ``port`` may be a proxy's."""
        query = urlencode({"schema": schema, **(options or {})})
        return f"postgresql://{user}@127.0.0.1:{port or self.port}/postgres?{query}"

    def plain_url(self) -> str:
        """For a client that is not ours."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/postgres"


@contextmanager
def temporary_cluster(programs: Path, **settings: str) -> Iterator[Cluster]:
    """A running cluster with these settings beside the usual ones, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="kvstore-postgres-", dir="/tmp") as name:
        cluster = Cluster(programs, Path(name))
        cluster.make(**settings)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop("immediate", check=False)
