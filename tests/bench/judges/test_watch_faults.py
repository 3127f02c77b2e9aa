"""Faults of watches, planted one at a time in records of a store that is right."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from bench.plan import Trouble, Verb
from bench.records import EventType, MessageKind, Outcome
from tests.bench.judges.world import PODS, Row, World, fresh, number, verdict_of


def watch_of(world: World, name: bytes, place: int = 0) -> Row:
    """The first, or a later, watch of a name."""
    return list(world.find("watches", name=name))[place]


def events_of(world: World, watch: Row) -> list[Row]:
    """What it was shown."""
    return list(world.find("events", watch=watch["watch"]))


def middle(world: World, kind: EventType = EventType.PUT, name: bytes = b"pods of 0") -> Row:
    """An event with others of the same watch around it, and an object before it."""
    events = events_of(world, watch_of(world, name))[5:-5]
    return next(e for e in events if e["type"] == kind and number(e, "prev_mod") > 0)


def lost(world: World) -> None:
    """One watch is not shown one event."""
    world.rows["events"].remove(middle(world))


def lost_of_all(world: World) -> None:
    """No watch is shown an acknowledged write."""
    mod = middle(world)["mod"]
    world.rows["events"] = [e for e in world.rows["events"] if e["mod"] != mod]


def duplicated(world: World) -> None:
    """One event comes again at once."""
    events, event = world.rows["events"], middle(world)
    events.insert(events.index(event) + 1, dict(event))


def duplicated_later(world: World) -> None:
    """One event comes again with the last message of its watch."""
    event = middle(world)
    last = events_of(world, watch_of(world, b"pods of 0"))[-1]
    world.rows["events"].append(event | {"message": last["message"]})


def reordered(world: World) -> None:
    """Two events of one watch come the wrong way round."""
    events = world.rows["events"]
    first = middle(world)
    mine = events_of(world, watch_of(world, b"pods of 0"))
    second = mine[mine.index(first) + 1]
    a, b = events.index(first), events.index(second)
    events[a], events[b] = (
        second | {"message": first["message"]},
        first | {"message": second["message"]},
    )


def split(world: World) -> None:
    """The deletes of one lease's end come in two messages."""
    events = world.rows["events"]
    pairs = pairwise(events)
    one = next(b for a, b in pairs if all(a[c] == b[c] for c in ("watch", "message", "mod")))
    start = events.index(one)
    for row in [r for r in world.rows["messages"] if r["watch"] == one["watch"]]:
        if number(row, "message") > number(one, "message"):
            row["message"] = number(row, "message") + 1
        elif row["message"] == one["message"]:
            world.rows["messages"].append(row | {"message": number(row, "message") + 1})
    for place, row in enumerate(events):
        if row["watch"] == one["watch"]:
            later = number(row, "message") > number(one, "message")
            same = row["message"] == one["message"] and place >= start
            events[place] = row | {"message": number(row, "message") + (later or same)}


def resumed_too_late(world: World) -> None:
    """A watch that resumes is not shown the first event after its start."""
    events = [events_of(world, w) for w in world.find("watches") if number(w, "start") > 1]
    world.rows["events"].remove(next(e for e in events if len(e) > 2)[0])


def older_than_asked(world: World) -> None:
    """A watch that resumes is shown the revision before its start."""
    pods = watch_of(world, b"pods of 0", 1)
    old = events_of(world, watch_of(world, b"pods of 0"))[-1]
    first = events_of(world, pods)[0]
    new = old | {"watch": pods["watch"], "message": first["message"]}
    world.rows["events"].insert(world.rows["events"].index(first), new)


def silent(world: World) -> None:
    """A watch that asks for what is compacted hears nothing."""
    canceled = next(world.find("messages", kind=MessageKind.CANCELED))
    world.rows["messages"].remove(canceled)


def served_from_compacted(world: World) -> None:
    """Instead it is shown some event."""
    canceled = next(world.find("messages", kind=MessageKind.CANCELED))
    canceled["kind"], canceled["compact_revision"] = MessageKind.EVENTS, 0
    (watch,) = world.find("watches", watch=canceled["watch"])
    event = next(e for e in world.rows["events"] if number(e, "mod") > number(watch, "start"))
    world.rows["events"].append(event | {"watch": watch["watch"], "message": 1})


def compacted_by_nobody(world: World) -> None:
    """A watch is canceled as compacted to a revision that nobody asked for."""
    canceled = next(world.find("messages", kind=MessageKind.CANCELED))
    canceled["compact_revision"] = 1 + max(
        number(op, "at") for op in world.find("ops", verb=Verb.COMPACT)
    )


