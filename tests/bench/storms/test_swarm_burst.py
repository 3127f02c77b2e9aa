"""S1: how much a claim writes, and that double owners, lost Readys and uncounted writes show."""

import random
from collections import Counter
from pathlib import Path

import pytest

from bench import values
from bench.plan import WRITES, Edit, Plan, Verb
from bench.records import EventType, Outcome
from bench.storms import idle_background, objects, swarm_burst
from tests.bench.storms.perfect import Played, Row, play

SMALL = swarm_burst.Parameters(
    claims=10, burst_every_s=2.0, tenants=2, replicas=8, dwell_s=0.2, apiservers=2
)


def plan() -> Plan:
    """Three small bursts."""
    return swarm_burst.schedule(SMALL, 6_000_000, random.Random(1))


@pytest.fixture
def played() -> Played:
    """A small run on a perfect store that the benchmark started."""
    return play(plan(), command="kvstore")


def violations(played: Played, folder: Path) -> list[int]:
    """Of one owner; claims, adoptions, Readys; populations; revisions."""
    verdicts = swarm_burst.checks(played.records(folder), SMALL)
    assert all(verdict.checked for verdict in verdicts)
    return [verdict.violations for verdict in verdicts]


def adopted(played: Played, number: int) -> Row:
    """One of the acknowledged adoptions."""
    return list(played.find("ops", verb=Verb.ADOPT))[number]


@pytest.mark.slow
def test_writes_per_claim() -> None:
    """At xs a claim costs 29.4 writes, its refill's among them; the rate fits two cores."""
    parameters = swarm_burst.PRESETS["xs"]
    made = swarm_burst.schedule(parameters, 30_000_000, random.Random(1))
    verbs = [step.verb for actor in made.actors for step in actor.steps]
    claims = verbs.count(Verb.ADOPT)
    assert claims == 7 * parameters.claims
    assert set(verbs) <= set(WRITES)
    assert len(verbs) / claims == pytest.approx(29.4, abs=0.3)
    assert 300 < len(verbs) / 30 < 1_300


def test_chain_is_that_of_the_text() -> None:
    """A claim is Ready with its sixth write; ten, fourteen and six writes make its chain."""
    actors = plan().actors
    lengths = Counter(len(actor.steps) for actor in actors)
    assert set(lengths) == {10, 16, 14}
    assert lengths[14] == 30
    claim = next(actor for actor in actors if len(actor.steps) == 16)
    assert claim.steps[5].role == "claim.ready"
    assert {step.lease_ttl for step in claim.steps if step.role.startswith("event.")} == {3_660}


def test_bursts_are_bursts() -> None:
    """All claims of a burst are due within 50 ms, on both apiservers, and some race."""
    claims = [actor for actor in plan().actors if actor.steps[0].role == "claim.create"]
    offsets = [(actor.steps[0].due_us - 400_000) % 2_000_000 for actor in claims]
    assert max(offsets) < swarm_burst.BURST_US
    assert {actor.apiserver for actor in claims} == {0, 1}
    first = Counter(actor.steps[3].candidates[0] for actor in claims)
    assert 2 in first.values()


def test_refills_are_taken_only_warm() -> None:
    """A refilled Sandbox has an owner until its refill has written it for the last time."""
    for actor in plan().actors:
        if actor.name.startswith("refill"):
            owners = [step.owner for step in actor.steps if b"/sandboxes/" in step.key]
            assert owners == [swarm_burst.POOL] * 3 + [""]


def test_pools_are_counted_up() -> None:
    """Pool status is read, changed and written: no writer replaces what another wrote."""
    steps = [step for actor in plan().actors for step in actor.steps]
    pools = [step for step in steps if step.key.startswith(objects.POOLS)]
    assert len(pools) == 60
    assert {step.edit for step in pools} == {Edit.INCREMENT}


def test_perfect_store_passes(played: Played, tmp_path: Path) -> None:
    """Nothing is wrong where nothing was done wrong."""
    assert violations(played, tmp_path) == [0, 0, 0, 0]


def test_background_is_counted(tmp_path: Path) -> None:
    """Writes of what runs under the storm are part of the revision's rise."""
    made = idle_background.under(plan(), idle_background.Parameters(agents=90), random.Random(2))
    played = play(made, command="kvstore")
    assert list(played.find("ops", verb=Verb.COMPACT))
    assert violations(played, tmp_path) == [0, 0, 0, 0]


