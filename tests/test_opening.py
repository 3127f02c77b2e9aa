"""Taking the shards at a start: where the order goes on, what is missing, what is refused."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from backends.memory import MemoryBackend, MemoryDisk
from kvstore.backend import Batch, CommitResult, HomeRows, Outcome, Row, ShardRecord
from kvstore.errors import BackendError, UnreachableError
from kvstore.opening import ABSENT, LOSS_BUMP, Opened, close_shards, open_shards
from kvstore.reservation import AHEAD
from kvstore.shard_config import RouteSpec, ShardConfig, ShardSpec, one_shard

NAMES = ("core", "events", "agents")
CONFIG = ShardConfig(
    [ShardSpec(name, "memory:") for name in NAMES],
    [RouteSpec(b"/events/", "events"), RouteSpec(b"/agents/", "agents")],
)
ONE = one_shard("memory:", name="core")


class Odd(MemoryBackend):
    """Its first commits end as ``outcomes`` say, stored or not."""

    outcomes: tuple[tuple[Outcome, bool], ...] = ()

    def commit(self, batch: Batch, done: Callable[[CommitResult], None]) -> None:
        """Commit, or not, and tell something."""
        if not self.outcomes:
            super().commit(batch, done)
            return
        (outcome, stored), *left = self.outcomes
        self.outcomes = tuple(left)
        told = CommitResult(outcome, "as told")
        if stored:
            super().commit(batch, lambda _: done(told))
        else:
            self._later(lambda: done(told))


def new_disks() -> list[MemoryDisk]:
    """Three empty databases."""
    return [MemoryDisk(shard=name) for name in NAMES]


def known_disks(*tips: int, reserved: int | None = None) -> list[MemoryDisk]:
    """Three databases of one store, as far as ``tips``, which home knows and has reserved."""
    named = zip(NAMES, tips, strict=True)
    disks = [MemoryDisk(shard=name, tip=tip, epoch=1) for name, tip in named]
    home = disks[0]
    home.reserved = max(tips) if reserved is None else reserved
    home.shard_map = CONFIG.document()
    home.records = {disk.shard: ShardRecord(disk.shard, disk.tip, "") for disk in disks[1:]}
    return disks


def hold(disks: list[MemoryDisk]) -> list[Odd]:
    """A backend for each."""
    later = asyncio.get_running_loop().call_soon
    return [Odd(disk, later=later) for disk in disks]


async def start(
    disks: list[MemoryDisk], config: ShardConfig = CONFIG, *, accept_loss: bool = False
) -> Opened:
    """Open them all, and die."""
    backends = hold(disks)
    opened = await open_shards(backends, config, accept_loss=accept_loss)
    for backend in backends:
        backend.crash()
    return opened


def row(revision: int, sub: int, key: bytes) -> Row:
    """A new key."""
    return (revision, sub, key, revision, 1, 0, b"v")


# -- one shard -------------------------------------------------------------------------------------


async def test_one_shard_goes_on_at_its_tip() -> None:
    """Nothing is stored for it but the epoch: it costs what it cost without shards."""
    disk = MemoryDisk(shard="core", tip=7, epoch=3, shard_map=ONE.document())
    before = replace(disk, epoch=4)
    opened = await start([disk], ONE)
    assert replace(disk, holder=None) == before
    assert (opened.fences[0].tip, opened.fences[0].reserved) == (7, 0)
    assert (opened.missing, opened.redo, opened.records) == ({}, {}, {})


async def test_one_shard_that_was_one_of_several() -> None:
    """What was reserved may have been issued, on shards that are no more."""
    disk = MemoryDisk(shard="core", tip=7, epoch=3, reserved=90, shard_map=ONE.document())
    for _ in range(2):
        opened = await start([disk], ONE)
        assert (opened.fences[0].tip, disk.tip) == (90, 90)
    disk.tip = 95
    assert (await start([disk], ONE)).fences[0].tip == 95


# -- several: the start rule -----------------------------------------------------------------------


async def test_a_new_store_begins_at_1() -> None:
    """As in etcd; what may be issued is reserved, the map stored, all belong to home's cluster."""
    disks = new_disks()
    disks[0].cluster_id, disks[0].member_id = 77, 78
    opened = await start(disks)
    home = disks[0]
    assert (home.tip, home.reserved, home.shard_map) == (1, 1 + AHEAD, CONFIG.document())
    assert home.records == {name: ShardRecord(name, 1, "") for name in NAMES[1:]}
    assert [disk.cluster_id for disk in disks] == [77] * 3
    assert [fence.tip for fence in opened.fences] == [1, 1, 1]
    assert opened.records == home.records


