"""How a user's words become a storm and its parameters."""

import random
from dataclasses import fields
from typing import Any

import pytest

from bench import storms
from bench.storms import idle_background
from bench.storms.registry import BOUNDS

IDLE = storms.find("idle-background")


def test_every_storm_has_all_presets() -> None:
    """Every storm has xs, s, m and l, and a line that tells what it does."""
    for storm in storms.STORMS.values():
        assert list(storm.PRESETS) == ["xs", "s", "m", "l"]
        assert storm.SUMMARY


@pytest.mark.slow
@pytest.mark.parametrize("name", storms.STORMS)
def test_one_seed_is_one_plan(name: str) -> None:
    """A plan depends on its seed, on nothing else, and not on the order of anything unordered."""
    storm: storms.Storm[Any] = storms.find(name)
    parameters = storms.parse_parameters(storm, "xs", {})
    first, again, other = (
        storm.schedule(parameters, 6_000_000, random.Random(seed)).fingerprint()
        for seed in (7, 7, 8)
    )
    assert first == again != other


def test_a_changed_number_is_taken() -> None:
    """Numbers replace those of the preset, each as its kind."""
    changed = storms.parse_parameters(IDLE, "s", {"agents": "90", "compaction_s": "2.5"})
    assert idle_background.Parameters(agents=90, compaction_s=2.5) == changed


@pytest.mark.parametrize(
    ("preset", "changes", "told"),
    [
        ("xxl", {}, "there are xs, s, m, l"),
        ("xs", {"speed": "1"}, "there are agents, apiservers, compaction_s"),
        ("xs", {"agents": "1.5"}, "agents=1.5: a whole number of 1 to 500,000 is wanted"),
        ("xs", {"agents": "-1"}, "a whole number of 1 to 500,000 is wanted"),
        ("xs", {"compaction_s": "nan"}, "compaction_s=nan: a number of 0 to 86,400 is wanted"),
    ],
)
def test_what_does_not_exist_is_answered_by_what_does(
    preset: str, changes: dict[str, str], told: str
) -> None:
    """A wrong preset, parameter or number is refused with what would be right."""
    with pytest.raises(ValueError, match=told):
        storms.parse_parameters(IDLE, preset, changes)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("swarm-burst", "claims=100000000", "a whole number of 1 to 100,000 is wanted"),
        ("swarm-burst", "claims=0", "a whole number of 1 to 100,000 is wanted"),
        ("swarm-burst", "racing=7", "a number of 0 to 1 is wanted"),
        ("apiserver-restart", "stale=101", "a whole number of 0 to 100 is wanted"),
        ("event-ttl", "events_per_second=inf", "a number of 0.1 to 50,000 is wanted"),
        ("compact-churn", "compaction_s=0", "a number of 0.1 to 86,400 is wanted"),
    ],
)
def test_what_no_plan_can_be_made_of_is_refused(name: str, change: str, told: str) -> None:
    """More than memory holds, a share above all, and a storm without work are one line each."""
    parameter, _, text = change.partition("=")
    with pytest.raises(ValueError, match=f"^{change}: {told}$"):
        storms.parse_parameters(storms.find(name), "xs", {parameter: text})


@pytest.mark.parametrize("name", storms.STORMS)
def test_every_parameter_has_bounds(name: str) -> None:
    """All presets lie within them, and both ends are taken; no bound is of nothing."""
    storm: storms.Storm[Any] = storms.find(name)
    for preset in storm.PRESETS:
        for field in fields(storm.PRESETS[preset]):
            least, most = storms.bounds(storm, field.name)
            assert least <= getattr(storm.PRESETS[preset], field.name) <= most
            for end in (least, most):
                storms.parse_parameters(storm, preset, {field.name: f"{end:.10g}"})
    known = {
        f"{storm.NAME} {field.name}"
        for storm in storms.STORMS.values()
        for field in fields(storm.PRESETS["xs"])
    }
    assert {each for each in BOUNDS if " " in each} <= known
    assert {each for each in BOUNDS if " " not in each} <= {each.split()[1] for each in known}


def most(storm: storms.Storm[Any], names: list[str]) -> dict[str, str]:
    """These parameters at their upper bounds."""
    return {name: f"{storms.bounds(storm, name).most:g}" for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swarm-burst", "tool-fanout", "heartbeat-flood", "event-ttl"])
def test_a_share_of_all_is_a_plan(name: str) -> None:
    """Every share at its upper bound, alone or with the others, gives a plan."""
    storm: storms.Storm[Any] = storms.find(name)
    names = [field.name for field in fields(storm.PRESETS["xs"])]
    shares = [each for each in names if storms.bounds(storm, each).most <= 1]
    assert shares
    for chosen in [[each] for each in shares] + [shares]:
        parameters = storms.parse_parameters(storm, "xs", most(storm, chosen))
        assert storm.schedule(parameters, 3_000_000, random.Random(1)).steps


@pytest.mark.slow
@pytest.mark.parametrize("name", storms.STORMS)
def test_nothing_of_something_is_a_plan_or_refused(name: str) -> None:
    """Every parameter at 0, or at the least that is taken, gives a plan that ends."""
    storm: storms.Storm[Any] = storms.find(name)
    refused = 0
    for parameter in (field.name for field in fields(storm.PRESETS["xs"])):
        try:
            parameters = storms.parse_parameters(storm, "xs", {parameter: "0"})
        except ValueError as error:
            refused += 1
            least = str(error).partition(" of ")[2].split()[0]
            parameters = storms.parse_parameters(storm, "xs", {parameter: least})
        assert storm.schedule(parameters, 3_000_000, random.Random(1)).apiservers > 0
    assert refused


def test_unknown_storm_is_answered_by_those_that_exist() -> None:
    """A wrong name of a storm is refused with all names."""
    with pytest.raises(ValueError, match="no storm 'calm'; there are idle-background"):
        storms.find("calm")
