"""Reports of stored sessions: one page, a summary, a picture, and comparisons.

``results`` makes everything that may be said of a session from its raw records, and hides the speed
of what is wrong; ``page``, ``terminal``, ``charts`` and ``compare`` show it and add nothing.
"""

from pathlib import Path

from bench.report.charts import draw_picture
from bench.report.kept import Judging
from bench.report.page import page
from bench.report.results import Measures, Results, build, stored, write

PAGE = "report.html"


def report(
    folder: Path, measures: Measures | None = None, judging: Judging | None = None
) -> Results:
    """Write ``results.json`` and ``report.html`` of the session in ``folder``, from raw records.

    The same records make the same bytes. ``measures`` are the storm's own figures of a run;
    ``judging`` judges runs whose verdicts are not stored.
    """
    results = build(folder, measures, judging)
    keep(folder, results)
    return results


def keep(folder: Path, results: Results) -> None:
    """Write both files; raises ``OSError``."""
    write(folder, results)
    (folder / PAGE).write_text(page(results))


def picture(folder: Path, path: Path, measures: Measures | None = None) -> None:
    """A PNG for a README, of a session with raw records or with stored results only."""
    draw_picture(stored(folder, measures), path)
