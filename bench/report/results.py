"""The results of a session: judged first, measured second, and only then compared.

Made from raw records alone; everything that is shown anywhere is drawn from these.
The state of a target decides what may be said of it:

- FAIL: a judge found a violation in one of its runs. The evidence is kept, the speed is not: a
  wrong answer is not a fast one.
- INVALID: the generator or the machine was at fault in one of its runs. To leave that run out and
  keep the rest would be to choose runs, so no speed is kept either. What is wrong in time only
  (``Verdict.timed``) while the generator was late or short of CPU may be its own doing, so it
  makes INVALID what would be FAIL.
- NOT JUDGED: no judge looked at one of its complete runs, or none saw what its watches showed
  although something was watched: a server that shows nothing has not kept a promise.
- INCOMPLETE: fewer complete runs than were asked for. Those that are complete count; of others,
  figures are kept and enter nothing.
- PASS.

What is hidden is hidden here, by not being in the results, so that nothing that draws them can show
it by mistake.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
from hdrh.histogram import HdrHistogram

from bench.capsule import DRIFT_PERCENT_MAX, UNEQUAL_PERCENT_MAX, drift, unequal
from bench.figures import ALL, Figures, Windows, figures, histogram
from bench.punctuality import objections
from bench.records import Facts, Records
from bench.report.durability import equally_durable
from bench.report.metrics import SHOWN_OF_CLASSES, Better, in_order, metric, of_classes
from bench.report.session import (
    RUN,
    SESSION,
    Session,
    StoredVerdict,
    read_session,
    read_verdicts,
    runs,
)
from bench.statistics import median, ratio
from bench.verdicts import VIOLATIONS_KEPT

RESULTS = "results.json"
WATCHED = "Reliable"
"""The judge that compares what watches showed with what was written."""
DIGITS = 6
"""Significant ones of every figure."""
INFINITE = "1e999"
CURVE_POINTS_PER_DECADE = 16

Measures = Callable[[Records], Mapping[str, float]]
"""A storm's own figures of one run, lower is better."""


class MixedRunsError(ValueError):
    """The folder's runs do not belong together."""


class JudgeSum(StoredVerdict):
    """One judge's findings in all runs of a target; evidence says of which."""

    excused: int
    """Violations in time, of runs whose generator was late; they are not among ``violations``."""


class DamagedRunError(ValueError):
    """A run's facts cannot be read; says where."""


class Run(TypedDict):
    """One run of one target."""

    repetition: int
    state: str
    """``COMPLETE`` or ``INCOMPLETE``."""
    judged: bool
    violations: int
    invalid: list[str]
    connections_failed: int
    errors: dict[str, int]
    values: dict[str, float]
    """Empty where speed is hidden."""


class Course(TypedDict):
    """One figure over the time of the load: the median run, the lowest and the highest."""

    middle: list[float | None]
    low: list[float | None]
    high: list[float | None]


class Target(TypedDict):
    """What is known of one target."""

    name: str
    version: str
    command: str
    durability: str
    client: str
    state: str
    """FAIL, INVALID, NOT JUDGED, INCOMPLETE or PASS."""
    reasons: list[str]
    """Why it is not PASS."""
    judges: list[JudgeSum]
    runs: list[Run]
    medians: dict[str, float]
    """Over complete runs."""
    curve: list[list[float]]
    """Latency in microseconds by nines of the percentile (1 is p90, 2 is p99), of all complete
    runs together."""
    window_us: int
    course: dict[str, Course]


class Comparison(TypedDict):
    """One figure of one target against another's."""

    metric: str
    target: str
    against: str
    ratio: float
    """Infinite where the other has none."""
    low: float | None
    high: float | None
    runs: int
    finding: str
    """better, worse, no difference, or too few."""


