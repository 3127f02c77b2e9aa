"""What every storm's plan is: complete in itself, and of a size that a small machine can carry."""

import random
from collections import Counter

import pytest

from bench import storms
from bench.plan import BOUND, Plan, Verb

DURATION_US = 30_000_000


@pytest.fixture(scope="module", params=list(storms.STORMS))
def plan(request: pytest.FixtureRequest) -> Plan:
    """The one of xs."""
    storm = storms.find(request.param)
    made: Plan = storm.schedule(storm.PRESETS["xs"], DURATION_US, random.Random(5))
    return made


@pytest.mark.slow
def test_objects_are_made_once_and_before_they_are_changed(plan: Plan) -> None:
    """No key is created twice, none is changed that nobody made."""
    steps = [step for actor in plan.actors for step in actor.steps if BOUND not in step.key]
    made = Counter(each.key for each in plan.preload)
    made.update(step.key for step in steps if step.verb == Verb.CREATE)
    assert {1} == set(made.values())
    changed = {step.key for step in steps if step.verb in {Verb.UPDATE, Verb.DELETE}}
    taken = {key for actor in plan.actors for step in actor.steps for key in step.candidates}
    assert made.keys() >= changed | taken


@pytest.mark.slow
def test_actors_have_names_of_their_own_and_work_in_time(plan: Plan) -> None:
    """Evidence names one actor; absolute times of its steps ascend and lie within the load."""
    assert len({actor.name for actor in plan.actors}) == len(plan.actors)
    for actor in plan.actors:
        due = [step.due_us for step in actor.steps if step.due_us >= 0]
        assert sorted(due) == due
        assert actor.steps[0].due_us == due[0]
        assert due[-1] < DURATION_US


@pytest.mark.slow
def test_a_small_machine_can_carry_it(plan: Plan) -> None:
    """At xs no plan asks for more than 1,300 calls a second, bursts apart."""
    assert plan.steps / (DURATION_US / 1e6) < 1_300
    assert plan.warm_up_us <= DURATION_US // 5
