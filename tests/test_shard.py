"""Flattened routes against the naive longest prefix."""

from hypothesis import given
from hypothesis import strategies as st

from kvstore.history import in_range
from kvstore.shard import HOME, SETS_MAX, ShardMap

keys = st.binary(max_size=4).map(lambda raw: bytes(b"\x00ab\xff"[byte % 4] for byte in raw))
routes = st.dictionaries(keys.filter(bool), st.integers(0, 3), max_size=5)
ends = st.one_of(st.none(), st.just(b"\0"), keys.filter(bool))


def route(table: dict[bytes, int], key: bytes) -> bytes:
    """The longest route that ``key`` starts with; empty if there is none."""
    return max((prefix for prefix in table if key.startswith(prefix)), key=len, default=b"")


def owner(table: dict[bytes, int], key: bytes) -> int:
    """The shard of that route."""
    return table.get(route(table, key), HOME)


@given(routes, keys)
def test_key_goes_to_its_longest_route(table: dict[bytes, int], key: bytes) -> None:
    """The longest matching prefix owns a key; without one, home does."""
    assert owner(table, key) == ShardMap(table).of(key)
    assert owner(table, key) == ShardMap(table, count=7).of(key)


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


@given(routes, st.integers(1, 6))
def test_shards_without_a_route_are_counted(table: dict[bytes, int], count: int) -> None:
    """A shard that gets no key is there all the same, and no shard of a route is left out."""
    shards = ShardMap(table, count=count)
    assert shards.count >= count
    assert shards.all == tuple(range(shards.count))
    assert {shards.of(prefix) for prefix in table} <= set(shards.all)


@given(routes, keys.filter(bool))
def test_every_key_is_in_one_stretch(table: dict[bytes, int], key: bytes) -> None:
    """Stretches follow one another from the first key without end, and say whose route decides."""
    stretches = list(ShardMap(table).stretches())
    assert stretches[0][0] in {b"", b"\0"}
    assert [start for start, _, _ in stretches[1:]] == [end for _, end, _ in stretches[:-1]]
    assert stretches[-1][1] == b"\0"
    (found,) = (prefix for start, end, prefix in stretches if in_range(key, start, end))
    assert route(table, key) == found


def test_what_is_remembered_of_ranges_is_bounded() -> None:
    """However many different ranges are asked for, the answers stay right and few are kept."""
    table = {b"%04d" % n: n % 3 for n in range(200)}
    shards = ShardMap(table)
    for start in range(0, 200, 2):
        for end in range(start + 1, 200, 2):
            wanted = {table[b"%04d" % n] for n in range(start, end)}
            asked = shards.of_range(b"%04d" % start, b"%04d" % end)
            assert wanted <= set(asked)
    assert len(shards._sets) <= SETS_MAX