class Results(TypedDict):
    """``results.json``."""

    session: Session
    drift_percent: dict[str, float]
    targets: list[Target]
    comparisons: list[Comparison]
    not_compared: list[str]
    """Why a pair of targets has no ratios."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """A run as it was read, before it is known whether its speed may be shown."""

    facts: Facts
    verdicts: list[StoredVerdict] | None
    figures: Figures
    values: dict[str, float]

    @property
    def complete(self) -> bool:
        return self.facts["state"] == "COMPLETE"

    @property
    def judged(self) -> bool:
        looked = {one["judge"] for one in self.verdicts or () if one["checked"]}
        unwatched = self.complete and self.facts["resources"] and WATCHED not in looked
        return bool(looked) and not unwatched

    def excuses(self, found: StoredVerdict) -> bool:
        """May the generator itself have made these violations, being late?"""
        return found["timed"] and any(objections(self.values))

    @property
    def violations(self) -> list[StoredVerdict]:
        """Findings that are the server's fault."""
        return [v for v in self.verdicts or () if v["violations"] and not self.excuses(v)]

    @property
    def excused(self) -> list[StoredVerdict]:
        """Findings that may not be."""
        return [v for v in self.verdicts or () if v["violations"] and self.excuses(v)]

    @property
    def sound(self) -> bool:
        """May its speed be shown, if that of its target may be? Of an interrupted run, too."""
        return self.judged and not self.figures.invalid


def build(folder: Path, measures: Measures | None = None) -> Results:
    """Results of the session in ``folder``, from its raw records."""
    session = read_session(folder)
    changed = drift(session["before"], session["after"]) if session["after"] else {}
    measured = {
        name: [_measured(path, session, measures) for path in runs(folder, name)]
        for name in session["targets"]
    }
    unsteady = list(_unsteady(list(measured.values()), changed))
    targets = [_target(session, name, measured[name], unsteady) for name in session["targets"]]
    comparisons, not_compared = _comparisons(targets, session["seed"])
    results = Results(
        session=session,
        drift_percent=changed,
        targets=targets,
        comparisons=comparisons,
        not_compared=not_compared,
    )
    return cast("Results", _rounded(results))


def _unsteady(
    measured: Sequence[Sequence[_Measured]], changed: Mapping[str, float]
) -> Iterator[str]:
    """What speaks against the machine: how it treated targets that took turns, or how it changed
    under a single one.
    """
    if len(measured) == 1:
        for name, percent in changed.items():
            if percent > DRIFT_PERCENT_MAX:
                limit = f"{DRIFT_PERCENT_MAX:.0f} % is allowed"
                yield f"{name} changed by {percent:.0f} % meanwhile, {limit}"
        return
    before = {
        "fsync": [[run.facts["fsync_us"] for run in each] for each in measured],
        "loopback": [[run.facts["loopback_us"] for run in each] for each in measured],
    }
    for name, speeds in before.items():
        if all(each and min(each) > 0 for each in speeds):
            percent = unequal(speeds)
            if percent > UNEQUAL_PERCENT_MAX:
                limit = f"{UNEQUAL_PERCENT_MAX:.0f} % is allowed"
                yield f"{name} differed by {percent:.0f} % between the targets' runs, {limit}"


def write(folder: Path, results: Results) -> None:
    """Keep results beside the raw records; an infinite number is one that JSON can write."""
    text = json.dumps(results, indent=1)
    text = re.sub(r"^(\s+\"\w+\": )Infinity\b", rf"\g<1>{INFINITE}", text, flags=re.MULTILINE)
    (folder / RESULTS).write_text(text + "\n")


def stored(folder: Path, measures: Measures | None = None) -> Results:
    """Results from raw records, or as they were kept where the records are gone."""
    if (folder / SESSION).exists():
        return build(folder, measures)
    if not (folder / RESULTS).exists():
        raise FileNotFoundError(f"{folder}: neither {SESSION} nor {RESULTS} is there")
    results: Results = json.loads((folder / RESULTS).read_text())
    return results


def has_speed(target: Target) -> bool:
    """Has it figures that may be shown?"""
    return bool(target["medians"])


