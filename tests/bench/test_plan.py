"""Plans: one fingerprint for one plan, and two plans beside each other."""

import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.plan import (
    Actor,
    Disturbance,
    Edit,
    Object,
    Plan,
    Start,
    Step,
    Trouble,
    Verb,
    Watcher,
)

TEXT = st.text("ab ", max_size=3)
KEYS = st.binary(max_size=3)
SMALL = st.integers(-1, 3)
STEPS = st.builds(
    Step,
    verb=st.sampled_from(Verb),
    key=KEYS,
    role=TEXT,
    due_us=SMALL,
    think_us=SMALL,
    edit=st.sampled_from(Edit),
    size=SMALL,
    candidates=st.lists(KEYS, max_size=2).map(tuple),
    owner=TEXT,
    refusal=SMALL,
)
PLANS = st.builds(
    Plan,
    duration_us=SMALL,
    apiservers=st.just(2),
    resources=st.lists(KEYS, max_size=2).map(tuple),
    preload=st.lists(st.builds(Object, KEYS, TEXT, SMALL, TEXT), max_size=2).map(tuple),
    actors=st.lists(
        st.builds(Actor, TEXT, st.integers(0, 1), st.lists(STEPS, max_size=2).map(tuple)),
        max_size=2,
    ).map(tuple),
    watchers=st.lists(st.builds(Watcher, TEXT, KEYS), max_size=2).map(tuple),
)
PLAN = Plan(
    duration_us=10,
    warm_up_us=1,
    apiservers=2,
    resources=(b"/registry/pods/",),
    preload=(Object(b"/registry/pods/a", "pod", 100),),
    actors=(Actor("one", 0, (Step(Verb.CREATE, b"k", "r"), Step(Verb.UPDATE, b"k", "r"))),),
    watchers=(Watcher("w", b"/registry/"),),
    disturbances=(Disturbance(5, Trouble.DROP),),
)


@pytest.mark.slow
@given(PLANS, PLANS)
def test_one_fingerprint_for_one_plan(one: Plan, other: Plan) -> None:
    """Two plans have one fingerprint exactly if they are equal."""
    assert (one == other) == (one.fingerprint() == other.fingerprint())


@pytest.mark.slow
@given(PLANS)
def test_a_copy_has_the_same_fingerprint(plan: Plan) -> None:
    """A plan that was written to a file and read by another process is the same."""
    copy = pickle.loads(pickle.dumps(plan))
    assert (plan, plan.fingerprint()) == (copy, copy.fingerprint())


def actor(name: str, changed_to: object) -> Callable[[Plan], Plan]:
    """Another second step of the first actor."""

    def changed(plan: Plan) -> Plan:
        first, second = plan.actors[0].steps
        steps = (first, Step(**(second._asdict() | {name: changed_to})))
        return replace(plan, actors=(plan.actors[0]._replace(steps=steps),))

    return changed


CHANGES: dict[str, Callable[[Plan], Plan]] = {
    **{
        name: actor(name, changed)
        for name, changed in {
            "verb": Verb.DELETE,
            "key": b"l",
            "role": "s",
            "due_us": 0,
            "think_us": 1,
            "shape": "pod",
            "size": 1,
            "edit": Edit.APPEND,
            "lease_ttl": 1,
            "limit": 1,
            "candidates": (b"k",),
            "owner": "o",
            "refusal": 3,
        }.items()
    },
    "duration": lambda plan: replace(plan, duration_us=11),
    "warm-up": lambda plan: replace(plan, warm_up_us=2),
    "apiservers": lambda plan: replace(plan, apiservers=3),
    "resources": lambda plan: replace(plan, resources=()),
    "preload": lambda plan: replace(plan, preload=(plan.preload[0]._replace(owner="o"),)),
    "name": lambda plan: replace(plan, actors=(plan.actors[0]._replace(name="two"),)),
    "apiserver": lambda plan: replace(plan, actors=(plan.actors[0]._replace(apiserver=1),)),
    "watcher": lambda plan: replace(plan, watchers=(plan.watchers[0]._replace(start=Start.NOW),)),
    "trouble": lambda plan: replace(plan, disturbances=(Disturbance(5, Trouble.DROP, stale=1),)),
    "progress": lambda plan: replace(plan, progress_requests_us=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows(change: str) -> None:
    """Nothing in a plan can be changed without another fingerprint."""
    assert PLAN.fingerprint() != CHANGES[change](PLAN).fingerprint()


def test_every_field_of_a_step_is_changed_above() -> None:
    """A new field of a step comes with its change."""
    assert set(Step._fields) <= CHANGES.keys()


def test_beside() -> None:
    """Both plans' work, over the first one's time; resources that both cache are cached once."""
    under = replace(
        PLAN,
        duration_us=99,
        apiservers=3,
        resources=(b"/registry/leases/", b"/registry/pods/"),
        actors=(Actor("under", 2, ()),),
        progress_requests_us=7,
    )
    both = PLAN.beside(under)
    assert (10, 1, 3, 7) == (
        both.duration_us,
        both.warm_up_us,
        both.apiservers,
        both.progress_requests_us,
    )
    assert (b"/registry/pods/", b"/registry/leases/") == both.resources
    assert ["one", "under"] == [actor.name for actor in both.actors]
    assert (2, 2, 2, 2) == tuple(
        map(len, (both.preload, both.watchers, both.disturbances, both.actors))
    )
    assert both.steps == PLAN.steps + under.steps


@pytest.mark.parametrize("apiserver", [-1, 2])
def test_an_actor_has_an_apiserver(apiserver: int) -> None:
    """A plan whose actor has none cannot be made."""
    with pytest.raises(ValueError, match=f"lost: there is no apiserver {apiserver}"):
        replace(PLAN, actors=(Actor("lost", apiserver, ()),))
