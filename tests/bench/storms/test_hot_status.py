"""S4: how contended the object is, and that lost updates, deaf and late watches show."""

import random
from collections import Counter
from pathlib import Path

import pytest

from bench import values
from bench.plan import Edit, Plan, Trouble, Verb
from bench.records import Outcome
from bench.storms import hot_status
from tests.bench.storms.perfect import CALL_US, Played, Row, play

SMALL = hot_status.Parameters(writers=3, rounds_per_second=10.0, others_per_second=10.0)


def plan() -> Plan:
    """Three seconds."""
    return hot_status.schedule(SMALL, 3_000_000, random.Random(1))


@pytest.fixture
def played() -> Played:
    """A perfect store."""
    return play(plan())


def violations(played: Played, folder: Path) -> list[int]:
    """Of counters, and of what was heard."""
    verdicts = hot_status.checks(played.records(folder), SMALL)
    assert all(verdict.checked for verdict in verdicts)
    return [verdict.violations for verdict in verdicts]


def heard(played: Played, number: int) -> Row:
    """The message that told of the hot object, in the middle of the run, to one watch."""
    events = list(played.find("events", key=hot_status.hot_key()))
    event = events[number]
    return next(played.find("messages", watch=event["watch"], message=event["message"]))


def test_writers_wake_together() -> None:
    """In each round all writers update the one object within a millisecond, counting up."""
    actors = [actor for actor in plan().actors if actor.name.startswith("writer")]
    assert len(actors) == 3
    assert {actor.apiserver for actor in actors} == {0, 1}
    rounds = list(zip(*(actor.steps for actor in actors), strict=True))
    assert len(rounds) > 20
    for steps in rounds:
        dues = [step.due_us for step in steps]
        assert max(dues) - min(dues) < hot_status.JITTER_US
        assert {(step.key, step.edit) for step in steps} == {(hot_status.hot_key(), Edit.INCREMENT)}


@pytest.mark.slow
def test_rate_and_skew() -> None:
    """At xs about 350 Txns a second, ten for each round's four writes; the others follow Zipf."""
    parameters = hot_status.PRESETS["xs"]
    made = hot_status.schedule(parameters, 30_000_000, random.Random(1))
    assert all(step.verb == Verb.UPDATE for actor in made.actors for step in actor.steps)
    roles = Counter(step.role for actor in made.actors for step in actor.steps)
    rounds = roles["hot.count"] / parameters.writers
    assert 300 < (rounds * 10 + roles["other.count"]) / 30 < 1_300
    assert roles["large.update"] == 30
    others = [step.key for actor in made.actors for step in actor.steps if "other" in step.role]
    counts = [count for _, count in Counter(others).most_common()]
    assert len(counts) == hot_status.OTHERS
    assert counts[0] / counts[9] == pytest.approx(10**1.2, rel=0.4)


def test_perfect_store_passes(played: Played, tmp_path: Path) -> None:
    """Nothing is wrong where nothing was done wrong."""
    assert violations(played, tmp_path) == [0, 0]


def test_lost_update_is_found(played: Played, tmp_path: Path) -> None:
    """A counter one short of the acknowledged updates is found; a version one short, too."""
    row = next(played.find("final", key=hot_status.hot_key()))
    count = values.count_of(bytes(row["value"]))
    less = b'"count":"%010d"' % (count - 1)
    row["value"] = bytes(row["value"]).replace(b'"count":"%010d"' % count, less)
    verdict, _ = hot_status.checks(played.records(tmp_path / "count"), SMALL)
    assert verdict.violations == 1
    assert (
        f"counts {count - 1} and has version {count + 1} in the end; {count} updates"
        in (verdict.evidence[0])
    )
    row["version"] = int(row["version"]) - 1
    assert violations(played, tmp_path / "both") == [1, 0]
    next(played.find("ops", role=b"hot.count"))["outcome"] = Outcome.UNKNOWN
    assert violations(played, tmp_path / "unknown") == [0, 0]


