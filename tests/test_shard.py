"""Flattened routes against the naive longest prefix."""

from hypothesis import given
from hypothesis import strategies as st

from kvstore.history import in_range
from kvstore.shard import HOME, ShardMap

keys = st.binary(max_size=4).map(lambda raw: bytes(b"\x00ab\xff"[byte % 4] for byte in raw))
routes = st.dictionaries(keys.filter(bool), st.integers(0, 3), max_size=5)
ends = st.one_of(st.none(), st.just(b"\0"), keys.filter(bool))


def owner(table: dict[bytes, int], key: bytes) -> int:
    """The shard of the longest route that ``key`` starts with."""
    matching = [prefix for prefix in table if key.startswith(prefix)]
    return table[max(matching, key=len)] if matching else HOME


@given(routes, keys)
def test_key_goes_to_its_longest_route(table: dict[bytes, int], key: bytes) -> None:
    """The longest matching prefix owns a key; without one, home does."""
    assert owner(table, key) == ShardMap(table).of(key)


@given(routes, keys, ends, st.lists(keys, max_size=20))
def test_range_touches_the_shard_of_every_key_in_it(
    table: dict[bytes, int], start: bytes, end: bytes | None, probes: list[bytes]
) -> None:
    """No key of a range is on a shard that the range does not name, however often asked."""
    shards = ShardMap(table)
    touched = shards.of_range(start, end)
    assert list(touched) == sorted(set(touched))
    assert touched == shards.of_range(start, end)
    for key in [start, *probes]:
        if in_range(key, start, end):
            assert owner(table, key) in touched


@given(routes, keys, ends)
def test_range_names_no_shard_without_a_key_in_it(
    table: dict[bytes, int], start: bytes, end: bytes | None
) -> None:
    """Every shard named owns some key of the range: one at its start or where a route begins or
    ends. An empty range has the shard of its start.
    """
    shards = ShardMap(table)
    edges = {start, *shards._boundaries}
    inside = {owner(table, key) for key in edges if in_range(key, start, end)}
    expected = inside or {owner(table, start)}
    if shards.count > 1:
        assert expected == set(shards.of_range(start, end))
