"""Actors: what each verb sends, what conflicts, refusals and silence make of a step."""

import asyncio
import json
from functools import partial
from itertools import pairwise

import pytest

from bench.client import requests
from bench.clock import now_us
from bench.drive.actor import ATTEMPTS_MAX, BACKOFF_US
from bench.plan import Edit, Step, Verb
from bench.records import ITEMS, OPS, Outcome
from bench.values import append, count_of, digest, entries, value
from tests.bench.drive.world import PODS, World, living
from tests.transport.running import eventually

KEY = PODS + b"ns/one"
CREATE = Step(Verb.CREATE, KEY, "create", shape="pod", size=400)
UPDATE = Step(Verb.UPDATE, KEY, "update", shape="pod", size=500)
DELETE = Step(Verb.DELETE, KEY, "delete")
GET = Step(Verb.GET, KEY, "get")


def other(seq: int = 0, owner: str = "") -> bytes:
    """A value that somebody else wrote."""
    return value(run="x", actor=99, seq=seq, shape="pod", size=300, owner=owner)


def outcomes(world: World) -> list[tuple[int | bytes, ...]]:
    """Verb and outcome of every call of an actor."""
    return [(row["verb"], row["outcome"]) for row in world.rows(OPS) if row["actor"] != -1]


@pytest.mark.parametrize("prefix", [b"", b"/mine"])
async def test_life_of_an_object(prefix: bytes) -> None:
    """Create, update and delete take effect below the prefix; records are without it."""
    async with living(PODS, prefix=prefix) as world:
        await world.done(CREATE, UPDATE, GET, DELETE, GET)
        wanted = [Verb.CREATE, Verb.UPDATE, Verb.GET, Verb.DELETE, Verb.GET]
        assert [(verb, Outcome.OK) for verb in wanted] == outcomes(world)
        create, update, get, delete, gone = world.rows(OPS, actor=0)
        assert {KEY} == set(world.column(OPS, "key", actor=0))
        assert (0, create["revision"], -1) == (
            create["expected"],
            update["expected"],
            get["expected"],
        )
        assert (update["revision"], update["revision"]) == (get["found"], delete["expected"])
        assert (0, -1, -1) == (gone["found"], gone["digest"], delete["digest"])
        (item,) = world.rows(ITEMS, op=get["op"])
        assert (update["revision"], create["revision"], 2, update["digest"], KEY) == (
            item["mod"],
            item["create"],
            item["version"],
            item["digest"],
            item["key"],
        )
        assert world.store.at(prefix + KEY, int(update["revision"])) is not None
        assert world.store.get(prefix + KEY) is None


async def test_values_are_the_actors() -> None:
    """What is written names run, actor, step and owner, is of its size, and is recorded."""
    async with living(PODS) as world:
        await world.done(GET, CREATE._replace(owner="me"), number=7)
        kv = world.store.get(KEY)
        assert kv is not None
        said = json.loads(kv.value)
        assert ("test", 7, 1, "me") == (said["run"], said["actor"], said["seq"], said["owner"])
        assert len(kv.value) == 400
        assert [digest(kv.value)] == world.column(OPS, "digest", verb=Verb.CREATE)


async def test_create_of_what_exists() -> None:
    """A create that comes second is a conflict, and is not tried again."""
    async with living(PODS) as world:
        world.store.put(KEY, other())
        await world.done(CREATE)
        assert [(Verb.CREATE, Outcome.CONFLICT)] == outcomes(world)
        assert [-1] == world.column(OPS, "found", actor=0)


@pytest.mark.parametrize("step", [UPDATE, DELETE])
async def test_conflict_is_tried_again(step: Step) -> None:
    """Who was slower tries again with what the Txn read, counted from that answer."""
    async with living(PODS) as world:
        world.store.put(KEY, other())
        await eventually(lambda: world.apiserver.known(KEY) is not None)
        world.store.before.append(lambda: world.store.put(KEY, other(1)))
        await world.done(step)
        first, second = world.rows(OPS, actor=0)
        assert (Outcome.CONFLICT, Outcome.OK) == (first["outcome"], second["outcome"])
        assert (0, 1) == (first["attempt"], second["attempt"])
        assert first["found"] == second["expected"]
        assert first["done"] == second["due"]


