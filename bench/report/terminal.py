"""Results as tables on a terminal: the verdicts, what is wrong, and the figures."""

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.report.compare import Sessions
from bench.report.metrics import in_order, metric
from bench.report.page import evidence, judges, pairs, ratio_cell, rows
from bench.report.results import Results, has_speed

STATES = {"PASS": "bold green", "FAIL": "bold red"}
DOUBT = "bold yellow"
STYLES = {"good": "green", "bad": "red", "muted": "dim", "": ""}


def summary(results: Results) -> list[RenderableType]:
    """What a session came to, verdicts first."""
    parts: list[RenderableType] = [_states(results), _judges(results)]
    for name, judge, lines in evidence(results["targets"]):
        parts.append(Text(f"{name}: {judge}", style="red"))
        parts += [Text(f"  {line}") for line in lines]
    parts += [Text(f"no ratios of {line}", style="dim") for line in results["not_compared"]]
    if any(has_speed(target) for target in results["targets"]):
        parts.append(_figures(results))
    return parts


def comparison_table(sessions: Sessions) -> RenderableType:
    """The second session against the first, target by target."""
    table = _table()
    table.add_column("target")
    table.add_column("figure")
    table.add_column("ratio", justify="right")
    table.add_column("finding")
    for row in sessions.rows:
        ratio, finding, kind = ratio_cell(row)
        style = STYLES[kind]
        label = escape(metric(row["metric"]).label)
        table.add_row(escape(row["target"]), label, ratio, Text(finding, style=style))
    remarks = [Text(line, style="yellow") for line in sessions.remarks]
    return Group(*remarks, table)


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))


def _states(results: Results) -> RenderableType:
    table = _table()
    for title in ("target", "state", "why", "durability"):
        table.add_column(title)
    for target in results["targets"]:
        state = Text(target["state"], style=STATES.get(target["state"], DOUBT))
        why = Text("\n".join(target["reasons"]))
        table.add_row(escape(target["name"]), state, why, escape(target["durability"]))
    return table


def _judges(results: Results) -> RenderableType:
    table = _table()
    table.add_column("judge")
    for target in results["targets"]:
        table.add_column(escape(target["name"]), justify="right")
    for judge, cells in judges(results["targets"]):
        table.add_row(escape(judge), *(Text(text, style=STYLES[kind]) for text, kind in cells))
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
