"""Words around numbers, as a reader expects them."""

from collections.abc import Sequence


def stated(names: Sequence[str], state: str) -> str:
    """``ours is FAIL``, ``ours and etcd are INVALID``."""
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} {state}"


def counted(number: int, noun: str) -> str:
    """``1 key``, ``2,000 keys``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