def test_double_adoption_is_found(played: Played, tmp_path: Path) -> None:
    """A Sandbox that two claims were given is found, as is the one that is missing then."""
    first, second = adopted(played, 0), adopted(played, 2)
    second["key"] = first["key"]
    verdict = swarm_burst.checks(played.records(tmp_path), SMALL)[0]
    assert verdict.violations >= 1
    assert verdict.evidence[0].startswith(bytes(first["key"]).decode() + " was adopted by agent-")
    assert f"(revision {int(first['revision'])}, OK) and agent-" in verdict.evidence[0]


def test_refused_adoption_that_is_heard_is_found(played: Played, tmp_path: Path) -> None:
    """A comparison that was lost, but whose value watches heard, is a second owner."""
    won, other = adopted(played, 0), adopted(played, 2)
    lost = played.add("ops", **(other | {"key": won["key"], "op": 10**9, "revision": 5}))
    lost |= {"outcome": Outcome.CONFLICT, "digest": 77}
    heard = next(played.find("events", key=won["key"], digest=won["digest"]))
    played.add("events", **(heard | {"digest": 77}))
    assert violations(played, tmp_path)[0] == 1


def test_wrong_owner_in_the_end_is_found(played: Played, tmp_path: Path) -> None:
    """A Sandbox that in the end belongs to another claim than it was given to is found."""
    owned = [row for row in played.rows["final"] if values.is_owned(bytes(row["value"]))]
    owned = [row for row in owned if bytes(row["key"]).startswith(objects.SANDBOXES)]
    owned[0]["value"], owned[1]["value"] = owned[1]["value"], owned[0]["value"]
    assert violations(played, tmp_path)[0] == 2


def test_missing_ready_is_found(played: Played, tmp_path: Path) -> None:
    """A claim that adopted without trouble and never became Ready is found."""
    played.rows["ops"].remove(next(played.find("ops", role=b"claim.ready")))
    assert violations(played, tmp_path)[1] == 1


def test_claims_in_trouble_are_excused(played: Played, tmp_path: Path) -> None:
    """After an error of its own a claim need not become Ready."""
    row = next(played.find("ops", role=b"claim.ready"))
    row |= {"outcome": Outcome.UNKNOWN, "code": 14}
    assert violations(played, tmp_path) == [0, 0, 0, 0]


def test_trouble_of_others_is_no_excuse(played: Played, tmp_path: Path) -> None:
    """A claim that adopted nothing and does not say why is found beside one that met an error."""
    bump = next(played.find("ops", role=b"refill.name"))
    bump |= {"outcome": Outcome.UNKNOWN, "code": 14}
    played.rows["ops"].remove(adopted(played, 0))
    assert violations(played, tmp_path)[1] == 1


@pytest.mark.parametrize("left", ["adopted", "nothing"])
@pytest.mark.parametrize("state", ["COMPLETE", "INCOMPLETE"])
def test_what_a_cut_run_leaves_is_excused(
    played: Played, tmp_path: Path, state: str, left: str
) -> None:
    """A claim that had not come to its Ready when the run was stopped did nothing wrong."""
    played.facts["state"] = state
    actor = adopted(played, 0)["actor"]
    done = 3 if left == "adopted" else 2
    played.rows["ops"] = [
        row for row in played.rows["ops"] if row["actor"] != actor or int(row["step"]) <= done
    ]
    found = swarm_burst.checks(played.records(tmp_path), SMALL)[1]
    expected = (30, 1) if state == "COMPLETE" else (29, 0)
    assert (found.checked, found.violations) == expected


def test_two_adoptions_in_a_cut_run_are_found(played: Played, tmp_path: Path) -> None:
    """No end of a run makes a claim adopt twice."""
    played.facts["state"] = "INCOMPLETE"
    once = adopted(played, 0)
    played.add("ops", **(once | {"op": 10**9}))
    played.rows["ops"].remove(next(played.find("ops", role=b"claim.ready", actor=once["actor"])))
    assert swarm_burst.checks(played.records(tmp_path), SMALL)[1].violations == 1


def without(played: Played, at_us: int) -> tuple[Row, bytes]:
    """Of the second claim: its ADOPT, lost at that time; and what it had adopted."""
    row = adopted(played, 1)
    name = bytes(row["key"])
    row |= {"outcome": Outcome.CONFLICT, "sent": -1, "done": at_us, "digest": -1, "revision": -1}
    return row, name


