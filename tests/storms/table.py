"""Write the table of all storms into the README from stored results, or check that it is there."""

import argparse
import json
import sys
from pathlib import Path
from typing import Final

from bench.report.metrics import shown, shown_ratio
from bench.report.results import Comparison, Results
from bench.storms import STORMS

ROOT: Final = Path(__file__).parents[2]
RESULTS: Final = Path(__file__).with_name("results")
README: Final = ROOT / "README.md"
BEGIN: Final = "<!-- storm-table:begin -->\n"
END: Final = "<!-- storm-table:end -->\n"
FIGURES: Final = {
    "server_cpu_per_operation_us": "CPU an operation",
    "latency_p50_us": "latency p50",
    "latency_p99_us": "latency p99",
    "watch_lag_p99_us": "watch lag p99",
    "server_rss_max_bytes": "memory",
}


def cell(results: Results, name: str) -> str:
    """``ours / etcd = ratio (interval)`` of one figure, or why there is none."""
    row = next((row for row in results["comparisons"] if row["metric"] == name), None)
    if row is None:
        return "-"
    sides = [t["medians"][name] for t in results["targets"]]
    values = " / ".join(shown(name, value) for value in sides)
    return f"{values} = {_ratio(row)}"


def _ratio(row: Comparison) -> str:
    if row["low"] is None or row["high"] is None:
        return f"{shown_ratio(row['ratio'])} (too few)"
    ratio, low, high = map(shown_ratio, (row["ratio"], row["low"], row["high"]))
    return f"**{ratio}** ({low}-{high})"


def origins(stored: list[Results]) -> list[str]:
    """Where the results come from, one sentence for each difference."""
    found = set()
    for results in stored:
        session, before = results["session"], results["session"]["before"]
        versions = ", ".join(f"{t['name']} {t['version']}" for t in results["targets"])
        found.add(
            f"xs, {session['duration_us'] // 1_000_000} s, {session['repetitions']} repetitions in "
            f"turns, seed {session['seed']}, on {before['cpu']}, {before['cores']} cores, "
            f"{before['kernel']}, {before['python']}; {versions}; "
            f"commit {before['commit'][:12]}, {session['started'][:10]}."
        )
    return sorted(found)


def table(folder: Path) -> str:
    """The table of all storms that have a result, as Markdown; empty if none has."""
    stored: dict[str, Results] = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in STORMS
        if (folder / f"{name}.json").exists()
    }
    if not stored:
        return ""
    lines = [
        "| storm | verdicts | " + " | ".join(FIGURES.values()) + " |",
        "|---|---|" + "---|" * len(FIGURES),
    ]
    for name, results in stored.items():
        states = ", ".join(f"{t['name']} {t['state']}" for t in results["targets"])
        cells = " | ".join(cell(results, figure) for figure in FIGURES)
        lines.append(f"| {name} | {states} | {cells} |")
    lines += ["", *origins(list(stored.values()))]
    return "\n".join(lines) + "\n"


def placed(readme: str, made: str) -> str:
    """The README with the table in its place."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + made + END + tail


def main() -> int:
    """Write the table; with ``--check`` exit with 1 if the README has another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    before = README.read_text()
    after = placed(before, table(RESULTS))
    if arguments.check:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
