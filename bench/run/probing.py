"""A search of capacity as something that is kept: its probes, what came of it, how it is told.

Each probe is a session of one run in a folder of its own, which ``report`` shows like any other;
``capacity.json`` above them says what was asked for and what each of them showed. It is written
after every probe, so that a search that is ended early has what it found by then.

What a probe saw, it saw: that the machine changed its speed between before and after says nothing
against it. But it speaks against comparing two targets, who were searched one after the other.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from bench.capsule import UNEQUAL_PERCENT_MAX, unequal
from bench.records import Records
from bench.report.results import Results
from bench.report.session import UnusableError, run_folder
from bench.run.capacity import Capacity, Finding, Gates, judge, search, with_rate
from bench.run.session import Wish
from bench.targets import Target

CAPACITY = "capacity.json"


class Probe(TypedDict):
    """One rate that was tried."""

    folder: str
    """Of its session, below that of the search."""
    rate: float
    finding: str
    """``holds``, ``misses`` or ``unknown``."""
    why: str
    fsync_us: float
    """What a synced write of a page took just before, without a server."""
    loopback_us: float


class Searched(TypedDict):
    """What is known of one target."""

    target: str
    probes: list[Probe]
    holds: float
    """The largest rate that was held; 0: none was."""
    misses: float
    """The smallest above it that was not, or of which nothing can be said; 0: there is none."""
    over: bool
    """The search came to its end, and ``misses`` is the server's."""


class Capacities(TypedDict):
    """``capacity.json``."""

    command_line: list[str]
    storm: str
    preset: str
    rate: str
    """The parameter that was searched."""
    seconds: float
    """Of each load."""
    gates: dict[str, float]
    targets: list[Searched]


class StoppedError(Exception):
    """The user has ended the search; what it found by then is written."""


def probe_all(
    wish: Wish,
    gates: Gates,
    run: Callable[[Wish], bool],
    report: Callable[[Path], Results],
    tell: Callable[[str], None],
) -> Capacities:
    """Search the capacity of each target of a wish; ``tell`` is told of every probe.

    ``run`` runs a session and gives whether the user ended it. Raises ``StoppedError``.
    """
    kept = Capacities(
        command_line=list(wish.command_line),
        storm=wish.storm.NAME,
        preset=wish.preset,
        rate=wish.storm.RATE,
        seconds=wish.duration_us / 1e6,
        gates=gates._asdict(),
        targets=[],
    )
    for target in wish.targets:
        searched = Searched(target=target.name, probes=[], holds=0, misses=0, over=False)
        kept["targets"].append(searched)

        def probe(rate: float, target: Target = target, searched: Searched = searched) -> Finding:
            folder = f"{target.name}/probe-{len(searched['probes']) + 1}"
            once = replace(
                wish,
                parameters=with_rate(wish.storm, wish.parameters, rate),
                targets=[target],
                repetitions=1,
                out=wish.out / folder,
                ceiling=False,
                drift=False,
            )
            if run(once):
                _write(wish.out, kept)
                raise StoppedError
            finding, why = judge(report(once.out), gates)
            fsync_us, loopback_us = _speeds(run_folder(once.out, target.name, 0))
            searched["probes"].append(
                Probe(
                    folder=folder,
                    rate=rate,
                    finding=finding.value,
                    why=why,
                    fsync_us=fsync_us,
                    loopback_us=loopback_us,
                )
            )
            held = [one["rate"] for one in searched["probes"] if one["finding"] == "holds"]
            searched["holds"] = max(held, default=0)
            _write(wish.out, kept)
            tell(f"{target.name}: {kept['rate']} {rate:.10g} {finding.value}: {why}")
            return finding

        _found(searched, search(probe, getattr(wish.parameters, wish.storm.RATE)))
        _write(wish.out, kept)
    return kept


def _found(searched: Searched, found: Capacity) -> None:
    """Note how a search ended."""
    searched["holds"], searched["misses"] = found.holds, found.misses
    searched["over"] = not found.bounded


def _speeds(run: Path) -> tuple[float, float]:
    """How fast disk and loopback were before a run; 0: it left nothing."""
    try:
        facts = Records(run).facts
    except FileNotFoundError:
        return 0.0, 0.0
    return facts["fsync_us"], facts["loopback_us"]


def _write(folder: Path, kept: Capacities) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CAPACITY).write_text(json.dumps(kept, indent=1) + "\n")


def read(folder: Path) -> Capacities:
    """What a search in this folder has found; raises ``OSError`` or ``ValueError``."""
    kept: Capacities = json.loads((folder / CAPACITY).read_text())
    return kept


def retold(folder: Path) -> list[str]:
    """What a search in this folder has found, in lines; raises ``OSError`` or ``UnusableError``."""
    try:
        kept = read(folder)
        return [*_probes(kept), *outcome(kept)]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnusableError(f"{folder / CAPACITY}: damaged") from error


def known(searched: Searched) -> bool:
    """Did any probe say anything of the server?"""
    return searched["over"] or searched["holds"] > 0


def _probes(kept: Capacities) -> Iterator[str]:
    """Every probe in a line."""
    for searched in kept["targets"]:
        for one in searched["probes"]:
            said = f"{one['rate']:.10g} {one['finding']}: {one['why']}"
            yield f"{searched['target']}: {kept['rate']} {said} ({one['folder']})"


def outcome(kept: Capacities) -> Iterator[str]:
    """What a search came to: a line for each target, and what speaks against comparing them."""
    for searched in kept["targets"]:
        least = "" if searched["over"] else "at least "
        held = f"{least}{searched['holds']:.10g} {kept['rate']}" if known(searched) else "unknown"
        yield f"{searched['target']}: capacity is {held}{_limit(kept, searched)}"
    speeds = [
        [(one["fsync_us"], one["loopback_us"]) for one in s["probes"]] for s in kept["targets"]
    ]
    for name, column in (("a synced write", 0), ("the loopback", 1)):
        taken = [[pair[column] for pair in of_target] for of_target in speeds]
        percent = _apart(taken)
        if percent > UNEQUAL_PERCENT_MAX:
            yield f"{name} differed by {percent:.0f} % between the targets' probes: do not compare"


def _limit(kept: Capacities, searched: Searched) -> str:
    """What stands in the way of more."""
    if not searched["misses"]:
        return ""
    at = next(one for one in searched["probes"] if one["rate"] == searched["misses"])
    return f"; at {at['rate']:.10g} {kept['rate']}: {at['finding']}: {at['why']}"


def _apart(taken: Sequence[Sequence[float]]) -> float:
    if len(taken) < 2 or not all(each and min(each) > 0 for each in taken):
        return 0.0
    return unequal(taken)