def canceled_for_nothing(world: World) -> None:
    """A watch is canceled as compacted that needs nothing of what was."""
    last = world.rows["messages"][-1]
    at = max(number(op, "at") for op in world.find("ops", verb=Verb.COMPACT))
    world.rows["messages"].append(
        last
        | {"message": number(last, "message") + 1, "kind": MessageKind.CANCELED}
        | {"compact_revision": at}
    )


def progress_too_early(world: World) -> None:
    """Progress names a revision of which an event comes afterwards."""
    event = middle(world)
    (row,) = world.find("messages", watch=event["watch"], message=event["message"])
    for each in (*world.rows["events"], *world.rows["messages"]):
        if each["watch"] == row["watch"] and number(each, "message") >= number(event, "message"):
            each["message"] = number(each, "message") + 1
    progress: Row = {
        "kind": MessageKind.PROGRESS,
        "message": number(row, "message") - 1,
        "events": 0,
    }
    world.rows["messages"].append(row | progress)


def outside(world: World) -> None:
    """A watch is shown a key that it did not ask for."""
    event = middle(world, name=b"pods of 0")
    key = watch_of(world, b"one key")
    first = events_of(world, key)[0]
    stray = event | {"watch": key["watch"], "message": first["message"]}
    stray |= dict.fromkeys(("prev_mod", "prev_create", "prev_version", "prev_digest"), -1)
    world.rows["events"].append(stray)


def unfiltered(world: World) -> None:
    """A watch that wants no puts is shown one."""
    event, watch = middle(world), watch_of(world, b"no puts")
    first = events_of(world, watch)[0]
    world.rows["events"].append(event | {"watch": watch["watch"], "message": first["message"]})


def wrong_prev(world: World) -> None:
    """prev_kv is an older object."""
    event = middle(world)
    event["prev_mod"] = number(event, "prev_mod") - 1


def wrong_prev_value(world: World) -> None:
    """prev_kv has another value."""
    middle(world)["prev_digest"] = 7


def missing_prev(world: World) -> None:
    """prev_kv is missing long before a compaction."""
    deletes = middle(world, EventType.DELETE)
    deletes |= dict.fromkeys(("prev_mod", "prev_create", "prev_version", "prev_digest"), -1)


def prev_of_nothing(world: World) -> None:
    """A creation comes with prev_kv."""
    events = events_of(world, watch_of(world, b"pods of 0"))
    created = next(e for e in events if e["create"] == e["mod"])
    created |= {"prev_mod": 3, "prev_create": 3, "prev_version": 1, "prev_digest": 5}


def unasked_prev(world: World) -> None:
    """prev_kv comes to a watch that has not asked for it."""
    event = events_of(world, watch_of(world, b"one key"))[0]
    event |= {"prev_mod": 3, "prev_create": 3, "prev_version": 1, "prev_digest": 5}


def update_as_creation(world: World) -> None:
    """An update is shown as a creation."""
    event = middle(world)
    event["create"] = event["mod"]


def creation_as_update(world: World) -> None:
    """A creation is shown as an update."""
    events = events_of(world, watch_of(world, b"pods of 0"))
    event = next(e for e in events if e["create"] == e["mod"])
    event["create"] = number(event, "create") - 1


def wrong_version(world: World) -> None:
    """An event's version skips one."""
    event = middle(world)
    event["version"] = number(event, "version") + 1


def wrong_create(world: World) -> None:
    """An event's create revision is that of something else."""
    event = middle(world)
    event["create"] = number(event, "create") - 1


def lagging(world: World) -> None:
    """An event of the load comes six seconds after its end."""
    last = events_of(world, watch_of(world, b"pods of 1", -1))[-1]
    (row,) = world.find("messages", watch=last["watch"], message=last["message"])
    for each in world.find("messages", watch=last["watch"]):
        if number(each, "message") >= number(row, "message"):
            each["received"] = world.load_end + 6_000_000


def never_shown(world: World) -> None:
    """The last event of the load never comes."""
    last = events_of(world, watch_of(world, b"pods of 1", -1))[-1]
    world.rows["events"].remove(last)


def no_watches(world: World) -> None:
    """No watch was ever opened."""
    for table in ("watches", "messages", "events"):
        world.rows[table].clear()


def one_without_watch(world: World) -> None:
    """An apiserver never came to watch one of its resources."""
    for watch in list(world.find("watches", name=b"events of 1")):
        without(world, watch)


def without(world: World, watch: Row) -> None:
    """A watch was never there."""
    for table in ("watches", "messages", "events"):
        world.rows[table] = [r for r in world.rows[table] if r["watch"] != watch["watch"]]


