"""Wire code against independent libraries: frames, header blocks, gRPC's texts and timeouts."""

import hpack
import pytest
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.table import HeaderTable
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import given
from hypothesis import strategies as st

from kvstore.transport import fields, frames, grpc, huffman

NAMES = st.one_of(
    st.sampled_from([name for name, _ in fields.STATIC_TABLE]),
    st.sampled_from([b"grpc-timeout", b"te", b"x"]),
    st.binary(max_size=40),
)
VALUES = st.one_of(
    st.sampled_from([value for _, value in fields.STATIC_TABLE]), st.binary(max_size=200)
)
PAIRS = st.lists(st.tuples(NAMES, VALUES), max_size=20)


def decode(block: bytes, count_max: int = 100, bytes_max: int = 1 << 20) -> list[fields.Field]:
    """The fields of a block."""
    return fields.decode(block, count_max=count_max, bytes_max=bytes_max)[0]


def stateless_encoder() -> hpack.Encoder:
    """The encoder of a peer that has taken a table size of 0."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    return encoder


def test_tables() -> None:
    """Huffman code and static table are those of the hpack library."""
    symbols = {
        1 << REQUEST_CODES_LENGTH[s] | REQUEST_CODES[s]: s for s in range(256)
    }  # EOS, the 257th, is never a symbol
    assert symbols == huffman._SYMBOLS
    assert tuple(HeaderTable.STATIC_TABLE) == fields.STATIC_TABLE


@given(st.binary(max_size=300))
def test_huffman_round_trip(text: bytes) -> None:
    """What hpack encodes is decoded to the same string."""
    coder = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)
    assert huffman.decode(coder.encode(text)) == text


@given(st.binary(max_size=30))
def test_huffman_accepts_what_hpack_accepts(raw: bytes) -> None:
    """Any bytes are decoded as by hpack, or refused as by hpack."""
    try:
        expected = hpack.huffman_table.decode_huffman(raw)
    except hpack.HPACKDecodingError:
        with pytest.raises(huffman.HuffmanError):
            huffman.decode(raw)
    else:
        assert huffman.decode(raw) == expected


@given(PAIRS, st.booleans())
def test_decode_what_hpack_encodes(pairs: list[fields.Field], coded: bool) -> None:  # noqa: FBT001
    """A stateless peer's block, with or without Huffman, means what hpack meant."""
    block = stateless_encoder().encode(pairs, huffman=coded)
    assert decode(block) == pairs


@given(PAIRS)
def test_hpack_decodes_what_we_encode(pairs: list[fields.Field]) -> None:
    """Our blocks mean the same to hpack, and leave its table empty."""
    decoder = hpack.Decoder(1 << 20)
    assert [tuple(pair) for pair in decoder.decode(fields.encode(pairs), raw=True)] == pairs
    assert not decoder.header_table.dynamic_entries
    assert decode(fields.encode(pairs)) == pairs


@given(st.binary(max_size=60))
def test_decode_any_bytes(block: bytes) -> None:
    """Any bytes give what hpack gives, or an error where hpack gives one or uses its table."""
    decoder = hpack.Decoder(1 << 20)
    decoder.max_allowed_table_size = 0
    decoder.header_table_size = 0
    try:
        expected = [tuple(pair) for pair in decoder.decode(block, raw=True)]
    except hpack.HPACKError:
        with pytest.raises(fields.CompressionError):
            decode(block)
    else:
        assert decode(block) == expected


@given(PAIRS, st.integers(0, 10))
def test_limits_of_a_list(pairs: list[fields.Field], count_max: int) -> None:
    """A list is refused exactly when it has too many fields or bytes."""
    block = stateless_encoder().encode(pairs)
    size = sum(len(name) + len(value) + 32 for name, value in pairs)
    assert decode(block, bytes_max=size) == pairs
    if pairs:
        with pytest.raises(fields.FieldsTooLargeError):
            decode(block, bytes_max=size - 1)
    if len(pairs) > count_max:
        with pytest.raises(fields.FieldsTooLargeError):
            decode(block, count_max=count_max)


@given(PAIRS, st.binary(max_size=20))
def test_located_value(pairs: list[fields.Field], value: bytes) -> None:
    """The span of a field's value literal is what changes when the value changes."""
    others = [pair for pair in pairs if pair[0] != b"grpc-timeout"]
    encoder = stateless_encoder()
    encoder.encode([])
    one, other = (
        encoder.encode([*others, (b"grpc-timeout", timeout), *others], huffman=True)
        for timeout in (value, b"5S")
    )
    spans = [
        fields.decode(b, count_max=100, bytes_max=1 << 20, locate=b"grpc-timeout")[1]
        for b in (one, other)
    ]
    assert spans[0] is not None
    assert spans[1] is not None
    assert one[: spans[0][0]] == other[: spans[1][0]]
    assert one[spans[0][1] :] == other[spans[1][1] :]


