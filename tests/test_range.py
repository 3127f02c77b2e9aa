"""Reads at a revision: what one step may cost, and that shards make no difference. Answers are
compared with the model's in ``test_model.py`` and ``test_sim.py``.
"""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import history
from kvstore.history import Entry, History, Log, MergedHistory, in_range
from kvstore.index import Index
from kvstore.range import RangeQuery, RangeRead

looks = [0]


class Key(bytes):
    """A key that counts how often keys are looked at."""

    __slots__ = ()

    def __lt__(self, other: bytes) -> bool:
        looks[0] += 1
        return bytes.__lt__(self, other)

    def __eq__(self, other: object) -> bool:
        looks[0] += 1
        return bytes.__eq__(self, other)

    def __hash__(self) -> int:
        looks[0] += 1
        return bytes.__hash__(self)


class World:
    """An index with its history, one per shard; a key's second byte tells its shard."""

    def __init__(self, shards: int = 1) -> None:
        self.index = Index()
        self.histories = [History() for _ in range(shards)]
        several = MergedHistory(self.histories)
        self.history: Log = several if shards > 1 else self.histories[0]
        self.revision = 1
        self.live: dict[bytes, Entry] = {}

    def revise(self, changes: Mapping[bytes, bool]) -> None:
        """One revision: keys that are live and to die do so, the others are put."""
        self.revision += 1
        for sub, (key, dies) in enumerate(changes.items()):
            before = self.live.pop(key, None)
            if dies and before is not None:
                entry: Entry = (self.revision, sub, 0, 0, 0)
                self.index.delete(key, entry)
            else:
                create, version = (before[2], before[3]) if before else (self.revision, 0)
                entry = (self.revision, sub, create, version + 1, 0)
                self.index.put(key, entry, b"v")
                self.live[key] = entry
            self.histories[key[1] % len(self.histories)].append(key, entry)


DEAD = [Key(b"/a/%05d" % n) for n in range(4_000)]
LIVE = [Key(b"/b/%05d" % n) for n in range(4_000)]
LOOKS_MAX = 2_000
"""A step of 64 keys, bisections in eight blocks and some thousand keys included."""


@pytest.fixture(params=[1, 2], ids=["one shard", "two shards"])
def world(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> World:
    """Half of the keys died after revision 8001, where all were there."""
    monkeypatch.setattr(history, "BLOCK_CHANGES", 512)
    made = World(request.param)
    for key in (*DEAD, *LIVE):
        made.revise({key: False})
    for key in DEAD:
        made.revise({key: True})
    return made


def read(world: World, query: RangeQuery) -> RangeRead:
    """Begin a read at revision 8001."""
    return RangeRead(world.index, world.history, query, at=8_001, head=world.revision, step_keys=64)


@pytest.mark.parametrize("first", [b"/a/", b"/b/"])
def test_a_page_behind_the_head_looks_at_what_it_shows(world: World, first: bytes) -> None:
    """Neither its beginning nor a step looks at all that died in the rest of the range."""
    looks[0] = 0
    tested = read(world, RangeQuery(first, b"/c", limit=10, revision=8_001))
    steps = 0
    while not tested.done:
        tested.step()
        steps += 1
        assert looks[0] < LOOKS_MAX * steps
    assert [key for key in (*DEAD, *LIVE) if key >= first][:10] == tested.keys
    assert tested.more


def test_a_step_looks_at_what_is_new_only(world: World) -> None:
    """A long read under churn does not look again, step by step, at what died before."""
    tested = read(world, RangeQuery(b"/a/", b"/c", revision=8_001))
    steps = 0
    while not tested.done:
        world.revise({LIVE[-1 - steps]: True})
        looks[0] = 0
        tested.step()
        steps += 1
        assert looks[0] < LOOKS_MAX
    assert steps > 100
    assert [*DEAD, *LIVE] == tested.keys
    assert tested.count == 8_000


NAMES = [b"/a", b"/b", b"/c", b"/d", b"/e"]


@given(
    shards=st.integers(1, 3),
    revisions=st.lists(
        st.dictionaries(st.sampled_from(NAMES), st.booleans(), min_size=1), max_size=16
    ),
    before=st.integers(0, 16),
    back=st.integers(0, 6),
    window=st.sampled_from([(b"/a", b"\0"), (b"/b", b"/e"), (b"/c", None)]),
    limit=st.integers(0, 4),
    step_keys=st.integers(1, 3),
)
def test_a_read_over_shards_is_one_snapshot(
    shards: int,
    revisions: list[dict[bytes, bool]],
    before: int,
    back: int,
    window: tuple[bytes, bytes | None],
    limit: int,
    step_keys: int,
) -> None:
    """A read at a revision shows all that was there then, in key order, with its count, whatever
    has happened since and goes on to happen between its steps, on whichever shards.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "BLOCK_CHANGES", 3)
        world = World(shards)
        states: list[dict[bytes, Entry]] = [{}, {}]
        for changes in revisions[:before]:
            world.revise(changes)
            states.append(dict(world.live))
        at = max(1, world.revision - back)
        query = RangeQuery(*window, limit=limit, revision=at)
        tested = RangeRead(
            world.index, world.history, query, at=at, head=world.revision, step_keys=step_keys
        )
        left = revisions[before:]
        while not tested.done:
            tested.step()
            if left:
                world.revise(left.pop(0))
    there = sorted(item for item in states[at].items() if in_range(item[0], *window))
    assert there[: limit or None] == list(zip(tested.keys, tested.entries, strict=True))
    assert len(there) == tested.count
    assert (0 < limit < len(there)) == tested.more
