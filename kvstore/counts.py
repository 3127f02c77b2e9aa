"""What the store has done so far, for the metrics: plain numbers that grow."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """Operations as etcd counts them, those inside a Txn included, and values that were shown."""

    puts: int = 0
    gets: int = 0
    """Ranges of one key that were answered at once, their value in memory."""
    ranges: int = 0
    """Other ranges."""
    deletes: int = 0
    txns: int = 0
    """Txns of more than one operation."""
    values_in_memory: int = 0
    """Of ``ranges``: values shown that were at hand."""
    values_read: int = 0
    """Values that came from storage, whatever for."""
