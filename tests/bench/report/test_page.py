"""The page, the summary and the picture of a session."""

import io
import json
import re
from html.parser import HTMLParser
from math import inf
from pathlib import Path

import matplotlib as mpl
import pytest
from rich.console import Console

from bench.records import Outcome
from bench.report import picture, report
from bench.report.charts import draw_picture
from bench.report.results import Results, stored
from bench.report.session import VERDICTS, run_folder
from bench.report.terminal import summary
from bench.verdicts import Verdict
from tests.bench.report.made import GOOD, Run, session

pytestmark = pytest.mark.slow
MEANS = {"ours": 2000.0, "etcd": 4000.0}
LOST = {
    "judge": "Reliable",
    "checked": 400,
    "violations": 1,
    "evidence": ["revision 17 of </pre><script>alert(1)</script> is missing"],
    "timed": False,
}
VOID = {"meta", "br", "path", "use", "rect", "g"}
OF_GENERATOR = re.compile(r"\b40 us|\d% of a core")
"""How late the made generators are, and what they use: no server's speed."""
SPEED = re.compile(r"\d (us|ms|s|MiB|KiB)\b|\d/s\b|% of a core")


class Balanced(HTMLParser):
    """Follows tags, ids and what is referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens an element, unless it never has content."""
        self.seen.append(tag)
        self._attributes(attrs)
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element of SVG that is closed at once."""
        self._attributes(attrs)

    def handle_endtag(self, tag: str) -> None:
        """Closes what was opened last, or the page is broken."""
        assert tag == self.open.pop()

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in {"href", "src"}:
                self.references.append(value or "")
            if found := re.fullmatch(r"url\((#.*)\)", value or ""):
                self.references.append(found[1])


def parsed(folder: Path) -> Balanced:
    """The page of a session, read as a browser would."""
    parser = Balanced()
    parser.feed((folder / "report.html").read_text())
    parser.close()
    return parser


def said(results: Results) -> str:
    """The summary as a terminal shows it."""
    console = Console(file=io.StringIO(), width=150)
    for part in summary(results):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def fail(folder: Path, target: str, repetition: int) -> None:
    """Plant a violation."""
    (run_folder(folder, target, repetition) / VERDICTS).write_text(json.dumps([LOST]))


def test_the_page_is_whole_and_alone(tmp_path: Path) -> None:
    """It is well formed, its ids are unique, and all it refers to is inside it."""
    session(tmp_path, means_us=MEANS, seconds=3)
    report(tmp_path)
    page = parsed(tmp_path)
    assert [] == page.open
    assert len(page.ids) == len(set(page.ids))
    assert page.references
    assert {reference.removeprefix("#") for reference in page.references} <= set(page.ids)
    assert not {"script", "link", "img", "iframe"} & set(page.seen)
    assert 2 == page.seen.count("svg")
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert "ours &amp; &lt;etcd&gt;" in text


def test_the_same_records_make_the_same_bytes(tmp_path: Path) -> None:
    """Another time, and under another user's settings of matplotlib."""
    session(tmp_path, means_us=MEANS, seconds=3)
    names = ("report.html", "results.json", "picture.png")
    made = []
    for style in ({}, {"font.size": 20, "lines.linewidth": 9}):
        with mpl.rc_context(style):  # type: ignore[arg-type]
            report(tmp_path)
            picture(tmp_path, tmp_path / names[2])
        made.append([(tmp_path / name).read_bytes() for name in names])
    assert made[0] == made[1]


def test_a_failure_is_shown_with_evidence_and_without_speed(tmp_path: Path) -> None:
    """With both targets failed no speed is in the page, in the results or in the summary."""
    session(tmp_path, means_us=MEANS, seconds=2)
    for target in MEANS:
        fail(tmp_path, target, 1)
    results = report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    body = re.sub(r"<style>.*?</style>", "", text[: text.index("<h2>Environment")], flags=re.DOTALL)
    body = body.replace("5 repetitions of 2 s, in turns", "")
    assert body.count("FAIL") >= 4
    assert "revision 17 of &lt;/pre&gt;&lt;script&gt;" in body
    assert "<svg" not in body
    for shown in (body, said(results)):
        of_servers = OF_GENERATOR.sub("", shown)
        assert not SPEED.search(of_servers), SPEED.search(of_servers)
    assert "revision 17" in said(results)
    assert "latency" not in json.dumps(results["targets"])