@pytest.mark.parametrize(
    ("tips", "reserved", "base"),
    [((7, 9, 3), 9, 9), ((7, 9, 3), 500, 500), ((12, 9, 3), 12, 12), ((12, 9, 3), 8, 12)],
)
async def test_the_order_goes_on_at_the_highest_that_is_known(
    tips: tuple[int, ...], reserved: int, base: int
) -> None:
    """Of all tips and of what was reserved; it is stored before anything is issued."""
    disks = known_disks(*tips, reserved=reserved)
    opened = await start(disks)
    assert (disks[0].tip, disks[0].reserved) == (base, base + AHEAD)
    assert (opened.fences[0].tip, opened.fences[0].reserved) == (base, base + AHEAD)
    assert [disk.tip for disk in disks[1:]] == list(tips[1:])


async def test_a_start_after_a_crash_is_above_all_that_was_reserved() -> None:
    """Each one: a process may have issued revisions that no shard shows which is there."""
    disks = new_disks()
    await start(disks)
    await start(disks)
    assert disks[0].tip == 1 + AHEAD
    await start(disks)
    assert disks[0].tip == 1 + 2 * AHEAD


# -- missing ---------------------------------------------------------------------------------------


async def test_a_shard_that_cannot_be_reached_is_missing() -> None:
    """The others are taken; its record stays as it was."""
    disks = known_disks(7, 9, 12, reserved=12)
    disks[2].reachable = False
    opened = await start(disks)
    assert opened.fences[2] == ABSENT._replace(shard="agents")
    assert [fence.epoch for fence in opened.fences] == [2, 2, 0]
    assert opened.missing == {2: "the memory of shard agents cannot be reached"}
    assert disks[0].records["agents"].tip == 12
    assert disks[0].tip == 12
    assert disks[2].epoch == 1


async def test_without_home_there_is_no_start() -> None:
    """Whatever the others are."""
    disks = known_disks(7, 9, 12)
    disks[0].reachable = False
    with pytest.raises(UnreachableError, match="core cannot be reached"):
        await start(disks)
    assert [disk.epoch for disk in disks] == [1, 1, 1]


async def test_a_shard_that_goes_while_it_is_looked_at_is_missing() -> None:
    """The others are opened, and it is let go; home is needed."""

    class Going(Odd):
        async def load_home(self) -> HomeRows:
            if self.disk is disks[gone]:
                raise UnreachableError("connection lost")
            return await super().load_home()

    for gone in (1, 0):
        disks = known_disks(7, 9, 12)
        later = asyncio.get_running_loop().call_soon
        backends = [Going(disk, later=later) for disk in disks]
        if gone:
            opened = await open_shards(backends, CONFIG)
            assert opened.missing == {gone: "connection lost"}
            assert [fence.epoch for fence in opened.fences] == [2, 0, 2]
        else:
            with pytest.raises(UnreachableError, match="connection lost"):
                await open_shards(backends, CONFIG)
        assert disks[gone].holder is None


async def test_a_changed_map_needs_every_shard() -> None:
    """It is refused before anything is stored."""
    disks = known_disks(7, 9, 12)
    disks[0].shard_map = ONE.document()
    disks[2].reachable = False
    with pytest.raises(BackendError, match="agents cannot be reached"):
        await start(disks)
    assert (disks[0].tip, disks[0].reserved) == (7, 12)
    assert [disk.holder for disk in disks] == [None] * 3


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cluster_id": 5}, "belongs to cluster 5"),
        ({"shard": "other"}, "the database of shard agents is that of shard other"),
        ({"tip": 11}, "agents has lost data: it is at revision 11 and was at 12"),
        ({"origin": "b"}, "agents is another one than it was: b instead of unnamed"),
        ({"shard_map": ONE.document()}, "agents is the home of another store"),
    ],
)
async def test_a_wrong_shard_stops_the_start(change: dict[str, object], reason: str) -> None:
    """It is told in one line; all are let go, and nothing was stored."""
    disks = known_disks(7, 9, 12, reserved=12)
    for name, value in change.items():
        setattr(disks[2], name, value)
    with pytest.raises(BackendError, match=reason) as caught:
        await start(disks)
    assert "\n" not in str(caught.value)
    assert (disks[0].tip, disks[0].reserved) == (7, 12)
    assert [disk.holder for disk in disks] == [None] * 3