async def test_conflicts_end() -> None:
    """After a few conflicts a step is given up, and the next one is taken."""
    async with living(PODS) as world:
        world.store.put(KEY, other())
        for seq in range(ATTEMPTS_MAX):
            world.store.before.append(partial(world.store.put, KEY, other(seq)))
        await world.done(UPDATE, GET)
        tried = [(Verb.UPDATE, Outcome.CONFLICT)] * ATTEMPTS_MAX
        assert [*tried, (Verb.GET, Outcome.OK)] == outcomes(world)[-1 - ATTEMPTS_MAX :]


async def test_conflict_with_a_deletion() -> None:
    """What was deleted meanwhile is not written again by an update."""
    async with living(PODS) as world:
        world.store.put(KEY, other())
        await eventually(lambda: world.apiserver.known(KEY) is not None)
        world.store.before.append(lambda: world.store.delete(KEY))
        await world.done(UPDATE)
        assert [(Verb.UPDATE, Outcome.CONFLICT)] == outcomes(world)
        assert [0] == world.column(OPS, "found", actor=0)
        assert world.store.get(KEY) is None


async def test_unseen_object_is_read_first() -> None:
    """An update of an object that no cache has begins with a read, which is no refusal."""
    async with living() as world:
        world.store.put(KEY, other())
        await world.done(UPDATE._replace(refusal=3), Step(Verb.DELETE, PODS + b"none", "x"))
        read, update, absent = world.rows(OPS, actor=0)
        assert (Verb.GET, Verb.UPDATE, Verb.GET) == (read["verb"], update["verb"], absent["verb"])
        assert (read["found"], 0) == (update["expected"], absent["found"])
        assert (0, 3) == (read["refusal"], update["refusal"])


async def test_edits() -> None:
    """An increment and an append change what was seen, also after a conflict."""
    async with living(PODS) as world:
        world.store.put(KEY, other())
        await eventually(lambda: world.apiserver.known(KEY) is not None)
        world.store.before.append(lambda: world.store.put(KEY, append(other(), "theirs", 100)))
        await world.done(
            UPDATE._replace(edit=Edit.APPEND, size=60),
            UPDATE._replace(edit=Edit.INCREMENT),
            UPDATE._replace(edit=Edit.INCREMENT),
        )
        kv = world.store.get(KEY)
        assert kv is not None
        assert (["theirs", "0.0"], 2) == (entries(kv.value), count_of(kv.value))
        assert json.loads(kv.value)["seq"] == 2


async def test_adopt_takes_the_first_without_owner() -> None:
    """Owned and unknown candidates are passed over, a lost race too; the name is bound."""
    names = [PODS + b"p/%d" % n for n in range(5)]
    async with living(PODS) as world:
        for n in (1, 2, 3):
            world.store.put(names[n], other(owner="them" if n == 1 else ""))
        await eventually(lambda: world.apiserver.known(names[3]) is not None)
        world.store.before.append(lambda: world.store.put(names[2], other(owner="them")))
        adopt = Step(
            Verb.ADOPT, b"", "adopt", shape="pod", size=300, owner="me", candidates=tuple(names)
        )
        follow = Step(Verb.CREATE, b"/registry/events/{bound}.1", "e", shape="event", size=200)
        await world.done(adopt, follow)
        lost, won, event = world.rows(OPS, actor=0)
        assert (names[2], Outcome.CONFLICT) == (lost["key"], lost["outcome"])
        assert (names[3], Outcome.OK, 1) == (won["key"], won["outcome"], won["attempt"])
        assert event["key"] == b"/registry/events/3.1"
        kv = world.store.get(names[3])
        assert kv is not None
        assert json.loads(kv.value)["owner"] == "me"


