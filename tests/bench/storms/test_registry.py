"""How a user's words become a storm and its parameters."""

import random
from dataclasses import fields
from typing import Any

import pytest

from bench import storms
from bench.storms import idle_background

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
        ("xs", {"agents": "1.5"}, "agents=1.5: a whole number of 0 or more is wanted"),
        ("xs", {"agents": "-1"}, "a whole number of 0 or more is wanted"),
        ("xs", {"compaction_s": "nan"}, "compaction_s=nan: a number of 0 or more is wanted"),
    ],
)
def test_what_does_not_exist_is_answered_by_what_does(
    preset: str, changes: dict[str, str], told: str
) -> None:
    """A wrong preset, parameter or number is refused with what would be right."""
    with pytest.raises(ValueError, match=told):
        storms.parse_parameters(IDLE, preset, changes)


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
