"""Header blocks of requests, read by a decoder that others wrote and that is strict."""

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.client.blocks import RequestBlocks, timeout_field
from kvstore.transport import grpc

PATHS = st.binary(min_size=1, max_size=60).map(lambda raw: b"/" + raw)
TABLES = (0, 64, 200, 1000, 4096, 65_536)


def decoder(table_bytes: int) -> hpack.Decoder:
    """One that has advertised a table of that size, after the default of 4,096."""
    made = hpack.Decoder()
    made.max_allowed_table_size = table_bytes
    return made


def wanted(path: bytes, authority: bytes) -> list[tuple[bytes, bytes]]:
    """The fields of a call."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", authority),
        (b"content-type", b"application/grpc"),
        (b"user-agent", b"kvstore-bench"),
        (b"te", b"trailers"),
    ]


def read(made: hpack.Decoder, block: bytes) -> list[tuple[bytes, bytes]]:
    """The fields of a block."""
    return [(bytes(field[0]), bytes(field[1])) for field in made.decode(block, raw=True)]


@pytest.mark.slow
@pytest.mark.parametrize("table_bytes", TABLES)
@given(st.lists(PATHS, min_size=1, max_size=30), st.data())
def test_blocks_say_the_call(table_bytes: int, paths: list[bytes], data: st.DataObject) -> None:
    """Whatever the table takes and in whatever order paths come, each block says its call."""
    blocks = RequestBlocks(authority=b"127.0.0.1:2379", table_bytes=table_bytes)
    far = decoder(table_bytes)
    for path in data.draw(st.lists(st.sampled_from(paths), max_size=200)):
        assert wanted(path, b"127.0.0.1:2379") == read(far, blocks.block(path))


@pytest.mark.parametrize("table_bytes", [4096, 65_536])
def test_known_calls_are_short(table_bytes: int) -> None:
    """From its second call on, a path costs one byte for each field, as with grpc-go."""
    blocks = RequestBlocks(authority=b"127.0.0.1:2379", table_bytes=table_bytes)
    blocks.block(b"/etcdserverpb.KV/Txn")
    assert 7 == len(blocks.block(b"/etcdserverpb.KV/Txn"))


def test_without_a_table_a_block_never_changes() -> None:
    """A server without a table gets the same bytes each time, which it can look up."""
    blocks = RequestBlocks(authority=b"127.0.0.1:2379", table_bytes=0)
    first, *later = [blocks.block(b"/etcdserverpb.KV/Txn") for _ in range(3)]
    assert [later[0]] * 2 == later
    assert first.endswith(later[0])


@given(st.integers(1, 10**12))
def test_timeout(timeout_us: int) -> None:
    """The server is told of the client's time or of a little more, never of less."""
    ((name, value),) = read(decoder(0), b"\x20" + timeout_field(timeout_us))
    assert name == b"grpc-timeout"
    assert timeout_us <= round(grpc.parse_timeout(value) * 1e6) <= timeout_us * 1.01
