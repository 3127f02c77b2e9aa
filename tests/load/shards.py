"""Measure shards and PostgreSQL: three files beside one, a PostgreSQL beside etcd, beside kine on
the same PostgreSQL and beside a bare INSERT, the storm of one tenant and the loss of its shard.

Every comparison starts its own servers on empty data; those on PostgreSQL share one cluster, in a
schema or a database each. The storms are ``kvstore-bench``'s, which judges them first: a run that
is not PASS leaves no figure.
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

import asyncpg

from tests.backends.postgres_cluster import MISSING, Cluster, find_programs, temporary_cluster
from tests.load.measure import described, say
from tests.load.results import RESULTS, Measured, amount, medians, origins, ratio
from tests.load.server import HERE, REFERENCE, ROOT, SUBJECT, Run, Server
from tests.load.works import OBJECTS, WRITTEN, Figure, faults

if TYPE_CHECKING:
    from bench.report.results import Results, Target

KINE: Final = ROOT / "tests/compat/bin/kine"
SPREAD: Final = f"-spread 3 -clients 100 -prefix {WRITTEN}"
THREE_FILES: Final = f"""\
shards:
  - {{name: home,   backend: "sqlite:home.db"}}
  - {{name: first,  backend: "sqlite:first.db"}}
  - {{name: second, backend: "sqlite:second.db"}}
routes:
  - {{prefix: {WRITTEN}1/, shard: first}}
  - {{prefix: {WRITTEN}2/, shard: second}}
"""
STORM_RUN_EXTRA_S: Final = 120
STORM_TRIES: Final = 4
"""For each repetition, all taken together: one during which the machine changed its speed says
nothing."""

BEFORE_SHARDS: Final = "aa80137"
"""The last commit without them."""
PAIRS_FACTOR: Final = 3
"""Times as many repetitions where a difference of a few percent is looked for."""

RATE_MUST: Final = 1.5
P50: Final = Figure(key="p50_ms", meaning="median time", unit="ms", goal=2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How much is measured."""

    repetitions: int
    seconds: int
    keys: int
    storm_seconds: int
    outage_seconds: int


Runs = tuple[list[Run], list[Run]]
"""Of what is compared with, none if there is nothing; and of kvstore."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Some rows of the table."""

    name: str
    meaning: str
    beside: str
    """What kvstore is compared with; a dash for nothing."""
    measure: Callable[[Cluster, Asked], Runs]
    figures: tuple[Figure, ...]


_numbers = count(1)


def on_postgres(cluster: Cluster) -> str:
    """The command of a server on a schema that nobody has used."""
    url = cluster.url(f"load_{next(_numbers)}")
    return f"{SUBJECT} --backend '{url}'"


def kine_on(cluster: Cluster) -> str:
    """The command of kine on a database that nobody has used, which it makes itself."""
    place = f"postgres://kv@127.0.0.1:{cluster.port}/kine_{next(_numbers)}?sslmode=disable"
    return f"{KINE} --listen-address 127.0.0.1:{{port}} --endpoint '{place}'"


def in_turns(one: Callable[[], Run], other: Callable[[], Run], repetitions: int) -> Runs:
    """Both as often as asked, taking turns at being first."""
    runs: Runs = ([], [])
    for repetition in range(repetitions):
        order = -1 if repetition % 2 else 1
        for kept, run in list(zip(runs, (one, other), strict=True))[::order]:
            kept.append(run())
    return runs


def both_driven(reference: str, subject: str, load: str, asked: Asked) -> Runs:
    """Drive two servers in turns."""
    arguments = f"{load} -duration {asked.seconds}s"
    with Server(reference) as one, Server(subject) as other:
        return in_turns(
            lambda: one.load(arguments), lambda: other.load(arguments), asked.repetitions
        )


def spread(mode: str) -> Callable[[Cluster, Asked], Runs]:
    """Writes to three files, and to one."""

    def measure(cluster: Cluster, asked: Asked) -> Runs:
        config = cluster.directory / "three_files.yaml"
        config.write_text(THREE_FILES)
        load = f"-mode {mode} {SPREAD}"
        return both_driven(SUBJECT, f"{SUBJECT} --config {config}", load, asked)

    return measure


