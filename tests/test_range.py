"""Reads at a revision: what one step may cost. Their answers are compared in ``test_model.py`` and
``test_sim.py``.
"""

import pytest

from kvstore import history
from kvstore.history import History
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
    """An index with its history; each change is a revision."""

    def __init__(self) -> None:
        self.index = Index()
        self.history = History()
        self.revision = 1

    def birth(self, key: bytes) -> None:
        """A key that was not there."""
        self.revision += 1
        entry = (self.revision, 0, self.revision, 1, 0)
        self.index.put(key, entry, b"v")
        self.history.append(key, entry)

    def death(self, key: bytes) -> None:
        """A key that was there."""
        self.revision += 1
        entry = (self.revision, 0, 0, 0, 0)
        self.index.delete(key, entry)
        self.history.append(key, entry)


DEAD = [Key(b"/a/%05d" % n) for n in range(4_000)]
LIVE = [Key(b"/b/%05d" % n) for n in range(4_000)]
LOOKS_MAX = 2_000
"""A step of 64 keys, bisections in eight blocks and some thousand keys included."""


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Half of the keys died after revision 8001, where all were there."""
    monkeypatch.setattr(history, "BLOCK_CHANGES", 512)
    made = World()
    for key in (*DEAD, *LIVE):
        made.birth(key)
    for key in DEAD:
        made.death(key)
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
        world.death(LIVE[-1 - steps])
        looks[0] = 0
        tested.step()
        steps += 1
        assert looks[0] < LOOKS_MAX
    assert steps > 100
    assert [*DEAD, *LIVE] == tested.keys
    assert tested.count == 8_000
