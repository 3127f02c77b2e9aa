"""The search for the highest rate that a target holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.report.results import Results, Target
from bench.run.capacity import Capacity, Finding, Gates, judge, search, with_rate
from bench.storms import find, parse_parameters


def cliff_at(limit: float, probes: list[float]) -> Capacity:
    """Search a server that holds everything up to ``limit``."""

    def probe(scale: float) -> Finding:
        probes.append(scale)
        return Finding.HOLDS if scale <= limit else Finding.MISSES

    return search(probe, 1.0)


@pytest.mark.parametrize("limit", [0.03, 0.7, 1.0, 5.3, 100.0])
def test_the_cliff_is_found_within_a_tenth(limit: float) -> None:
    """What holds and what does not are a tenth apart, with the limit in between."""
    probes: list[float] = []
    found = cliff_at(limit, probes)
    assert found.holds <= limit < found.misses <= found.holds * 1.1
    assert not found.bounded
    assert len(probes) < 16


def test_a_server_that_holds_nothing_has_no_capacity() -> None:
    """The search ends, and says 0."""
    assert cliff_at(0, []).holds == 0


def test_a_server_that_holds_everything_gives_a_lower_bound() -> None:
    """The search ends, and says that it has not found the cliff."""
    found = cliff_at(1e9, [])
    assert found.bounded
    assert found.misses == 0


@pytest.mark.parametrize("first", [10.0, 100.0])
def test_a_late_generator_gives_a_lower_bound(first: float) -> None:
    """The search goes on below a probe that says nothing about the server, and says so."""
    found = search(lambda rate: Finding.HOLDS if rate < 30 else Finding.UNKNOWN, first)
    assert found.holds < 30 <= found.misses <= found.holds * 1.1
    assert found.bounded


def test_a_cliff_below_a_late_generator_is_the_servers() -> None:
    """What was found between is no lower bound, though the generator was late above it."""
    limits = ((20, Finding.HOLDS), (40, Finding.MISSES), (1e9, Finding.UNKNOWN))
    found = search(lambda rate: next(what for limit, what in limits if rate < limit), 64.0)
    assert found.holds < 20 <= found.misses < 40
    assert not found.bounded


def test_a_generator_that_is_always_late_says_nothing() -> None:
    """Nothing was held, and nothing is the server's fault."""
    found = search(lambda _: Finding.UNKNOWN, 4)
    assert (found.holds, found.bounded) == (0, True)


@given(first=st.integers(1, 40), limit=st.integers(0, 12_000))
def test_a_count_is_found_to_the_last(first: int, limit: int) -> None:
    """Only whole numbers are probed, none twice, and neighbours end the search."""
    probes: list[float] = []

    def probe(rate: float) -> Finding:
        probes.append(rate)
        return Finding.HOLDS if rate <= limit else Finding.MISSES

    found = search(probe, first)
    assert all(isinstance(rate, int) and rate > 0 for rate in probes)
    assert len(probes) == len(set(probes))
    assert found.holds in (0, *probes)
    if found.bounded:
        assert limit >= found.holds >= first * 256
    else:
        assert found.holds <= limit < found.misses <= max(found.holds * 1.1, found.holds + 1)


def test_the_rate_is_changed_and_nothing_else() -> None:
    """The storm's own rate is what is searched."""
    storm = find("swarm-burst")
    parameters = parse_parameters(storm, "xs", {})
    changed = with_rate(storm, parameters, 125)
    assert changed == parse_parameters(storm, "xs", {"claims": "125"})


def results(state: str, **medians: float) -> Results:
    """Results of one target, as far as the search looks at them."""
    target = Target(
        name="t",
        version="",
        command="",
        durability="",
        client="lean",
        state=state,
        reasons=[state],
        judges=[],
        runs=[],
        medians=medians,
        curve=[],
        window_us=0,
        course={},
    )
    return {"targets": [target]}  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("state", "medians", "finding"),
    [
        ("PASS", {"errors": 0, "latency_p99_us": 19_000, "watch_lag_p99_us": 1}, Finding.HOLDS),
        ("PASS", {"errors": 0, "latency_p99_us": 21_000, "watch_lag_p99_us": 1}, Finding.MISSES),
        ("PASS", {"errors": 0, "latency_p99_us": 1, "watch_lag_p99_us": 51_000}, Finding.MISSES),
        ("PASS", {"errors": 1, "latency_p99_us": 1, "watch_lag_p99_us": 1}, Finding.MISSES),
        ("FAIL", {}, Finding.MISSES),
        ("INVALID", {}, Finding.UNKNOWN),
        ("NOT JUDGED", {}, Finding.UNKNOWN),
    ],
)
def test_a_probe_holds_only_within_all_gates(
    state: str, medians: dict[str, float], finding: Finding
) -> None:
    """Errors, latency, watch lag and verdicts each count; an invalid run counts for nothing."""
    assert judge(results(state, **medians), Gates())[0] is finding
