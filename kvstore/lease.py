"""Leases: who may attach keys, when they expire, and what a restart remembers of the time left.

A lease is in one of three states:

    grant ──> GRANTED ──durable──> LIVE ──revoke or expiry──> REVOKING ──row deleted──> gone
                 └───────────────── revoke or expiry ─────────────┘

- GRANTED: its row is on the way to the home shard.
  It can be seen, renewed and revoked (those answers wait for the same commit), but a put may not
  attach to it: on another shard the key could become durable before the lease.
- REVOKING lasts one call when all attached keys are on the home shard: the keys' tombstones and the
  deletion of the row are in one batch. Keys on other shards go first, all of them in one revision,
  and the row follows once they are durably gone; a crash between the two leaves a lease without
  keys, which expires again. Nothing attaches to a REVOKING lease.

To delete keys of several shards at once is a request over several shards: it may have to wait for
its turn (``HeldError``, ``barrier``). Meanwhile the lease is as before. One whose end is refused or
hangs is **delayed**: nobody waits for it any more. If a shard refuses it, it is parked until that
takes writes again, costs the others no time, and then comes after those that are due.

**Time.** ``expiry`` is on the monotonic clock, which a restart cannot know. So leases longer than
the checkpoint interval record the whole seconds left, rounded up, once per interval: after a crash
such a lease lives at most one interval too long, and never too short.
Renewing a lease with a recorded remainder records 0 (none) first and the answer waits for that, or
a restart would take the renewed time away.

**Work.** The agenda says when to look at a lease: at its expiry, or at its next checkpoint if that
is earlier. Renewing does not touch the agenda: a lease that comes up early is put down again.
One ``tick`` does a bounded amount of work and says how soon it wants to go on. A lease with very
many keys is the one exception: they die in one revision, as in etcd, so that the call takes as long
as a DeleteRange of them.

Rules are those of etcd 3.6 (``server/lease/lessor.go``) unless a comment says otherwise.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from random import Random
from typing import NamedTuple, Protocol

from kvstore import orphans
from kvstore.agenda import Agenda, Parked
from kvstore.answers import Answer, Then
from kvstore.backend import LeaseRow
from kvstore.clock import Clock
from kvstore.commit import NOTHING_PENDING
from kvstore.config import LeaseConfig
from kvstore.errors import (
    HeldError,
    LeaseExistsError,
    LeaseNotFoundError,
    LeaseTtlTooLargeError,
    StoreError,
    TimedOutError,
    TooManyRequestsError,
)
from kvstore.shard import HOME

HOME_ONLY = (HOME,)
"""The shards that a lease's own row touches."""

_GRANTED, _LIVE, _REVOKING = range(3)

_SEGMENTS = 64

BACKLOG_PAUSE = 0.05
"""Seconds between ticks while expired leases wait; each does its part of a second's revokes."""
SCAN_PAUSE = 0.01
"""Seconds until the next tick when ``scanned_per_tick_max`` was not enough."""


class Store(orphans.Store, Protocol):
    """What the lessor needs of ``kvstore.store``, and what deletes orphans."""

    @property
    def revision(self) -> int:
        """The last one issued."""

    def head_of(self, shards: Sequence[int]) -> int:
        """The revision of an answer that rests on ``shards`` and changed nothing."""


