"""Results as one page that needs nothing else: no network, no script, no second file."""

import shlex
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from bench.capsule import Capsule
from bench.report.charts import DARK, LIGHT, Palette, course_chart, percentile_chart
from bench.report.metrics import METRICS, in_order, metric, of_classes, shown, shown_ratio
from bench.report.results import Comparison, Results, Run, Target, has_speed
from bench.statistics import INTERVAL_PERCENT, REPETITIONS_MIN

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
KINDS = {"better": "good", "worse": "bad"}


class Row(NamedTuple):
    """One figure of every target that may show it, and its ratios."""

    label: str
    values: list[str]
    ratios: list[tuple[str, str, str]]
    """Ratio, finding and the class of its colour, for each pair."""


class RunRow(NamedTuple):
    """One run of one target, in the place of its colour."""

    place: int
    target: str
    repetition: int
    state: str
    values: list[str]
    errors: str


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
        judges=list(judges(targets)),
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
        runs=list(_runs(targets)),
        environment=list(_environment(results)),
        plan=list(_plan(results)),
    )


def judges(targets: Sequence[Target]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each judge with its finding about each target: a text and the class of its colour."""
    spoken = dict.fromkeys(one["judge"] for target in targets for one in target["judges"])
    for judge in spoken:
        cells = []
        for target in targets:
            found = next((one for one in target["judges"] if one["judge"] == judge), None)
            if found is None or not any(
                found[part] for part in ("checked", "violations", "excused")
            ):
                cells.append(("not judged", "muted"))
            elif found["violations"]:
                cells.append((f"FAIL {found['violations']:,} of {found['checked']:,}", "bad"))
            elif found["excused"]:
                text = f"INVALID {found['excused']:,} of {found['checked']:,}"
                cells.append((text, "muted"))
            else:
                cells.append((f"ok {found['checked']:,}", "good"))
        yield judge, cells


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


def _runs(targets: Sequence[Target]) -> Iterator[RunRow]:
    for place, target in enumerate(targets):
        for run in target["runs"]:
            yield RunRow(
                place,
                target["name"],
                run["repetition"],
                run_state(run),
                [_value(run["values"], name) for name in OF_A_RUN],
                ", ".join(f"{n:,} {name}" for name, n in run["errors"].items()),
            )


def run_state(run: Run) -> str:
    """The worst of one run."""
    if run["violations"]:
        return "FAIL"
    if run["state"] == "COMPLETE" and run["invalid"]:
        return "INVALID"
    if run["state"] == "COMPLETE" and not run["judged"]:
        return "NOT JUDGED"
    return run["state"]


def _environment(results: Results) -> Iterator[tuple[str, str, str]]:
    before, after = results["session"]["before"], results["session"]["after"]
    for (name, then), (_, now) in zip(_described(before), _described(after or before), strict=True):
        yield name, then, ("not taken" if after is None else "the same" if now == then else now)
    for name, percent in results["drift_percent"].items():
        yield f"drift of {name}", "", f"{percent:.0f} %"


def _described(capsule: Capsule) -> Iterator[tuple[str, str]]:
    yield "CPU", f"{capsule['cpu']}, {capsule['cores']} cores"
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
