"""Two stored sessions: how a target does today against how it did then.

Ratios inside one session compare servers that took turns on one machine; across sessions nothing
took turns. So the machines must be the same by their capsules and the plans by their fingerprints,
or the comparison is refused; whoever insists is told, beside every figure, what differs. That goes
for the speed of the disk and of the loopback, too, which is no less a difference than a kernel's.
Which versions are compared stands above all of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.capsule import DRIFT_PERCENT_MAX, differences, drift
from bench.report.metrics import shown
from bench.report.page import versions
from bench.report.results import (
    Comparison,
    Measures,
    Results,
    compared,
    has_speed,
    same_durability,
    stored,
)


class UnequalSessionsError(Exception):
    """The sessions differ in what timings depend on; its arguments say in what, one line each."""


@dataclass(frozen=True, slots=True)
class Sessions:
    """The second session against the first."""

    rows: list[Comparison]
    """Of each target that both have; ``against`` is the same target in the first."""
    remarks: list[str]
    """What differs, and which targets are left out, with the reason."""
    about: list[str]
    """Versions, commits and the speed of the machine, of both sessions."""


def compare(
    first: Path, second: Path, *, force: bool = False, measures: Measures | None = None
) -> Sessions:
    """Ratios of the second session to the first, for every target that both have.

    Raises ``UnequalSessionsError`` if they must not be compared, unless ``force`` is given.
    """
    one, other = stored(first, measures), stored(second, measures)
    unequal = list(_unequal(one, other))
    if unequal and not force:
        raise UnequalSessionsError(*unequal)
    remarks = list(unequal)
    rows: list[Comparison] = []
    others = {target["name"]: target for target in other["targets"]}
    for then in one["targets"]:
        name = then["name"]
        now = others.pop(name, None)
        if now is None:
            remarks.append(f"{name} is in the first session only")
        elif not (has_speed(then) and has_speed(now)):
            remarks.append(f"{name} is {then['state']} in the first, {now['state']} in the second")
        else:
            rows += compared(now, then, other["session"]["seed"])
    remarks += [f"{name} is in the second session only" for name in others]
    return Sessions(rows, remarks, list(_about(one, other)))


def _about(one: Results, other: Results) -> Iterator[str]:
    """What whoever compares wants to see first, the same or not."""
    others = {target["name"]: target for target in other["targets"]}
    for then in one["targets"]:
        if now := others.get(then["name"]):
            yield _sides(then["name"], versions(one, then), versions(other, now))
    before = (one["session"]["before"], other["session"]["before"])
    yield _sides("commit", *(capsule["commit"] or "unknown" for capsule in before))
    yield _sides("fsync", *(shown("_us", capsule["fsync_p50_us"]) for capsule in before))
    yield _sides("loopback", *(shown("_us", capsule["loopback_p50_us"]) for capsule in before))


def _sides(name: str, then: str, now: str) -> str:
    both = f"{then} in both" if then == now else f"{then} in the first, {now} in the second"
    return f"{name}: {both}"


def _unequal(one: Results, other: Results) -> Iterator[str]:
    before = (one["session"]["before"], other["session"]["before"])
    yield from differences(*before)
    for name, percent in drift(*before).items():
        if percent > DRIFT_PERCENT_MAX:
            limit = f"{DRIFT_PERCENT_MAX:.0f} % is allowed"
            yield f"{name} differs by {percent:.0f} % between the sessions, {limit}"
    prints = [results["session"]["fingerprint"] for results in (one, other)]
    if prints[0] != prints[1]:
        yield f"fingerprint: {prints[0][:12]} against {prints[1][:12]}"
    elif one["session"]["parameters"] != other["session"]["parameters"]:  # a replay's speed
        yield f"{one['session']['parameters']} against {other['session']['parameters']}"
    others = {target["name"]: target for target in other["targets"]}
    for then in one["targets"]:
        now = others.get(then["name"])
        if now is None:
            continue
        if then["client"] != now["client"]:
            yield f"client of {then['name']}: {then['client']} against {now['client']}"
        if not same_durability(then, now):
            told = f"{then['durability']} against {now['durability']}"
            yield f"durability of {then['name']}: {told}"
