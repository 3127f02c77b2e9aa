"""Why the figures of a session are not to be believed, and what can be done about it.

Doubts are about the generator in one run (it was late, or short of CPU), about the machine over the
whole session, or about what judges could see. Each kind has its advice, which is given once however
many runs it is about. What the machine did is kept as it was measured, because a reason that speaks
of a difference is not understood without the two sides of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from statistics import geometric_mean
from typing import TypedDict

from bench.capsule import DRIFT_PERCENT_MAX, UNEQUAL_PERCENT_MAX, unequal
from bench.punctuality import GENERATOR_CPU_MAX, SEND_LAG_P99_US_MAX
from bench.records import Facts

GENERATOR = ("send_lag_p50_us", "send_lag_p99_us", "generator_cores_max")
"""Figures of the generator itself, which are no server's and never hidden."""


class Doubt(Enum):
    """What is wrong; its value is what to do about it."""

    LATE = (
        "The generator was late: stop other programs, let it run in real time (root or "
        "CAP_SYS_NICE), ask for less per second (--set), or use fewer --processes on few cores."
    )
    LATE_REPLAY = (
        "The generator was late: stop other programs, or replay at a lower --speed; a trace's "
        "pace may be more than one process can send."
    )
    BUSY = (
        "The generator used up its core: ask for less per second (--set), or share the work "
        "(--processes, at most one for each apiserver of the plan)."
    )
    EMPTY = "Nothing was due after the warm-up: let the load last longer (--seconds)."
    UNEVEN = (
        "The machine was not the same for all targets: stop other programs and run again; more "
        "repetitions (--reps) even its changes out, and so do longer ones of a storm (--seconds)."
    )
    DRIFTED = (
        "The machine changed meanwhile: stop other programs and run again; with a second target in "
        "the session (--start) changes cancel out, as the two take turns."
    )
    UNCOUNTED = (
        "An older version wrote these records and did not count their rows: whether all are still "
        "there could not be checked."
    )
    UNSEEN = "A run counts as judged when its watches showed something: see what judges lacked."


class Speed(TypedDict):
    """What one micro-benchmark said before the runs, when no server was there."""

    name: str
    """``fsync``: a synced write of a page; ``loopback``: a byte there and back."""
    means_us: dict[str, float]
    """Geometric mean over the runs of each target."""
    unequal_percent: float
    """Between the slowest of them and the fastest."""


def speeds(facts: Mapping[str, Sequence[Facts]]) -> list[Speed]:
    """The machine before the runs of each target; nothing where it was not measured for all."""
    before = {
        "fsync": {name: [run["fsync_us"] for run in runs] for name, runs in facts.items()},
        "loopback": {name: [run["loopback_us"] for run in runs] for name, runs in facts.items()},
    }
    return [
        Speed(
            name=name,
            means_us={target: geometric_mean(each) for target, each in measured.items()},
            unequal_percent=unequal(list(measured.values())),
        )
        for name, measured in before.items()
        if measured and all(each and min(each) > 0 for each in measured.values())
    ]


def unsteady(
    measured: Sequence[Speed], changed: Mapping[str, float], *, alone: bool
) -> Iterator[str]:
    """What speaks against the machine: how it treated targets that took turns, or, if there was
    one ``alone``, by how many per cent it ``changed`` from before the session to after it.
    """
    if alone:
        for name, percent in changed.items():
            if percent > DRIFT_PERCENT_MAX:
                limit = f"{DRIFT_PERCENT_MAX:.0f} % is allowed"
                yield f"{name} changed by {percent:.0f} % meanwhile, {limit}"
        return
    for speed in measured:
        percent = speed["unequal_percent"]
        if percent > UNEQUAL_PERCENT_MAX:
            limit = f"{UNEQUAL_PERCENT_MAX:.0f} % is allowed"
            yield f"{speed['name']} differed by {percent:.0f} % between the targets' runs, {limit}"


def of_generator(values: Mapping[str, float], *, replayed: bool) -> Iterator[Doubt]:
    """What is wrong with the generator in a run with these figures."""
    if not values["operations"]:
        yield Doubt.EMPTY
    if values.get("send_lag_p99_us", 0) > SEND_LAG_P99_US_MAX:
        yield Doubt.LATE_REPLAY if replayed else Doubt.LATE
    if values.get("generator_cores_max", 0) > GENERATOR_CPU_MAX:
        yield Doubt.LATE_REPLAY if replayed else Doubt.BUSY
