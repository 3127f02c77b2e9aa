"""Bounds: each says what happens when it is reached, and each is somebody's."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from kvstore import config
from kvstore.transport.limits import Limits

ROOT = Path(__file__).parents[1]
SECTIONS = {field.name: field.default_factory for field in dataclasses.fields(config.Config)}


def bounds() -> list[tuple[str, str, float]]:
    """Section, name and number of every bound; what is on or off bounds nothing."""
    sections = dataclasses.asdict(config.Config()).items()
    every = [(name, field, value) for name, bounds in sections for field, value in bounds.items()]
    return [bound for bound in every if not isinstance(bound[2], bool)]


def undocumented(text: str) -> list[str]:
    """Fields of dataclasses that no docstring follows."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name != "Config":
            for field, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and not documented:
                    found.append(ast.unparse(field.target))
    return found


def test_every_bound_says_what_happens() -> None:
    """No bound without a sentence; a planted one is found."""
    for file in ("kvstore/config.py", "kvstore/transport/limits.py"):
        assert undocumented((ROOT / file).read_text()) == []
    assert undocumented("class A:\n  a: int = 1\n  'told'\n  b: int = 2\n") == ["b"]


def test_every_bound_is_used() -> None:
    """A bound that nobody reads bounds nothing."""
    readers = [*(ROOT / "kvstore").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]
    sources = "".join(
        path.read_text()
        for path in readers
        if path.name not in {"config.py", "limits.py"} and "pb" not in path.parts
    )
    unused = [name for _, name, _ in bounds() if not re.search(rf"\.{name}\b", sources)]
    assert unused == []


@pytest.mark.parametrize("bound", bounds(), ids=lambda bound: f"{bound[0]}.{bound[1]}")
def test_bounds_are_numbers(bound: tuple[str, str, float]) -> None:
    """Every bound is a number that can be reached; 0 only where the sentence gives it a meaning."""
    section, name, number = bound
    assert isinstance(number, int | float)
    assert number > 0 or (section, name) in {
        ("lease", "extend_on_start"),
        ("server", "quota_bytes"),
    }


def test_bounds_that_depend_on_each_other() -> None:
    """Relations without which a bound would be useless."""
    whole = config.Config()
    request, transport = whole.request, whole.transport
    assert transport.message_bytes_max == request.request_bytes_max + request.request_overhead_bytes
    assert whole.commit.batch_rows_max < whole.commit.queue_rows_max
    assert whole.commit.batch_bytes_max < whole.commit.queue_bytes_max
    assert transport.message_bytes_max < whole.commit.batch_bytes_max
    assert whole.commit.shard_timeout < whole.server.stop_timeout
    assert transport.output_bytes_max < transport.output_bytes_total_max
    assert whole.sqlite.checkpoint_bytes < whole.sqlite.wal_bytes_max


def test_values_of_etcd() -> None:
    """What etcd 3.6 has a flag for begins with its default."""
    whole = config.Config()
    assert whole.request.request_bytes_max == 1_572_864
    assert whole.request.txn_ops_max == 128
    assert whole.watch.progress_interval == 600
    assert whole.transport.ping_interval_min == 5
    assert (whole.transport.keepalive_interval, whole.transport.keepalive_timeout) == (7200, 20)


def test_configurations_are_values() -> None:
    """Nothing is changed after the start, and every section is of its own kind."""
    whole = config.Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole.request = config.RequestConfig()  # type: ignore[misc]
    assert isinstance(whole.transport, Limits)
    assert len({type(getattr(whole, name)) for name in SECTIONS}) == len(SECTIONS)