async def test_nothing_to_adopt() -> None:
    """If others were faster the step is lost, which is recorded with the time when it was seen, and
    what needs its name is left out.
    """
    async with living(PODS) as world:
        world.store.put(KEY, other(owner="them"))
        await eventually(lambda: world.apiserver.known(KEY) is not None)
        adopt = Step(Verb.ADOPT, b"", "adopt", candidates=(KEY,))
        await world.done(adopt, Step(Verb.CREATE, PODS + b"{bound}", "x", shape="pod"), GET)
        assert [(Verb.ADOPT, Outcome.CONFLICT), (Verb.GET, Outcome.OK)] == outcomes(world)
        lost, read = world.rows(OPS, actor=0)
        assert (KEY, world.site.zero_us - 1, 0) == (lost["key"], lost["sent"], lost["code"])
        assert int(lost["due"]) <= int(lost["done"]) <= int(read["sent"])


async def test_a_race_for_the_last_candidate() -> None:
    """Who loses the last one at the store has lost the step, after the call that says so."""
    async with living(PODS) as world:
        world.store.put(KEY, other())
        await eventually(lambda: world.apiserver.known(KEY) is not None)
        world.store.before.append(lambda: world.store.put(KEY, other(owner="them")))
        await world.done(Step(Verb.ADOPT, b"", "adopt", shape="pod", size=300, candidates=(KEY,)))
        call, lost = world.rows(OPS, actor=0)
        assert (Outcome.CONFLICT, 0) == (call["outcome"], call["attempt"])
        assert (Outcome.CONFLICT, 1) == (lost["outcome"], lost["attempt"])
        assert int(call["done"]) <= int(lost["done"])
        assert int(call["sent"]) > int(lost["sent"]) == world.site.zero_us - 1


def unsent(world: World) -> list[tuple[int | bytes, ...]]:
    """Step, message and due time of what was never sent, after checking that they say so."""
    never = world.site.zero_us - 1
    rows = world.rows(OPS, sent=never)
    assert all((row["done"], row["outcome"], row["code"]) == (never, 3, 4) for row in rows)
    return [(row["step"], row["message"], row["due"]) for row in rows]


async def test_nothing_seen_to_adopt() -> None:
    """A candidate that the cache never showed is a failure, and so is what was to follow."""
    async with living(PODS) as world:
        adopt = Step(Verb.ADOPT, b"", "adopt", candidates=(PODS + b"none",))
        follow = Step(Verb.CREATE, PODS + b"{bound}", "x", shape="pod")
        await world.done(adopt, follow, GET)
        assert [b"a candidate was never seen", b"its actor adopted nothing"] == [
            message for _, message, _ in unsent(world)
        ]
        assert [PODS + b"none", PODS + b"{bound}", KEY] == world.column(OPS, "key", actor=0)


async def test_no_lease() -> None:
    """A step whose lease cannot be had was not sent, and is recorded all the same."""
    async with living(PODS) as world:
        world.store.refusals[requests.GRANT].append((14, "etcdserver: no leader"))
        await world.done(CREATE._replace(lease_ttl=60), GET)
        assert [(0, b"no lease")] == [row[:2] for row in unsent(world)]
        assert [Outcome.OK] == world.column(OPS, "outcome", verb=Verb.GET, actor=0)


async def test_what_was_due_and_not_begun() -> None:
    """Steps that a slow server kept waiting until the load ended are not left out."""
    steps = [
        CREATE._replace(due_us=0),
        GET._replace(due_us=1000),
        UPDATE,
        GET._replace(due_us=2000),
        GET._replace(due_us=60_000_000),
    ]
    async with living(PODS) as world:
        world.store.silent.add(requests.TXN)
        acting = world.act(*steps)
        await asyncio.sleep(0.01)
        world.site.over = True
        acting.leave()
        zero_us, why = world.site.zero_us, b"the load ended before it was begun"
        assert [(1, why, zero_us + 1000), (3, why, zero_us + 2000)] == unsent(world)
        for line in world.lines():
            line.expire(now_us() + 10_000_000)
        assert 3 == len(world.rows(OPS, actor=0))
        assert not acting._own


