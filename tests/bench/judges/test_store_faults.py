"""Faults of writes, reads and leases, planted one at a time in records of a right store."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.plan import Trouble, Verb
from bench.records import EventType, Outcome
from bench.values import digest
from tests.bench.judges.world import (
    EVENTS,
    PODS,
    TTL,
    Row,
    World,
    fresh,
    number,
    text,
    verdict_of,
)


def acked(world: World, verb: Verb = Verb.UPDATE, prefix: bytes = PODS, place: int = 20) -> Row:
    """An acknowledged write."""
    return [
        op
        for op in world.find("ops", verb=verb, outcome=Outcome.OK)
        if text(op, "key").startswith(prefix)
    ][place]


def row_of(world: World, key: object) -> Row:
    """A key in the final list."""
    return next(row for row in world.rows["final"] if row["key"] == key)


# Writes.


def lost_update(world: World) -> None:
    """Two writers succeed with the same comparison."""
    first, second = acked(world), acked(world, place=40)
    second |= {"key": first["key"], "expected": first["expected"]}


def created_twice(world: World) -> None:
    """A key is created that exists."""
    op = acked(world)
    op |= {"verb": Verb.CREATE, "expected": 0}


def skipped(world: World) -> None:
    """A write compares with a revision that the key never had."""
    op = acked(world)
    op["expected"] = number(op, "expected") - 1


def conflict_without_reason(world: World) -> None:
    """A comparison fails although the key is as it was expected."""
    op = next(world.find("ops", verb=Verb.UPDATE, outcome=Outcome.CONFLICT))
    op["expected"], op["found"] = op["found"], -1


def conflict_with_itself(world: World) -> None:
    """A comparison fails and reads the very revision that was expected."""
    op = next(world.find("ops", verb=Verb.UPDATE, outcome=Outcome.CONFLICT))
    op["found"] = op["expected"]


def never_applied(world: World) -> None:
    """A write is acknowledged and has not been done."""
    newest = max(number(op, "revision") for op in world.rows["ops"])
    raw, at = b"gone", newest + 1
    last = world.rows["ops"][-1]
    done = {"sent": number(last, "done") + 1, "done": number(last, "done") + 2, "revision": at}
    new: Row = {"verb": Verb.CREATE, "key": PODS + b"gone", "expected": 0, "digest": digest(raw)}
    world.rows["ops"].append(last | new | done | {"op": 10_000, "outcome": Outcome.OK})


def forgotten(world: World) -> None:
    """After a kill a key is as it was before the last acknowledged write."""
    acks = {(op["key"], op["revision"]) for op in world.find("ops", verb=Verb.UPDATE)}
    final = next(f for f in world.rows["final"] if (f["key"], f["mod"]) in acks)
    final["mod"] = number(final, "mod") - 1
    world.rows["incidents"].append(
        {"at": world.load_end, "until": world.load_end, "trouble": Trouble.KILL}
    )


def resurrected_for_writer(world: World) -> None:
    """A key whose deletion was acknowledged is in the final list."""
    deleted = next(
        op
        for op in reversed(world.rows["ops"])
        if op["verb"] == Verb.DELETE and all(f["key"] != op["key"] for f in world.rows["final"])
    )
    some = world.rows["final"][-1]
    mod = number(deleted, "revision") - 1
    world.rows["final"].append(some | {"key": deleted["key"], "mod": mod, "lease": 0})


def final_without(world: World) -> None:
    """The final list leaves a key out."""
    world.rows["final"].remove(row_of(world, world.rows["final"][-1]["key"]))


def final_empty(world: World) -> None:
    """The final list is empty."""
    world.rows["final"].clear()


def all_forgotten(world: World) -> None:
    """After the load nothing is there any more."""
    world.rows["final"].clear()


def final_of_long_ago(world: World) -> None:
    """The final list is that of the beginning, when there was nothing."""
    world.rows["final"].clear()
    world.facts["final_revision"] = 1


def final_with(world: World) -> None:
    """The final list has a key that nobody wrote."""
    some = world.rows["final"][-1]
    world.rows["final"].append(some | {"key": PODS + b"never-written"})


def final_other_value(world: World) -> None:
    """A key has another value in the final list."""
    world.rows["final"][-1]["value"] = b"other"


def final_other_version(world: World) -> None:
    """A key has another version in the final list."""
    world.rows["final"][-1]["version"] = 77


def went_back(world: World) -> None:
    """An answer has a lower revision than one received before it was asked for."""
    status = list(world.find("ops", verb=Verb.STATUS))[5]
    status["revision"] = number(status, "revision") - 1


def write_not_newer(world: World) -> None:
    """A write has the revision of an answer before it."""
    op = acked(world)
    op["revision"] = number(op, "revision") - 1


def same_revision(world: World) -> None:
    """Two writes of one key have one revision."""
    op = acked(world)
    world.rows["ops"].append(op | {"op": 10_000})


def reused_revision(world: World) -> None:
    """Two keys are put at one revision."""
    op = acked(world)
    world.rows["ops"].append(op | {"op": 10_000, "key": PODS + b"reused"})


def stream_went_back(world: World) -> None:
    """A watch's message has a lower revision than the one before."""
    message = [m for m in world.rows["messages"] if m["watch"] == 0][-2]
    message["revision"] = 1


