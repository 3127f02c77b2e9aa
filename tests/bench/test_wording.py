"""Words around numbers."""

import pytest

from bench.wording import counted, stated


@pytest.mark.parametrize(
    ("number", "told"), [(0, "0 keys"), (1, "1 key"), (2, "2 keys"), (12_345, "12,345 keys")]
)
def test_one_is_singular(number: int, told: str) -> None:
    """One of a thing is named as one, all other numbers as many, large ones in groups."""
    assert told == counted(number, "key")


def test_those_of_one_state_are_named_together() -> None:
    """One is, two are."""
    assert "ours is FAIL" == stated(["ours"], "FAIL")
    assert "ours and etcd are INVALID" == stated(["ours", "etcd"], "INVALID")
