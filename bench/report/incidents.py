"""What was done to a server or to connections on purpose, run by run, and what it answered.

The outage of a kill is from the signal until the restarted server answered its first call; that of
a pause is as long as the pause, which shows that it was made. Connections that are dropped have no
outage: the server goes on. Every generator process tells of the same drop, so those that are close
together are one.
"""

from typing import TypedDict

from bench.clock import MICROSECONDS
from bench.plan import Trouble
from bench.records import INCIDENTS, NEVER_US, Records

KINDS = {
    Trouble.KILL: "kill -9",
    Trouble.PAUSE: "pause",
    Trouble.DROP: "connections dropped",
    Trouble.SHARD: "shard stopped",
}
KILLED = KINDS[Trouble.KILL]
SAME_US = MICROSECONDS
"""Drops that are closer than this are one."""


class Incident(TypedDict):
    """One of them."""

    what: str
    """``kill -9``, ``pause`` or ``connections dropped``."""
    at_us: int
    """After the start of the load."""
    outage_us: int | None
    """Until the server answered again; None: it never did, connections were dropped, which are no
    outage, or its speed is not shown.
    """


def incidents(records: Records) -> list[Incident]:
    """Of one run, in order."""
    table = records.frame(INCIDENTS)
    rows = zip(*(table[name].tolist() for name in ("at", "until", "trouble")), strict=True)
    found: list[Incident] = []
    dropped_us = -SAME_US
    for at, until, trouble in sorted(rows):
        if trouble == Trouble.DROP:
            if at - dropped_us < SAME_US and dropped_us >= 0:
                continue
            dropped_us = at
        endless = trouble == Trouble.DROP or until >= NEVER_US
        outage_us = None if endless else until - at
        found.append(Incident(what=KINDS[Trouble(trouble)], at_us=at, outage_us=outage_us))
    return found


def without_speed(found: list[Incident]) -> list[Incident]:
    """The same of a server whose speed is not shown."""
    return [Incident(what=one["what"], at_us=one["at_us"], outage_us=None) for one in found]
