"""The shards as configured, and the document that home stores of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import BackendError
from kvstore.shard import HOME
from kvstore.shard_config import (
    RouteSpec,
    ShardConfig,
    ShardSpec,
    one_shard,
    prefix_bytes,
    prefix_text,
    read_document,
)

NAMES = ["core", "events", "agents", "leases"]
STORED = (
    '{"format":1,"shards":["core","agents","events"],'
    '"routes":[["/\\u0000\\udcff\\u00e9","events"],["/a/","core"]]}'
)


def configured(names: list[str], routes: dict[bytes, str]) -> ShardConfig:
    """A configuration with URLs that differ."""
    shards = [ShardSpec(name, f"sqlite:{name}.db", line=n) for n, name in enumerate(names)]
    return ShardConfig(shards, [RouteSpec(prefix, shard) for prefix, shard in routes.items()])


configs = st.permutations(NAMES).flatmap(
    lambda names: st.builds(
        configured,
        st.integers(1, len(names)).map(lambda count: names[:count]),
        st.dictionaries(st.binary(min_size=1, max_size=3), st.just(names[0]), max_size=4),
    )
)


def meaning(config: ShardConfig) -> object:
    """What makes two maps the same: home, the other shards, the routes."""
    return config.names[HOME], set(config.names), {(r.prefix, r.shard) for r in config.routes}


@given(configs, configs)
def test_documents_are_the_same_if_the_maps_are(one: ShardConfig, other: ShardConfig) -> None:
    """The order of routes and of shards behind home does not matter, everything else does."""
    assert (meaning(one) == meaning(other)) == (one.document() == other.document())


@given(configs)
def test_order_does_not_matter(config: ShardConfig) -> None:
    """Likewise, of one map."""
    home, *others = config.shards
    turned = ShardConfig([home, *reversed(others)], list(reversed(config.routes)))
    assert config.document() == turned.document()


@given(configs)
def test_document_is_read_back(config: ShardConfig) -> None:
    """It holds the whole map and no URL, as ASCII without NUL, which every database stores."""
    document = config.document()
    assert document.isascii()
    assert document.isprintable()
    assert "sqlite" not in document
    assert meaning(config) == meaning(read_document(document, home="core"))


def test_stored_form() -> None:
    """What stores hold is read by every later version, to the letter."""
    routes = {b"/a/": "core", b"/\0\xff\xc3\xa9": "events"}
    config = configured(["core", "events", "agents"], routes)
    assert config.document() == STORED
    assert meaning(config) == meaning(read_document(STORED, home="core"))


def test_store_without_a_map() -> None:
    """It had one shard, which has everything."""
    assert meaning(one_shard("", name="core")) == meaning(read_document("", home="core"))


@pytest.mark.parametrize(
    "document",
    [
        *("nonsense", "1", "[]", "null", "{}", '{"format":1}', '{"format":1,"shards":["core"]}'),
        '{"format":1,"shards":[],"routes":[]}',
        '{"format":1,"shards":["core","core"],"routes":[]}',
        '{"format":1,"shards":["core"],"routes":[["/a/","gone"]]}',
        '{"format":1,"shards":["core"],"routes":[["","core"]]}',
        '{"format":1,"shards":["core"],"routes":[["/a/"]]}',
        '{"format":1,"shards":["core"],"routes":[[1,"core"]]}',
        '{"format":1,"shards":["core"],"routes":[["\\ud800","core"]]}',
    ],
)
def test_damaged_document(document: str) -> None:
    """It is refused, whatever is wrong with it."""
    with pytest.raises(BackendError, match="map stored on shard core is damaged"):
        read_document(document, home="core")


def test_newer_document() -> None:
    """A map that is said in another way is not guessed at."""
    with pytest.raises(BackendError, match="format 2, this program knows 1: a newer one"):
        read_document('{"format":2}', home="core")


@given(st.binary(max_size=6))
def test_prefix_as_text(prefix: bytes) -> None:
    """Any bytes can be told as text, and be had back."""
    assert prefix == prefix_bytes(prefix_text(prefix))


def test_map() -> None:
    """Names become numbers, home's is 0; a shard without a route is counted."""
    config = configured(["core", "events", "agents"], {b"/e/": "events", b"/e/x/": "core"})
    shards = config.shard_map()
    assert [shards.of(key) for key in (b"/a", b"/e/a", b"/e/x/a")] == [0, 1, 0]
    assert shards.count == 3


def test_urls_are_not_shown() -> None:
    """What holds a password does not appear where a configuration is printed."""
    assert "pass" not in repr(one_shard("postgresql://kv:pass@db1/kv"))
