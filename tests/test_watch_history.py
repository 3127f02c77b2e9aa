"""The changes that a watcher reads, in bounded looks, against all changes there are."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import history
from kvstore.history import Entry, History, in_range

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
    window=st.sampled_from(RANGES),
    after=st.integers(0, 30),
    ahead=st.integers(0, 60),
    limit=st.integers(1, 6),
)
def test_changes(
    revisions: Sequence[Sequence[bytes]],
    gaps: int,
    window: tuple[bytes, bytes | None],
    after: int,
    ahead: int,
    limit: int,
) -> None:
    """Answers put together are all changes of the range, none twice, no revision cut."""
    log = History()
    wanted: list[tuple[bytes, Entry]] = []
    up_to = after + ahead
    for n, keys in enumerate(revisions):
        for sub, key in enumerate(keys):
            entry = (2 + n * gaps, sub, 1, 2, 0)
            log.append(key, entry)
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
