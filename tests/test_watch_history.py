"""The changes that a watcher reads, in bounded looks, against all changes there are."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import history
from kvstore.history import Entry, History, Log, MergedHistory, in_range

KEYS = [b"a", b"b", b"c", b"d"]
RANGES = [(b"a", None), (b"b", b"d"), (b"b", b"\0"), (b"x", b"z")]


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> object:
    """Blocks of four changes, looks of eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "BLOCK_CHANGES", 4)
        patch.setattr(history, "SCAN_CHANGES", 8)
        patch.setattr(history, "_SKIP_COST", 1)
        yield


@given(
    revisions=st.lists(st.lists(st.sampled_from(KEYS), min_size=1, max_size=9), max_size=25),
    gaps=st.integers(1, 3),
    shard_of=st.sampled_from([(0, 0, 0, 0), (0, 1, 1, 0), (0, 1, 2, 3)]),
    window=st.sampled_from(RANGES),
    after=st.integers(0, 30),
    ahead=st.integers(0, 60),
    limit=st.integers(1, 6),
)
def test_changes(
    revisions: Sequence[Sequence[bytes]],
    gaps: int,
    shard_of: Sequence[int],
    window: tuple[bytes, bytes | None],
    after: int,
    ahead: int,
    limit: int,
) -> None:
    """Answers put together are all changes of the range, none twice, no revision cut, however many
    shards it changes; over several shards each look is as long as over one.
    """
    shards = [History() for _ in range(1 + max(shard_of))]
    log: Log = MergedHistory(shards) if len(shards) > 1 else shards[0]
    wanted: list[tuple[bytes, Entry]] = []
    up_to = after + ahead
    for n, keys in enumerate(revisions):
        for sub, key in enumerate(keys):
            entry = (2 + n * gaps, sub, 1, 2, 0)
            shards[shard_of[KEYS.index(key)]].append(key, entry)
            if after < entry[0] <= up_to and in_range(key, *window):
                wanted.append((key, entry))
    got: list[tuple[bytes, Entry]] = []
    at = after
    while at < up_to:
        found, through = log.changes(*window, at, up_to, limit)
        assert at < through <= up_to, "every look gets on"
        assert found == [change for change in wanted if at < change[1][0] <= through]
        revisions_found = {entry[0] for _, entry in found}
        assert len(found) < limit or len(revisions_found) <= limit
        got += found
        at = through
    assert got == wanted


@given(
    revisions=st.lists(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4), max_size=25),
    lags=st.tuples(st.integers(0, 8), st.integers(0, 8)),
)
def test_changes_up_to_what_all_shards_have(
    revisions: Sequence[Sequence[bytes]], lags: tuple[int, int]
) -> None:
    """A shard whose newest changes are not there does no harm to who reads up to its frontier."""
    wanted: list[tuple[bytes, Entry]] = []
    shards = [History(), History()]
    frontiers = [len(revisions) + 1 - lag for lag in lags]
    for n, keys in enumerate(revisions):
        for sub, key in enumerate(keys):
            entry = (2 + n, sub, 1, 2, 0)
            shard = KEYS.index(key) % 2
            if entry[0] <= frontiers[shard]:
                shards[shard].append(key, entry)
            if entry[0] <= min(frontiers):
                wanted.append((key, entry))
    got: list[tuple[bytes, Entry]] = []
    at = 0
    while at < min(frontiers):
        found, at = MergedHistory(shards).changes(b"", b"\0", at, min(frontiers), 3)
        got += found
    assert got == wanted
