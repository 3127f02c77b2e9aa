"""What figures are called, which way is better, and how they are written for a reader.

A figure's name ends in its unit. One of a single class of operations has the class behind a slash:
``latency_p99_us/role claim.assign``. Names that are not known here are a storm's own measures.
"""

from enum import IntEnum
from math import isfinite
from typing import NamedTuple


class Better(IntEnum):
    """Which way a figure is better."""

    LOWER = 0
    HIGHER = 1
    NEITHER = 2
    """It describes the load or the generator."""


class Metric(NamedTuple):
    """How a figure is presented."""

    label: str
    better: Better = Better.LOWER


METRICS = {
    "latency_p50_us": Metric("latency p50"),
    "latency_p90_us": Metric("latency p90"),
    "latency_p99_us": Metric("latency p99"),
    "latency_p999_us": Metric("latency p99.9"),
    "call_latency_p50_us": Metric("latency of a call p50"),
    "call_latency_p99_us": Metric("latency of a call p99"),
    "service_p50_us": Metric("service time of a call p50"),
    "service_p99_us": Metric("service time of a call p99"),
    "watch_lag_p50_us": Metric("watch lag p50"),
    "watch_lag_p99_us": Metric("watch lag p99"),
    "watch_lag_after_answer_p99_us": Metric("watch lag after the answer p99"),
    "watcher_lag_p99_us": Metric("watch lag without cache p99"),
    "rate_per_second": Metric("successful operations", Better.HIGHER),
    "errors": Metric("failed calls and unsent steps"),
    "operations_lost": Metric("operations lost to others"),
    "conflicts_per_success": Metric("conflicts per success"),
    "calls_per_success": Metric("calls per success"),
    "server_cpu_per_operation_us": Metric("server CPU per operation"),
    "server_cpu_per_call_us": Metric("server CPU per call"),
    "server_cpu_per_event_us": Metric("server CPU per event"),
    "written_per_write_bytes": Metric("written to disk per write"),
    "server_rss_max_bytes": Metric("server memory, highest"),
    "server_rss_end_bytes": Metric("server memory at the end"),
    "disk_end_bytes": Metric("disk at the end"),
    "kill_outage_max_us": Metric("unanswered after a kill, longest"),
    "operations": Metric("operations", Better.NEITHER),
    "calls": Metric("calls", Better.NEITHER),
    "send_lag_p50_us": Metric("send lag p50", Better.NEITHER),
    "send_lag_p99_us": Metric("send lag p99", Better.NEITHER),
    "generator_cores_max": Metric("generator CPU, busiest process", Better.NEITHER),
}
"""In the order of tables."""
SHOWN_OF_CLASSES = ("latency_p50_us", "latency_p99_us", "service_p99_us")
"""Figures that every class has, where it has enough operations or calls."""
UNNAMED = frozenset(
    {
        *("conflicts", "refusals", "server_cores", "watcher_lag_p50_us"),
        *(f"{name}_{p}_us" for name in ("watch_lag", "watcher_lag") for p in ("p90", "p999")),
        *(f"watch_lag_after_answer_{p}_us" for p in ("p50", "p90", "p999")),
        *("call_latency_p90_us", "call_latency_p999_us"),
        *("service_p90_us", "service_p999_us", "send_lag_p90_us", "send_lag_p999_us"),
    }
)
"""Figures that are kept in results and stand in no table."""
_UNITS = ("_us", "_bytes", "_per_second", "_cores_max", "_cores")


def metric(name: str) -> Metric:
    """How the figure ``name`` is presented."""
    known = METRICS.get(name)
    if known is not None:
        return known
    figure, _, of = name.partition("/")
    if of:
        return Metric(f"{of}: {metric(figure).label}", metric(figure).better)
    return Metric(name.removesuffix(_unit(name)).replace("_", " "))


def in_order(names: set[str]) -> list[str]:
    """The figures of the summary table: known ones, then the storm's own measures by name."""
    measures = sorted(n for n in names - METRICS.keys() - UNNAMED if "/" not in n)
    return [name for name in METRICS if name in names] + measures


def of_classes(names: set[str]) -> list[str]:
    """Latencies of classes of operations and calls, by class."""
    return sorted(
        (name for name in names if "/" in name and not name.startswith("count/")),
        key=lambda name: (name.partition("/")[2], name),
    )


def shown(name: str, value: float) -> str:
    """A value with its unit, in three or four digits."""
    unit = _unit(name.partition("/")[0])
    if unit == "_us":
        return _microseconds(value)
    if unit == "_bytes":
        return _bytes(value)
    if unit == "_per_second":
        return f"{_number(value)}/s"
    if unit.startswith("_cores"):
        return f"{value:.0%} of a core"
    return _number(value)


def shown_ratio(ratio: float) -> str:
    """How many times one figure is another."""
    return f"{ratio:.2f}" if isfinite(ratio) else "\N{INFINITY}"


def _unit(name: str) -> str:
    return next((unit for unit in _UNITS if name.endswith(unit)), "")


def _microseconds(value: float) -> str:
    for size, unit in ((1_000_000, "s"), (1_000, "ms")):
        if abs(value) >= size:
            return f"{_number(value / size)} {unit}"
    return f"{_number(value)} us"


def _bytes(value: float) -> str:
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(value) >= size:
            return f"{_number(value / size)} {unit}"
    return f"{_number(value)} B"


def _number(value: float) -> str:
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"
