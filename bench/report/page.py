"""Results as one page that needs nothing else: no network, no script, no second file."""

import shlex
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from bench.capsule import UNEQUAL_PERCENT_MAX, Capsule
from bench.clock import MICROSECONDS
from bench.report.charts import DARK, LIGHT, Palette, course_chart, percentile_chart
from bench.report.incidents import KILLED
from bench.report.metrics import METRICS, in_order, metric, of_classes, shown, shown_ratio
from bench.report.results import Comparison, JudgeSum, Results, Run, Target, has_speed
from bench.statistics import INTERVAL_PERCENT, REPETITIONS_MIN
from bench.wording import counted

TEMPLATE = "page.html"
DASH = "\N{EN DASH}"
OF_A_RUN = (
    "operations",
    "rate_per_second",
    "latency_p50_us",
    "latency_p99_us",
    "send_lag_p99_us",
    "generator_cores_max",
)
"""Columns of the table of runs."""
UNSTEADY = "session INVALID: machine not steady"
HIDDEN = "How soon a server is back is its speed, and shown where its figures are."
REFUSED = (
    "A call that was refused or never answered, as while a server was killed, counts as the timeout"
    " in latencies."
)
KINDS = {"better": "good", "worse": "bad"}


class Row(NamedTuple):
    """One figure of every target that may show it, and its ratios."""

    label: str
    values: list[str]
    ratios: list[tuple[str, str, str]]
    """Ratio, finding and the class of its colour, for each pair."""


class JudgeRow(NamedTuple):
    """What one judge says of every target."""

    judge: str
    rule: str
    cells: list[tuple[str, str]]
    """A text and the class of its colour."""
    lacking: list[str]
    """Of each target: why it was not judged; empty if it was, or if nobody knows."""


class RunRow(NamedTuple):
    """One run of one target, in the place of its colour."""

    place: int
    target: str
    repetition: int
    state: str
    values: list[str]
    errors: str


class TroubleRow(NamedTuple):
    """What was done to one run of one target, in the place of its colour."""

    place: int
    target: str
    repetition: int
    what: str
    outage: str
    """Until the server answered again; empty where that is not shown."""


def page(results: Results) -> str:
    """The whole page."""
    source = files("bench.report").joinpath(TEMPLATE).read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    targets, comparisons = results["targets"], results["comparisons"]
    names = set[str]().union(*(target["medians"] for target in targets))
    return environment.from_string(source).render(
        session=results["session"],
        targets=targets,
        names=", ".join(target["name"] for target in targets),
        colors=len(LIGHT.targets),
        light=Markup(_variables(LIGHT)),  # noqa: S704 - ours
        dark=Markup(_variables(DARK)),  # noqa: S704 - ours
        repetitions=counted(results["session"]["repetitions"], "repetition"),
        duration=shown("_us", results["session"]["duration_us"]),
        versions=[versions(results, target) for target in targets],
        invalid=session_doubts(results),
        reasons=[own_reasons(results, target) for target in targets],
        advice=results["advice"],
        judges=list(judges(targets)),
        troubles=list(troubles(targets)),
        hidden=HIDDEN,
        refused=REFUSED if was_killed(results) else "",
        is_replay=is_replay(results),
        evidence=list(evidence(targets)),
        not_compared=results["not_compared"],
        repetitions_min=REPETITIONS_MIN,
        intervals=sum(row["low"] is not None for row in comparisons),
        chance=1 - INTERVAL_PERCENT / 100,
        speedy=[(n, target) for n, target in enumerate(targets) if has_speed(target)],
        pairs=pairs(comparisons),
        figures=rows(results, in_order(names)),
        classes=rows(results, of_classes(names)),
        percentiles=Markup(percentile_chart(results)),  # noqa: S704 - matplotlib escapes names
        course=Markup(course_chart(results)),  # noqa: S704 - likewise
        run_columns=[METRICS[name].label for name in OF_A_RUN],
        runs=list(_runs(results)),
        environment=list(_environment(results)),
        machine=list(_machine(results)),
        unequal_percent_max=UNEQUAL_PERCENT_MAX,
        plan=list(_plan(results)),
    )