def before(mode: str) -> Callable[[Cluster, Asked], Runs]:
    """Writes to one file, now and as it was before there were shards."""

    def measure(_: Cluster, asked: Asked) -> Runs:
        tree = ROOT / "build" / "load" / BEFORE_SHARDS
        tree.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(
            ["git", "archive", BEFORE_SHARDS], cwd=ROOT, check=True, capture_output=True, timeout=60
        )
        subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True, timeout=60)
        words = SUBJECT.partition(" ")[2]
        then = f"env PYTHONPATH={tree} {sys.executable} -P -m kvstore {words}"
        now = f"env PYTHONPATH={ROOT} {sys.executable} -P -m kvstore {words}"
        load = f"-mode {mode} -clients 100 -prefix {WRITTEN}"
        pairs = replace(asked, repetitions=PAIRS_FACTOR * asked.repetitions)
        return both_driven(then, now, load, pairs)

    return measure


def beside(rival: Callable[[Cluster], str], mode: str) -> Callable[[Cluster, Asked], Runs]:
    """Writes to a shard on PostgreSQL, and to a rival."""

    def measure(cluster: Cluster, asked: Asked) -> Runs:
        load = f"-mode {mode} -clients 100 -prefix {WRITTEN}"
        return both_driven(rival(cluster), on_postgres(cluster), load, asked)

    return measure


def one_client(*, transactions: bool) -> Callable[[Cluster, Asked], Runs]:
    """One client's creates, and one-row INSERTs of the same size on a connection."""

    def measure(cluster: Cluster, asked: Asked) -> Runs:
        load = f"-mode create -clients 1 -conns 1 -prefix {WRITTEN} -duration {asked.seconds}s"
        with Server(on_postgres(cluster)) as server:
            return in_turns(
                lambda: asyncio.run(inserts(cluster, asked.seconds, transactions=transactions)),
                lambda: server.load(load),
                asked.repetitions,
            )

    return measure


async def inserts(cluster: Cluster, seconds: float, *, transactions: bool) -> Run:
    """What a client of PostgreSQL takes for a durable row: BEGIN, INSERT and COMMIT or, the least
    that there is, an INSERT that is a transaction of its own.
    """
    connection = await asyncpg.connect(cluster.plain_url())
    table = f"bare_{next(_numbers)}"
    await connection.execute(f"CREATE TABLE {table} (id BIGINT PRIMARY KEY, value BYTEA)")
    insert = await connection.prepare(f"INSERT INTO {table} VALUES ($1, $2)")
    took: list[float] = []
    value, end = bytes(1024), time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        async with connection.transaction() if transactions else nullcontext():
            await insert.fetch(len(took), value)
        took.append(time.monotonic() - began)
    await connection.close()
    return {"p50_ms": median(took) * 1000, "operations": len(took)}


def started(cluster: Cluster, asked: Asked) -> Runs:
    """Starts with keys that are there."""
    with Server(on_postgres(cluster)) as server:
        server.load(f"-mode fill -keys {asked.keys} -clients 20 -prefix {OBJECTS}")
        return [], [server.restart() for _ in range(asked.repetitions)]


def stormed(stop: str, start: str) -> Callable[[Cluster, Asked], Runs]:
    """noisy-shard with one tenant on PostgreSQL, which is stopped and started by these words."""

    def measure(cluster: Cluster, asked: Asked) -> Runs:
        runs: list[Run] = []
        tried = 0
        while len(runs) < asked.repetitions:
            tried += 1
            target, folder = _storm(cluster, asked, stop, start, tried)
            if target["state"] == "PASS":
                found = target["runs"][0]["values"]  # its errors are the lost shard's, and judged
                runs.append({figure.key: found[figure.key] for figure in (NOISE, *LOST)})
            elif target["state"] != "INVALID" or tried >= STORM_TRIES * asked.repetitions:
                told = f"{target['state']}: {'; '.join(target['reasons'])}, see {folder}"
                runs.append({"errors": 1, "first_error": told})
                break
        return [], runs

    return measure