def test_conflict_that_was_written_is_found(played: Played, tmp_path: Path) -> None:
    """An update that was told it lost, and counts all the same, is found."""
    next(played.find("ops", role=b"other.count"))["outcome"] = Outcome.CONFLICT
    assert violations(played, tmp_path) == [1, 0]


def test_unheard_update_is_found(played: Played, tmp_path: Path) -> None:
    """An acknowledged update that one of two watches never hears of is named."""
    event = list(played.find("events", key=hot_status.hot_key()))[7]
    played.rows["events"].remove(event)
    _, verdict = hot_status.checks(played.records(tmp_path), SMALL)
    assert verdict.violations == 1
    key = hot_status.hot_key().decode()
    told = f"watch {event['watch']} never heard of {key} at revision {event['mod']}"  # type: ignore[str-bytes-safe]
    assert verdict.evidence == (told,)


def test_stall_is_found(played: Played, tmp_path: Path) -> None:
    """Two seconds between an answer and its event are too many."""
    message = heard(played, 5)
    message["received"] = int(message["received"]) + hot_status.STALL_US + 1_000
    assert violations(played, tmp_path) == [0, 1]


def test_slow_drain_is_found(played: Played, tmp_path: Path) -> None:
    """Events that come later than a second after the last update are too late."""
    done = max(int(row["done"]) for row in played.find("ops", verb=Verb.UPDATE))
    message = heard(played, -1)
    message["received"] = done + hot_status.DRAIN_US + 1
    assert int(message["received"]) - done < hot_status.STALL_US
    assert violations(played, tmp_path) == [0, 1]


def test_trouble_excuses_lateness(played: Played, tmp_path: Path) -> None:
    """A run whose server was paused on purpose has no verdict on lateness, which is no pass."""
    played.add("incidents", at=1, until=2, trouble=Trouble.PAUSE)
    _, verdict = hot_status.checks(played.records(tmp_path), SMALL)
    assert not verdict.checked


def test_measures(played: Played, tmp_path: Path) -> None:
    """Failed attempts, unequal shares and late events show, each in its own figure."""
    good = hot_status.measures(played.records(tmp_path / "good"), SMALL)
    assert good["attempts_per_success"] == good["unfairness_ratio"] == 1
    assert good["hot_given_up_per_cent"] == 0
    hot = list(played.find("ops", role=b"hot.count", actor=0))
    last = hot[-1]
    for attempt in range(5):
        again = {"op": 10**9 + attempt, "attempt": attempt, "outcome": Outcome.CONFLICT}
        played.add("ops", **(last | again))
    for number in range(-40, -20):
        late = heard(played, number)
        late["received"] = int(late["received"]) + 50_000
    bad = hot_status.measures(played.records(tmp_path / "bad"), SMALL)
    shares = len([row for row in hot if int(row["due"]) >= 300_000])
    assert bad["unfairness_ratio"] == pytest.approx(shares / (shares - 1))
    assert bad["attempts_per_success"] > 1
    assert bad["hot_given_up_per_cent"] == pytest.approx(100 / (3 * shares))
    assert bad["hot_watch_lag_p99_ms"] == pytest.approx(50 + CALL_US / 1000)


def test_lag_counts_from_the_sending(played: Played, tmp_path: Path) -> None:
    """An event that comes before the answer is as late as it is after the write was sent.

    A watch that was opened after a write was sent reads history, and says nothing of lag.
    """
    for message in played.rows["messages"]:
        message["received"] = int(message["received"]) - CALL_US // 3
    before = hot_status.measures(played.records(tmp_path / "before"), SMALL)
    expected_ms = (CALL_US - CALL_US // 3) / 1000
    for per_cent in (50, 99):
        assert before[f"hot_watch_lag_p{per_cent}_ms"] == pytest.approx(expected_ms)
    for watch in played.rows["watches"]:
        watch["opened"] = max(int(row["sent"]) for row in played.rows["ops"]) + 1
    after = hot_status.measures(played.records(tmp_path / "after"), SMALL)
    assert not [name for name in after if "lag" in name]
