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

from bench.capsule import drift
from bench.figures import ALL, Figures, figures
from bench.punctuality import objections
from bench.records import WATCHES, Facts, Records
from bench.report.doubts import GENERATOR, Doubt, Speed, of_generator, speeds, unsteady
from bench.report.durability import equally_durable
from bench.report.incidents import Incident, incidents, without_speed
from bench.report.kept import Judging, all_there, reading, records_of, verdicts_of
from bench.report.medians import Course, course, curve, medians
from bench.report.metrics import SHOWN_OF_CLASSES, Better, in_order, metric, of_classes
from bench.report.session import (
    SESSION,
    Session,
    StoredVerdict,
    UnusableError,
    read_object,
    read_session,
    runs,
)
from bench.statistics import ratio
from bench.verdicts import VIOLATIONS_KEPT
from bench.wording import counted, stated

RESULTS = "results.json"
WATCHED = "Reliable"
"""The judge that compares what watches showed with what was written."""
DIGITS = 6
"""Significant ones of every figure."""
INFINITE = "1e999"

Measures = Callable[[Records], Mapping[str, float]]
"""A storm's own figures of one run, lower is better."""


class MixedRunsError(UnusableError):
    """The folder's runs do not belong together."""


class JudgeSum(StoredVerdict):
    """One judge's findings in all runs of a target; evidence says of which.

    What was lacking is told only if it was in all of them.
    """

    excused: int
    """Violations in time, of runs whose generator was late; they are not among ``violations``."""


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
    incidents: list[Incident]
    generator: dict[str, float]
    """Figures of the generator, which are no server's."""
    values: dict[str, float]
    """Empty where speed is hidden."""


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
    machine: list[Speed]
    """Before the runs of each target."""
    unsteady: list[str]
    """What speaks against the machine, and so against every target; among their reasons, too."""
    advice: list[str]
    """What to do about what is INVALID or NOT JUDGED."""
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
    incidents: list[Incident]
    watched: bool
    """Was anything to be watched, by the plan or by a client of a trace?"""

    @property
    def complete(self) -> bool:
        return self.facts["state"] == "COMPLETE"

    @property
    def judged(self) -> bool:
        looked = {one["judge"] for one in self.verdicts or () if one["checked"]}
        unseen = self.complete and self.watched and WATCHED not in looked
        return bool(looked) and not unseen

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


def build(
    folder: Path, measures: Measures | None = None, judging: Judging | None = None
) -> Results:
    """Results of the session in ``folder``, from its raw records.

    Runs whose verdicts are not stored are judged by ``judging``. Raises ``UnusableError`` if not
    everything that was written is there.
    """
    session = read_session(folder)
    all_there(folder, session)
    changed = drift(session["before"], session["after"]) if session["after"] else {}
    measured = {
        name: [_read(path, session, measures, judging) for path in runs(folder, name)]
        for name in session["targets"]
    }
    machine = speeds({name: [run.facts for run in each] for name, each in measured.items()})
    alone = len(measured) == 1
    wrong = list(unsteady(machine, changed, alone=alone))
    targets = [_target(session, name, measured[name], wrong) for name in session["targets"]]
    doubts = {doubt for one in targets for doubt in _doubts(one, measured[one["name"]])}
    if any("rows" not in run.facts for each in measured.values() for run in each):
        doubts.add(Doubt.UNCOUNTED)
    if wrong and "INVALID" in {one["state"] for one in targets}:
        doubts.add(Doubt.DRIFTED if alone else Doubt.UNEVEN)
    comparisons, not_compared = _comparisons(targets, session["seed"])
    results = Results(
        session=session,
        drift_percent=changed,
        machine=machine,
        unsteady=wrong,
        advice=[doubt.value for doubt in Doubt if doubt in doubts],
        targets=targets,
        comparisons=comparisons,
        not_compared=not_compared,
    )
    return cast("Results", _rounded(results))


def _doubts(target: Target, measured: Sequence[_Measured]) -> Iterator[Doubt]:
    """Why a target has no figures although nothing was found to be wrong with it."""
    if target["state"] == "NOT JUDGED":
        yield Doubt.UNSEEN
    if target["state"] == "INVALID":
        for run in measured:
            yield from of_generator(run.values, replayed=not run.facts["resources"])


def write(folder: Path, results: Results) -> None:
    """Keep results beside the raw records; an infinite number is one that JSON can write."""
    text = json.dumps(results, indent=1)
    text = re.sub(r"^(\s+\"\w+\": )Infinity\b", rf"\g<1>{INFINITE}", text, flags=re.MULTILINE)
    (folder / RESULTS).write_text(text + "\n")


