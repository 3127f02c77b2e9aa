"""Who is told of changes as they are applied: what the store needs of the watch hub and the
lessor.
"""

from typing import Protocol

from kvstore.answers import Answer
from kvstore.history import Entry


class Hub(Protocol):
    """What the store tells the watch hub."""

    def record(
        self,
        shard: int,
        key: bytes,
        entry: Entry,
        framed: bytes,
        previous: Entry | None,
        previous_framed: bytes | None,
    ) -> None:
        """A change was applied; it is not durable yet."""

    def advance(self) -> None:
        """A frontier moved."""

    def compacted(self) -> None:
        """The compact revision moved."""


class Leases(Protocol):
    """What the store asks and tells the lessor."""

    def exists(self, lease: int) -> bool:
        """May keys be attached to it?"""

    def attach(self, lease: int, key: bytes, revision: int) -> None:
        """``key`` belongs to it since ``revision``."""

    def detach(self, lease: int, key: bytes) -> None:
        """``key`` no longer belongs to it."""

    def after_absence(self, lease: int, answer: Answer) -> None:
        """``answer.reply`` once it is durable that keys may not be attached to it."""
