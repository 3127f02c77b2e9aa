"""What the store has done so far, for the metrics: plain numbers that grow.

Operations are counted as etcd counts them, those inside a Txn included; values that are shown, by
the shard that they are of.
"""

from collections.abc import Sequence


class Counts:
    """Of a store with that many ``shards``."""

    __slots__ = (
        "deletes",
        "gets",
        "puts",
        "ranges",
        "txns",
        "values_in_memory",
        "values_read",
    )

    def __init__(self, shards: int) -> None:
        self.puts = 0
        self.gets = [0] * shards
        """Ranges of one key that were answered at once, their value in memory; by shard."""
        self.ranges = 0
        """Other ranges."""
        self.deletes = 0
        self.txns = 0
        """Txns of more than one operation."""
        self.values_in_memory = [0] * (shards + 1)
        """Values shown by ``ranges`` that were at hand; by shard, the last of ranges over several.
        """
        self.values_read = [0] * shards
        """Values that came from storage, whatever for; by shard."""

    def shown(self, shards: Sequence[int], values: int) -> None:
        """A range over ``shards`` shows that many ``values`` that were in memory."""
        self.values_in_memory[shards[0] if len(shards) == 1 else -1] += values