def is_replay(results: Results) -> bool:
    """Is it a trace's session? Its load has other causes than a storm's plan."""
    return results["session"]["storm"] == "replay"


def versions(results: Results, target: Target) -> str:
    """What a server says of itself in its runs, and what its command said before them."""
    told = target["version"] or "version unknown"
    command = results["session"]["before"]["versions"].get(target["name"], "")
    parts = [part for part in command.split("; ") if part not in {"", told, f"API {told}"}]
    return f"{told} ({'; '.join(parts)})" if parts else told


def session_doubts(results: Results) -> list[str]:
    """Why all of the session is INVALID; empty if it is not."""
    states = {target["state"] for target in results["targets"]}
    return results["unsteady"] if "INVALID" in states else []


def own_reasons(results: Results, target: Target) -> list[str]:
    """Why a target is not PASS; what the whole session is INVALID for is told above, in full."""
    own = [line for line in target["reasons"] if line not in results["unsteady"]]
    return own or ([UNSTEADY] if target["reasons"] else [])


def judges(targets: Sequence[Target]) -> Iterator[JudgeRow]:
    """Each judge with its finding about each target."""
    spoken = dict.fromkeys(one["judge"] for target in targets for one in target["judges"])
    for judge in spoken:
        all_found = [
            next((one for one in target["judges"] if one["judge"] == judge), None)
            for target in targets
        ]
        yield JudgeRow(
            judge,
            next((one["rule"] for one in all_found if one is not None and one["rule"]), ""),
            [_finding(found) for found in all_found],
            ["" if found is None else found["lacking"] for found in all_found],
        )


def _finding(found: JudgeSum | None) -> tuple[str, str]:
    if found is None or not any(found[part] for part in ("checked", "violations", "excused")):
        return "not judged", "muted"
    if found["violations"]:
        return f"FAIL {found['violations']:,} of {found['checked']:,}", "bad"
    if found["excused"]:
        return f"INVALID {found['excused']:,} of {found['checked']:,}", "muted"
    return f"ok {found['checked']:,}", "good"


def troubles(targets: Sequence[Target]) -> Iterator[TroubleRow]:
    """What was done on purpose, one row for each kind and run."""
    for place, target in enumerate(targets):
        for run in target["runs"]:
            for what in dict.fromkeys(one["what"] for one in run["incidents"]):
                mine = [one for one in run["incidents"] if one["what"] == what]
                when = ", ".join(f"{one['at_us'] / MICROSECONDS:.1f}" for one in mine)
                outages = [one["outage_us"] for one in mine if one["outage_us"] is not None]
                yield TroubleRow(
                    place,
                    target["name"],
                    run["repetition"],
                    f"{len(mine)} \N{MULTIPLICATION SIGN} {what}, at {when} s",
                    ", ".join(shown("_us", outage) for outage in outages),
                )


def was_killed(results: Results) -> bool:
    """Was any server killed on purpose?"""
    runs = [run for target in results["targets"] for run in target["runs"]]
    return any(one["what"] == KILLED for r in runs for one in r["incidents"])


def evidence(targets: Sequence[Target]) -> Iterator[tuple[str, str, list[str]]]:
    """Target, judge and lines of everything that is wrong."""
    for target in targets:
        for one in target["judges"]:
            if one["evidence"]:
                yield target["name"], one["judge"], one["evidence"]


def pairs(comparisons: Sequence[Comparison]) -> list[str]:
    """``ours / etcd``, in order."""
    return list(dict.fromkeys(f"{row['target']} / {row['against']}" for row in comparisons))


def rows(results: Results, names: Sequence[str]) -> list[Row]:
    """Medians and ratios of figures."""
    speedy = [target for target in results["targets"] if has_speed(target)]
    ratios = {
        (row["metric"], f"{row['target']} / {row['against']}"): row
        for row in results["comparisons"]
    }
    every_pair = pairs(results["comparisons"])
    return [
        Row(
            metric(name).label,
            [_value(target["medians"], name) for target in speedy],
            [ratio_cell(ratios.get((name, pair))) for pair in every_pair],
        )
        for name in names
    ]


