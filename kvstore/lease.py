"""Leases: who may attach keys, when they expire, and what a restart remembers of the time left.

A lease is in one of three states:

    grant ──> GRANTED ──durable──> LIVE ──revoke or expiry──> REVOKING ──row deleted──> gone
                 └───────────────── revoke or expiry ─────────────┘

- GRANTED: its row is on the way to the home shard.
  It can be seen, renewed and revoked (those answers wait for the same commit), but a put may not
  attach to it: on another shard the key could become durable before the lease.
- REVOKING lasts one call when all attached keys are on the home shard: the keys' tombstones and the
  deletion of the row are in one batch. Keys on other shards go first and the row follows once
  they are durably gone; a crash between the two leaves a lease without keys, which expires again.
  Nothing attaches to a REVOKING lease.

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
from collections.abc import Iterable, Iterator
from math import ceil
from random import Random
from typing import NamedTuple, Protocol

from kvstore.agenda import Agenda
from kvstore.answers import Answer
from kvstore.backend import LeaseRow
from kvstore.clock import Clock
from kvstore.commit import Commits
from kvstore.config import LeaseConfig
from kvstore.errors import (
    LeaseExistsError,
    LeaseNotFoundError,
    LeaseTtlTooLargeError,
    StoreError,
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


class Store(Protocol):
    """What the lessor needs of ``kvstore.store``."""

    @property
    def commits(self) -> Commits:
        """The road to storage."""

    def shards_of(self, key: bytes, end: bytes | None) -> tuple[int, ...]:
        """The shards that a key or range touches."""

    def delete_keys(self, keys: Iterable[bytes]) -> int:
        """Delete live keys of one shard in one revision; that revision, 0 when none was live."""


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


class _Lease:
    """One lease; only this module writes it."""

    __slots__ = ("expiry", "keys", "remainder", "slot", "state", "ttl", "waiters")

    def __init__(self, *, ttl: int, remainder: int, expiry: float, state: int) -> None:
        self.ttl = ttl
        self.remainder = remainder
        """Seconds that the last checkpoint recorded; 0: none."""
        self.expiry = expiry
        self.slot = 0
        """Its place in the agenda."""
        self.state = state
        self.keys: set[bytes] | None = None
        self.waiters: list[tuple[Answer, bytes]] | None = None


class _WhenGranted:
    """Makes leases attachable once their grant is durable."""

    __slots__ = ("_leases", "_lessor")

    def __init__(self, lessor: "Lessor", leases: list[_Lease]) -> None:
        self._lessor = lessor
        self._leases = leases

    def reply(self, message: bytes) -> None:
        """Their rows are durable."""
        for lease in self._leases:
            if lease.state == _GRANTED:
                lease.state = _LIVE

    def fail(self, code: int, message: str) -> None:
        """Not in time; the rows are still on the way."""
        self._lessor.unconfirmed += self._leases


class _WhenKeysGone:
    """Deletes a lease's row once its keys on other shards are durably gone."""

    __slots__ = ("_lease_id", "_lessor", "_shards")

    def __init__(self, lessor: "Lessor", lease_id: int, shards: tuple[int, ...]) -> None:
        self._lessor = lessor
        self._lease_id = lease_id
        self._shards = shards

    def reply(self, message: bytes) -> None:
        """The keys are durably gone."""
        self._lessor.end_revoke(self._lease_id)

    def fail(self, code: int, message: str) -> None:
        """Not in time; the tombstones are still on the way."""
        self._lessor.half_revoked.append((self._lease_id, self._shards))