class TimeToLive(NamedTuple):
    """What a client may know of a lease."""

    granted: int
    """Seconds."""
    left: int
    """Whole seconds, rounded down; 0 from the expiry to the end of the revoke."""
    keys: list[bytes]
    """Attached keys, in key order."""
    shards: tuple[int, ...]
    """The shards whose commits this rests on: home and the keys'."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Lease:
    """One lease; only this module writes it."""

    ttl: int
    expiry: float
    state: int
    remainder: int = 0
    """Seconds that the last checkpoint recorded; 0: none."""
    since: int = 0
    """The revision at which it was granted; keys are attached later. 0: before the start."""
    slot: int = 0
    """Its place in the agenda."""
    keys: set[bytes] | None = None
    left: set[int] | None = None
    """Shards on which it had keys that are gone, perhaps not durably yet."""
    waiters: list[tuple[Answer, bytes]] | None = None
    delayed: bool = False

    def delay(self) -> None:
        """Its end is not to be waited for."""
        self.delayed = True
        waiters, self.waiters = self.waiters, None
        for answer, _ in waiters or ():
            answer.fail(TimedOutError.code, TimedOutError.text)


class Lessor:
    """All leases of the store. See the module's text.

    Whatever is shown or refused here may rest on changes that are not durable yet: answers go
    through ``commits.release`` on ``HOME_ONLY`` unless a method says otherwise.
    """

    def __init__(self, clock: Clock, random: Random, config: LeaseConfig) -> None:
        self._clock, self._random, self._config = clock, random, config
        self._leases: list[dict[int, _Lease]] = [{} for _ in range(_SEGMENTS)]
        """By id; a single dictionary of a million leases takes 30 ms to grow."""
        self._agenda = Agenda()
        self._up: deque[int] = deque()
        """Leases of the slot ``_up_slot`` that came up and were not looked at yet."""
        self._up_slot = 0
        self.unconfirmed: list[_Lease] = []
        """Grants whose ticket failed; ``tick`` asks again."""
        self.half_revoked: dict[tuple[int, ...], list[int]] = {}
        """Leases whose ticket failed, by its shards; likewise, once none of these is lost."""
        self.granted_total = self.renewed_total = self.expired_total = 0
        self.revoked_total = 0
        """Those that expired included."""

    def bind(self, store: Store) -> None:
        """Give it the store that deletes keys; once, right after both exist."""
        self._store = store
        self._commits = store.commits
        self._parked = Parked(store.commits.check_room)
        self.orphans = orphans.Orphans(store)

    def __len__(self) -> int:
        """Leases held."""
        return sum(map(len, self._leases))

    # -- called by the store -----------------------------------------------------------------------

    def exists(self, lease: int) -> bool:
        """May keys attach? From the durable grant until a revoke begins, be it expired or not."""
        found = self._leases[lease % _SEGMENTS].get(lease)
        return found is not None and found.state == _LIVE

    def attach(self, lease: int, key: bytes, revision: int) -> None:
        """``key`` belongs to ``lease`` since ``revision``; while loading, that may be one that is
        gone.
        """
        found = self._leases[lease % _SEGMENTS].get(lease)
        if found is None or found.state == _REVOKING or revision <= found.since:
            self.orphans.add(lease, key)
        elif found.keys is None:
            found.keys = {key}
        else:
            found.keys.add(key)

    def detach(self, lease: int, key: bytes) -> None:
        """``key`` no longer belongs to ``lease``, which may be gone."""
        found = self._leases[lease % _SEGMENTS].get(lease)
        if found is not None and found.keys is not None:
            found.keys.discard(key)
            if (shards := self._store.shards_of(key, None)) != HOME_ONLY:
                found.left = {*(found.left or ()), *shards}
        self.orphans.discard(lease, key)

    # -- start -------------------------------------------------------------------------------------

    def load(self, rows: Iterable[LeaseRow]) -> None:
        """Take over the stored leases, before or after the keys; ``orphans`` are next.

        Time starts now: each gets its remainder, or all of its TTL. First checkpoints are spread
        over the interval, so that they do not come up all at once and that a server which crashes
        often still gets to record some.
        """
        now = self._clock.monotonic()
        for row in rows:
            expiry = now + (row.remaining_ttl or row.granted_ttl) + self._config.extend_on_start
            lease = _Lease(
                ttl=row.granted_ttl, remainder=row.remaining_ttl, expiry=expiry, state=_LIVE
            )
            lease.keys = self.orphans.claim(row.id)
            self._leases[row.id % _SEGMENTS][row.id] = lease
            self._put_down(row.id, lease, now, self._random.random())

    # -- requests ----------------------------------------------------------------------------------

    def grant(self, lease_id: int, ttl: int) -> tuple[int, int]:
        """Grant a lease: its id, and its TTL in seconds.

        ``lease_id`` 0: a random positive one; negative ones are legal. A ``ttl`` below the minimum
        is raised to it.
        Raises LeaseTtlTooLargeError, LeaseExistsError, TooManyRequestsError (too many leases), and
        what ``check_room`` raises.
        """
        if ttl > self._config.ttl_max:
            raise LeaseTtlTooLargeError
        if lease_id in self._leases[lease_id % _SEGMENTS]:
            raise LeaseExistsError
        if len(self) >= self._config.leases_max:
            raise TooManyRequestsError
        self._commits.check_room(HOME)
        while lease_id == 0 or lease_id in self._leases[lease_id % _SEGMENTS]:
            lease_id = self._random.getrandbits(63)
        ttl = max(ttl, self._config.ttl_min)
        now = self._clock.monotonic()
        lease = _Lease(ttl=ttl, expiry=now + ttl, state=_GRANTED, since=self._store.revision)
        self._leases[lease_id % _SEGMENTS][lease_id] = lease
        self._put_down(lease_id, lease, now)
        self.granted_total += 1
        self._commits.append_lease(put=LeaseRow(lease_id, ttl, 0))
        self._confirm([lease])
        return lease_id, ttl

    def revoke(self, lease_id: int) -> int:
        """Delete the lease and its keys; the deletion's revision, or the head of what the answer
        rests on when there was no live key.

        The answer, or LeaseNotFoundError, goes through ``after_revoke``.
        Raises LeaseNotFoundError (also while it is being revoked), and what ``check_room`` raises;
        on HeldError it is tried again when the barrier lets it, for the shards of its keys.
        """
        lease = self._leases[lease_id % _SEGMENTS].get(lease_id)
        if lease is None or lease.state == _REVOKING:
            raise LeaseNotFoundError(lease_id)
        return self._revoke(lease_id, lease)

    def shards_of(self, lease_id: int) -> tuple[int, ...]:
        """The shards of the keys attached to a lease."""
        lease = self._leases[lease_id % _SEGMENTS].get(lease_id)
        return self._shards(lease.keys or () if lease is not None else ())

    def keep_alive(self, lease_id: int) -> int | None:
        """Renew the lease: its TTL, 0 if it is unknown, None if it has expired but is still there.

        On None the answer is 0, after a wait with ``after_revoke``, however that ends: such a lease
        is not renewed any more.
        Raises what ``check_room`` raises.
        """
        lease = self._leases[lease_id % _SEGMENTS].get(lease_id)
        if lease is None:
            return 0
        now = self._clock.monotonic()
        if lease.state == _REVOKING or lease.expiry <= now:
            return None
        if lease.remainder:
            self._commits.check_room(HOME)
            self._commits.append_lease(put=LeaseRow(lease_id, lease.ttl, 0))
            lease.remainder = 0
        lease.expiry = now + lease.ttl
        self.renewed_total += 1
        return lease.ttl

    def time_to_live(self, lease_id: int, *, keys: bool) -> TimeToLive | None:
        """What is left of the lease, its keys only if asked for; None if it is unknown.

        The answer goes through ``commits.release`` on the shards that it names.
        """
        lease = self._leases[lease_id % _SEGMENTS].get(lease_id)
        if lease is None:
            return None
        attached = sorted(lease.keys) if keys and lease.keys else []
        left = 0.0 if lease.state == _REVOKING else lease.expiry - self._clock.monotonic()
        shards = self._touched(lease, attached) if keys else HOME_ONLY
        return TimeToLive(lease.ttl, max(0, int(left)), attached, shards)

    def leases(self) -> list[int]:
        """Ids of all leases, in no order that means anything."""
        return [lease_id for segment in self._leases for lease_id in segment]

    def by_expiry(self, ids: Iterable[int]) -> list[tuple[float, int]]:
        """(expiry, id) of some leases in order; those that are gone meanwhile come first."""
        found = ((self._leases[lease_id % _SEGMENTS].get(lease_id), lease_id) for lease_id in ids)
        return sorted((lease.expiry if lease else 0.0, lease_id) for lease, lease_id in found)

    def after_revoke(self, lease_id: int, answer: Answer, body: bytes) -> None:
        """``answer.reply(body)`` once the lease is durably gone.

        Fails with too many requests when ``revoke_waiters_max`` others wait for it, and as timed
        out when it is delayed, or becomes so.
        """
        lease = self._leases[lease_id % _SEGMENTS].get(lease_id)
        if lease is None:
            self._commits.release(HOME_ONLY, answer, body)
        elif lease.delayed:
            answer.fail(TimedOutError.code, TimedOutError.text)
        elif lease.waiters is None:
            lease.waiters = [(answer, body)]
        elif len(lease.waiters) < self._config.revoke_waiters_max:
            lease.waiters.append((answer, body))
        else:
            answer.fail(TooManyRequestsError.code, TooManyRequestsError.text)

    def after_absence(self, lease_id: int, answer: Answer) -> None:
        """``answer.reply`` once it is durable that keys may not be attached: the lease is gone, or
        was not there yet. Otherwise as ``after_revoke``.
        """
        lease = self._leases[lease_id % _SEGMENTS].get(lease_id)
        if lease is not None and lease.state == _GRANTED:
            self._commits.release(HOME_ONLY, answer, b"")
        else:
            self.after_revoke(lease_id, answer, b"")

    # -- time --------------------------------------------------------------------------------------

    def tick(self) -> float:
        """Revoke leases that have expired and record remainders; seconds until the next call.

        It does a bounded part and asks to be called soon for the rest. A lease that cannot be
        revoked now (full queue, shard out) is looked at again when it can; the others go on.
        """
        self._ask_again()
        now = self._clock.monotonic()
        revokes = max(1, int(self._config.expired_per_second_max * BACKLOG_PAUSE))
        checkpoints = self._config.checkpoints_per_tick_max
        keys = self._config.revoked_keys_per_tick_max
        for scanned, (lease_id, lease) in enumerate(self._coming_up(now), start=1):
            if lease.expiry <= now:
                keys -= len(lease.keys or ())
                self._expire(lease_id, lease)
                revokes -= not lease.delayed  # what is refused takes nobody's turn
            else:
                checkpoints -= self._checkpoint(lease_id, lease, now)
                self._put_down(lease_id, lease, now)
            if revokes <= 0 or checkpoints <= 0 or keys <= 0:
                return BACKLOG_PAUSE
            if scanned >= self._config.scanned_per_tick_max:
                return SCAN_PAUSE
        return self._config.tick_interval

    def _coming_up(self, now: float) -> Iterator[tuple[int, _Lease]]:
        """Leases whose time in the agenda has come, then parked ones; they are there no longer."""
        while True:
            while self._up:
                lease_id = self._up.popleft()
                lease = self._leases[lease_id % _SEGMENTS].get(lease_id)
                if lease is None or lease.slot != self._up_slot or lease.state == _REVOKING:
                    continue  # revoked while it waited, and perhaps granted anew
                yield lease_id, lease
            taken = self._agenda.take(now)
            if taken is None:
                break
            self._up_slot, ids = taken
            self._up.extend(ids)
        for lease_id in self._parked.take():
            lease = self._leases[lease_id % _SEGMENTS].get(lease_id)
            if lease is not None and lease.delayed and lease.state != _REVOKING:
                yield lease_id, lease

    def _put_down(self, lease_id: int, lease: _Lease, now: float, part: float = 1.0) -> None:
        """Enter the lease into the agenda; a checkpoint comes after ``part`` of an interval."""
        due = lease.expiry
        if lease.ttl > self._config.checkpoint_interval:
            due = min(due, now + part * self._config.checkpoint_interval)
        lease.slot = self._agenda.add(lease_id, due)

    def _expire(self, lease_id: int, lease: _Lease) -> None:
        """Revoke an expired lease, perhaps when its turn comes, or put it off."""
        if lease.state == _REVOKING:
            return  # while it waited for its turn
        try:
            self._revoke(lease_id, lease)
            self.expired_total += 1
        except HeldError:
            self._store.barrier.run(
                self._shards(lease.keys or ()),
                lambda: self._expire(lease_id, lease),
                lambda _: self._put_off(lease_id, lease),
                0,
            )
        except StoreError:
            self._put_off(lease_id, lease)

    def _put_off(self, lease_id: int, lease: _Lease) -> None:
        """Revoke later what has been refused: when its shard takes writes, or soon."""
        if lease.state == _REVOKING:
            return  # by a client, meanwhile
        lease.delay()
        if not self._parked.add(lease_id, (HOME, *self._shards(lease.keys or ()))):
            due = self._clock.monotonic() + self._config.tick_interval
            lease.slot = self._agenda.add(lease_id, due)

    def _checkpoint(self, lease_id: int, lease: _Lease, now: float) -> int:
        """Record what is left of a long lease; how many rows that took, 0 or 1."""
        left = ceil(lease.expiry - now)
        if lease.ttl <= self._config.checkpoint_interval or left >= lease.ttl:
            return 0
        try:
            self._commits.check_room(HOME)
        except StoreError:
            return 1
        self._commits.append_lease(put=LeaseRow(lease_id, lease.ttl, left))
        lease.remainder = left
        return 1

    def _ask_again(self) -> None:
        """Take new tickets for those that failed since the last tick."""
        if self.unconfirmed:
            leases, self.unconfirmed = self.unconfirmed, []
            self._confirm(leases)
        for shards in list(self.half_revoked):
            if not any(self._commits.queues[shard].lost for shard in shards):
                self._end_when_gone(self.half_revoked.pop(shards), shards)

    def _confirm(self, leases: list[_Lease]) -> None:
        """Make leases attachable once their rows are durable."""

        def told(error: StoreError | None) -> None:
            if error is not None:  # not in time; the rows are still on the way
                self.unconfirmed += leases
                return
            for lease in leases:
                if lease.state == _GRANTED:
                    lease.state = _LIVE

        self._commits.release(HOME_ONLY, Then(told), b"")

    # -- revoking ----------------------------------------------------------------------------------

    def _revoke(self, lease_id: int, lease: _Lease) -> int:
        """Delete keys and row: at once, or the row when keys on other shards are durably gone."""
        keys = list(lease.keys or ())
        shards = self._touched(lease, keys)
        self._commits.check_room(HOME)
        if keys:
            self._store.check_room(self._shards(keys))
        head = self._store.head_of(shards)
        lease.state, lease.delayed = _REVOKING, False
        self.revoked_total += 1
        self._agenda.remove(lease_id, lease.slot)
        if shards == HOME_ONLY:
            # The row goes first: a batch may close behind the keys, and one batch takes both.
            self._end_revoke(lease_id)
            return self._store.delete_keys(keys) or head
        revision = self._store.delete_keys(keys) or head
        self._end_when_gone([lease_id], shards)
        return revision

    def _end_when_gone(self, lease_ids: list[int], shards: tuple[int, ...]) -> None:
        """Delete the rows once the keys on ``shards`` are durably gone."""

        def told(error: StoreError | None) -> None:
            if error is not None:  # not in time; the tombstones are still on the way
                self.half_revoked.setdefault(shards, []).extend(lease_ids)
            for lease_id in lease_ids:
                if error is None:
                    self._end_revoke(lease_id)
                else:
                    self._leases[lease_id % _SEGMENTS][lease_id].delay()

        self._commits.release(shards, Then(told), b"")

    def _end_revoke(self, lease_id: int) -> None:
        """Delete the row and forget the lease; its keys are gone, durably or in the same batch."""
        lease = self._leases[lease_id % _SEGMENTS].pop(lease_id)
        self._commits.append_lease(delete=lease_id)
        for answer, body in lease.waiters or ():
            self._commits.release(HOME_ONLY, answer, body)

    def _shards(self, keys: Collection[bytes]) -> tuple[int, ...]:
        """The shards of ``keys``."""
        return tuple(sorted({self._store.shards_of(key, None)[0] for key in keys}))

    def _touched(self, lease: _Lease, keys: Collection[bytes]) -> tuple[int, ...]:
        """Home, the shards of ``keys``, and those where the loss of others is not durable yet."""
        if lease.left:
            pending = self._commits.frontier
            lease.left = {each for each in lease.left if pending((each,)) != NOTHING_PENDING}
        return tuple(sorted({HOME, *self._shards(keys), *(lease.left or ())}))
