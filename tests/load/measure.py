"""Measure the server of this checkout beside etcd, in turns, and store what each run printed.

Both servers run at the same time on the same machine and take turns, so that what else the machine
does meets both alike. The client shares the cores: CPU per operation tells more than a rate.
"""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Final

from tests.load.results import RESULTS, Measured, line
from tests.load.server import HERE, REFERENCE, ROOT, SUBJECT, Run, Server
from tests.load.works import WORKS, Work, faults, fill

ETCD_MODULE: Final = "go.etcd.io/etcd/server/v3"


def etcd_version() -> str:
    """The release that the reference is built of."""
    required = (ROOT / "tests/compat/etcdref36/go.mod").read_text()
    return required.split(f"{ETCD_MODULE} v")[1].split()[0]


def commit() -> str:
    """The commit of the checkout, with a mark if anything but stored results was changed since."""

    def git(*arguments: str) -> str:
        ran = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return ran.stdout.strip()

    written_here = (":!tests/load/results", ":!README.md")
    changed = git("status", "--porcelain", "--", ".", *written_here)
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")


def python() -> str:
    """The interpreter, and whether it is the distribution's: those are built with profiles, which
    is worth a sixth of the CPU time; one compiled with the default options is not.
    """
    system = platform.freedesktop_os_release().get("NAME", "the system")
    origin = f"as built by {system}" if sys.base_prefix == "/usr" else "of another build"
    return f"{platform.python_version()} {origin}"


def machine() -> dict[str, str | int]:
    """What a figure depends on and no reader could guess."""
    cpu = next(
        text.split(":")[1].strip()
        for text in Path("/proc/cpuinfo").read_text().splitlines()
        if text.startswith("model name")
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "kernel": platform.release(),
    }


def in_turns(work: Work, servers: Sequence[Server], repetitions: int, seconds: int) -> Measured:
    """Run the work on the reference and the subject as often as asked, and judge it.

    They take turns at being first: what the first has left to the disk is the second's burden.
    """
    runs: tuple[list[Run], list[Run]] = ([], [])
    for repetition in range(repetitions):
        order = -1 if repetition % 2 else 1
        made = work.measure(servers[::order], seconds)
        for kept, run in zip(runs[::order], made, strict=True):
            kept.append(run)
    return described(work.name, seconds, *runs)


def described(
    name: str, seconds: int, reference: list[Run], subject: list[Run], **versions: str
) -> Measured:
    """The runs with all that they were made on; ``versions`` are of what else took part."""
    return Measured(
        work=name,
        date=datetime.now(UTC).date().isoformat(),
        commit=commit(),
        machine=machine(),
        versions={
            "etcd": etcd_version(),
            "kvstore": version("kvstore"),
            "python": python(),
            **versions,
        },
        seconds=seconds,
        reference=reference,
        subject=subject,
    )


def say(text: str) -> None:
    """Print a line at once, as the next may take minutes."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def report(work: Work, measured: Measured) -> bool:
    """Print the figures of a work; whether all goals were reached without a fault."""
    wrong = [fault for run in (*measured.reference, *measured.subject) for fault in faults(run)]
    for fault in wrong:
        say(f"FAIL {work.name}: {fault}")
    reached = not wrong
    for figure in work.figures:
        text, fine = line(figure, measured)
        say(f"{'ok  ' if fine else 'MISS'} {work.meaning}, {text}")
        reached = reached and fine
    return reached


def main() -> int:
    """Measure the works asked for; the exit code tells whether all goals were reached."""
    names = [work.name for work in WORKS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(names)}")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="of one run")
    parser.add_argument("--reference", default=REFERENCE, help="command with {dir} and {port}")
    parser.add_argument("--subject", default=SUBJECT, help="likewise")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to store in")
    asked = parser.parse_args()
    if unknown := set(asked.works) - set(names):
        parser.error(f"no work {', '.join(unknown)}")
    chosen = [work for work in WORKS if not asked.works or work.name in asked.works]
    reached = True
    for keys, works in groupby(chosen, key=lambda work: work.keys):
        with Server(asked.reference) as reference, Server(asked.subject) as subject:
            for server in (reference, subject):
                fill(server, keys)
            for work in works:
                measured = in_turns(work, (reference, subject), asked.repetitions, asked.seconds)
                measured.store(asked.results)
                reached = report(work, measured) and reached
    return 0 if reached else 1


if __name__ == "__main__":
    assert (HERE / "bin" / "etcdload").exists(), "tests/load/run builds etcdload first"
    sys.exit(main())