def stored(folder: Path, measures: Measures | None = None) -> Results:
    """Results from raw records, or as they were kept where the records are gone.

    What was not kept yet when they were is empty.
    """
    if (folder / SESSION).exists():
        return build(folder, measures)
    if not (folder / RESULTS).exists():
        raise FileNotFoundError(f"{folder}: neither {SESSION} nor {RESULTS} is there")
    later: dict[str, object] = {"machine": [], "unsteady": [], "advice": []}
    names = Results.__required_keys__ - later.keys()
    results = cast("Results", later | read_object(folder / RESULTS, names))
    for target in results["targets"]:
        for judge in target["judges"]:
            judge.setdefault("rule", "")
            judge.setdefault("lacking", "")
        for run in target["runs"]:
            run.setdefault("incidents", [])
            run.setdefault("generator", {})
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
        version=", ".join(dict.fromkeys(v for run in measured if (v := run.facts["version"]))),
        command=facts["command"] if facts else "",
        durability=facts["durability"] if facts else "",
        client=facts["client"] if facts else "",
        state=state,
        reasons=reasons,
        judges=_judges(measured),
        runs=[_run(run, is_shown=visible and run.sound) for run in measured],
        medians=medians([run.values for run in complete]),
        curve=curve([run.figures.latency for run in complete]),
        window_us=complete[0].figures.windows["width_us"] if complete else 0,
        course=course([run.figures.windows for run in complete]),
    )


def _read(
    path: Path, session: Session, measures: Measures | None, judging: Judging | None
) -> _Measured:
    with reading(path):
        return _measured(path, session, measures, judging)


def _measured(
    path: Path, session: Session, measures: Measures | None, judging: Judging | None
) -> _Measured:
    records = records_of(path)
    facts = records.facts
    if facts["fingerprint"] != session["fingerprint"]:
        raise MixedRunsError(f"{path}: a run of another plan than its session's")
    verdicts = verdicts_of(path, facts, judging)
    made = figures(records)
    values = dict(made.values)
    for kind, one in ((kind, one) for kind, one in made.classes.items() if kind != ALL):
        values[f"count/{kind}"] = one["count"]
        of_class = {f"latency_{p}_us": us for p, us in one["latency_us"].items()}
        of_class |= {f"service_{p}_us": us for p, us in one["service_us"].items()}
        values |= {f"{n}/{kind}": of_class[n] for n in SHOWN_OF_CLASSES if n in of_class}
    if measures is not None:
        values |= measures(records)
    return _Measured(
        facts=facts,
        verdicts=verdicts,
        figures=made,
        values=values,
        incidents=incidents(records),
        watched=bool(facts["resources"] or len(records.frame(WATCHES))),
    )


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
    excused = [
        f"{_said(run, one)}, which is a matter of time, and the generator had none"
        for run in measured
        for one in run.excused
    ]
    if excused or (complete and (complaints or unsteady)):
        return "INVALID", [*unsteady, *complaints, *excused]
    unseen = [
        ": ".join(filter(None, (f"run {run.facts['repetition']} was not judged", why)))
        for run in complete
        if not run.judged
        for why in (run.facts["reason"],)
    ]
    if unseen:
        return "NOT JUDGED", unseen
    if len(complete) < repetitions:
        ends = [
            f"run {run.facts['repetition']}: {run.facts['reason']}"
            for run in measured
            if run.facts["reason"]
        ]
        return "INCOMPLETE", [f"{counted(len(complete), 'complete run')} of {repetitions}", *ends]
    return "PASS", []


def _said(run: _Measured, found: StoredVerdict) -> str:
    at = run.facts["repetition"]
    return f"run {at}: {found['judge']}: {found['violations']} of {found['checked']}"


def _run(measured: _Measured, *, is_shown: bool) -> Run:
    troubles, values = measured.incidents, measured.values
    return Run(
        repetition=measured.facts["repetition"],
        state=measured.facts["state"],
        judged=measured.judged,
        violations=sum(one["violations"] for one in measured.violations),
        invalid=measured.figures.invalid,
        connections_failed=measured.facts["connections_failed"],
        errors=measured.figures.errors,
        incidents=troubles if is_shown else without_speed(troubles),
        generator={name: values[name] for name in GENERATOR if name in values},
        values=values if is_shown else {},
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
                rule=one["rule"],
                lacking="",
                excused=0,
            )
            total = sums.setdefault(one["judge"], nothing)
            total["checked"] += one["checked"]
            total["excused" if run.excuses(one) else "violations"] += one["violations"]
            room = VIOLATIONS_KEPT - len(total["evidence"])
            total["evidence"] += [
                f"run {run.facts['repetition']}: {line}" for line in one["evidence"][: max(0, room)]
            ]
    for judge, total in sums.items():
        if not total["checked"]:
            every = [v for run in measured for v in run.verdicts or () if v["judge"] == judge]
            total["lacking"] = "; ".join(dict.fromkeys(v["lacking"] for v in every if v["lacking"]))
    return list(sums.values())


def _comparisons(targets: Sequence[Target], seed: int) -> tuple[list[Comparison], list[str]]:
    """The first target against each other one."""
    rows: list[Comparison] = []
    refused: list[str] = []
    for other in targets[1:]:
        first = targets[0]
        pair = f"{first['name']} / {other['name']}"
        silent = [t for t in (first, other) if not has_speed(t)]
        if silent:
            of: dict[str, list[str]] = {}
            for one in silent:
                of.setdefault(one["state"], []).append(one["name"])
            refused += [f"{pair}: {stated(names, state)}" for state, names in of.items()]
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
