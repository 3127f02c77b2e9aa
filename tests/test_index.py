"""The index against a dictionary of versions, in chunks so small that they split and join."""

import gc
from bisect import bisect_left

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore import index
from kvstore.history import Entry, in_range
from kvstore.kv import frame_key_value

keys = st.binary(min_size=1, max_size=2).map(lambda raw: bytes(b % 6 for b in raw))
starts = st.one_of(st.just(b""), keys)
ends = st.one_of(st.none(), st.just(b"\0"), keys)


class IndexAgainstVersions(RuleBasedStateMachine):
    """``versions`` keeps all versions of each key, oldest first; ``values`` what may be cached."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(index, "CHUNK_KEYS", 4)
        self.patch.setattr(index, "_MERGE_KEYS", 2)
        self.index = index.Index()
        self.versions: dict[bytes, list[Entry]] = {}
        self.values: dict[bytes, bytes] = {}
        self.revision = 1
        self.trimmed = 0

    def teardown(self) -> None:
        """Give the numbers back."""
        self.patch.undo()

    def head(self, key: bytes) -> Entry | None:
        """The live version."""
        versions = self.versions.get(key)
        return versions[-1] if versions and versions[-1][3] else None

    def live(self) -> list[bytes]:
        """Live keys in order."""
        return sorted(key for key in self.versions if self.head(key))

    # -- changes ---------------------------------------------------------------------------------

    @rule(key=keys, cached=st.booleans(), size=st.integers(0, 30))
    def put(self, *, key: bytes, cached: bool, size: int) -> None:
        """A new version, with its value or without."""
        self.revision += 1
        before = self.head(key)
        created, version = (before[2], before[3] + 1) if before else (self.revision, 1)
        entry = (self.revision, 0, created, version, 0)
        value = frame_key_value(key, created, self.revision, version, b"x" * size, 0)
        self.index.put(key, entry, value if cached else None)
        self.versions.setdefault(key, []).append(entry)
        self.values[key] = value

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        """A live key dies."""
        if self.live():
            key = data.draw(st.sampled_from(self.live()))
            self.revision += 1
            self.index.delete(key, (self.revision, 0, 0, 0, 0))
            self.versions[key].append((self.revision, 0, 0, 0, 0))

    @rule(back=st.integers(0, 5))
    def trim(self, back: int) -> None:
        """Exactly what no read from then on can see is forgotten, and named."""
        up_to = self.trimmed = max(self.revision - back, self.trimmed)
        for key in list(self.versions):
            versions = self.versions[key]
            past = [entry for entry in versions if entry[0] <= up_to]
            kept = versions[len(past) :]
            if past and (past[-1][3] or past[-1][0] == up_to):
                kept = [past.pop(), *kept]
            assert past == list(self.index.trim(key, up_to))
            self.versions[key] = kept
            if not kept:
                del self.versions[key]

    @rule(budget=st.integers(0, 100), back=st.integers(0, 4))
    def evict(self, budget: int, back: int) -> None:
        """Values leave until the budget holds, unless they are too young to be anywhere else."""
        keep_after = self.revision - back
        young = [
            (key, value)
            for chunk, low, high in self.index.slices(b"", b"\0")
            for key, entry, value in zip(
                chunk.keys[low:high], chunk.entries[low:high], chunk.values[low:high], strict=True
            )
            if entry[0] > keep_after and value is not None
        ]
        self.index.evict(budget, keep_after)
        for key, value in young:
            assert self.index.head_value(key, self.versions[key][-1]) == value
        assert self.index.value_bytes <= max(budget, sum(len(value) for _, value in young))

    @rule(data=st.data())
    def cache(self, data: st.DataObject) -> None:
        """A value read from storage is kept for the live version only."""
        if not self.live():
            return
        key = data.draw(st.sampled_from(self.live()))
        self.index.cache_value(key, (0, 0, 0, 1, 0), b"of another version")
        self.index.cache_value(key, self.versions[key][-1], self.values[key])
        assert self.index.head_value(key, self.versions[key][-1]) == self.values[key]
        assert self.index.head_value(key, (0, 0, 0, 1, 0)) is None

    # -- reads -----------------------------------------------------------------------------------

    @rule(key=keys, back=st.integers(0, 8))
    def at(self, key: bytes, back: int) -> None:
        """A read at a revision sees the newest version that is not later, unless it is a death."""
        revision = max(self.revision - back, self.trimmed)
        past = [entry for entry in self.versions.get(key, []) if entry[0] <= revision]
        assert (past[-1] if past and past[-1][3] else None) == self.index.at(key, revision)

    @rule(start=starts, end=ends)
    def ranges(self, start: bytes, end: bytes | None) -> None:
        """Slices are the live keys of the range in order, never empty pieces; a count their sum."""
        pieces = list(self.index.slices(start, end))
        assert all(low < high for _, low, high in pieces)
        found = [key for chunk, low, high in pieces for key in chunk.keys[low:high]]
        assert [key for key in self.live() if in_range(key, start, end)] == found
        assert len(found) == self.index.count(start, end)

    @rule(key=keys)
    def place(self, key: bytes) -> None:
        """A key's place is where it is, or where it would have to be."""
        _, chunk, at, live = self.index.place(key)
        assert live == (self.head(key) is not None)
        assert at == bisect_left(chunk.keys, key)
        assert (self.index.find(key) == (chunk, at)) == live

    @invariant()
    def same(self) -> None:
        """Heads, older versions and sums are the model's; chunks are ordered and bounded."""
        for key, versions in self.versions.items():
            head = self.head(key)
            assert head == self.index.head(key)
            assert versions == [*self.index.older(key), *([head] if head else [])]
        chunks = self.index._chunks
        assert self.index.live == len(self.live())
        assert self.index.value_bytes == sum(chunk.value_bytes for chunk in chunks)
        for chunk, first in zip(chunks, self.index._firsts, strict=True):
            assert len(chunk.keys) == len(chunk.entries) == len(chunk.values) <= index.CHUNK_KEYS
            assert all(first <= key for key in chunk.keys)
            assert chunk.value_bytes == sum(len(v) for v in chunk.values if v is not None)
            for key, value in zip(chunk.keys, chunk.values, strict=True):
                assert value in (None, self.values[key])


