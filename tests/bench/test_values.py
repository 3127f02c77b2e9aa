"""Values: JSON of the wanted size that says who wrote it, and how it is changed."""

import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.values import (
    SHAPES,
    append,
    count_of,
    digest,
    entries,
    increment,
    is_owned,
    value,
)

NAMES = st.text("abcdefghijklmnopqrstuvwxyz-0123456789", max_size=20)
SHAPE = st.sampled_from(sorted(SHAPES))
SIZES = st.integers(0, 5000) | st.integers(60_000, 200_000)


@pytest.mark.slow
@given(NAMES, st.integers(-1, 10**6), st.integers(0, 10**4), SHAPE, SIZES, NAMES)
def test_value(run: str, actor: int, seq: int, shape: str, size: int, owner: str) -> None:
    """A value is JSON, of its size unless its head is larger, and the same each time."""
    raw = value(run=run, actor=actor, seq=seq, shape=shape, size=size, owner=owner)
    said = json.loads(raw)
    assert (run, actor, seq, owner) == (said["run"], said["actor"], said["seq"], said["owner"])
    kinds = json.loads("{" + SHAPES[shape] + "}")
    assert kinds == {name: said[name] for name in ("kind", "apiVersion")}
    smallest = len(value(run=run, actor=actor, seq=seq, shape=shape, size=0, owner=owner))
    assert len(raw) == max(size, smallest)
    assert raw == value(run=run, actor=actor, seq=seq, shape=shape, size=size, owner=owner)
    assert (bool(owner), 0, []) == (is_owned(raw), count_of(raw), entries(raw))


def test_origin_comes_first() -> None:
    """The first bytes name run, actor and step, wherever a value turns up."""
    raw = value(run="swarm-burst-1-0", actor=12, seq=3, shape="pod", size=3000)
    assert raw.startswith(b'{"run":"swarm-burst-1-0","actor":12,"seq":3,')


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_compressible(shape: str) -> None:
    """As what Kubernetes stores: neither noise nor nothing but repetition."""
    raw = value(run="r", actor=1, seq=1, shape=shape, size=4000)
    assert 4 < len(raw) / len(zlib.compress(raw)) < 12


@pytest.mark.slow
@given(SHAPE, st.integers(0, 2000), NAMES, st.lists(NAMES, max_size=6), st.integers(1, 5))
def test_edits(shape: str, size: int, owner: str, names: list[str], times: int) -> None:
    """Increments and appends change what they name, and leave the rest and valid JSON."""
    raw = before = value(run="first", actor=1, seq=1, shape=shape, size=size, owner=owner)
    for n, name in enumerate(names):
        longer = append(raw, name, 60)
        assert len(raw) + 20 <= len(longer) <= len(raw) + 100
        raw = longer
        assert names[: n + 1] == entries(raw)
    for n in range(times):
        raw = increment(raw, run="second", actor=2, seq=n)
        assert n + 1 == count_of(raw)
    said, was = json.loads(raw), json.loads(before)
    assert names == [step["name"] for step in said.pop("steps", [])]
    assert (names, bool(owner)) == (entries(raw), is_owned(raw))
    assert said == was | {
        "run": "second",
        "actor": 2,
        "seq": times - 1,
        "count": f"{times:010}",
    }


@pytest.mark.parametrize("size", [1000, 100_000])
def test_append_adds_its_size(size: int) -> None:
    """An entry is about as large as was asked for."""
    raw = append(value(run="r", actor=1, seq=1, shape="run", size=3000), "first", 500)
    assert abs(len(append(raw, "a.b", size)) - len(raw) - size) < 10


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_digest(one: bytes, other: bytes) -> None:
    """Different values are told apart by length and checksum, in a number that a column takes."""
    assert (digest(one) == digest(other)) == (one == other)
    assert 0 <= digest(one) < 2**63
    assert digest(one) >> 32 == len(one)
