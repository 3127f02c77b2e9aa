"""Charts of results: as vectors inside the page, and as one picture.

A target has one colour everywhere, by its place in the session. In the page colours are variables
of its style sheet, so that a chart follows light and dark; matplotlib cannot draw those, so it is
given stand-ins that no chart contains otherwise, and each is replaced in its output.
That output is cleaned of what only a file of its own needs, and what it names is given the chart's
name in front, because a page has one space of names for all its charts.
Same results, same bytes: matplotlib draws its names from a salt, which is fixed here.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.clock import MICROSECONDS
from bench.report.metrics import metric
from bench.report.results import Comparison, Results, Target, has_speed

PANELS = (
    ("rate_per_second", "rate", 1.0, "/s"),
    ("latency_p99_us", "latency p99", 1e-3, "ms"),
    ("watch_lag_p99_us", "watch lag p99", 1e-3, "ms"),
    ("server_cores", "server CPU", 1.0, "cores"),
    ("server_rss_bytes", "server memory", 1 / (1 << 20), "MiB"),
)
"""Time series, top to bottom: the figure, its title, and the scale and unit of its axis."""
HEADLINES = (
    "latency_p50_us",
    "latency_p99_us",
    "service_p99_us",
    "watch_lag_p99_us",
    "server_cpu_per_operation_us",
    "written_per_write_bytes",
    "server_rss_max_bytes",
)
"""Ratios in the picture."""
FAR = 1e6
"""Ratios beyond it, either way, end at the edge of the picture."""
SALT = "kvstore-bench"
BAND_ALPHA = 0.16
WIDTH = 8.6
"""Inches of a chart in the page, at 72 units each."""
PICTURE_DPI = 110


class Palette(NamedTuple):
    """Colours of one medium."""

    ink: str
    muted: str
    grid: str
    paper: str
    targets: tuple[str, ...]


LIGHT = Palette("#1c2127", "#5f6b76", "#e3e7eb", "#ffffff", ("#1f6fb4", "#c8641b", "#2f8f5b"))
DARK = Palette("#e6e9ec", "#98a3ad", "#30373d", "#14181b", ("#62aaea", "#f0965a", "#63c08c"))
STAND_INS = Palette("#000001", "#000002", "#000003", "#000004", ("#000011", "#000012", "#000013"))
VARIABLES = {
    **{getattr(STAND_INS, name): f"var(--{name})" for name in ("ink", "muted", "grid", "paper")},
    **{color: f"var(--target-{n})" for n, color in enumerate(STAND_INS.targets)},
}


def percentile_chart(results: Results) -> str:
    """Latency by percentile of every target whose speed may be shown; empty if there is none."""
    targets = _with_speed(results)
    if not any(target["curve"] for _, target in targets):
        return ""
    with _settings():
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        _percentiles(figure.subplots(), targets, STAND_INS)
        return _svg(figure, "percentiles")


def course_chart(results: Results) -> str:
    """The load over time: the median run of each target as a line, its runs as a band."""
    targets = _with_speed(results)
    panels = [panel for panel in PANELS if any(_is_known(t, panel[0]) for _, t in targets)]
    if not panels:
        return ""
    with _settings():
        figure = Figure(figsize=(WIDTH, 0.5 + 1.45 * len(panels)), layout="constrained")
        all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
        for axes, panel in zip(all_axes[:, 0], panels, strict=True):
            _course(axes, targets, panel, STAND_INS)
        _legend(all_axes[0, 0])
        all_axes[-1, 0].set_xlabel("seconds of load", color=STAND_INS.muted)
        return _svg(figure, "course")


def draw_picture(results: Results, path: Path) -> None:
    """One PNG for a README: ratios, percentiles, and latency over time."""
    targets, colors = _with_speed(results), LIGHT
    session = results["session"]
    names = " and ".join(target["name"] for target in results["targets"])
    states = ", ".join(f"{target['name']} {target['state']}" for target in results["targets"])
    with _settings():
        figure = Figure(figsize=(10, 6.2), layout="constrained", facecolor=colors.paper)
        title = f"{session['storm']} {session['preset']} on {names}: {states}"
        figure.suptitle(
            f"{title}\n", x=0.01, ha="left", color=colors.ink, fontsize=13, weight="bold"
        )
        grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1])
        rows = [
            row
            for row in results["comparisons"]
            if row["metric"] in HEADLINES and 0 < row["ratio"] < inf
        ]
        if rows:
            _ratios(figure.add_subplot(grid[0, 0]), rows, results, colors)
        place = grid[0, 1] if rows else grid[0, :]
        _percentiles(figure.add_subplot(place), targets, colors)
        for column, panel in enumerate((PANELS[1], PANELS[3])):
            axes = figure.add_subplot(grid[1, column])
            _course(axes, targets, panel, colors)
            axes.set_xlabel("seconds of load", color=colors.muted)
        figure.savefig(path, format="png", dpi=PICTURE_DPI, metadata={"Software": None})


def _with_speed(results: Results) -> list[tuple[int, Target]]:
    """Targets that may be drawn, with their places, which are their colours."""
    return [(n, target) for n, target in enumerate(results["targets"]) if has_speed(target)]


def _color(palette: Palette, place: int) -> str:
    return palette.targets[place % len(palette.targets)]


def _percentiles(axes: Axes, targets: Sequence[tuple[int, Target]], palette: Palette) -> None:
    for place, target in targets:
        nines = [point[0] for point in target["curve"]]
        times = [max(1.0, point[1]) / 1000 for point in target["curve"]]
        color = _color(palette, place)
        axes.plot(nines, times, color=color, linewidth=1.8, label=target["name"])
    _legend(axes)
    _frame(axes, palette, "latency by percentile", "ms")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    most = max((t["curve"][-1][0] for _, t in targets if t["curve"]), default=1.0)
    ticks = [(0.30103, "50"), (1.0, "90"), (2.0, "99"), (3.0, "99.9")]
    ticks += [(4.0, "99.99"), (5.0, "99.999"), (6.0, "99.9999")]
    kept = [tick for tick in ticks if tick[0] <= most + 0.01]
    axes.set_xticks([at for at, _ in kept], [f"{label} %" for _, label in kept])
    axes.set_xlim(0, most)


def _course(
    axes: Axes,
    targets: Sequence[tuple[int, Target]],
    panel: tuple[str, str, float, str],
    palette: Palette,
) -> None:
    figure, title, scale, unit = panel
    longest = 0.0
    for place, target in targets:
        if not _is_known(target, figure):
            continue
        course, color = target["course"][figure], _color(palette, place)
        width = target["window_us"] / MICROSECONDS
        seconds = [(n + 0.5) * width for n in range(len(course["middle"]))]
        longest = max(longest, len(seconds) * width)
        low, middle, high = (
            [float("nan") if value is None else value * scale for value in values]
            for values in (course["low"], course["middle"], course["high"])
        )
        axes.fill_between(seconds, low, high, color=color, alpha=BAND_ALPHA, linewidth=0)
        axes.plot(seconds, middle, color=color, linewidth=1.5, label=target["name"])
    _frame(axes, palette, title, unit)
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, longest or 1)


def _ratios(axes: Axes, rows: Sequence[Comparison], results: Results, palette: Palette) -> None:
    """Dots and intervals on a logarithmic axis: half and double are equally far from one."""
    places = {target["name"]: n for n, target in enumerate(results["targets"])}
    labels = []
    for n, row in enumerate(reversed(rows)):
        color = _color(palette, places[row["target"]])
        if row["low"] is not None and row["high"] is not None:
            low, high = max(row["low"], 1 / FAR), min(row["high"], FAR)
            axes.plot([low, high], [n, n], color=color, linewidth=3, alpha=0.45)
        axes.plot([row["ratio"]], [n], "o", color=color, markersize=6)
        against = f" / {row['against']}" if len(places) > 2 else ""
        labels.append(f"{metric(row['metric']).label}{against}")
    pair = f"{rows[0]['target']} / {rows[0]['against'] if len(places) == 2 else 'others'}"
    _frame(axes, palette, f"{pair}, below 1 is better; bars are 95 % intervals", "")
    axes.set_xscale("log")
    known = (e for row in rows for e in (row["ratio"], row["low"], row["high"]) if e is not None)
    ends = [end for end in known if 1 / FAR < end < FAR]
    low, high = min(*ends, 0.8) / 1.15, max(*ends, 1.25) * 1.15
    axes.set_xlim(low, high)
    steps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.33, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
    kept = [step for step in steps if low <= step <= high]
    axes.set_xticks(kept, [f"{step:g}" for step in kept])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(labels)), labels, color=palette.ink)
    axes.axvline(1, color=palette.muted, linewidth=1)


def _frame(axes: Axes, palette: Palette, title: str, unit: str) -> None:
    """Axes without what carries no information."""
    axes.set_facecolor("none")
    named = f"{title}, {unit}" if unit else title
    axes.set_title(named, loc="left", fontsize=10, color=palette.ink)
    axes.grid(visible=True, color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=palette.muted)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(palette.muted)


def _legend(axes: Axes) -> None:
    """Names in the colours of their lines, above the axes, where no line passes."""
    lines = axes.get_legend_handles_labels()[0]
    if lines:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=len(lines),
            frameon=False,
            labelcolor="linecolor",
            borderpad=0,
            fontsize=10,
        )


def _is_known(target: Target, figure: str) -> bool:
    course = target["course"].get(figure)
    return course is not None and any(value is not None for value in course["middle"])


@contextmanager
def _settings() -> Iterator[None]:
    """Matplotlib as it is by itself, whatever this machine's user has configured, and ours."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams["font.family"] = "DejaVu Sans"
        mpl.rcParams["svg.fonttype"] = "none"
        mpl.rcParams["svg.hashsalt"] = SALT
        yield


def _svg(figure: Figure, name: str) -> str:
    written = io.StringIO()
    figure.patch.set_visible(False)
    figure.savefig(written, format="svg")
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    head, _, rest = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    for color, variable in VARIABLES.items():
        rest = rest.replace(color, variable)
    rest = rest.replace("xlink:href", "href")
    rest = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", rest)
    rest = re.sub(r"\n\s*", "\n", rest)
    return f'<svg class="chart" role="img" aria-label="{name}" {box[0]}>{rest}'.strip()