async def test_the_next_in_line_was_due() -> None:
    """A step that counts from an answer that came after the end was due with that answer."""
    async with living(PODS) as world:
        acting = world.act(CREATE, UPDATE, UPDATE)
        world.site.over = True
        await eventually(lambda: acting.done)
        done = world.column(OPS, "done", verb=Verb.CREATE)
        assert [(1, done[0])] == [(step, due) for step, _, due in unsent(world)]


async def test_lists_and_counts() -> None:
    """A list comes in pages at one revision and fills the cache; a count only counts."""
    async with living() as world:
        keys = [PODS + b"%d" % n for n in range(5)]
        for key in keys:
            world.store.put(key, other())
        await world.done(Step(Verb.LIST, PODS, "l", limit=2), Step(Verb.COUNT, PODS, "c"))
        *pages, count = world.rows(OPS, actor=0)
        assert [(5, 0), (3, 6), (1, 6)] == [(page["count"], page["at"]) for page in pages]
        assert [0, 1, 2] == [page["attempt"] for page in pages]
        assert pages[0]["done"] == pages[1]["due"]
        assert (Verb.COUNT, 5, -1) == (count["verb"], count["count"], count["found"])
        assert keys == world.column(ITEMS, "key")
        assert world.apiserver.known(keys[4]) is not None


async def test_history() -> None:
    """READ_AT asks for the revision that was the head so long ago."""
    async with living(PODS) as world:
        first = world.store.put(KEY, other(1))
        world.apiserver.saw(now_us() - 2_000_000, first)
        world.store.put(KEY, other(2))
        world.apiserver.saw(now_us() - 500_000, world.store.revision)
        await world.done(Step(Verb.READ_AT, KEY, "h", due_us=0, think_us=1_000_000))
        (row,) = world.rows(OPS, actor=0)
        assert (first, first, digest(other(1))) == (row["at"], row["found"], row["digest"])


async def test_answers_tell_how_far_the_store_is() -> None:
    """An apiserver knows the head of history from its answers, though a watch was faster."""
    async with living(PODS) as world:
        await world.done(CREATE)
        await eventually(lambda: world.apiserver.known(KEY) is not None)
        world.site.head_revision += 10
        world.apiserver.revisions.clear()
        await world.done(UPDATE)
        assert 1 == len(world.apiserver.revisions)


async def test_status() -> None:
    """A STATUS is answered with the head revision."""
    async with living() as world:
        await world.done(Step(Verb.STATUS, b"", "s"))
        assert [world.store.revision] == world.column(OPS, "revision", actor=0)


async def test_compaction() -> None:
    """The winner compacts to what it saw an interval earlier; the loser learns the version."""
    compact = Step(Verb.COMPACT, b"compact_rev_key", "compact")
    async with living(PODS) as world:
        winner = [compact, compact._replace(think_us=200_000), compact._replace(think_us=200_000)]
        acting = world.act(*winner, number=1)
        await eventually(lambda: len(world.rows(OPS, actor=1)) == 1)
        await world.done(compact, number=2)
        assert [Outcome.CONFLICT] == world.column(OPS, "outcome", actor=2)
        await eventually(lambda: acting.done)
        txns = world.rows(OPS, actor=1, at=0)
        compactions = [row for row in world.rows(OPS, actor=1) if row["at"]]
        assert [Outcome.OK] * 5 == world.column(OPS, "outcome", actor=1)
        assert [txns[0]["revision"], txns[1]["revision"]] == [row["at"] for row in compactions]
        assert world.store.compacted == txns[1]["revision"]
        assert [-1, -1] == [row["digest"] for row in compactions]


