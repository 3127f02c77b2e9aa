"""The file of shards and routes: taken whole, or refused with line, reason and right spelling."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.urls import find
from kvstore.errors import BackendError
from kvstore.shard_config import RouteSpec, ShardConfig, ShardSpec
from kvstore.shard_file import (
    FILE_BYTES_MAX,
    ROUTES_MAX,
    SHARDS_MAX,
    ShardFileError,
    parse_shards,
    read_shard_file,
)

EXAMPLE = """\
shards:
  - {name: core,   backend: "sqlite:core.db"}
  - {name: events, backend: "sqlite:events.db"}
  - {name: agents, backend: "postgresql://kv@db1/kvstore"}
routes:
  - {prefix: /registry/events/, shard: events}
  - {prefix: /registry/agents.x-k8s.io/, shard: agents}
"""
ONE = "shards: [{name: core, backend: 'sqlite:core.db'}]\n"
SECRET = "V9xQ2mKp7TzL4wRj"
PIECE = 4
"""Characters of a secret that nobody says by chance."""


def test_example() -> None:
    """The file of README is what it says."""
    config = parse_shards(EXAMPLE, name="shards.yaml")
    assert config == ShardConfig(
        [
            ShardSpec("core", "sqlite:core.db"),
            ShardSpec("events", "sqlite:events.db"),
            ShardSpec("agents", "postgresql://kv@db1/kvstore"),
        ],
        [
            RouteSpec(b"/registry/events/", "events"),
            RouteSpec(b"/registry/agents.x-k8s.io/", "agents"),
        ],
    )
    assert [shard.line for shard in config.shards] == [2, 3, 4]


@pytest.mark.parametrize(
    ("written", "prefix"),
    [
        ("/registry/events/", b"/registry/events/"),
        ('"a b"', b"a b"),
        ("'1'", b"1"),
        ("/caf\u00e9/", b"/caf\xc3\xa9/"),
        ("!!binary AP8v", b"\0\xff/"),
        ("!!binary 'AP\n      8v'", b"\0\xff/"),
    ],
)
def test_prefixes(written: str, prefix: bytes) -> None:
    """A prefix is text, or any bytes in Base64."""
    text = f"{ONE}routes:\n  - prefix: {written}\n    shard: core\n"
    assert parse_shards(text, name="f").routes == [RouteSpec(prefix, "core")]


def test_routes_may_be_left_out() -> None:
    """One shard needs no route."""
    assert parse_shards(ONE, name="f").routes == []
    assert parse_shards(ONE + "routes: []\n", name="f").routes == []


REFUSED = [
    ("", 0, "the file is empty"),
    ("# nothing\n", 0, "the file is empty"),
    ("- a\n", 1, "the file is a mapping of shards and routes"),
    ("routes: []\n", 1, "the file needs shards"),
    ("\nshard: []\n", 2, "the file has no 'shard'; did you mean shards?"),
    (ONE + "ruotes: []\n", 2, "the file has no 'ruotes'; did you mean routes?"),
    (ONE + "other: 1\n", 2, "a mapping of shards and routes, and of nothing else"),
    (ONE + "? [a]\n: 1\n", 2, "a mapping of shards and routes, and of nothing else"),
    (ONE + ONE, 2, "shards is there already, in line 1"),
    ("shards:\n", 1, "shards is a list"),
    ("shards: {}\n", 1, "shards is a list"),
    ("shards: []\n", 1, "shards is empty"),
    ("shards: !!set {a}\n", 1, "shards is a list"),
    ("shards:\n  - core\n", 2, "a shard is a mapping of name and backend"),
    ("shards:\n  - !mine {name: a, backend: b}\n", 2, "a shard is a mapping"),
    ("shards:\n  - {name: a}\n", 2, "a shard needs backend"),
    ("shards:\n  - nmae: a\n    backend: b\n", 2, "a shard has no 'nmae'; did you mean name?"),
    ("shards:\n  - name: a\n    url: b\n", 3, "a mapping of name and backend, and of nothing else"),
    ("shards:\n  - name: a\n    backend:\n", 3, "backend is empty"),
    ("shards:\n  - name: a\n    backend: ''\n", 3, "backend is empty"),
    ("shards:\n  - name: a\n    backend: [b]\n", 3, "backend is a text"),
    ("shards:\n  - name: 1\n    backend: b\n", 2, "name is a text: put it in quotes"),
    ("shards:\n  - name: on\n    backend: b\n", 2, "name is a text: put it in quotes"),
    ("shards:\n  - name: Core DB\n    backend: b\n", 2, "all small; did you mean core-db?"),
    ("shards:\n  - name: '--'\n    backend: b\n", 2, "all small"),
    (f"shards:\n  - name: {'a' * 64}\n    backend: b\n", 2, "up to 62 letters"),
    ("shards:\n  - name: 'a\\n'\n    backend: b\n", 2, "all small"),
    ('shards:\n  - name: a\n    backend: "b\\n"\n', 3, "backend has characters that cannot"),
    (
        "shards:\n  - {name: a, backend: b}\n  - {name: a, backend: c}\n",
        3,
        "shard a is there already, in line 2",
    ),
    (
        "shards:\n  - {name: a, backend: b}\n  - {name: default, backend: c}\n",
        3,
        "the name default is kept for the first shard",
    ),
    (ONE + "routes: {}\n", 2, "routes is a list"),
    (ONE + "routes:\n  - /a/\n", 3, "a route is a mapping of prefix and shard"),
    (ONE + "routes:\n  - {prefix: /a/}\n", 3, "a route needs shard"),
    (ONE + "routes:\n  - {perfix: /a/, shard: core}\n", 3, "did you mean prefix?"),
    (ONE + "routes:\n  - {prefix: /a/, shard: cor}\n", 3, "no shard 'cor'; did you mean core?"),
    (ONE + "routes:\n  - {prefix: /a/, shard: x}\n", 3, "there is no such shard; there is core"),
    (ONE + "routes:\n  - {prefix: '', shard: core}\n", 3, "prefix is empty"),
    (ONE + "routes:\n  - {prefix: !!binary '', shard: core}\n", 3, "prefix is empty"),
    (ONE + "routes:\n  - {prefix: !!binary '?', shard: core}\n", 3, "is not Base64"),
    (ONE + "routes:\n  - {prefix: !!binary \u00e9, shard: core}\n", 3, "is not Base64"),
    (ONE + 'routes:\n  - {prefix: "/a\\0", shard: core}\n', 3, "use !!binary"),
    (ONE + 'routes:\n  - {prefix: "\\ud800", shard: core}\n', 3, "use !!binary"),
    (
        ONE + "routes:\n  - {prefix: /a/, shard: core}\n  - {prefix: /a/, shard: core}\n",
        4,
        "prefix b'/a/' has a route already, in line 3",
    ),
    ("shards: [\n", 2, "not YAML: expected the node content, but found '<stream end>'"),
    ("shards:\n\t- a\n", 2, "not YAML: found character '\\t' that cannot start any token"),
    ("a: 1\n---\na: 2\n", 2, "not YAML: but found another document"),
    ("a: *b\n", 1, "not YAML: found undefined alias"),
    ("a: \u0007\n", 1, "not YAML: a character that it forbids"),
    ("[" * 500, 0, "nested too deeply"),
]
"""(text, line or 0 for the whole file, reason)."""


@pytest.mark.parametrize(("text", "line", "reason"), REFUSED)
def test_refusals(text: str, line: int, reason: str) -> None:
    """Each mistake is one line, which names the file, the line and what would be right."""
    with pytest.raises(ShardFileError) as caught:
        parse_shards(text, name="shards.yaml")
    said = str(caught.value)
    assert said.startswith(f"shards.yaml:{line}: " if line else "shards.yaml: ")
    assert reason in said
    assert "\n" not in said


@pytest.mark.slow
def test_as_many_as_there_may_be() -> None:
    """One shard or route more is refused, with its line."""
    shards = "".join(f"  - {{name: s{n}, backend: b{n}}}\n" for n in range(SHARDS_MAX))
    routes = "".join(f"  - {{prefix: /{n}/, shard: s0}}\n" for n in range(ROUTES_MAX))
    head = f"shards:\n{shards}routes:\n{routes}"
    assert len(parse_shards(head, name="f").routes) == ROUTES_MAX
    with pytest.raises(ShardFileError, match=rf"f:{head.count(chr(10)) + 1}: .* {ROUTES_MAX} rout"):
        parse_shards(head + "  - {prefix: /x/, shard: s0}\n", name="f")
    with pytest.raises(ShardFileError, match=rf"f:{SHARDS_MAX + 2}: .* {SHARDS_MAX} shards"):
        parse_shards(f"shards:\n{shards}  - {{name: x, backend: x}}\n", name="f")


class TestFiles:
    """What stands at the path."""

    def test_file(self, tmp_path: Path) -> None:
        """A file is read."""
        (tmp_path / "f").write_text(EXAMPLE)
        assert read_shard_file(tmp_path / "f") == parse_shards(EXAMPLE, name="f")

    def test_no_file(self, tmp_path: Path) -> None:
        """One that is missing, or a directory, is named with the reason."""
        with pytest.raises(ShardFileError, match="f: No such file or directory"):
            read_shard_file(tmp_path / "f")
        with pytest.raises(ShardFileError, match="Is a directory"):
            read_shard_file(tmp_path)

    def test_not_text(self, tmp_path: Path) -> None:
        """Bytes that are not UTF-8 are refused with their line."""
        (tmp_path / "f").write_bytes(b"shards:\n\n# caf\xe9\n")
        with pytest.raises(ShardFileError, match=r"f:3: this is not UTF-8"):
            read_shard_file(tmp_path / "f")

    def test_endless_file(self) -> None:
        """What does not end is not read to its end."""
        with pytest.raises(ShardFileError, match=f"longer than {FILE_BYTES_MAX} bytes"):
            read_shard_file(Path("/dev/zero"))


def says_a_piece(said: str) -> bool:
    """Is a piece of the secret in ``said``, in whatever case?"""
    pieces = {SECRET[n : n + PIECE].lower() for n in range(len(SECRET) - PIECE + 1)}
    return any(piece in said.lower() for piece in pieces)


TORN = [
    f"shards: [{{name: core, backend: postgresql://kv:a,{SECRET}@db1/kv}}]",
    f"shards: [{{name: core, backend: postgresql://kv:a,{SECRET}: b@db1/kv}}]",
    f"shards: [{{name: core, backend: postgresql://kv:a, *{SECRET}}}]",
    f"shards: [{{name: core, backend: postgresql://kv:a, &{SECRET} b, &{SECRET} c}}]",
    f"shards: [{{name: core, backend: postgresql://kv:a, !{SECRET}!b c}}]",
    f"shards: [{{name: 'postgresql://kv:{SECRET}@db1/kv', backend: core}}]",
    f"shards: [{{name: 'kv:{SECRET}', backend: core}}]",
    f"shards: [{{name: core, backend: 'sqlite:a'}}, 'postgresql://kv:{SECRET}@db1/kv']",
    f"{ONE}routes: [{{prefix: /a/, shard: 'postgresql://kv:{SECRET}@db1/kv'}}]",
    f"postgresql://kv:{SECRET}@db1/kv",
    f"postgresql://kv:{SECRET}@db1/kv: core",
]


@pytest.mark.parametrize("text", TORN)
def test_torn_urls_are_not_told(text: str) -> None:
    """Where a piece of a URL has got into another place, the refusal does not repeat it."""
    with pytest.raises(ShardFileError) as caught:
        parse_shards(text, name="f")
    assert not says_a_piece(str(caught.value))


@pytest.mark.parametrize("style", ["flow", "block"])
@given(st.data())
def test_secrets_are_not_told(style: str, data: st.DataObject) -> None:
    """However a URL with a password is torn by slips, no refusal says a piece of it."""
    url = f"postgresql://kv:{SECRET}@db1/kvstore"
    backend = data.draw(st.sampled_from([url, f'"{url}"']))
    item = f"name: core, backend: {backend}"
    text = f"shards:\n  - {{{item}}}\nroutes: []\n"
    if style == "block":
        text = text.replace("{name", "name").replace("}", "").replace(", backend", "\n    backend")
    for _ in range(data.draw(st.integers(1, 3))):
        first = text.find("kv")
        inside = st.integers(first, max(first, text.rfind("db1")))
        at = data.draw(st.integers(0, len(text)) | inside if first >= 0 else st.just(0))
        cut = data.draw(st.integers(0, 3))
        put = data.draw(st.text("\n\t ,:#{}[]'\"*&!|>%@/?\\-", max_size=2))
        text = text[:at] + put + text[at + cut :]
    try:
        config = parse_shards(text, name="f")
        for shard in config.shards:
            find(shard.backend_url, data_dir=Path("/data"))
    except (ShardFileError, BackendError) as error:
        assert not says_a_piece(str(error)), text


def test_pieces_are_found() -> None:
    """The test above would see a secret."""
    assert says_a_piece(f"no such shard: {SECRET[3:8]}")
    assert not says_a_piece("no such shard: core")
