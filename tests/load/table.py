"""Write the speed table into the README from the stored results, or check that it is there."""

import argparse
import sys
from pathlib import Path
from typing import Final

from tests.load.results import RESULTS, Measured, amount, medians, ratio
from tests.load.server import ROOT
from tests.load.works import WORKS, Work, faults

README: Final = ROOT / "README.md"
BEGIN: Final = "<!-- speed-table:begin -->\n"
END: Final = "<!-- speed-table:end -->\n"


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


def origins(results: list[Measured]) -> list[str]:
    """What the results were measured on, one sentence for each difference."""
    found = []
    for measured in results:
        on, of = measured.machine, measured.versions
        found.append(
            f"Medians of {len(measured.subject)}, in turns on one machine ({on['cpu']}, "
            f"{on['cores']} cores, {on['memory_gib']} GiB, Linux {on['kernel']}): "
            f"etcd {of['etcd']} and kvstore {of['kvstore']} at {measured.commit} "
            f"on Python {of['python']}, {measured.date}."
        )
    return sorted(set(found))


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


def with_table(readme: str, text: str) -> str:
    """The README with the table between its marks; raises ValueError without marks."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + text + END + after


def main() -> int:
    """Write the table, or with ``--check`` only tell whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    readme = README.read_text()
    wanted = with_table(readme, table(RESULTS))
    if asked.check:
        return 0 if readme == wanted else 1
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