def test_the_speed_of_a_sound_target_stays(tmp_path: Path) -> None:
    """Where one fails the other keeps its figures, and its colour."""
    session(tmp_path, means_us=MEANS, seconds=2)
    report(tmp_path)
    before = (tmp_path / "report.html").read_text()
    fail(tmp_path, "ours", 0)
    results = report(tmp_path)
    after = (tmp_path / "report.html").read_text()
    assert SPEED.search(said(results))
    chart = after[after.index("<svg") : after.rindex("</svg>")]
    assert "stroke: var(--target-1)" in chart
    assert "stroke: var(--target-0)" not in chart
    assert "stroke: var(--target-0)" in before
    assert "ours / etcd: ours is FAIL" in after


def test_errors_against_none_are_a_difference(tmp_path: Path) -> None:
    """A ratio to nothing is shown everywhere, kept as JSON that others read, and drawn nowhere."""

    def broken(run: Run) -> None:
        for n in range(50):
            run.op(n * 1000, actor=7000 + n, outcome=Outcome.UNKNOWN, code=14)

    session(tmp_path, means_us=MEANS, seconds=2, changes={"ours": broken})
    results = report(tmp_path)
    (row,) = (row for row in results["comparisons"] if row["metric"] == "errors")
    assert (inf, "worse") == (row["ratio"], row["finding"])
    assert "Infinity" not in (tmp_path / "results.json").read_text()
    (tmp_path / "session.json").unlink()
    assert results == stored(tmp_path)
    for shown in ((tmp_path / "report.html").read_text(), said(results)):
        assert "\N{INFINITY} (\N{INFINITY} to \N{INFINITY})" in shown
    row["metric"] = "latency_p99_us"
    draw_picture(results, tmp_path / "picture.png")


def test_the_page_warns_of_many_figures(tmp_path: Path) -> None:
    """With so many intervals of 95 % some leave 1 out by chance; the page says how many."""
    session(tmp_path, means_us=MEANS, seconds=2)
    results = report(tmp_path)
    text = " ".join((tmp_path / "report.html").read_text().split())
    count = len(results["comparisons"])
    assert count > 20
    assert f"about {round(count * 0.05)} of them all ({count} ratios" in text


def test_too_few_runs_are_called_so(tmp_path: Path) -> None:
    """Ratios of three runs have no interval and no verdict."""
    session(tmp_path, means_us=MEANS, seconds=2, repetitions=3)
    results = report(tmp_path)
    for shown in ((tmp_path / "report.html").read_text(), said(results)):
        assert "too few (3)" in shown
        assert " to 0." not in shown
        assert "better" not in shown


def test_a_judge_that_looked_at_nothing_is_shown(tmp_path: Path) -> None:
    """It is neither ok nor FAIL."""
    session(tmp_path, means_us=MEANS, seconds=1)
    results = report(tmp_path)
    (line,) = (line for line in said(results).splitlines() if line.startswith("Resumable"))
    assert ["Resumable", *["not", "judged"] * 2] == line.split()


def test_lateness_that_may_be_the_generators_is_no_fail(tmp_path: Path) -> None:
    """It is shown as INVALID with its evidence."""

    def late(run: Run) -> None:
        for n in range(50):
            run.op(n * 1000, lag=20_000, latency=30_000, actor=9000 + n)

    slow = Verdict("Lag drains", 40, 1, ("a watch was 6 s behind",), timed=True)
    session(
        tmp_path,
        means_us={"ours": 2000},
        seconds=1,
        verdicts={"ours": [*GOOD, slow]},
        changes={"ours": late},
    )
    results = report(tmp_path)
    for shown in ((tmp_path / "report.html").read_text(), said(results)):
        assert "INVALID 5 of 200" in shown
        assert "run 0: a watch was 6 s behind" in shown
        assert "FAIL" not in shown


def test_names_that_look_like_markup_stay_as_they_are(tmp_path: Path) -> None:
    """A target and a judge in brackets are shown, not interpreted."""
    odd = {"[red]x[/blue]": [*GOOD, Verdict("[/b] judge", 1)]}
    session(tmp_path, means_us={"[red]x[/blue]": 1000}, seconds=1, verdicts=odd)
    text = said(report(tmp_path))
    assert "[red]x[/blue]" in text
    assert "[/b] judge" in text


def test_an_empty_session_has_a_page(tmp_path: Path) -> None:
    """Interrupted before its first run: INCOMPLETE, and nothing breaks."""
    session(tmp_path, means_us=MEANS, repetitions=0)
    results = report(tmp_path)
    assert [] == parsed(tmp_path).open
    assert "No judge has looked" in (tmp_path / "report.html").read_text()
    assert [] == results["comparisons"]


def test_the_picture_is_small(tmp_path: Path) -> None:
    """Below 200 KB, with and without figures to show."""
    session(tmp_path, means_us=MEANS, seconds=30)
    path = tmp_path / "picture.png"
    picture(tmp_path, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert 200_000 > path.stat().st_size
    for target in MEANS:
        fail(tmp_path, target, 0)
    picture(tmp_path, path)