def newer_than_message(world: World) -> None:
    """A message brings an event that is newer than itself."""
    event = world.rows["events"][-1]
    (message,) = world.find("messages", watch=event["watch"], message=event["message"])
    message["revision"] = number(event, "mod") - 1


# Reads.


def read_op(world: World, verb: Verb) -> Row:
    """A read that found something."""
    return next(
        op
        for op in world.find("ops", verb=verb)
        if op["found"] != 0 and any(world.find("items", op=op["op"]))
    )


def stale_get(world: World) -> None:
    """A read shows what the key was before."""
    ops = [op for op in world.find("ops", verb=Verb.GET) if number(op, "found") > 0]
    for op in ops:
        (item,) = world.find("items", op=op["op"])
        if number(item, "version") > 1:
            op["found"] = item["mod"] = number(item, "mod") - 1
            return
    pytest.fail("no such read")


def blind_get(world: World) -> None:
    """A read does not find a key that exists."""
    op = read_op(world, Verb.GET)
    op["found"] = 0
    world.rows["items"] = [item for item in world.rows["items"] if item["op"] != op["op"]]


def get_other_value(world: World) -> None:
    """A read shows another value."""
    next(world.find("items", op=read_op(world, Verb.GET)["op"]))["digest"] = 7


def get_other_version(world: World) -> None:
    """A read shows another version."""
    next(world.find("items", op=read_op(world, Verb.GET)["op"]))["version"] = 70


def history_rewritten(world: World) -> None:
    """A read of history shows what came later."""
    op = read_op(world, Verb.READ_AT)
    op["found"] = number(op, "found") + 1
    next(world.find("items", op=op["op"]))["mod"] = op["found"]


def wrong_else_branch(world: World) -> None:
    """The else-branch of a lost Txn reads another revision."""
    op = next(world.find("ops", verb=Verb.UPDATE, outcome=Outcome.CONFLICT))
    op["found"] = number(op, "found") - 2


def items_of_page(world: World, page: int) -> list[Row]:
    """What a page of a list showed that had another one behind it."""
    op = next(
        op
        for op in world.find("ops", verb=Verb.LIST, attempt=page)
        if len(list(world.find("items", op=op["op"]))) == 4
    )
    return list(world.find("items", op=op["op"]))


def page_empty(world: World) -> None:
    """The last page of a list shows nothing, and counts right."""
    op = next(
        op
        for op in world.find("ops", verb=Verb.LIST)
        if number(op, "count") == len(list(world.find("items", op=op["op"]))) > 0
    )
    world.rows["items"] = [item for item in world.rows["items"] if item["op"] != op["op"]]


def page_with_hole(world: World) -> None:
    """A page leaves out a key in its middle."""
    world.rows["items"].remove(items_of_page(world, 0)[1])


def page_without_first(world: World) -> None:
    """A later page leaves out its first key."""
    world.rows["items"].remove(items_of_page(world, 1)[0])