def all_unimplemented(world: World) -> None:
    """Each watch ends at once, with an error."""
    world.rows["messages"].clear()
    world.rows["events"].clear()
    for watch in world.rows["watches"]:
        watch |= {"code": 12, "closed": watch["opened"], "message": b"unknown method"}


def ended_for_good(world: World) -> None:
    """A watch ends before the run does, and none comes for it."""
    watch_of(world, b"pods of 0", -1)["code"] = 14


def never_created(world: World) -> None:
    """A watch waits for its creation to the end."""
    watch = watch_of(world, b"no puts", -1)
    for table in ("messages", "events"):
        world.rows[table] = [r for r in world.rows[table] if r["watch"] != watch["watch"]]


def without_head(world: World) -> None:
    """A watch never hears how far the store has come."""
    progress = list(world.find("messages", kind=MessageKind.PROGRESS))
    watch = watch_of(world, b"one key", -1)
    (told,) = (row for row in progress if row["watch"] == watch["watch"])
    world.rows["messages"].remove(told)


def silent_all(world: World) -> None:
    """Every watch is told of progress, and of nothing else."""
    world.rows["events"].clear()


def phantom(world: World) -> None:
    """An event comes that nobody wrote."""
    event = middle(world)
    ghost = event | {"key": PODS + b"ghost", "version": 1, "create": event["mod"], "digest": 1}
    ghost |= dict.fromkeys(("prev_mod", "prev_create", "prev_version", "prev_digest"), -1)
    world.rows["events"].insert(world.rows["events"].index(event), ghost)


def applied_though(world: World, outcome: Outcome) -> None:
    """A write that was said to have failed is seen."""
    op = next(world.find("ops", verb=Verb.UPDATE, outcome=outcome))
    event = next(e for e in world.rows["events"] if e["key"] == op["key"])
    world.rows["events"].append(event | {"digest": op["digest"], "mod": 1000, "message": 1})


def conflict_applied(world: World) -> None:
    """A write that lost its comparison is seen."""
    applied_though(world, Outcome.CONFLICT)


def refused_applied(world: World) -> None:
    """A write that was refused is seen."""
    applied_though(world, Outcome.REFUSED)


def effect_of_unknown(world: World) -> tuple[Row, Row]:
    """A write of unknown outcome that took effect, and an event that showed it."""
    by_value = {event["digest"]: event for event in world.rows["events"]}
    unknown = world.find("ops", verb=Verb.UPDATE, outcome=Outcome.UNKNOWN)
    op = next(op for op in unknown if op["digest"] in by_value)
    return op, by_value[op["digest"]]


def unknown_applied_twice(world: World) -> None:
    """A write of unknown outcome is seen to take effect once more."""
    _, event = effect_of_unknown(world)
    (watch,) = world.find("watches", watch=event["watch"])
    last = [m for m in world.rows["messages"] if m["watch"] == watch["watch"]][-1]
    again: Row = {"mod": 100_000, "message": last["message"]}
    world.rows["events"].append(event | again)


def unknown_applied_against_comparison(world: World) -> None:
    """A write of unknown outcome took effect although its comparison did not hold."""
    op, _ = effect_of_unknown(world)
    op["expected"] = number(op, "expected") - 1


def other_value(world: World) -> None:
    """One watch is shown another value than was written."""
    middle(world)["digest"] = 7


def deleted_by_nobody(world: World) -> None:
    """A key without a lease is seen to go, and nobody deleted it."""
    delete = next(world.find("ops", verb=Verb.DELETE, outcome=Outcome.OK))
    world.rows["ops"].remove(delete)


def accepted(world: World) -> None:
    """What must be refused is accepted."""
    op = next(world.find("ops", refusal=3))
    op |= {"outcome": Outcome.CONFLICT, "code": 0, "revision": -1}


def refused_otherwise(world: World) -> None:
    """It is refused with another code."""
    next(world.find("ops", refusal=3))["code"] = 8


def refused_for_nothing(world: World) -> None:
    """A write within the rules is called invalid."""
    next(world.find("ops", refusal=3))["refusal"] = 0