class Lessor:
    """All leases of the store. See the module's text.

    Whatever is shown or refused here may rest on changes that are not durable yet: answers go
    through ``commits.release`` on ``HOME_ONLY`` unless a method says otherwise.
    """

    def __init__(self, clock: Clock, random: Random, config: LeaseConfig) -> None:
        self._clock = clock
        self._random = random
        self._config = config
        self._leases: list[dict[int, _Lease]] = [{} for _ in range(_SEGMENTS)]
        """By id; a single dictionary of a million leases takes 30 ms to grow."""
        self._agenda = Agenda()
        self._up: deque[int] = deque()
        """Leases of the slot ``_up_slot`` that came up and were not looked at yet."""
        self._up_slot = 0
        self._orphans: dict[int, set[bytes]] = {}
        """Keys whose lease is not stored, by lease; filled while loading."""
        self.unconfirmed: list[_Lease] = []
        """Grants whose ticket failed; ``tick`` asks again."""
        self.half_revoked: list[tuple[int, tuple[int, ...]]] = []
        """Leases and shards of keys whose ticket failed; likewise."""
        self.granted_total = 0
        self.renewed_total = 0
        self.revoked_total = 0
        """Those that expired included."""
        self.expired_total = 0

    def bind(self, store: Store) -> None:
        """Give it the store that deletes keys; once, right after both exist."""
        self._store = store
        self._commits = store.commits

    def __len__(self) -> int:
        """Leases held."""
        return sum(map(len, self._leases))

    # -- called by the store -----------------------------------------------------------------------

    def exists(self, lease: int) -> bool:
        """May keys attach? From the durable grant until a revoke begins, be it expired or not."""
        found = self._leases[lease % _SEGMENTS].get(lease)
        return found is not None and found.state == _LIVE

    def attach(self, lease: int, key: bytes) -> None:
        """``key`` now belongs to ``lease``; while loading, that may be one that is not stored."""
        found = self._leases[lease % _SEGMENTS].get(lease)
        if found is None:
            self._orphans.setdefault(lease, set()).add(key)
        elif found.keys is None:
            found.keys = {key}
        else:
            found.keys.add(key)

    def detach(self, lease: int, key: bytes) -> None:
        """``key`` no longer belongs to ``lease``, which may be gone."""
        found = self._leases[lease % _SEGMENTS].get(lease)
        keys = found.keys if found is not None else self._orphans.get(lease)
        if keys is not None:
            keys.discard(key)

    # -- start -------------------------------------------------------------------------------------

    def load(self, rows: Iterable[LeaseRow]) -> None:
        """Take over the stored leases, before or after the keys; ``delete_orphans`` is next.

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
            lease.keys = self._orphans.pop(row.id, None)
            self._leases[row.id % _SEGMENTS][row.id] = lease
            self._put_down(row.id, lease, now, self._random.random())

    def delete_orphans(self) -> int:
        """Delete keys whose lease is not stored, a revision per lease; how many leases are left.

        They are what a crash left between two shards. Called before serving, and again once commits
        have moved on while it does not return 0.
        """
        for lease_id in sorted(self._orphans):
            keys = list(self._orphans[lease_id])
            try:
                self._check_room(self._shards(keys))
            except StoreError:
                break
            self._delete_keys(keys)
            del self._orphans[lease_id]
        return len(self._orphans)

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
        lease = _Lease(ttl=ttl, remainder=0, expiry=now + ttl, state=_GRANTED)
        self._leases[lease_id % _SEGMENTS][lease_id] = lease
        self._put_down(lease_id, lease, now)
        self.granted_total += 1
        self._commits.append_lease(put=LeaseRow(lease_id, ttl, 0))
        self._commits.release(HOME_ONLY, _WhenGranted(self, [lease]), b"")
        return lease_id, ttl

    def revoke(self, lease_id: int) -> int:
        """Delete the lease and its keys; the deletion's revision, 0 when there was no live key.

        The answer, or LeaseNotFoundError, goes through ``after_revoke``.
        Raises LeaseNotFoundError (also while it is being revoked), and what ``check_room`` raises.
        """
        lease = self._leases[lease_id % _SEGMENTS].get(lease_id)
        if lease is None or lease.state == _REVOKING:
            raise LeaseNotFoundError
        return self._revoke(lease_id, lease)

    def keep_alive(self, lease_id: int) -> int | None:
        """Renew the lease: its TTL, 0 if it is unknown, None if it has expired but is still there.

        On None the answer is 0, through ``after_revoke``: etcd waits for the end of the lease, too.
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
        return TimeToLive(lease.ttl, max(0, int(left)), attached, self._shards(attached))

    def leases(self) -> list[int]:
        """Ids of all leases, in no order that means anything."""
        return [lease_id for segment in self._leases for lease_id in segment]

    def by_expiry(self, ids: Iterable[int]) -> list[tuple[float, int]]:
        """(expiry, id) of some leases in order; those that are gone meanwhile come first."""
        found = ((self._leases[lease_id % _SEGMENTS].get(lease_id), lease_id) for lease_id in ids)
        return sorted((lease.expiry if lease else 0.0, lease_id) for lease, lease_id in found)

    def after_revoke(self, lease_id: int, answer: Answer, body: bytes) -> None:
        """``answer.reply(body)`` once the lease is durably gone.

        Fails with too many requests when ``revoke_waiters_max`` others wait for it.
        """
        lease = self._leases[lease_id % _SEGMENTS].get(lease_id)
        if lease is None:
            self._commits.release(HOME_ONLY, answer, body)
        elif lease.waiters is None:
            lease.waiters = [(answer, body)]
        elif len(lease.waiters) < self._config.revoke_waiters_max:
            lease.waiters.append((answer, body))
        else:
            answer.fail(TooManyRequestsError.code, TooManyRequestsError.text)

    # -- time --------------------------------------------------------------------------------------

    def tick(self) -> float:
        """Revoke leases that have expired and record remainders; seconds until the next call.

        It does a bounded part and asks to be called soon for the rest. A lease that cannot be
        revoked now (full queue, shard out) is tried again half a second later, the others go on.
        """
        self._ask_again()
        now = self._clock.monotonic()
        revokes = max(1, int(self._config.expired_per_second_max * BACKLOG_PAUSE))
        checkpoints = self._config.checkpoints_per_tick_max
        keys = self._config.revoked_keys_per_tick_max
        for scanned, (lease_id, lease) in enumerate(self._coming_up(now), start=1):
            if lease.expiry <= now:
                revokes -= 1
                keys -= len(lease.keys or ())
                self._expire(lease_id, lease, now)
            else:
                checkpoints -= self._checkpoint(lease_id, lease, now)
                self._put_down(lease_id, lease, now)
            if revokes <= 0 or checkpoints <= 0 or keys <= 0:
                return BACKLOG_PAUSE
            if scanned >= self._config.scanned_per_tick_max:
                return SCAN_PAUSE
        return self._config.tick_interval

    def _coming_up(self, now: float) -> Iterator[tuple[int, _Lease]]:
        """Leases whose time in the agenda has come; they are no longer in it."""
        while True:
            while self._up:
                lease_id = self._up.popleft()
                lease = self._leases[lease_id % _SEGMENTS].get(lease_id)
                if lease is None or lease.slot != self._up_slot or lease.state == _REVOKING:
                    continue  # revoked while it waited, and perhaps granted anew
                yield lease_id, lease
            taken = self._agenda.take(now)
            if taken is None:
                return
            self._up_slot, ids = taken
            self._up.extend(ids)

    def _put_down(self, lease_id: int, lease: _Lease, now: float, part: float = 1.0) -> None:
        """Enter the lease into the agenda; a checkpoint comes after ``part`` of an interval."""
        due = lease.expiry
        if lease.ttl > self._config.checkpoint_interval:
            due = min(due, now + part * self._config.checkpoint_interval)
        lease.slot = self._agenda.add(lease_id, due)

    def _expire(self, lease_id: int, lease: _Lease, now: float) -> None:
        """Revoke an expired lease, or put it down for later."""
        try:
            self._revoke(lease_id, lease)
        except StoreError:
            lease.slot = self._agenda.add(lease_id, now + self._config.tick_interval)
        else:
            self.expired_total += 1

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
            self._commits.release(HOME_ONLY, _WhenGranted(self, leases), b"")
        half_revoked, self.half_revoked = self.half_revoked, []
        for lease_id, shards in half_revoked:
            self._commits.release(shards, _WhenKeysGone(self, lease_id, shards), b"")

    # -- revoking ----------------------------------------------------------------------------------

    def _revoke(self, lease_id: int, lease: _Lease) -> int:
        """Delete keys and row: at once, or the row when keys on other shards are durably gone."""
        keys = list(lease.keys or ())
        shards = self._shards(keys)
        self._check_room(shards)
        lease.state = _REVOKING
        self.revoked_total += 1
        self._agenda.remove(lease_id, lease.slot)
        if shards == HOME_ONLY:
            # The row goes first: a batch may close behind the keys, and one batch takes both.
            self.end_revoke(lease_id)
            return self._delete_keys(keys)
        revision = self._delete_keys(keys)
        self._commits.release(shards, _WhenKeysGone(self, lease_id, shards), b"")
        return revision

    def end_revoke(self, lease_id: int) -> None:
        """Delete the row and forget the lease; its keys are gone, durably or in the same batch."""
        lease = self._leases[lease_id % _SEGMENTS].pop(lease_id)
        self._commits.append_lease(delete=lease_id)
        for answer, body in lease.waiters or ():
            self._commits.release(HOME_ONLY, answer, body)

    def _delete_keys(self, keys: list[bytes]) -> int:
        """Delete ``keys``, for which there is room; the last revision, 0 when none was live.

        Keys of one shard die in one revision, as in etcd; a lease over several shards takes one
        revision per shard.
        """
        by_shard: dict[int, list[bytes]] = {}
        for key in keys:
            by_shard.setdefault(self._store.shards_of(key, None)[0], []).append(key)
        return max((self._store.delete_keys(group) for group in by_shard.values()), default=0)

    def _check_room(self, shards: tuple[int, ...]) -> None:
        """Raise what ``check_room`` raises for the first shard that refuses writes."""
        for shard in shards:
            self._commits.check_room(shard)

    def _shards(self, keys: list[bytes]) -> tuple[int, ...]:
        """Home and the shards of ``keys``."""
        touched = {self._store.shards_of(key, None)[0] for key in keys}
        return tuple(sorted(touched.union(HOME_ONLY)))