def page_of_another_revision(world: World) -> None:
    """A later page shows an object as it is after the list's revision."""
    for op in world.find("ops", verb=Verb.LIST):
        for item in world.find("items", op=op["op"]) if op["attempt"] else ():
            wrote = next(world.find("events", key=item["key"], type=EventType.PUT), None)
            if wrote and number(wrote, "mod") > number(op, "at"):
                item |= {name: wrote[name] for name in ("mod", "create", "version", "digest")}
                return
    pytest.fail("no such page")


def unordered_page(world: World) -> None:
    """A page shows two keys the wrong way round."""
    first, second = items_of_page(world, 0)[:2]
    items = world.rows["items"]
    a, b = items.index(first), items.index(second)
    items[a], items[b] = second, first


def page_miscounted(world: World) -> None:
    """A page counts one key too many."""
    op = next(world.find("ops", verb=Verb.LIST, attempt=1))
    op["count"] = number(op, "count") + 1


def more_denied(world: World) -> None:
    """A page with others behind it says that nothing more follows."""
    next(world.find("ops", verb=Verb.LIST, found=1))["found"] = 0


def more_promised(world: World) -> None:
    """The last page says that more follows."""
    ops = world.find("ops", verb=Verb.LIST, found=0)
    next(op for op in ops if text(op, "key") == PODS)["found"] = 1


def miscounted(world: World) -> None:
    """A count is one too low."""
    op = list(world.find("ops", verb=Verb.COUNT))[3]
    op["count"] = number(op, "count") - 1


def read_compacted(world: World) -> None:
    """A compacted revision is read."""
    compact = list(world.find("ops", verb=Verb.COMPACT, digest=-1))[-1]
    op = next(
        op
        for op in world.find("ops", verb=Verb.READ_AT)
        if number(op, "sent") > number(compact, "done") and number(op, "at") > 0
    )
    op["at"] = number(compact, "at") - 1


# Leases.


def leased_change(world: World, version: int = 1) -> tuple[Row, Row]:
    """A put with a lease that made that version at least, and the event of its end."""
    deletes = world.find("events", type=EventType.DELETE)
    leased = (e for e in deletes if text(e, "key").startswith(EVENTS))
    end = next(e for e in leased if number(e, "prev_version") >= version)
    put = next(
        op
        for op in world.rows["ops"]
        if op["key"] == end["key"] and op["revision"] == end["prev_mod"]
    )
    return put, end


def grant_of(world: World, put: Row) -> Row:
    """The grant of its lease."""
    return next(world.find("ops", verb=Verb.GRANT, lease=put["lease"]))


def expired_early(world: World) -> None:
    """A key goes a second before its lease ends."""
    grant_of(world, leased_change(world)[0])["ttl"] = TTL + 1


def expired_late(world: World) -> None:
    """A key goes six seconds after its lease ended."""
    put, _ = leased_change(world)
    late = 8_000_000
    grant = grant_of(world, put)
    world.rows["incidents"].clear()
    for name in ("due", "sent", "done"):
        grant[name] = number(grant, name) - late


def expired_never(world: World) -> None:
    """A key is still there at the end, long after its lease."""
    put, _ = leased_change(world)
    grant = grant_of(world, put)
    old = dict.fromkeys(("due", "sent", "done"), -9_000_000)
    world.rows["ops"].append(grant | old | {"op": 10_000, "lease": 5})
    new: Row = {"op": 10_001, "key": b"/unwatched", "revision": 2000, "lease": 5, "expected": 0}
    world.rows["ops"].append(put | new | {"verb": Verb.CREATE})
    final: Row = {"revision": 2000, "key": b"/unwatched", "mod": 2000, "create": 2000}
    world.rows["final"].append(final | {"version": 1, "lease": 5, "value": b""})
    world.rows["incidents"].clear()