def parse(data: bytes) -> list[Frame]:
    """Frames by hyperframe."""
    found = []
    while data:
        frame, size = Frame.parse_frame_header(memoryview(data[:9]))
        frame.parse_body(memoryview(data[9 : 9 + size]))
        found.append(frame)
        data = data[9 + size :]
    return found


def test_small_frames() -> None:
    """Every frame that we build is what hyperframe builds."""
    pairs = [(1, 0), (3, 100), (4, 2**31 - 1)]
    assert frames.settings(pairs) == SettingsFrame(0, settings=dict(pairs)).serialize()
    assert list(frames.iter_settings(frames.settings(pairs)[9:])) == pairs
    assert SettingsFrame(0, flags=["ACK"]).serialize() == frames.SETTINGS_ACK
    assert frames.window_update(3, 70_000) == WindowUpdateFrame(3, 70_000).serialize()
    assert frames.reset(5, 8) == RstStreamFrame(5, 8).serialize()
    assert frames.ping(b"12345678") == PingFrame(0, b"12345678").serialize()
    acknowledged = PingFrame(0, b"12345678", flags=["ACK"])
    assert frames.ping(b"12345678", frames.ACK) == acknowledged.serialize()
    assert frames.goaway(7, 11, b"calm") == GoAwayFrame(0, 7, 11, b"calm").serialize()
    data = DataFrame(9, b"abc", flags=["END_STREAM"]).serialize()
    assert frames.frame(frames.DATA, frames.END_STREAM, 9, b"abc") == data
    assert frames.header(frames.DATA, frames.END_STREAM, 9, 3) == data[:9]
    assert frames.unpack_header(data, 0) == (3 << 8, 1, 9)


@given(st.binary(max_size=100), st.booleans())
def test_header_frames(block: bytes, end: bool) -> None:  # noqa: FBT001
    """A block larger than a frame goes on in CONTINUATION frames."""
    found = parse(frames.headers(3, block, end_stream=end, frame_bytes_max=10))
    assert isinstance(found[0], HeadersFrame)
    assert all(isinstance(frame, ContinuationFrame) for frame in found[1:])
    assert b"".join(frame.data for frame in found) == block  # type: ignore[attr-defined]
    assert [("END_HEADERS" in f.flags) for f in found] == [False] * (len(found) - 1) + [True]
    assert [("END_STREAM" in f.flags) for f in found] == [end] + [False] * (len(found) - 1)


@given(st.binary(max_size=50), st.integers(0, 255))
def test_padding(data: bytes, padding: int) -> None:
    """Padding is taken off."""
    frame = DataFrame(1, data, flags=["PADDED"], pad_length=padding).serialize()
    assert frames.unpad(frames.PADDED, frame[9:]) == data
    assert frames.unpad(0, data) == data


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (b"1H", 3600),
        (b"2M", 120),
        (b"3S", 3),
        (b"4m", 0.004),
        (b"5u", 0.000_005),
        (b"6n", 0.000_000_006),
        (b"99999999H", 99_999_999 * 3600.0),
        (b"0S", 0),
        (b"00000007S", 7),
    ],
)
def test_timeouts(text: bytes, seconds: float) -> None:
    """All units, up to eight digits."""
    assert grpc.parse_timeout(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", [b"", b"1", b"S", b"1s", b"1x", b"-1S", b"+1S", b" 1S", b"1.5S", b"1_0S", b"123456789S"]
)
def test_improper_timeouts(text: bytes) -> None:
    """Anything else is refused."""
    with pytest.raises(ValueError, match=r"transport: timeout|strconv"):
        grpc.parse_timeout(text)


@given(st.floats(0, 1e12))
def test_timeout_round_trip(seconds: float) -> None:
    """An encoded timeout is valid, not shorter, and longer by no more than eight digits cost."""
    parsed = grpc.parse_timeout(grpc.encode_timeout(seconds))
    assert seconds <= parsed * (1 + 1e-12) or seconds > 99_999_999 * 3600
    assert parsed <= seconds * (1 + 2e-5) + 2e-9


@given(st.text())
def test_message_round_trip(text: str) -> None:
    """A status text survives, and is printable ASCII on the wire."""
    encoded = grpc.encode_message(text)
    assert all(0x20 <= byte <= 0x7E for byte in encoded)
    assert grpc.decode_message(encoded) == text.encode("utf-8", "replace").decode()


@given(st.binary())
def test_binary_metadata_round_trip(value: bytes) -> None:
    """Binary metadata survives, padded or not."""
    encoded = grpc.encode_binary(value)
    assert b"=" not in encoded
    assert grpc.decode_binary(encoded) == grpc.decode_binary(encoded + b"=" * (-len(encoded) % 4))
    assert grpc.decode_binary(encoded) == value


def test_prefix() -> None:
    """A message's prefix says that it is not compressed, and its size."""
    assert grpc.prefix(258) == b"\0\0\0\1\2"
    assert grpc.unpack_prefix(b"xx\0\0\0\1\2", 2) == (0, 258)