IndexAgainstVersions.TestCase.settings = settings(stateful_step_count=60)
TestIndexAgainstVersions = IndexAgainstVersions.TestCase


def counted_evictions(monkeypatch: pytest.MonkeyPatch, tested: index.Index) -> list[index.Chunk]:
    """The chunks whose values are gone through from now on."""
    gone_through: list[index.Chunk] = []
    evict_chunk = tested._evict_chunk

    def counted(chunk: index.Chunk, keep_after: int, stored: index.Stored | None) -> int:
        gone_through.append(chunk)
        return evict_chunk(chunk, keep_after, stored)

    monkeypatch.setattr(tested, "_evict_chunk", counted)
    return gone_through


def filled_with_values() -> index.Index:
    """About a thousand chunks, each key with a value of 10 bytes."""
    tested = index.Index()
    for n in range(4_000):
        tested.put(b"%05d" % n, (n + 2, 0, n + 2, 1, 0), b"0123456789")
    return tested


def test_the_hand_rests_when_nothing_can_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """While values wait for storage, a write does not walk the index to learn it again; once they
    are stored or others are cached, they go.
    """
    monkeypatch.setattr(index, "CHUNK_KEYS", 4)
    tested = filled_with_values()
    chunks = len(tested._chunks)
    gone_through = counted_evictions(monkeypatch, tested)
    for _ in range(1_000):
        tested.evict(39_000, 1)
    assert len(gone_through) == chunks
    tested.evict(39_000, 2)
    assert len(gone_through) > chunks
    while tested.value_bytes > 39_000:
        tested.evict(39_000, 4_001)
    tested.evict(0, 4_001)
    assert tested.value_bytes == 0
    tested.cache_value(b"00001", (3, 0, 3, 1, 0), b"0123456789")
    tested.evict(0, 4_001)
    assert tested.value_bytes == 0


