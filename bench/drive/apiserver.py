"""A simulated kube-apiserver: caches that follow the store, and leases that objects share.

For each resource it has one line, over which it lists, watches, and sends its actors' calls, as
kube-apiserver has one client per resource. What an actor knows of an object is what the cache has
been told, or what the actor was answered, whichever is newer.

Leases are shared as kube-apiserver shares them: one is used for new objects for a twentieth of its
TTL, at most a minute, and for at most a thousand objects (apiserver,
pkg/storage/etcd3/lease_manager.go).
"""

import asyncio
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from bench import plan
from bench.client import requests
from bench.clock import MICROSECONDS, now_us
from bench.drive.site import Line, Site
from bench.drive.watching import Watching
from bench.records import Outcome
from kvstore.pb import rpc_pb2 as pb

LEASE_OBJECTS_MAX = 1000
_REUSE_PARTS = 20
_REUSE_SECONDS_MAX = 60


class Known(NamedTuple):
    """What is known of an object: its revision, and its value unless it is gone."""

    revision: int
    value: bytes | None


Leased = Callable[[int], None]
"""The lease's id; 0: none could be had."""


class _Shared:
    """A lease that objects share, or one that has been asked for."""

    def __init__(self, until_us: int) -> None:
        self.until_us = until_us
        self.objects = 0
        self.id = 0
        self.waiting: list[Leased] = []


class Apiserver:
    """See the module's text."""

    def __init__(self, site: Site, number: int, made: plan.Plan) -> None:
        self.site = site
        self.number = number
        self._cache: dict[bytes, Known] = {}
        self._leases: dict[int, _Shared] = {}
        self._other = Line(site)
        self._watching: list[tuple[bytes, Watching]] = []
        for prefix in sorted(made.resources, key=len, reverse=True):
            name = f"apiserver {number} {prefix.decode()}"
            watcher = plan.Watcher(name, prefix, progress=True)
            watching = Watching(site, Line(site), watcher, number, self.changed)
            self._watching.append((prefix, watching))
        self.revisions: list[tuple[int, int]] = []
        """(time, revision) as this apiserver has seen the store's head, for reads of history."""

    def up(self, group: asyncio.TaskGroup) -> None:
        """Connect all lines."""
        self._other.up(group)
        for _, watching in self._watching:
            watching.line.up(group)

    @property
    def watchings(self) -> list[Watching]:
        """One for each resource."""
        return [watching for _, watching in self._watching]

    @property
    def ready(self) -> bool:
        """Every cache has been filled and is watching."""
        return self._other.connection is not None and all(w.synced for w in self.watchings)

    def line(self, key: bytes) -> Line:
        """The connection for calls about a key."""
        for prefix, watching in self._watching:
            if key.startswith(prefix):
                return watching.line
        return self._other

    def lines(self) -> list[Line]:
        """All of them."""
        return [self._other, *(watching.line for watching in self.watchings)]

    # What is known.

    def changed(self, key: bytes, revision: int, value: bytes | None) -> None:
        """A list or a watch has shown an object."""
        known = self._cache.get(key)
        if known is None or known.revision < revision:
            self._cache[key] = Known(revision, value)

    def known(self, key: bytes) -> Known | None:
        """What the cache knows of an object."""
        return self._cache.get(key)

    def saw(self, now: int, revision: int) -> None:
        """An answer said how far the store is."""
        last_us, last = self.revisions[-1] if self.revisions else (0, 0)
        if now - last_us > MICROSECONDS // 10 and revision >= last:
            self.revisions.append((now, revision))

    def revision_at(self, time_us: int) -> int:
        """The newest revision seen at that time or before; the oldest one if there is none."""
        found = 0
        for at, revision in self.revisions:
            if at > time_us and found:
                break
            found = revision
        return found

    # Leases.

    def lease(self, ttl: int, leased: Leased) -> None:
        """A lease of ``ttl`` seconds for one more object; ``leased`` may be called at once."""
        now = now_us()
        shared = self._leases.get(ttl)
        if shared is None or shared.until_us < now or shared.objects >= LEASE_OBJECTS_MAX:
            reuse_us = min(ttl * MICROSECONDS // _REUSE_PARTS, _REUSE_SECONDS_MAX * MICROSECONDS)
            shared = self._leases[ttl] = _Shared(now + reuse_us)
            shared.waiting.append(leased)
            self._grant(ttl, shared, now)
        elif shared.id:
            leased(shared.id)
        else:
            shared.waiting.append(leased)
        shared.objects += 1

    def _grant(self, ttl: int, shared: _Shared, due_us: int) -> None:
        site, line = self.site, self._other
        operation, number, sent_us = next(site.operations), line.number, now_us()

        def answered(code: int, message: bytes, text: str) -> None:
            done_us = now_us()
            revision = -1
            if code == 0:
                answer = pb.LeaseGrantResponse.FromString(message)
                shared.id, revision = answer.ID, answer.header.revision
            elif self._leases.get(ttl) is shared:
                del self._leases[ttl]
            outcome = site.outcome(code, text) if code else Outcome.OK
            times = (due_us, sent_us, done_us)
            site.recorders["ops"].add(
                *(operation, number, -1, -1, 0, plan.Verb.GRANT, *times, outcome, code),
                *(-1, revision, -1, -1, shared.id, ttl, -1, 0, 0),
                *(b"apiserver.grant", b"", text.encode()),
            )
            waiting, shared.waiting = shared.waiting, []
            for leased in waiting:
                leased(shared.id)

        line.call(requests.GRANT, requests.grant(ttl), answered)

    # Trouble.

    def drop(self, trouble: plan.Disturbance, draw: Random) -> None:
        """Lose every connection; each watch comes back as the disturbance says."""
        reset = draw.random() < 0.5
        for watching in self.watchings:
            watching.come_back(trouble, draw)
        for line in self.lines():
            line.close(reset=reset)