def _target(
    session: Session, name: str, measured: Sequence[_Measured], unsteady: Sequence[str]
) -> Target:
    state, reasons = _state(measured, unsteady, session["repetitions"])
    visible = state in {"PASS", "INCOMPLETE"}
    complete = [run for run in measured if run.complete] if visible else []
    facts = measured[0].facts if measured else None
    return Target(
        name=name,
        version=facts["version"] if facts else "",
        command=facts["command"] if facts else "",
        durability=facts["durability"] if facts else "",
        client=facts["client"] if facts else "",
        state=state,
        reasons=reasons,
        judges=_judges(measured),
        runs=[_run(run, run.values if visible and run.sound else {}) for run in measured],
        medians=_medians([run.values for run in complete]),
        curve=_curve([run.figures.latency for run in complete]),
        window_us=complete[0].figures.windows["width_us"] if complete else 0,
        course=_course([run.figures.windows for run in complete]),
    )


def _records(path: Path) -> Records:
    file = path / RUN
    try:
        facts: object = json.loads(file.read_text())
    except ValueError as error:
        raise DamagedRunError(f"{file}: {error}") from error
    known = facts.keys() if isinstance(facts, dict) else set()
    missing = sorted(Facts.__required_keys__ - known)
    if missing:
        raise DamagedRunError(f"{file}: without {missing[0]}")
    return Records(path)


def _measured(path: Path, session: Session, measures: Measures | None) -> _Measured:
    records = _records(path)
    facts = records.facts
    if facts["fingerprint"] != session["fingerprint"]:
        raise MixedRunsError(f"{path}: a run of another plan than its session's")
    made = figures(records)
    values = dict(made.values)
    for kind, one in ((kind, one) for kind, one in made.classes.items() if kind != ALL):
        values[f"count/{kind}"] = one["count"]
        of_class = {f"latency_{p}_us": us for p, us in one["latency_us"].items()}
        of_class |= {f"service_{p}_us": us for p, us in one["service_us"].items()}
        values |= {f"{n}/{kind}": of_class[n] for n in SHOWN_OF_CLASSES if n in of_class}
    if measures is not None:
        values |= measures(records)
    return _Measured(facts=facts, verdicts=read_verdicts(path), figures=made, values=values)


def _state(
    measured: Sequence[_Measured], unsteady: Sequence[str], repetitions: int
) -> tuple[str, list[str]]:
    """The worst that is known of a target, and why."""
    violations = [_said(run, one) for run in measured for one in run.violations]
    if violations:
        return "FAIL", violations
    complete = [run for run in measured if run.complete]
    complaints = [
        f"run {run.facts['repetition']}: {reason}"
        for run in complete
        for reason in run.figures.invalid
    ]
    excused = [f"{_said(run, one)}, in time" for run in measured for one in run.excused]
    if excused or (complete and (complaints or unsteady)):
        return "INVALID", [*unsteady, *complaints, *excused]
    unseen = [f"run {run.facts['repetition']} was not judged" for run in complete if not run.judged]
    if unseen:
        return "NOT JUDGED", unseen
    if len(complete) < repetitions:
        ends = [
            f"run {run.facts['repetition']}: {run.facts['reason']}"
            for run in measured
            if run.facts["reason"]
        ]
        return "INCOMPLETE", [f"{len(complete)} complete runs of {repetitions}", *ends]
    return "PASS", []


def _said(run: _Measured, found: StoredVerdict) -> str:
    at = run.facts["repetition"]
    return f"run {at}: {found['judge']}: {found['violations']} of {found['checked']}"


def _run(measured: _Measured, values: dict[str, float]) -> Run:
    return Run(
        repetition=measured.facts["repetition"],
        state=measured.facts["state"],
        judged=measured.judged,
        violations=sum(one["violations"] for one in measured.violations),
        invalid=measured.figures.invalid,
        connections_failed=measured.facts["connections_failed"],
        errors=measured.figures.errors,
        values=values,
    )


def _judges(measured: Sequence[_Measured]) -> list[JudgeSum]:
    """Sums by judge, in the order in which judges first spoke."""
    sums: dict[str, JudgeSum] = {}
    for run in measured:
        for one in run.verdicts or ():
            nothing = JudgeSum(
                judge=one["judge"],
                checked=0,
                violations=0,
                evidence=[],
                timed=one["timed"],
                excused=0,
            )
            total = sums.setdefault(one["judge"], nothing)
            total["checked"] += one["checked"]
            total["excused" if run.excuses(one) else "violations"] += one["violations"]
            room = VIOLATIONS_KEPT - len(total["evidence"])
            total["evidence"] += [
                f"run {run.facts['repetition']}: {line}" for line in one["evidence"][: max(0, room)]
            ]
    return list(sums.values())