def _storm(
    cluster: Cluster, asked: Asked, stop: str, start: str, number: int
) -> tuple["Target", Path]:
    """What came of one run, and where it is told, from the project's folder on."""
    out = ROOT / "build" / "load" / f"noisy-shard-{stop}-{number}-{time.time_ns()}"
    control = f"{HERE}/outage {cluster.programs} {cluster.directory}"
    server = f"ours={HERE}/noisy_server {{port}} {{dir}} {cluster.plain_url()}"
    command = [
        *(str(ROOT / ".venv/bin/kvstore-bench"), "run", "noisy-shard", "--start", server),
        *("--reps", "1", "--seconds", str(asked.storm_seconds), "--seed", str(number)),
        *("--set", f"outage_s={asked.outage_seconds}", "--out", str(out)),
        *("--shard-stop", f"{control} {stop}", "--shard-start", f"{control} {start}"),
    ]
    patience = asked.storm_seconds + STORM_RUN_EXTRA_S
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, timeout=patience)
    results: Results = json.loads((out / "results.json").read_text())
    shutil.rmtree(out / "ours")
    (target,) = results["targets"]
    return target, out.relative_to(ROOT)


SPREAD_FIGURES: Final = (
    Figure(key="per_second", meaning="rate", unit="/s", goal=1.0, larger_is_better=True),
    Figure(key="server_cpu_us_per_operation", meaning="server CPU", unit="us", goal=1.15),
)

BEFORE_FIGURES: Final = (
    Figure(key="server_cpu_us_per_operation", meaning="server CPU", unit="us", goal=1.05),
)


def writes(must: float) -> tuple[Figure, ...]:
    """What is told of writes to PostgreSQL; the CPU of PostgreSQL itself is nobody's here."""
    rate = Figure(key="per_second", meaning="rate", unit="/s", goal=must, larger_is_better=True)
    return (rate, Figure(key="p99_ms", meaning="99th percentile", unit="ms"))


def _etcd(_: Cluster) -> str:
    return REFERENCE


LOST: Final = (
    Figure(key="neighbours_outage_ratio", meaning="others' p99 then / calm", unit="", limit=1.2),
    Figure(key="lost_refused_longest_ms", meaning="refused within", unit="ms", limit=6_000),
    Figure(
        key="lost_refused_later_ms", meaning="refused within, from 5 s on", unit="ms", limit=100
    ),
    Figure(key="lost_back_ms", meaning="back in service after", unit="ms", limit=5_000),
)
NOISE: Final = Figure(
    key="neighbours_noise_ratio", meaning="others' p99 in the storm / calm", unit="", limit=1.5
)

COMPARISONS: Final = (
    *(
        Comparison(
            name=f"before-{mode}",
            meaning=f"{mode}, 100 in flight, one file",
            beside="before there were shards",
            measure=before(mode),
            figures=BEFORE_FIGURES,
        )
        for mode in ("create", "update")
    ),
    *(
        Comparison(
            name=f"shards-{mode}",
            meaning=f"{mode}, 100 in flight over three files",
            beside="one file",
            measure=spread(mode),
            figures=SPREAD_FIGURES,
        )
        for mode in ("create", "update")
    ),
    *(
        Comparison(
            name=f"postgres-{mode}",
            meaning=f"{mode}, 100 in flight, on PostgreSQL",
            beside="etcd",
            measure=beside(_etcd, mode),
            figures=writes(RATE_MUST),
        )
        for mode in ("create", "update")
    ),
    *(
        Comparison(
            name=f"kine-{mode}",
            meaning=f"{mode}, 100 in flight, on PostgreSQL",
            beside="kine on it",
            measure=beside(kine_on, mode),
            figures=writes(10.0),
        )
        for mode in ("create", "update")
    ),
    Comparison(
        name="postgres-one",
        meaning="create, one client, on PostgreSQL",
        beside="BEGIN, INSERT, COMMIT",
        measure=one_client(transactions=True),
        figures=(P50,),
    ),
    Comparison(
        name="postgres-one-insert",
        meaning="create, one client, on PostgreSQL",
        beside="INSERT alone",
        measure=one_client(transactions=False),
        figures=(replace(P50, goal=None),),
    ),
    Comparison(
        name="postgres-start",
        meaning="start with 200,000 on PostgreSQL",
        beside="-",
        measure=started,
        figures=(Figure(key="seconds", meaning="until the first read", unit="s", limit=5.0),),
    ),
    Comparison(
        name="storm-killed",
        meaning="storm of a tenant; then its PostgreSQL is killed",
        beside="-",
        measure=stormed("kill", "start"),
        figures=(NOISE, *LOST),
    ),
    Comparison(
        name="storm-frozen",
        meaning="storm of a tenant; then its PostgreSQL stands still",
        beside="-",
        measure=stormed("freeze", "thaw"),
        figures=(NOISE, *LOST),
    ),
)