def test_an_eviction_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call goes through few chunks; further over the budget more, and then none is spared."""
    monkeypatch.setattr(index, "CHUNK_KEYS", 4)
    tested = filled_with_values()
    gone_through = counted_evictions(monkeypatch, tested)
    tested.evict(39_990, 1)
    assert 0 < len(gone_through) <= 16
    for chunk in tested._chunks:
        chunk.hot = True
    tested.evict(39_990, 4_001)
    assert tested.value_bytes == 40_000, "all were read since"
    gone_through.clear()
    tested.evict(20_000, 1)
    assert 100 < len(gone_through) <= 300
    tested.evict(20_000, 4_001)
    assert tested.value_bytes <= 36_000


def test_what_one_shard_has_not_stored_keeps_no_other_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values leave by what is stored of their own keys, in chunks of several shards too."""
    monkeypatch.setattr(index, "CHUNK_KEYS", 4)
    tested = filled_with_values()

    def stored(key: bytes, end: bytes | None) -> int:
        """Of keys below 1001 nothing is, and no other after revision 4000."""
        assert end is None or key < end
        return 0 if key < b"01001" else 4_000

    chunks = [chunk for chunk, _, _ in tested.slices(b"", b"\0")]
    assert any(chunk.keys[0] <= b"01000" < chunk.keys[-1] for chunk in chunks), "one has both"
    while tested.value_bytes > 10_020:
        before = tested.value_bytes
        tested.evict(0, 4_001, stored)
        assert tested.value_bytes < before
    left = [key for chunk in chunks for key, v in zip(chunk.keys, chunk.values, strict=True) if v]
    assert left == [b"%05d" % n for n in (*range(1_001), 3_999)]


def test_older_versions_are_nothing_to_the_collector() -> None:
    """What churn leaves behind is tuples of numbers, which the collector looks at once: of keys
    that changed once, or however often before they died.
    """
    tested = index.Index()
    names = [b"%05d" % n for n in range(5_000)]
    gc.collect()
    before = len(gc.get_objects())
    for n, key in enumerate(names):
        tested.put(key, (n + 2, 0, n + 2, 1, 0), None)
        tested.put(key, (n + 20_002, 0, n + 2, 2, 0), None)
        if n % 2:
            tested.put(key, (n + 30_000, 0, n + 2, 3, 0), None)
            tested.delete(key, (n + 40_000, 0, 0, 0, 0))
    gc.collect()
    gc.collect()
    assert len(gc.get_objects()) - before < 500


@pytest.mark.parametrize("deaths", [(), (3,), (9, 12), (25, 28), (3, 25, 26, 29)])
def test_a_key_of_many_versions(deaths: tuple[int, ...]) -> None:
    """Its older versions stay in order while they become more and fewer, through its deaths."""
    tested = index.Index()
    entries: list[Entry] = []
    for n in range(2, 32):
        if n in deaths:
            entries.append((2 * n, 0, 0, 0, 0))
            tested.delete(b"a", entries[-1])
        entries.append((2 * n + 1, 0, 2, n - 1, 0))
        tested.put(b"a", entries[-1], None)
    assert entries[:-1] == list(tested.older(b"a"))
    for n in (4, 12, 20, 27, 31):
        dropped = [entry for entry in entries[:-1] if entry[0] < 2 * n + 1]
        assert dropped == list(tested.trim(b"a", 2 * n + 1))
        entries = entries[len(dropped) :]
        assert entries[:-1] == list(tested.older(b"a"))


def test_chunks_split_and_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that come make more chunks; keys that go leave one behind."""
    monkeypatch.setattr(index, "CHUNK_KEYS", 4)
    monkeypatch.setattr(index, "_MERGE_KEYS", 2)
    tested = index.Index()
    names = [b"%03d" % n for n in range(100)]
    for n, key in enumerate(names):
        tested.put(key, (n + 2, 0, n + 2, 1, 0), None)
    assert len(tested._chunks) > 20
    for n, key in enumerate(names):
        tested.delete(key, (n + 200, 0, 0, 0, 0))
    assert len(tested._chunks) < 20
    assert tested.count(b"", b"\0") == 0
