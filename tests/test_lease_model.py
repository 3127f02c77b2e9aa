"""Leases against a model, over every cut that a crash can make.

Each operation leaves a picture of what should be there. After a crash the store must equal one of
the pictures from the last answered operation on, and no lease may have less time than promised.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.agenda import SLOT_SECONDS
from kvstore.config import CommitConfig, Config, LeaseConfig
from kvstore.errors import LeaseExistsError, LeaseNotFoundError
from kvstore.lease import HOME_ONLY
from tests.engine import Engine, Waiter

IDS = st.sampled_from([1, 2, -3])
KEYS = st.sampled_from([b"a", b"b", b"c", b"x/a"])
TTLS = st.sampled_from([0, 3, 30, 299, 301, 1000])
CONFIG = Config(
    lease=LeaseConfig(expired_per_second_max=1),  # one revoke a tick, so that each has a picture
    commit=CommitConfig(batch_rows_max=2),
)


@dataclass
class Picture:
    """What should be there: each lease's TTL and deadline, each live key's lease."""

    ttls: dict[int, int] = field(default_factory=dict)
    deadlines: dict[int, float] = field(default_factory=dict)
    keys: dict[bytes, int] = field(default_factory=dict)

    def copy(self) -> "Picture":
        """Another one that changes by itself."""
        return Picture(dict(self.ttls), dict(self.deadlines), dict(self.keys))

    def forget(self, lease_id: int) -> None:
        """The lease and its keys are gone."""
        del self.ttls[lease_id], self.deadlines[lease_id]
        self.keys = {key: lease for key, lease in self.keys.items() if lease != lease_id}


class LeaseMachine(RuleBasedStateMachine):
    """One server's life after another over the same disk."""

    @initialize()
    def start(self) -> None:
        """A new store."""
        self.engine = Engine(config=CONFIG)
        self.picture = Picture()
        self.pictures = [(answered(), self.picture.copy())]
        self.grants: dict[int, Waiter] = {}

    def release(self) -> Waiter:
        """Take a ticket for an operation that was just done, with its picture."""
        waiter = Waiter()
        self.engine.commits.release(HOME_ONLY, waiter, b"")
        self.pictures.append((waiter, self.picture.copy()))
        return waiter

    # -- requests ------------------------------------------------------------------------------

    @rule(lease_id=IDS, ttl=TTLS)
    def grant(self, lease_id: int, ttl: int) -> None:
        """Grant, refused if it is there."""
        if lease_id in self.picture.ttls:
            with pytest.raises(LeaseExistsError):
                self.engine.lessor.grant(lease_id, ttl)
            return
        granted = max(2, ttl)
        assert self.engine.lessor.grant(lease_id, ttl) == (lease_id, granted)
        self.picture.ttls[lease_id] = granted
        self.picture.deadlines[lease_id] = self.engine.clock.now + granted
        self.grants[lease_id] = self.release()

    @rule(key=KEYS, lease_id=IDS)
    def attach(self, key: bytes, lease_id: int) -> None:
        """Put with a lease, refused until its grant is durable."""
        if lease_id not in self.picture.ttls or self.grants[lease_id].waits:
            with pytest.raises(LeaseNotFoundError):
                self.engine.put(key, lease_id)
            return
        self.engine.put(key, lease_id)
        self.picture.keys[key] = lease_id
        self.release()

    @rule(key=KEYS)
    def put(self, key: bytes) -> None:
        """Put without a lease."""
        self.engine.put(key)
        self.picture.keys[key] = 0
        self.release()

    @rule(key=KEYS)
    def delete(self, key: bytes) -> None:
        """Delete."""
        existed = self.picture.keys.pop(key, None) is not None
        assert self.engine.delete(key) == existed
        self.release()

    @rule(lease_id=IDS)
    def revoke(self, lease_id: int) -> None:
        """Revoke, in one revision or none."""
        before = self.engine.store.revision
        if lease_id not in self.picture.ttls:
            with pytest.raises(LeaseNotFoundError):
                self.engine.lessor.revoke(lease_id)
            return
        had_keys = lease_id in self.picture.keys.values()
        assert self.engine.lessor.revoke(lease_id) == before + had_keys
        self.picture.forget(lease_id)
        self.release()

    @rule(lease_id=IDS)
    def keep_alive(self, lease_id: int) -> None:
        """Renew; too late once it has expired."""
        now = self.engine.clock.now
        ttl = self.engine.lessor.keep_alive(lease_id)
        if lease_id not in self.picture.ttls:
            assert ttl == 0
        elif self.picture.deadlines[lease_id] <= now:
            assert ttl is None
        else:
            assert ttl == self.picture.ttls[lease_id]
            self.picture.deadlines[lease_id] = now + ttl
            self.release()

    # -- time and the disk ---------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.125, 0.5, 2, 10, 100, 290]), ticks=st.booleans())
    def wait(self, *, seconds: float, ticks: bool) -> None:
        """Time goes by; the lessor revokes what has expired, nothing else, and not too late."""
        self.engine.clock.advance(seconds)
        now = self.engine.clock.now
        pause = 0.0
        while ticks and pause < CONFIG.lease.tick_interval:
            pause = self.engine.lessor.tick()
            for lease_id in set(self.picture.ttls) - set(self.engine.lessor.leases()):
                assert self.picture.deadlines[lease_id] <= now, "expired too early"
                self.picture.forget(lease_id)
                self.release()
        if ticks:
            late = now - SLOT_SECONDS
            assert all(deadline > late for deadline in self.picture.deadlines.values())

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        """The disk works a little."""
        for _ in range(steps):
            self.engine.steps.run_next()

    @rule()
    def settle(self) -> None:
        """The disk finishes."""
        self.engine.settle()
        assert all(not waiter.waits for waiter, _ in self.pictures)

    @rule(seconds=st.sampled_from([0, 1, 1000]))
    def crash(self, seconds: int) -> None:
        """Die and start again: a picture that could be there is there, with time enough."""
        now = self.engine.clock.now
        last = max(i for i, (waiter, _) in enumerate(self.pictures) if not waiter.waits)
        possible = [picture for _, picture in self.pictures[last:]]
        self.engine = self.engine.crash(seconds=seconds)
        assert self.engine.lessor.orphans.delete() == 0
        found = self.found()
        matching = [p for p in possible if (p.ttls, p.keys) == (found.ttls, found.keys)]
        assert matching, "neither what was answered nor anything after it"
        for lease_id, ttl in found.ttls.items():
            left = found.deadlines[lease_id] - self.engine.clock.now
            promised = min(p.deadlines[lease_id] for p in matching) - now
            assert min(promised, ttl) <= left <= ttl
            assert left == ttl or ttl > CONFIG.lease.checkpoint_interval
        self.picture = found
        self.pictures = [(answered(), found.copy())]
        self.grants = dict.fromkeys(found.ttls, answered())

    # -- what is there -------------------------------------------------------------------------

    def found(self) -> Picture:
        """What the engine has."""
        segments = self.engine.lessor._leases
        leases = {id_: lease for segment in segments for id_, lease in segment.items()}
        attached = {key: id_ for id_, lease in leases.items() for key in lease.keys or ()}
        return Picture(
            {lease_id: lease.ttl for lease_id, lease in leases.items()},
            {lease_id: lease.expiry for lease_id, lease in leases.items()},
            {key: attached.get(key, 0) for key in self.engine.live()},
        )

    @invariant()
    def head_is_the_model(self) -> None:
        """The head is the last picture; the agenda holds each lease once."""
        if hasattr(self, "engine"):
            assert self.found() == self.picture
            assert len(self.engine.lessor._agenda) == len(self.picture.ttls)

    def teardown(self) -> None:
        """Whatever happened, everything expires in the end."""
        if hasattr(self, "engine"):
            self.settle()
            self.wait(seconds=2000, ticks=True)
            self.engine.settle()
            assert (self.engine.lessor.leases(), self.engine.disks[0].leases) == ([], {})
            assert set(self.engine.live()) == {k for k, id_ in self.picture.keys.items() if not id_}


def answered() -> Waiter:
    """A ticket that was answered long ago."""
    waiter = Waiter()
    waiter.reply(b"")
    return waiter


LeaseMachine.TestCase.settings = settings(settings(), stateful_step_count=40)
TestLeases = LeaseMachine.TestCase
