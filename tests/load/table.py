"""Write both speed tables into the README from the stored results, or check that they are there."""

import argparse
import sys
from pathlib import Path
from typing import Final

from tests.load import shards
from tests.load.results import RESULTS, Measured, amount, medians, origins, ratio
from tests.load.server import ROOT
from tests.load.works import WORKS, Work, faults

README: Final = ROOT / "README.md"
MARKS: Final = ("<!-- {}-table:begin -->\n", "<!-- {}-table:end -->\n")


def rows(work: Work, measured: Measured) -> list[str]:
    """The rows of one work; a run with a fault leaves no figure, only the fault."""
    wrong = [fault for run in (*measured.reference, *measured.subject) for fault in faults(run)]
    if wrong:
        return [f"| {work.meaning} | FAIL: {wrong[0]} | | | |"]
    found = []
    for figure in work.figures:
        reference, subject = (amount(value, figure.unit) for value in medians(figure, measured))
        part = ratio(figure, measured)
        told = "-" if part is None else f"{part:.2f}"
        found.append(f"| {work.meaning} | {figure.meaning} | {reference} | {subject} | {told} |")
    return found


def table(folder: Path) -> str:
    """The table of all works that have a result, as Markdown; empty if none has."""
    results = {
        work: Measured.load(folder / f"{work.name}.json")
        for work in WORKS
        if (folder / f"{work.name}.json").exists()
    }
    if not results:
        return ""
    lines = ["| objects of 1 KiB | figure | etcd | kvstore | ratio |", "|---|---|---|---|---|"]
    for work, measured in results.items():
        lines += rows(work, measured)
    lines += ["", *origins(list(results.values()))]
    return "\n".join(lines) + "\n"


def with_table(readme: str, name: str, text: str) -> str:
    """The README with a table between its marks; raises ValueError without marks."""
    begin, end = (mark.format(name) for mark in MARKS)
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    return before + begin + text + end + after


def with_tables(readme: str, folder: Path) -> str:
    """The README with the tables that the stored results make."""
    readme = with_table(readme, "speed", table(folder))
    return with_table(readme, "shards", shards.table(folder))


def main() -> int:
    """Write the tables, or with ``--check`` only tell whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    readme = README.read_text()
    wanted = with_tables(readme, RESULTS)
    if asked.check:
        return 0 if readme == wanted else 1
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
