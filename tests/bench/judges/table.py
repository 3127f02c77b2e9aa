"""Write the table of all judges into the design of the benchmark, from what they say themselves.

``python -m tests.bench.judges.table`` after a judge's docstring has changed.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from bench.judges import judge
from bench.records import Records
from bench.storms import STORMS
from bench.verdicts import Verdict
from tests.bench.judges.world import facts_of

DESIGN: Final = Path(__file__).parents[3] / "bench" / "DESIGN.md"
BEGIN: Final = "<!-- judges:begin -->\n"
END: Final = "<!-- judges:end -->\n"


def verdicts() -> list[Verdict]:
    """What all judges, and the checks of all storms, say of a run in which nothing happened."""
    facts = facts_of() | {"duration_us": 0, "warm_up_us": 0, "timeout_us": 1}
    with TemporaryDirectory() as folder:
        (Path(folder) / "run.json").write_text(json.dumps(facts))
        records = Records(Path(folder))
        found = judge(records)
        for storm in STORMS.values():
            found += storm.checks(records, storm.PRESETS["xs"])
    return found


def table() -> str:
    """As Markdown; ``(timed)`` is what must hold within a time only."""
    rows = [
        f"| {one.judge}{' (timed)' if one.timed else ''} | {one.rule.replace('|', chr(92) + '|')} |"
        for one in verdicts()
    ]
    return "\n".join(("| judge | what it holds a server to |", "|---|---|", *rows)) + "\n"


def placed(design: str) -> str:
    """The text with the table in its place."""
    head, _, rest = design.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + table() + END + tail


if __name__ == "__main__":
    DESIGN.write_text(placed(DESIGN.read_text()))
