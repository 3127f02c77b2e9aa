"""What "acknowledged" means to a server, as far as it decides who may be compared with whom.

How a server comes to have synced (one commit at a time, or many together) is its own affair and
shows in its figures; that it has is what makes two of them comparable. Of a server that was running
already nobody here knows, and two unknowns are no equals, unless one command started both.
"""

SYNCED = "synced"
NONE = "none"
UNKNOWN = "unknown"


def durability_class(told: str) -> str:
    """``synced`` of ``fsync per commit``; ``none`` of ``none (memory)``; or ``unknown``."""
    first = told.partition(" ")[0]
    return {"fsync": SYNCED, "none": NONE}.get(first, UNKNOWN)


def equally_durable(told: tuple[str, str], commands: tuple[str, str]) -> bool:
    """May two servers be compared that say this of themselves, and were started so?"""
    one, other = map(durability_class, told)
    if UNKNOWN in (one, other):
        return told[0] == told[1] and commands[0] == commands[1] != ""
    return one == other