def expired_twice(world: World) -> None:
    """A second delete of a key comes after its lease's end."""
    _, end = leased_change(world)
    alike = list(world.find("events", key=end["key"], mod=end["mod"]))
    nothing: Row = dict.fromkeys(("prev_mod", "prev_create", "prev_version", "prev_digest"), -1)
    mod = number(end, "mod") + 1
    # Whatever else had that revision makes room.
    world.rows["events"] = [event for event in world.rows["events"] if event["mod"] != mod]
    world.rows["ops"] = [op for op in world.rows["ops"] if op["revision"] != mod]
    for event in alike:
        world.rows["events"].append(event | (nothing | {"mod": mod}))


def ended_by_old_lease(world: World) -> None:
    """A key that got another lease goes with its old one."""
    put, _ = leased_change(world)
    other = number(put, "lease") + 100_000
    grant = grant_of(world, put)
    put["lease"] = other
    later: Row = {name: number(grant, name) + 1_000_000 for name in ("due", "sent", "done")}
    world.rows["ops"].append(grant | {"op": 10_000, "lease": other} | later)


def ended_without_lease(world: World) -> None:
    """A key that was put again without a lease goes with its old one."""
    put, _ = leased_change(world, version=2)
    put["lease"] = 0


FAULTS: dict[Callable[[World], None], tuple[str, str]] = {
    lost_update: ("CAS chains", "comparing with"),
    created_twice: ("CAS chains", "comparing with 0, after put of"),
    skipped: ("CAS chains", "comparing with"),
    conflict_without_reason: ("CAS chains", "failed at"),
    conflict_with_itself: ("CAS chains", "failed at"),
    never_applied: ("Final state", "has nothing of /registry/pods/gone"),
    forgotten: ("Acknowledged writes durable", "before a kill; the final list has revision"),
    resurrected_for_writer: ("Acknowledged writes durable", "the final list has revision"),
    final_without: ("Final state", "has nothing of"),
    final_empty: ("Final state", "has nothing of"),
    final_of_long_ago: ("Final state", "had been told before"),
    all_forgotten: ("Acknowledged writes durable", "the final list has nothing"),
    final_with: ("Final state", "it was absent"),
    final_other_value: ("Final state", "another create, version, lease or value"),
    final_other_version: ("Final state", "another create, version, lease or value"),
    went_back: ("Revision", "had been told before"),
    write_not_newer: ("Revision", "had been told before"),
    same_revision: ("Revision", "for two: UPDATE"),
    reused_revision: ("Revision", "one revision for two"),
    stream_went_back: ("Revision", "says revision 1 after"),
    newer_than_message: ("Revision", "brings an event of"),
    stale_get: ("Snapshot", "found revision"),
    blind_get: ("Snapshot", "found nothing"),
    get_other_value: ("Snapshot", "showed"),
    get_other_version: ("Snapshot", "version 70"),
    history_rewritten: ("Snapshot", "READ_AT"),
    wrong_else_branch: ("Snapshot", "found revision"),
    page_empty: ("Snapshot", "left out"),
    page_with_hole: ("Snapshot", "left out"),
    page_without_first: ("Snapshot", "left out"),
    page_of_another_revision: ("Snapshot", "LIST"),
    unordered_page: ("Snapshot", "after"),
    page_miscounted: ("Snapshot", "counted"),
    more_denied: ("Snapshot", "said that nothing more follows"),
    more_promised: ("Snapshot", "said that more follows; nothing did"),
    miscounted: ("Snapshot", "counted"),
    read_compacted: ("Snapshot", "had been compacted"),
    expired_early: ("TTL window", "s too early"),
    expired_late: ("TTL overdue", "was over"),
    expired_never: ("TTL overdue", "it is still there"),
    expired_twice: ("TTL window", "was seen after a delete"),
    ended_by_old_lease: ("TTL window", "too early"),
    ended_without_lease: ("TTL window", "had no lease any more"),
}
"""Each fault, the judge that must catch it, and what the evidence says."""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_caught(fault: Callable[[World], None], tmp_path: Path) -> None:
    """A planted fault of a write, read or lease is caught by its judge, which names it."""
    world = fresh()
    fault(world)
    judge, phrase = FAULTS[fault]
    found = verdict_of(world, judge, tmp_path)
    assert not found.passed
    assert any(phrase in each for each in found.evidence), found.evidence