@pytest.mark.parametrize(("tip", "reserved", "known"), [(7, 8, 8), (7, 0, 7), (10, 8, 10)])
async def test_a_home_that_lacks_what_others_have_stops_the_start(
    tip: int, reserved: int, known: int
) -> None:
    """Nothing is committed on any shard that home has not reserved, so that it was older then."""
    disks = known_disks(tip, known, known + 1, reserved=reserved)
    with pytest.raises(BackendError) as caught:
        await start(disks)
    assert str(caught.value) == (
        f"shard core has lost data: shard agents is at revision {known + 1}, and core knows of none"
        f" after {known}"
    )
    assert (disks[0].tip, disks[0].reserved) == (tip, reserved)
    await start(disks, accept_loss=True)
    assert disks[0].tip == known + 1 + LOSS_BUMP


async def test_a_failover_of_which_home_has_not_heard() -> None:
    """The shard's own row is what counts: its backend has looked whether anything is missing."""
    disks = known_disks(7, 9, 12)
    disks[2].origin = "system/2"
    disks[0].records["agents"] = ShardRecord("agents", 12, "system/1")
    await start(disks)
    assert disks[0].records["agents"] == ShardRecord("agents", 12, "system/2")


async def test_a_removed_shard_comes_back_with_a_new_database() -> None:
    """What home remembers of the one that had its name is not held against it, while it is new."""
    disks = known_disks(7, 9, 12)
    without = ShardConfig(CONFIG.shards[:2], CONFIG.routes[:1])
    disks[0].shard_map = without.document()
    disks[2] = MemoryDisk(shard="agents", tip=5, epoch=1)
    with pytest.raises(BackendError, match="agents has lost data"):
        await start(disks)
    disks[2] = MemoryDisk(shard="agents")
    await start(disks)
    assert disks[0].records["agents"] == ShardRecord("agents", 1, "")
    disks[2] = MemoryDisk(shard="agents", origin="other", epoch=1)
    with pytest.raises(BackendError, match="agents is another one"):
        await start(disks)


async def test_a_shard_that_is_not_home_does_not_start_alone() -> None:
    """It would begin an order of its own over the revisions that it has."""
    disks = new_disks()
    await start(disks)
    events = disks[1]
    events.tip = 9
    with pytest.raises(BackendError, match="events has never been the first of a store"):
        await start([events], one_shard("memory:", name="events"))
    assert (events.tip, events.shard_map, events.holder) == (9, "", None)
    await start(disks)


async def test_an_empty_shard_that_was_started_alone() -> None:
    """It is a home from then on, and not taken for another one's shard."""
    disks = new_disks()
    await start(disks)
    await start([disks[1]], one_shard("memory:", name="events"))
    with pytest.raises(BackendError, match="events is the home of another store"):
        await start(disks)


async def test_a_shard_in_use_stops_the_start() -> None:
    """It is there, and somebody else's: that is no reason to serve without it."""
    disks = known_disks(7, 9, 12)
    user = hold(disks)[1]
    await user.open()
    with pytest.raises(BackendError, match="in use"):
        await start(disks)
    assert [disk.holder for disk in disks] == [None, user, None]


async def test_a_loss_that_is_accepted() -> None:
    """The shards are taken as they are; what is above is skipped and everything compacted, so that
    whoever has seen what is lost is told so.
    """
    disks = known_disks(7, 9, 12, reserved=20)
    disks[2].tip, disks[2].origin = 11, "b"
    opened = await start(disks, accept_loss=True)
    base = 20 + LOSS_BUMP
    assert (disks[0].tip, disks[0].compact_revision) == (base, base)
    assert (opened.fences[0].tip, opened.fences[0].compact_revision) == (base, base)
    assert disks[0].records["agents"] == ShardRecord("agents", 11, "b")
    await start(disks)


async def test_a_loss_of_one_shard_that_is_accepted() -> None:
    """Nothing was reserved, and nobody knows how much is lost: a day of writes is skipped."""
    disk = MemoryDisk(shard="core", tip=11, epoch=1, shard_map=ONE.document())
    (fence,) = (await start([disk], ONE, accept_loss=True)).fences
    a_day_of_writes = 24 * 3600 * 100_000
    assert a_day_of_writes < disk.compact_revision == disk.tip == fence.tip


