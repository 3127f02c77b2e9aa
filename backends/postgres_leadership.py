"""Who may take a shard, and when.

The fence row says who holds a shard (``holder``) and changes with every commit and renewal
(``writes``). Whoever takes a shard raises its epoch: from then on no statement of an older holder
changes anything. That is enough to keep data right, but not to keep an old holder from *answering*
out of its memory what is no longer true. So the home shard is held by a lease:

- The holder may answer until ``lease_duration`` after it began its last commit or renewal that
  succeeded; idle, it renews every ``renew_interval``.
- A new server looks at the row, and again until ``lease_watch`` is over. If it has changed, there
  is somebody, and the new one gives up. If not, every renewal that succeeded began before the first
  look, so that its time is over, provided the two clocks do not differ by a fifth. It then takes
  the row on condition that it is still as seen.
- A new server that is to take over (``take_over``) raises the epoch first, so that the old holder
  writes and renews nothing more, and then waits as long, for that one may go on answering until its
  time is over. Only then it takes the row for its own. Meanwhile the row has a mark (``-holder``)
  that nobody takes for a holder of his own: whoever loses the connection while it waits, or finds
  what such a one has left, waits anew.
- A holder that stops in order lets go, and nobody need wait.

The other shards need no lease: who holds home may take them from whoever has them.
"""

import asyncio
from typing import NamedTuple

import asyncpg

from backends import postgres_statements as sql
from backends.postgres_session import Session
from kvstore.clock import Clock
from kvstore.config import PostgresConfig
from kvstore.errors import BackendError, UnreachableError


class Taken(NamedTuple):
    """A shard that was taken."""

    row: asyncpg.Record
    """The fence row from then on."""
    began: float
    """The monotonic time before it was asked for."""


async def take_home(
    session: Session, *, holder: int, origin: str, config: PostgresConfig, clock: Clock
) -> Taken:
    """Take the home shard for ``holder`` once nobody else has it, or has had to stop answering.

    Raises ``BackendError`` when another server has it, and what ``Session`` raises.
    """
    seen = await session.one(sql.SELECT_FENCE)
    if config.take_over and seen["holder"] not in (0, holder):
        seen = (await take_other(session, holder=-holder, origin=origin, clock=clock)).row
    until = clock.monotonic() + config.lease_watch
    while seen["holder"] not in (0, holder) and clock.monotonic() < until:
        await asyncio.sleep(config.renew_interval / 2)  # noqa: TID251 - others do, in real time
        now = await session.one(sql.SELECT_FENCE)
        if _position(now) != _position(seen):
            raise BackendError("another server holds the shard: it has written to it just now")
        seen = now
    began = clock.monotonic()
    taken = (await session.run(sql.TAKE_SEEN, holder, origin, *_position(seen))).rows
    if not taken:
        raise BackendError("another server took the shard just now")
    return Taken(taken[0], began)


async def take_other(session: Session, *, holder: int, origin: str, clock: Clock) -> Taken:
    """Take a shard, whoever has it. Raises ``UnreachableError`` when somebody took it meanwhile:
    an attempt that was given up, perhaps, and arrived late.
    """
    seen = await session.one(sql.SELECT_FENCE)
    began = clock.monotonic()
    taken = (await session.run(sql.TAKE_ANY, holder, origin, seen["epoch"])).rows
    if not taken:
        raise UnreachableError("the shard was taken just now, and not by this attempt")
    return Taken(taken[0], began)


def _position(row: asyncpg.Record) -> tuple[int, int]:
    """What every commit, renewal and taking changes."""
    return row["epoch"], row["writes"]