def ratio_cell(row: Comparison | None) -> tuple[str, str, str]:
    """Ratio with interval, finding, and the class of its colour; empty if there is none."""
    if row is None:
        return "", "", ""
    finding = row["finding"]
    if row["low"] is None or row["high"] is None:
        return shown_ratio(row["ratio"]), f"{finding} ({row['runs']})", "muted"
    ratio, low, high = map(shown_ratio, (row["ratio"], row["low"], row["high"]))
    text = f"{ratio} ({low} to {high})"
    return text, finding, KINDS.get(finding, "muted")


def _value(values: dict[str, float], name: str) -> str:
    return shown(name, values[name]) if name in values else DASH


def _variables(palette: Palette) -> str:
    named = {name: getattr(palette, name) for name in ("ink", "muted", "grid", "paper")}
    named |= {f"target-{n}": color for n, color in enumerate(palette.targets)}
    return " ".join(f"--{name}: {color};" for name, color in named.items())


def _runs(results: Results) -> Iterator[RunRow]:
    for place, target in enumerate(results["targets"]):
        for run in target["runs"]:
            yield RunRow(
                place,
                target["name"],
                run["repetition"],
                run_state(results, target, run),
                [_value(run["generator"] | run["values"], name) for name in OF_A_RUN],
                ", ".join(f"{n:,} {name}" for name, n in run["errors"].items()),
            )


def run_state(results: Results, target: Target, run: Run) -> str:
    """The worst of one run; of one that is complete, why its speed is not shown all the same."""
    if run["violations"]:
        return "FAIL"
    if run["state"] != "COMPLETE":
        return run["state"]
    if run["invalid"]:
        return "INVALID"
    if not run["judged"]:
        return "NOT JUDGED"
    state = target["state"]
    if state in {"PASS", "INCOMPLETE"}:
        return "COMPLETE"
    if state == "INVALID" and session_doubts(results):
        return f"complete; {UNSTEADY}"
    return f"complete; target {state}: other runs"


def _environment(results: Results) -> Iterator[tuple[str, str, str]]:
    before, after = results["session"]["before"], results["session"]["after"]
    for (name, then), (_, now) in zip(_described(before), _described(after or before), strict=True):
        yield name, then, ("not taken" if after is None else "the same" if now == then else now)
    for name, percent in results["drift_percent"].items():
        yield f"{name}, before to after", "", f"changed by {percent:.0f} %"


def _machine(results: Results) -> Iterator[tuple[str, list[str]]]:
    """Each micro-benchmark: its mean before the runs of each target, and how far these differ."""
    for speed in results["machine"]:
        cells = [
            shown("_us", speed["means_us"][target["name"]]) if target["runs"] else DASH
            for target in results["targets"]
        ]
        yield speed["name"], [*cells, f"{speed['unequal_percent']:.0f} %"]


def _described(capsule: Capsule) -> Iterator[tuple[str, str]]:
    yield "CPU", f"{capsule['cpu']}, {counted(capsule['cores'], 'core')}"
    yield "memory", shown("memory_bytes", capsule["memory_bytes"])
    yield "kernel", capsule["kernel"]
    yield "file system", capsule["file_system"]
    yield "Python", capsule["python"]
    yield "versions", ", ".join(f"{name}: {text}" for name, text in capsule["versions"].items())
    yield "commit", capsule["commit"] or DASH
    times = (shown("_us", capsule["fsync_p50_us"]), shown("_us", capsule["fsync_p99_us"]))
    yield "4 KiB write and fdatasync", f"p50 {times[0]}, p99 {times[1]}"
    yield "loopback ping-pong", f"p50 {shown('_us', capsule['loopback_p50_us'])}"


def _plan(results: Results) -> Iterator[tuple[str, str]]:
    session = results["session"]
    yield "command", shlex.join(session["command_line"])
    yield "storm", f"{session['storm']} {session['preset']}"
    for name, value in session["parameters"].items():
        yield name, f"{value:g}"
    yield "seed", str(session["seed"])
    yield "fingerprint", session["fingerprint"]
    clients = dict.fromkeys(t["client"] for t in results["targets"] if t["client"])
    yield "client", ", ".join(clients) or DASH
    ceiling = session["ceiling_per_second"]
    against_null = shown("rate_per_second", ceiling) if ceiling else "not measured"
    yield "generator's ceiling against a null server", against_null