def must(figure: Figure) -> str:
    """What is wanted of a figure, in words."""
    if figure.limit is not None:
        return f"<= {amount(figure.limit, figure.unit)}".strip()
    if figure.goal is None:
        return ""
    return f"ratio {'>=' if figure.larger_is_better else '<='} {figure.goal:g}"


def reached(figure: Figure, measured: Measured) -> bool:
    """Is the figure as wanted?"""
    _, subject = medians(figure, measured)
    part = ratio(figure, measured)
    if figure.limit is not None:
        return subject is not None and subject <= figure.limit
    return figure.goal is None or (part is not None and figure.reached(part))


def rows(comparison: Comparison, measured: Measured) -> list[str]:
    """The rows of one comparison; a run with a fault leaves no figure, only the fault."""
    wrong = [fault for run in (*measured.reference, *measured.subject) for fault in faults(run)]
    if wrong:
        return [f"| {comparison.meaning} | FAIL: {'; '.join(wrong)} | | | | | |"]
    found = []
    for figure in comparison.figures:
        reference, subject = (amount(value, figure.unit) for value in medians(figure, measured))
        part = ratio(figure, measured)
        told = "-" if part is None else f"{part:.2f}"
        verdict = must(figure) + ("" if reached(figure, measured) else " **missed**")
        cells = (comparison.meaning, figure.meaning, comparison.beside, reference, subject)
        found.append(f"| {' | '.join(cells)} | {told} | {verdict} |")
    return found


def table(folder: Path) -> str:
    """The table of all comparisons that have a result, as Markdown; empty if none has."""
    results = {
        comparison: Measured.load(folder / f"{comparison.name}.json")
        for comparison in COMPARISONS
        if (folder / f"{comparison.name}.json").exists()
    }
    if not results:
        return ""
    heads = ("objects of 1 KiB", "figure", "beside", "its", "kvstore", "ratio", "wanted")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for comparison, measured in results.items():
        lines += rows(comparison, measured)
    databases = {f"PostgreSQL {measured.versions['postgresql']}" for measured in results.values()}
    lines += ["", *origins(list(results.values())), f"On {', '.join(sorted(databases))}."]
    return "\n".join(lines) + "\n"


def measure(names: Sequence[str], asked: Asked, folder: Path) -> bool:
    """Measure and store; whether all that is wanted was reached without a fault."""
    programs = find_programs()
    if programs is None:
        sys.exit(MISSING)
    fine = True
    with ExitStack() as stack:
        cluster = stack.enter_context(
            temporary_cluster(programs, max_wal_size="4GB", max_connections="300")
        )
        version = cluster.run("postgres", "--version").split()[2]
        for comparison in COMPARISONS:
            if names and comparison.name not in names:
                continue
            runs = comparison.measure(cluster, asked)
            measured = described(comparison.name, asked.seconds, *runs, postgresql=version)
            measured.store(folder)
            for row in rows(comparison, measured):
                say(row)
                fine = fine and "FAIL" not in row and "missed" not in row
    return fine


def main() -> int:
    """Measure the comparisons asked for; the exit code tells whether all was reached."""
    names = [comparison.name for comparison in COMPARISONS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparisons", nargs="*", help=f"of {', '.join(names)}")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="of one run of etcdload")
    parser.add_argument("--keys", type=int, default=200_000, help="at the start")
    parser.add_argument("--storm-seconds", type=int, default=60)
    parser.add_argument("--outage-seconds", type=int, default=10)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to store in")
    given = parser.parse_args()
    if unknown := set(given.comparisons) - set(names):
        parser.error(f"no comparison {', '.join(unknown)}")
    asked = Asked(
        repetitions=given.repetitions,
        seconds=given.seconds,
        keys=given.keys,
        storm_seconds=given.storm_seconds,
        outage_seconds=given.outage_seconds,
    )
    return 0 if measure(given.comparisons, asked, given.results) else 1


if __name__ == "__main__":
    sys.exit(main())