async def test_nothing_is_sent_early() -> None:
    """A step due at the very beginning waits for it, as one due later does."""
    async with living() as world:
        world.site.zero_us = zero_us = now_us() + 60_000
        await world.done(CREATE._replace(due_us=0), UPDATE._replace(due_us=30_000))
        create, update = world.rows(OPS, actor=0)
        assert (zero_us, zero_us + 30_000) == (create["due"], update["due"])
        assert all(int(row["sent"]) >= int(row["due"]) for row in (create, update))
        await world.done(CREATE._replace(key=PODS + b"late", due_us=1000), number=1)
        assert [zero_us + 1000] == world.column(OPS, "due", actor=1)


async def test_think_time() -> None:
    """A step without a time of its own is due so long after the answer before it."""
    async with living() as world:
        await world.done(CREATE, UPDATE._replace(think_us=20_000))
        create, update = world.rows(OPS, actor=0)
        assert update["due"] == int(create["done"]) + 20_000


async def test_unknown_outcome() -> None:
    """Who knows not whether it was done goes on, a while later, with the next step."""
    async with living(PODS) as world:
        world.store.refusals[requests.TXN].append((14, "etcdserver: no leader"))
        await world.done(CREATE, GET)
        create, get = world.rows(OPS, actor=0)
        assert (Outcome.UNKNOWN, 14, b"etcdserver: no leader", -1) == (
            create["outcome"],
            create["code"],
            create["message"],
            create["revision"],
        )
        assert int(get["due"]) == int(create["done"]) + BACKOFF_US


async def test_words_of_a_server_are_not_ours() -> None:
    """A server that says that there is no connection has been sent something."""
    async with living(PODS) as world:
        world.store.refusals[requests.TXN].append((14, "no connection"))
        await world.done(CREATE)
        assert [Outcome.UNKNOWN] == world.column(OPS, "outcome", actor=0)


async def test_refusal() -> None:
    """What the store refuses was not done."""
    async with living(PODS) as world:
        world.store.refusals[requests.TXN].append((3, "etcdserver: request is too large"))
        await world.done(CREATE._replace(refusal=3))
        (row,) = world.rows(OPS, actor=0)
        assert (Outcome.REFUSED, 3, 3) == (row["outcome"], row["code"], row["refusal"])


async def test_timeout() -> None:
    """A call that is not answered is over after its time, as one that may have been done."""
    async with living(PODS, timeout_us=20_000) as world:
        world.store.silent.add(requests.TXN)
        acting = world.act(CREATE)
        connection = world.apiserver.line(KEY).connection
        assert connection is not None
        connection.expire(now_us() + 30_000)
        await eventually(lambda: acting.done)
        assert [(Verb.CREATE, Outcome.UNKNOWN)] == outcomes(world)


async def test_outage() -> None:
    """However many steps come due while the server is away, each is tried and recorded."""
    steps = [CREATE._replace(key=PODS + b"%d" % n, due_us=n) for n in range(3)]
    async with living(PODS) as world:
        for line in world.lines():
            line.give_up()
        await eventually(lambda: all(line.connection is None for line in world.lines()))
        await world.done(*steps)
        rows = world.rows(OPS, actor=0)
        assert [(Outcome.REFUSED, 14, b"no connection")] * 3 == [
            (row["outcome"], row["code"], row["message"]) for row in rows
        ]
        waits = [int(b["sent"]) - int(a["done"]) for a, b in pairwise(rows)]
        assert min(waits) >= BACKOFF_US - 1000
        zero_us = world.site.zero_us
        assert [zero_us, zero_us + 1, zero_us + 2] == [row["due"] for row in rows]


async def test_end_of_the_load() -> None:
    """When the load is over no step is begun; what is under way is finished."""
    async with living(PODS) as world:
        acting = world.act(CREATE, UPDATE._replace(think_us=60_000_000), UPDATE)
        world.site.over = True
        await eventually(lambda: acting.done)
        assert [(Verb.CREATE, Outcome.OK)] == outcomes(world)
        assert not acting.busy
