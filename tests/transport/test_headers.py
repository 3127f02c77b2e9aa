"""Header templates: a block is understood by its bytes exactly as if it were decoded."""

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.transport import fields, headers
from kvstore.transport.api import Method
from kvstore.transport.headers import Routes, Templates, understand
from tests.transport.service import echo

ROUTES = Routes.of([Method.unary(b"/s.A/X", echo), Method.unary(b"/s.A/Y", echo)])


def pairs_of(path: bytes, timeout: bytes | None, token: bytes = b"") -> list[fields.Field]:
    """A request's fields, with a timeout in the middle."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b"content-type", b"application/grpc"),
        *([(b"grpc-timeout", timeout)] if timeout is not None else []),
        *([(b"token", token)] if token else []),
    ]


def encoder() -> hpack.Encoder:
    """A peer that has taken a table of size 0 and said so."""
    made = hpack.Encoder()
    made.header_table_size = 0
    made.encode([])
    return made


def read(block: bytes) -> tuple[headers.Head, float | None, tuple[int, int] | None]:
    """What a block says when it is decoded: headers, seconds of its timeout, and where that is."""
    pairs, span = fields.decode(block, count_max=64, bytes_max=16_384, locate=b"grpc-timeout")
    head, literal = understand(pairs, ROUTES)
    return head, None if literal is None else headers.seconds_of(literal), span


def find(templates: Templates, block: bytes) -> tuple[headers.Head, float | None] | None:
    """What a block says by its template."""
    found = templates.find(block)
    if found is None:
        return None
    head, literal = found
    return head, None if literal is None else headers.seconds_of(literal)


TIMEOUTS = st.one_of(
    st.none(),
    st.builds(b"%d%c".__mod__, st.tuples(st.integers(0, 10**8 - 1), st.sampled_from(b"HMSmun"))),
)
REQUESTS = st.tuples(
    st.sampled_from([b"/s.A/X", b"/s.A/Y"]), TIMEOUTS, st.sampled_from([b"", b"t", b"u" * 50])
)


@given(st.lists(REQUESTS, max_size=30), st.booleans())
def test_templates_agree_with_decoding(
    requests: list[tuple[bytes, bytes | None, bytes]],
    coded: bool,  # noqa: FBT001
) -> None:
    """Whatever was learnt before, a found block has the headers and timeout that it says."""
    templates = Templates(count_max=3, bytes_max=1000)
    peer = encoder()
    for request in requests:
        block = peer.encode(pairs_of(*request), huffman=coded)
        head, timeout, span = read(block)
        found = find(templates, block)
        if found is not None and head.refusal is None:
            assert (found[0].route, found[0].metadata) == (head.route, head.metadata)
            assert found[1] == timeout
        elif head.refusal is None:
            templates.learn(block, span, head)
            assert find(templates, block) == (head, timeout)
        assert len(templates.known) <= 3


@given(st.binary(max_size=40))
def test_nothing_hides_where_the_timeout_was(between: bytes) -> None:
    """A block that begins and ends like a known one is taken for it only if it means the same."""
    block = encoder().encode(pairs_of(b"/s.A/X", b"5S", b"t"), huffman=False)
    head, _, span = read(block)
    assert span is not None
    templates = Templates(count_max=3, bytes_max=1000)
    templates.learn(block, span, head)
    forged = block[: span[0]] + between + block[span[1] :]
    found = find(templates, forged)
    if found is None:
        return
    try:
        really, timeout, _ = read(forged)
    except fields.CompressionError:  # the literal has the right length and is no string
        assert found == (head, None)
        return
    if really.refusal is not None:  # a timeout that is none, or zero
        assert not found[1]
    else:
        assert found == (really, timeout)


@pytest.mark.parametrize("timeout", [b"x", b"5s", b"", b"999999999S", b"5" * 50 + b"S"])
@pytest.mark.parametrize("coded", [True, False])
def test_improper_timeouts(timeout: bytes, coded: bool) -> None:  # noqa: FBT001
    """What is no timeout is refused by the decoder, and no deadline behind a template."""
    peer = encoder()
    good = peer.encode(pairs_of(b"/s.A/X", b"5S"), huffman=coded)
    head, _, span = read(good)
    templates = Templates(count_max=3, bytes_max=1000)
    templates.learn(good, span, head)
    bad = peer.encode(pairs_of(b"/s.A/X", timeout), huffman=coded)
    assert read(bad)[0].refusal is not None
    assert find(templates, bad) in (None, (head, None))


def test_last_used_template_is_first() -> None:
    """Templates stand in the order of their last use, and the oldest is forgotten."""
    peer = encoder()
    templates = Templates(count_max=2, bytes_max=1000)
    blocks = [peer.encode(pairs_of(b"/s.A/X", b"5S", token)) for token in (b"a", b"b", b"c")]
    for block in blocks[:2]:
        head, _, span = read(block)
        templates.learn(block, span, head)
    assert templates.find(blocks[0]) is not None
    head, _, span = read(blocks[2])
    templates.learn(blocks[2], span, head)
    assert [templates.find(block) is not None for block in blocks] == [True, False, True]


def test_large_blocks_are_not_kept() -> None:
    """A block above the limit is decoded each time."""
    block = encoder().encode(pairs_of(b"/s.A/X", b"5S", b"t" * 100), huffman=False)
    head, _, span = read(block)
    templates = Templates(count_max=2, bytes_max=len(block) - 1)
    templates.learn(block, span, head)
    assert templates.known == []


def test_a_path_is_served_once() -> None:
    """Two methods at one path are a mistake that shows at once."""
    with pytest.raises(AssertionError):
        Routes.of([Method.unary(b"/s.A/X", echo), Method.unary(b"/s.A/X", echo)])