# -- redo records ----------------------------------------------------------------------------------


def with_redo(disks: list[MemoryDisk]) -> None:
    """Home has committed two revisions for both others, which have none, or the first of them."""
    disks[0].tip = 14
    disks[0].redo = [
        ("events", row(13, 0, b"/events/a")),
        ("agents", row(13, 1, b"/agents/a")),
        ("events", row(14, 0, b"/events/b")),
        ("agents", row(14, 1, b"/agents/b")),
    ]
    disks[1].rows[13, 0] = row(13, 0, b"/events/a")
    disks[1].tip = 13


async def test_what_home_has_recorded_is_applied() -> None:
    """To each what it lacks; then the records are dropped."""
    disks = known_disks(7, 9, 12)
    with_redo(disks)
    opened = await start(disks)
    assert [list(disk.rows) for disk in disks[1:]] == [[(13, 0), (14, 0)], [(13, 1), (14, 1)]]
    assert [fence.tip for fence in opened.fences] == [14, 14, 14]
    assert disks[0].redo == []
    assert disks[0].records["agents"].tip == 14
    await start(disks)


async def test_what_is_recorded_for_a_missing_shard_is_kept() -> None:
    """Until it has it; the other one has its part meanwhile."""
    disks = known_disks(7, 9, 12)
    with_redo(disks)
    disks[2].reachable = False
    opened = await start(disks)
    assert list(disks[1].rows) == [(13, 0), (14, 0)]
    assert opened.redo == {2: [row(13, 1, b"/agents/a"), row(14, 1, b"/agents/b")]}
    assert len(disks[0].redo) == 4
    disks[2].reachable = True
    await start(disks)
    assert list(disks[2].rows) == [(13, 1), (14, 1)]
    assert disks[0].redo == []


@pytest.mark.parametrize(
    ("outcome", "stored"),
    [(Outcome.NOT_COMMITTED, False), (Outcome.UNKNOWN, False), (Outcome.UNKNOWN, True)],
)
async def test_a_shard_that_does_not_take_its_part_is_missing(
    outcome: Outcome,
    stored: bool,  # noqa: FBT001
) -> None:
    """It is let go, to be opened again; whether it was stored is seen then."""
    disks = known_disks(7, 9, 12)
    with_redo(disks)
    backends = hold(disks)
    backends[2].outcomes = ((outcome, stored),)
    opened = await open_shards(backends, CONFIG)
    assert opened.missing == {2: f"shard agents does not commit: {outcome.value}: as told"}
    assert opened.fences[2].epoch == 0
    assert (disks[2].holder, len(disks[0].redo)) == (None, 4)
    await close_shards(backends)
    await start(disks)
    assert list(disks[2].rows) == [(13, 1), (14, 1)]


async def test_records_for_a_shard_that_is_not_configured() -> None:
    """They would be lost without it."""
    disks = known_disks(7, 9, 12)
    with_redo(disks)
    two = ShardConfig(CONFIG.shards[:2], CONFIG.routes[:1])
    with pytest.raises(BackendError, match="for shard agents, which the configuration leaves out"):
        await start(disks[:2], two)


@pytest.mark.parametrize("number", [0, 1])
async def test_a_shard_that_breaks_meanwhile(number: int) -> None:
    """Home while the start is stored, another one while it gets its part."""
    disks = known_disks(7, 9, 12)
    with_redo(disks)
    backends = hold(disks)
    backends[number].outcomes = ((Outcome.BROKEN, False),)
    with pytest.raises(BackendError, match=f"{NAMES[number]} does not commit: broken: as told"):
        await open_shards(backends, CONFIG)
    assert [disk.holder for disk in disks] == [None] * 3


@pytest.mark.parametrize("stored", [True, False])
async def test_a_start_whose_outcome_is_unknown(stored: bool) -> None:  # noqa: FBT001
    """It has failed; the next one is no lower, whether it was stored or not."""
    disks = known_disks(7, 9, 12)
    backends = hold(disks)
    backends[0].outcomes = ((Outcome.UNKNOWN, stored),)
    with pytest.raises(BackendError, match="core does not commit: unknown: as told"):
        await open_shards(backends, CONFIG)
    opened = await start(disks)
    assert opened.fences[0].tip == (12 + AHEAD if stored else 12)