def test_nothing_left_to_adopt_is_no_breach(played: Played, tmp_path: Path) -> None:
    """A claim all whose candidates have owners adopts nothing, and is Ready without; no comparison
    of it was lost.
    """
    row, name = without(played, 10**9)
    row["key"] = name[:-11] + b"99999" + name[-6:]  # beyond all that were there
    records = played.records(tmp_path)
    assert swarm_burst.checks(records, SMALL)[1].violations == 0
    measured = swarm_burst.measures(records, SMALL)
    assert (measured["conflicts_per_claim"], measured["claims_unserved"]) == (0, 1)


def test_nothing_adopted_though_one_was_free_is_found(played: Played, tmp_path: Path) -> None:
    """Nobody had tried to adopt a candidate of it, at all or by then."""
    row, name = without(played, 10**9)
    found = swarm_burst.checks(played.records(tmp_path / "at all"), SMALL)[1]
    assert found.violations == 1
    assert (
        f"adopted 0 Sandboxes and was made Ready 1 times, though {name.decode()}"
        in (found.evidence[0])
    )
    tried = played.add("ops", **(row | {"op": 10**9, "outcome": Outcome.UNKNOWN, "actor": 999}))
    for place, (sent, expected) in enumerate([(5, 0), (10**9 + 1, 1)]):
        tried |= {"sent": sent, "done": sent + 1, "key": name}
        assert violations(played, tmp_path / str(place))[1] == expected


def test_wrong_population_is_found(played: Played, tmp_path: Path) -> None:
    """A warm Sandbox that is gone in the end, and one more than was made, are found."""
    warm = [
        row
        for row in played.rows["final"]
        if bytes(row["key"]).startswith(objects.SANDBOXES)
        and not values.is_owned(bytes(row["value"]))
    ]
    played.rows["final"].remove(warm[0])
    assert violations(played, tmp_path / "gone")[2] == 1
    more = warm[0] | {"key": bytes(warm[0]["key"]) + b"-more"}
    played.rows["final"] += [warm[0], more]
    assert violations(played, tmp_path / "more")[2] == 1


@pytest.mark.parametrize("change", [-1, 1])
def test_uncounted_write_is_found(played: Played, tmp_path: Path, change: int) -> None:
    """A revision too few or too many, by one, is found."""
    for row in played.rows["final"]:
        row["revision"] = int(row["revision"]) + change
    assert violations(played, tmp_path)[3] == 1


def test_expired_lease_may_raise_the_revision(played: Played, tmp_path: Path) -> None:
    """Leases that took keys with them excuse as many revisions, and no more."""
    deleted = {row["key"] for row in played.find("events", type=EventType.DELETE)}
    leased = [row for row in played.rows["ops"] if int(row["lease"]) > 0 and row["verb"] == 0]
    event = next(row for row in leased if row["key"] not in deleted)
    played.rows["final"] = [row for row in played.rows["final"] if row["key"] != event["key"]]
    for expected in (0, 1):
        for row in played.rows["final"]:
            row["revision"] = int(row["revision"]) + 1
        assert violations(played, tmp_path / str(expected))[3] == expected


def test_measures(played: Played, tmp_path: Path) -> None:
    """Ready counts from the time when a claim was due, and a claim without it as the timeout."""
    good = swarm_burst.measures(played.records(tmp_path / "good"), SMALL)
    assert 6 * 2 < good["ready_p50_ms"] < good["ready_p99_ms"] < 6 * 20.3
    assert good["ready_p99_ms"] <= good["all_ready_ms"] <= good["all_ready_max_ms"] < 6 * 20.3 + 50
    assert 100 < good["drained_ms"] < 600
    assert good["conflicts_per_claim"] == good["claims_unserved"] == 0
    lost = adopted(played, 0)
    lost["outcome"] = Outcome.CONFLICT
    ready = next(played.find("ops", role=b"claim.ready"))
    ready |= {"outcome": Outcome.UNKNOWN, "code": 14}
    bad = swarm_burst.measures(played.records(tmp_path / "bad"), SMALL)
    assert bad["ready_p99_ms"] == 5_000
    assert bad["all_ready_max_ms"] > 5_000
    assert bad["conflicts_per_claim"] == pytest.approx(1 / 30)
    assert bad["claims_unserved"] == 1
