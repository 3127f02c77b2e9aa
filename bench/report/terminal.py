"""Results as tables on a terminal: the verdicts, what is wrong, and the figures.

Nothing is told twice: what the whole session is INVALID for stands once above the targets, and what
several judges lacked once below them.
"""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.report.compare import Sessions
from bench.report.doubts import GENERATOR
from bench.report.metrics import in_order, metric, shown
from bench.report.page import (
    DASH,
    HIDDEN,
    REFUSED,
    evidence,
    judges,
    own_reasons,
    pairs,
    ratio_cell,
    rows,
    session_doubts,
    troubles,
    versions,
    was_killed,
)
from bench.report.results import Results, has_speed
from bench.statistics import REPETITIONS_MIN

STATES = {"PASS": "bold green", "FAIL": "bold red"}
DOUBT = "bold yellow"
STYLES = {"good": "green", "bad": "red", "muted": "dim", "": ""}


def summary(results: Results) -> list[RenderableType]:
    """What a session came to, verdicts first; of a storm or of a replay."""
    parts: list[RenderableType] = [
        Text(f"session INVALID: {line}", style=DOUBT) for line in session_doubts(results)
    ]
    parts += [_states(results), *(Text(line, style="dim") for line in results["advice"])]
    parts += [_judges(results), *(Text(line, style="dim") for line in _lacking(results))]
    for name, judge, lines in evidence(results["targets"]):
        parts.append(Text(f"{name}: {judge}", style="red"))
        parts += [Text(f"  {line}") for line in lines]
    if any(run["incidents"] for target in results["targets"] for run in target["runs"]):
        parts.append(_troubles(results))
        if any(one["runs"] and not has_speed(one) for one in results["targets"]):
            parts.append(Text(HIDDEN, style="dim"))
    parts += [Text(f"no ratios of {line}", style="dim") for line in results["not_compared"]]
    if any(has_speed(target) for target in results["targets"]):
        parts.append(_figures(results))
        if was_killed(results):
            parts.append(Text(REFUSED, style="dim"))
    if any(run["generator"] and not run["values"] for t in results["targets"] for run in t["runs"]):
        parts.append(_generator(results))
    return parts


def comparison_table(sessions: Sessions) -> RenderableType:
    """The second session against the first, target by target.

    What the machine and the versions were comes first; what is true of every row is said once.
    """
    about = [
        *(Text(line, style="dim") for line in sessions.about),
        *(Text(line, style=DOUBT) for line in sessions.remarks),
    ]
    if not sessions.rows:
        return Group(*about, Text("nothing can be compared: no target has figures in both"))
    findings = dict.fromkeys(ratio_cell(row)[1] for row in sessions.rows)
    too_few = {row["finding"] for row in sessions.rows} == {"too few"}
    table = _table()
    table.add_column("target")
    table.add_column("figure")
    table.add_column("ratio", justify="right")
    table.add_column("finding")
    for row in sessions.rows:
        ratio, finding, kind = ratio_cell(row)
        style = STYLES[kind]
        finding = "" if too_few else finding
        label = escape(metric(row["metric"]).label)
        table.add_row(escape(row["target"]), label, ratio, Text(finding, style=style))
    closing = f"every finding is {', '.join(findings)}: it takes {REPETITIONS_MIN} runs in each"
    return Group(*about, table, *([Text(closing)] if too_few else []))


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))


def _states(results: Results) -> RenderableType:
    table = _table()
    for title in ("target", "state", "version", "durability", "why"):
        table.add_column(title)
    for target in results["targets"]:
        state = Text(target["state"], style=STATES.get(target["state"], DOUBT))
        why = Text("\n".join(own_reasons(results, target)))
        about = (versions(results, target), target["durability"])
        table.add_row(escape(target["name"]), state, *map(escape, about), why)
    return table


def _judges(results: Results) -> RenderableType:
    table = _table()
    table.add_column("judge")
    for target in results["targets"]:
        table.add_column(escape(target["name"]), justify="right")
    for row in judges(results["targets"]):
        cells = (Text(text, style=STYLES[kind]) for text, kind in row.cells)
        table.add_row(escape(row.judge), *cells)
    return table


def _lacking(results: Results) -> Iterator[str]:
    """Who was not judged for what, the judges of one reason together."""
    names = [target["name"] for target in results["targets"]]
    by_reason: dict[str, dict[str, list[str]]] = {}
    for row in judges(results["targets"]):
        for name, why in zip(names, row.lacking, strict=True):
            if why:
                by_reason.setdefault(why, {}).setdefault(row.judge, []).append(name)
    for why, of in by_reason.items():
        told = (
            judge if len(whom) == len(names) else f"{judge} ({', '.join(whom)})"
            for judge, whom in of.items()
        )
        yield f"not judged, since {why}: {', '.join(told)}"


def _troubles(results: Results) -> RenderableType:
    table = _table()
    table.add_column("target")
    table.add_column("run", justify="right")
    table.add_column("made on purpose")
    table.add_column("until it answered again")
    for row in troubles(results["targets"]):
        cells = (row.target, str(row.repetition), row.what, row.outage or DASH)
        table.add_row(*map(escape, cells))
    return table


def _generator(results: Results) -> RenderableType:
    """The generator's own figures, of runs that show no others."""
    table = _table()
    table.add_column("target")
    for title in ("run", *(metric(name).label for name in GENERATOR)):
        table.add_column(title, justify="right")
    for target in results["targets"]:
        for run in target["runs"]:
            own = run["generator"]
            if own and not run["values"]:
                cells = (shown(name, own[name]) if name in own else DASH for name in GENERATOR)
                table.add_row(escape(target["name"]), str(run["repetition"]), *cells)
    return table


def _figures(results: Results) -> RenderableType:
    table = _table()
    table.add_column("median of runs")
    for target in filter(has_speed, results["targets"]):
        table.add_column(escape(target["name"]), justify="right")
    for pair in pairs(results["comparisons"]):
        table.add_column(escape(pair), justify="right")
        table.add_column("")
    names = set[str]().union(*(target["medians"] for target in results["targets"]))
    for row in rows(results, in_order(names)):
        cells: list[RenderableType] = [escape(row.label), *row.values]
        for text, finding, kind in row.ratios:
            cells += [text, Text(finding, style=STYLES[kind])]
        table.add_row(*cells)
    return table
