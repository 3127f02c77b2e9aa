"""The works of the speed table: what is done to a server, and which figures are told of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tests.load.server import LoadError, Run, Server

OBJECTS: Final = "/registry/pods/"
WRITTEN: Final = "/registry/leases/"
LISTED: Final = "/registry/configmaps/"
MEMORY_AFTER_SECONDS: Final = 60
STALL: Final = "kvstore_loop_stall_seconds_bucket"

Measure = Callable[[Sequence[Server], int], list[Run]]
"""One run on each server in turn, that many seconds each where the work has no length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of a run, and the ratio to the reference that is wanted, if one is."""

    key: str
    meaning: str
    unit: str
    goal: float | None = None
    larger_is_better: bool = False
    limit: float | None = None
    """The largest value that is wanted, whatever the reference's is."""

    def reached(self, ratio: float) -> bool:
        """Whether the ratio of the subject's median to the reference's is as wanted."""
        if self.goal is None:
            return True
        return ratio >= self.goal if self.larger_is_better else ratio <= self.goal


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One row of the table, or several."""

    name: str
    meaning: str
    keys: int
    """How many objects of 1 KiB the server holds."""
    measure: Measure
    figures: tuple[Figure, ...]


def faults(run: Run) -> list[str]:
    """What makes a run worth no figure: failed requests, lost or disordered events."""
    wrong = ("errors", "conflicts", "watchers_incomplete", "disordered_or_twice")
    found = [f"{key}: {run[key]}" for key in wrong if run.get(key)]
    if found and "first_error" in run:
        found.append(str(run["first_error"]))
    return found


def fill(server: Server, keys: int) -> None:
    """Give the server its objects, and ten thousand more for a list of their own."""
    server.load(f"-mode fill -keys {keys} -clients 20 -prefix {OBJECTS}")
    server.load(f"-mode fill -keys 10000 -clients 20 -prefix {LISTED}")


def driven(arguments: str) -> Measure:
    """Run etcdload for the time given, one server after the other."""

    def measure(servers: Sequence[Server], seconds: int) -> list[Run]:
        return [server.load(f"{arguments} -duration {seconds}s") for server in servers]

    return measure


def restarted(servers: Sequence[Server], _: int) -> list[Run]:
    """Restart each server, list everything once, and look at its memory a minute after the start.

    The list is one Range without a limit, so that all values are in memory at once. The rest of the
    minute is idle: whoever gives memory back has the time to.
    """
    runs, starts = [], []
    for server in servers:
        starts.append(time.monotonic())
        runs.append(server.restart())
    for server, run in zip(servers, runs, strict=True):
        run["scan_seconds"] = server.load(f"-mode scan -conns 1 -prefix {OBJECTS}")["seconds"]
    for server, run, start in zip(servers, runs, starts, strict=True):
        time.sleep(max(0.0, start + MEMORY_AFTER_SECONDS - time.monotonic()))
        run["rss_mib"] = server.rss_mib
    return runs


def stalled(servers: Sequence[Server], seconds: int) -> list[Run]:
    """Probe each server with reads at a steady rate while it writes, lists and compacts."""
    return [_stalled(server, seconds) for server in servers]


def _stalled(server: Server, seconds: int) -> Run:
    before = _stalls(server.metrics())
    beside = (
        f"-mode update -rate 500 -clients 50 -prefix {WRITTEN}",
        f"-mode list -limit 0 -clients 1 -conns 1 -prefix {LISTED}",
        "-mode compact -clients 1 -conns 1",
    )
    probe = f"-mode get -keys 100000 -rate 200 -clients 50 -prefix {OBJECTS}"
    running = [server.begin(f"{each} -duration {seconds}s") for each in (probe, *beside)]
    run, *others = [server.finish(each) for each in running]
    for other in others:
        if faults(other):
            raise LoadError(f"{other['mode']} beside the probe: {faults(other)}")
    run["lists"] = others[1]["operations"]
    after = _stalls(server.metrics())
    if after:
        run["stall_max_ms"] = 1000 * _highest({le: after[le] - before[le] for le in after})
    return run


def _stalls(metrics: str) -> dict[float, float]:
    """How many stalls were at most so long, by that bound; only those that the server blames itself
    for. Empty if the server tells of none.
    """
    found = {}
    for line in metrics.splitlines():
        if line.startswith(STALL) and 'measured="cpu"' in line:
            found[float(line.split('le="')[1].split('"')[0])] = float(line.rsplit(" ", 1)[1])
    return found


def _highest(at_most: dict[float, float]) -> float:
    """The bound that no stall exceeded; raises LoadError if one exceeded all bounds."""
    everything = max(at_most.values())
    highest = min(bound for bound, count in at_most.items() if count == everything)
    if highest == float("inf"):
        raise LoadError("a stall was longer than the histogram tells")
    return highest


LISTS: Final = (
    Figure(key="server_cpu_us_per_operation", meaning="server CPU", unit="us", goal=0.15),
    Figure(key="p50_ms", meaning="median time", unit="ms"),
)
PAGES: Final = (replace(LISTS[0], goal=None), LISTS[1])
WRITES: Final = (
    Figure(key="server_cpu_us_per_operation", meaning="server CPU", unit="us", goal=0.45),
    Figure(key="per_second", meaning="rate", unit="/s", goal=1.6, larger_is_better=True),
    Figure(key="p99_ms", meaning="99th percentile", unit="ms"),
)

WORKS: Final = (
    Work(
        name="create",
        meaning="create, 100 in flight",
        keys=20_000,
        measure=driven(f"-mode create -clients 100 -prefix {WRITTEN}"),
        figures=WRITES,
    ),
    Work(
        name="update",
        meaning="update, 100 in flight",
        keys=20_000,
        measure=driven(f"-mode update -clients 100 -prefix {WRITTEN}"),
        figures=WRITES,
    ),
    Work(
        name="one",
        meaning="create, one client",
        keys=20_000,
        measure=driven(f"-mode create -clients 1 -conns 1 -prefix {WRITTEN}"),
        figures=(Figure(key="p50_ms", meaning="median time", unit="ms", goal=1.1),),
    ),
    Work(
        name="get",
        meaning="get, 100 in flight",
        keys=20_000,
        measure=driven(f"-mode get -clients 100 -keys 20000 -prefix {OBJECTS}"),
        figures=(
            Figure(key="server_cpu_us_per_operation", meaning="server CPU", unit="us", goal=0.35),
            Figure(key="per_second", meaning="rate", unit="/s", goal=1.7, larger_is_better=True),
        ),
    ),
    Work(
        name="list",
        meaning="list the first 500 of 20,000",
        keys=20_000,
        measure=driven(f"-mode list -clients 8 -prefix {OBJECTS}"),
        figures=LISTS,
    ),
    Work(
        name="page",
        meaning="list 20,000 in pages of 500",
        keys=20_000,
        measure=driven(f"-mode page -clients 8 -keys 20000 -prefix {OBJECTS}"),
        figures=PAGES,
    ),
    Work(
        name="fanout",
        meaning="100 watchers of 20 writers",
        keys=20_000,
        measure=driven(f"-mode fanout -watchers 100 -clients 20 -prefix {WRITTEN}"),
        figures=(
            Figure(
                key="server_cpu_us_per_event", meaning="server CPU an event", unit="us", goal=0.5
            ),
            Figure(key="delivered_per_second", meaning="events", unit="/s", larger_is_better=True),
        ),
    ),
    Work(
        name="restart",
        meaning="restart with 200,000",
        keys=200_000,
        measure=restarted,
        figures=(
            Figure(key="seconds", meaning="until the first read", unit="s"),
            Figure(key="rss_mib", meaning="memory after a list of all, at 60 s", unit="MiB"),
        ),
    ),
    Work(
        name="list-million",
        meaning="list the first 500 of 1,000,000",
        keys=1_000_000,
        measure=driven(f"-mode list -clients 8 -prefix {OBJECTS}"),
        figures=(replace(LISTS[0], goal=0.01), LISTS[1]),
    ),
    Work(
        name="page-million",
        meaning="list 1,000,000 in pages of 500",
        keys=1_000_000,
        measure=driven(f"-mode page -clients 8 -keys 1000000 -prefix {OBJECTS}"),
        figures=PAGES,
    ),
    Work(
        name="stall",
        meaning="1,000,000 held; writes, lists of 10,000, compactions",
        keys=1_000_000,
        measure=stalled,
        figures=(
            Figure(key="p99_ms", meaning="get beside them, 99th percentile", unit="ms"),
            Figure(key="max_ms", meaning="get beside them, longest", unit="ms"),
            Figure(key="stall_max_ms", meaning="longest stall is at most", unit="ms"),
        ),
    ),
)