FAULTS: dict[Callable[[World], None], tuple[str, str]] = {
    lost: ("Reliable", "never got the put of /registry/pods/"),
    lost_of_all: ("Acknowledged writes durable", "no watch of it saw that"),
    duplicated: ("Unique", "again in message"),
    duplicated_later: ("Unique", "again in message"),
    reordered: ("Ordered", "before put of"),
    split: ("Atomic", "in messages"),
    resumed_too_late: ("Resumable", "having asked from revision"),
    older_than_asked: ("Resumable", "got the"),
    silent: ("Resumable", "was not told"),
    served_from_compacted: ("Resumable", "was shown events"),
    compacted_by_nobody: ("Resumable", "nobody had asked"),
    canceled_for_nothing: ("Resumable", "had been shown everything up to"),
    progress_too_early: ("Bookmarkable", "later"),
    outside: ("Filter", "outside its range"),
    unfiltered: ("Filter", "of a kind that it does not want"),
    wrong_prev: ("PrevKV", "prev_kv has (mod, create, version)"),
    wrong_prev_value: ("PrevKV", "the value of another revision"),
    missing_prev: ("PrevKV", "without prev_kv"),
    prev_of_nothing: ("PrevKV", "a creation, with prev_kv of revision 3"),
    unasked_prev: ("PrevKV", "for which it had not asked"),
    update_as_creation: ("IsCreate", "as a creation"),
    creation_as_update: ("IsCreate", "as an update"),
    wrong_version: ("Version arithmetic", "with version"),
    wrong_create: ("Version arithmetic", "created at"),
    lagging: ("Lag drains", "6.0 s after the load"),
    never_shown: ("Lag drains", "never"),
    no_watches: ("Everyone is watching", "apiserver 1 of /registry/events/ never had a watch"),
    one_without_watch: ("Everyone is watching", "apiserver 1 of /registry/events/ never had"),
    all_unimplemented: ("Everyone is watching", "over with code 12 unknown method"),
    ended_for_good: ("Everyone is watching", "over with code 14"),
    never_created: ("Everyone is watching", "never created"),
    without_head: ("Everyone is watching", "watcher one key has come to revision"),
    silent_all: ("Everyone is watching", "no watch has shown anything"),
    phantom: ("Errors attributable", "no write explains it"),
    conflict_applied: ("Errors attributable", "ended as CONFLICT"),
    refused_applied: ("Errors attributable", "ended as REFUSED"),
    unknown_applied_twice: ("Errors attributable", "ended as UNKNOWN"),
    unknown_applied_against_comparison: ("Errors attributable", "ended as UNKNOWN"),
    other_value: ("Errors attributable", "but not as UPDATE"),
    deleted_by_nobody: ("Errors attributable", "no write explains it"),
    accepted: ("Errors attributable", "had to be refused"),
    refused_otherwise: ("Errors attributable", "had to be refused"),
    refused_for_nothing: ("Errors attributable", "was within the rules"),
}
"""Each fault, the judge that must catch it, and what the evidence says."""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_caught(fault: Callable[[World], None], tmp_path: Path) -> None:
    """A planted fault of a watch is caught by its judge, with evidence that names it."""
    world = fresh()
    fault(world)
    judge, phrase = FAULTS[fault]
    found = verdict_of(world, judge, tmp_path)
    assert not found.passed
    assert any(phrase in each for each in found.evidence), found.evidence


def test_unsent_excuses_nothing(tmp_path: Path) -> None:
    """Intents that were never sent explain no change, and are no violation themselves."""
    world = fresh()
    some = next(world.find("ops", verb=Verb.DELETE))
    for place, key in enumerate({op["key"] for op in world.rows["ops"]}):
        never: Row = {"op": 20_000 + place, "actor": 0, "sent": -1, "done": -1, "revision": -1}
        lost: Row = {"outcome": Outcome.UNKNOWN, "code": 4, "refusal": 3, "key": key}
        world.rows["ops"].append(some | never | lost)
    judge = "Errors attributable"
    (tmp_path / "right").mkdir()
    assert verdict_of(world, judge, tmp_path / "right").passed
    deleted_by_nobody(world)
    assert not verdict_of(world, judge, tmp_path).passed


@pytest.mark.parametrize("trouble_s", [4, 6])
def test_everyone_may_come_back(trouble_s: int, tmp_path: Path) -> None:
    """A watch that trouble has just ended is missed only when there was time to come back."""
    world = fresh()
    ended_for_good(world)
    at = world.facts["finished_us"] - trouble_s * 1_000_000
    world.rows["incidents"].append({"at": at, "until": at, "trouble": Trouble.DROP})
    assert verdict_of(world, "Everyone is watching", tmp_path).passed is (trouble_s == 4)


def test_stopped_run_needs_nobody(tmp_path: Path) -> None:
    """Of a run that was stopped it is not known who would have come back."""
    world = fresh()
    no_watches(world)
    world.facts["state"] = "INCOMPLETE"
    found = verdict_of(world, "Everyone is watching", tmp_path)
    assert (found.checked, found.violations) == (0, 0)