def _medians(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of figures that every run has."""
    if not values:
        return {}
    names = [name for name in values[0] if all(name in run for run in values)]
    return {name: median([run[name] for run in values]) for name in names}


def _curve(histograms: Sequence[HdrHistogram]) -> list[list[float]]:
    """Latency at percentiles that come closer and closer to 100, the last of one operation."""
    together = histogram()
    for one in histograms:
        together.add(one)
    total = together.get_total_count()
    if not total:
        return []
    points = int(np.log10(total) * CURVE_POINTS_PER_DECADE) + 1
    nines = [n / CURVE_POINTS_PER_DECADE for n in range(points)]
    percents = [100 * (1 - 10**-n) for n in nines]
    found = together.get_percentile_to_value_dict(percents)
    return [[n, found[percent]] for n, percent in zip(nines, percents, strict=True)]


def _course(windows: Sequence[Windows]) -> dict[str, Course]:
    """How each figure went over the time of the load."""
    names = [name for name in windows[0] if name != "width_us"] if windows else []
    return {name: _middle([dict(one)[name] for one in windows]) for name in names}


def _middle(series: Sequence[object]) -> Course:
    course = Course(middle=[], low=[], high=[])
    lists = [one for one in series if isinstance(one, list)]
    for n in range(max(map(len, lists), default=0)):
        known = [one[n] for one in lists if n < len(one) and one[n] is not None]
        course["middle"].append(median(known) if known else None)
        course["low"].append(min(known, default=None))
        course["high"].append(max(known, default=None))
    return course


def _comparisons(targets: Sequence[Target], seed: int) -> tuple[list[Comparison], list[str]]:
    """The first target against each other one."""
    rows: list[Comparison] = []
    refused: list[str] = []
    for other in targets[1:]:
        first = targets[0]
        pair = f"{first['name']} / {other['name']}"
        silent = [t for t in (first, other) if not has_speed(t)]
        if silent:
            refused += [f"{pair}: {one['name']} is {one['state']}" for one in silent]
        elif not same_durability(first, other):
            classes = f"{first['durability']!r} against {other['durability']!r}"
            refused.append(f"{pair}: durability differs, {classes}")
        else:
            rows += compared(first, other, seed)
    return rows, refused


def same_durability(one: Target, other: Target) -> bool:
    """Do both mean the same by an acknowledgement, as far as is known?"""
    told = (one["durability"], other["durability"])
    return equally_durable(told, (one["command"], other["command"]))


def compared(target: Target, against: Target, seed: int) -> list[Comparison]:
    """Ratios of all figures that both have."""
    names = target["medians"].keys() & against["medians"].keys()
    rows = []
    for name in in_order(names) + of_classes(names):
        better = metric(name).better
        sides = [_complete(side, name) for side in (target, against)]
        found = ratio(*sides, seed=seed) if better is not Better.NEITHER else None
        if found is None:
            continue
        finding = "too few" if found.too_few else "no difference"
        if found.settled:
            finding = "better" if (found.ratio < 1) == (better is Better.LOWER) else "worse"
        rows.append(
            Comparison(
                metric=name,
                target=target["name"],
                against=against["name"],
                ratio=found.ratio,
                low=found.low,
                high=found.high,
                runs=found.runs,
                finding=finding,
            )
        )
    return rows


def _complete(target: Target, name: str) -> list[float]:
    return [run["values"][name] for run in target["runs"] if run["state"] == "COMPLETE"]


def _rounded(part: object) -> object:
    """The same with floats of a few digits: small, and no place for noise."""
    if isinstance(part, float):
        return float(f"{part:.{DIGITS}g}")
    if isinstance(part, dict):
        return {name: _rounded(value) for name, value in part.items()}
    return [_rounded(one) for one in part] if isinstance(part, list | tuple) else part
