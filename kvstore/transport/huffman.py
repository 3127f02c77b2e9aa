r"""The Huffman code of HPACK strings (RFC 7541 appendix B).

The code is canonical: codes of one length are consecutive numbers in the order of their symbols, so
the symbols by length say everything (a test compares with the ``hpack`` library).

Decoding walks whole bytes: a state is the bits read since the last symbol behind a leading 1, and a
step takes a state and a byte to the next state and the symbols completed on the way.
Steps are worked out when first met; there are at most 256 x 256 of them.
"""

_SYMBOLS_BY_LENGTH = {
    5: b"012aceiost",
    6: b" %-./3456789=A_bdfghlmnpru",
    7: b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz",
    8: b"&*,;XZ",
    10: b'!"()?',
    11: b"'+|",
    12: b"#>",
    13: b"\x00$@[]~",
    14: b"^}",
    15: b"<`{",
    19: b"\\\xc3\xd0",
    20: bytes.fromhex("808283a2b8c2e0e2"),
    21: bytes.fromhex("99a1a7acb0b1b3d1d8d9e3e5e6"),
    22: bytes.fromhex("81848586 8892 9a9ca0a3a4a9aaadb2b5b9babbbdbec4c6e4e8e9"),
    23: bytes.fromhex("01 87898a8b8c8d8f 93959697989b9d9e a5a6a8aeafb4b6b7bcbfc5e7ef"),
    24: bytes.fromhex("098e909194 9fabcee1 d7eced"),
    25: bytes.fromhex("c7cfeaeb"),
    26: bytes.fromhex("c0c1c8c9cacdd2d5dadbeef0f2f3ff"),
    27: bytes.fromhex("cbccd3d4d6dddedff1f4f5f6f7f8fafbfcfdfe"),
    28: bytes.fromhex("02030405060708 0b0c0e0f 1011121314 15 1718191a1b1c1d1e1f 7fdcf9"),
    30: bytes.fromhex("0a0d16"),
}


def _codes() -> dict[int, int]:
    """Symbol by code, each code behind a leading 1 that keeps its length."""
    symbols = {}
    code = 0
    length = 0
    for next_length, members in _SYMBOLS_BY_LENGTH.items():
        code <<= next_length - length
        length = next_length
        for symbol in sorted(members):
            symbols[1 << length | code] = symbol
            code += 1
    return symbols


_SYMBOLS = _codes()
_EOS_BITS = 30
_PADDINGS = frozenset((1 << bits) - 1 for bits in range(1, 9))
"""States at which a string may end: up to seven ones."""
_steps: dict[int, tuple[int, bytes]] = {}


class HuffmanError(ValueError):
    """Not a string in HPACK's Huffman code: EOS inside, or wrong padding."""


def _step(state: int, byte: int) -> tuple[int, bytes]:
    """From ``state`` through the eight bits of ``byte``; remembered."""
    key = state << 8 | byte
    emitted = bytearray()
    for shift in range(7, -1, -1):
        state = state << 1 | (byte >> shift & 1)
        symbol = _SYMBOLS.get(state)
        if symbol is not None:
            emitted.append(symbol)
            state = 1
        elif state.bit_length() > _EOS_BITS:
            raise HuffmanError("end-of-string symbol inside a string")
    step = _steps[key] = (state, bytes(emitted))
    return step


def decode(raw: bytes) -> bytes:
    """The string behind its Huffman-coded form; raises ``HuffmanError``."""
    state = 1
    pieces = []
    steps = _steps
    for byte in raw:
        state, emitted = steps.get(state << 8 | byte) or _step(state, byte)
        pieces.append(emitted)
    if state not in _PADDINGS:
        raise HuffmanError("padding is not a prefix of the end-of-string symbol")
    return b"".join(pieces)
