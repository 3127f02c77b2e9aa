"""What will be sent, decided before anything is: the schedule.

A *plan* is made from (storm, parameters, seed, duration) alone and never changes, so every target
gets the same one; its fingerprint is printed beside every figure.
It holds *intents*: who does what to which key, when. Revisions and lease ids exist only in a run
and are bound there, as is the object that an ``ADOPT`` gets.

An *actor* is a sequence of steps taken one after the other, as one controller handles one object.
A step is due at an absolute offset, or a time to think after the step before it was answered. So
the arrival of work is open loop (an actor whose first step is due starts whether or not the server
keeps up), and what follows inside one piece of work is causal.

An *apiserver* is what stands between actors and the store: for each cached resource a connection,
a list, a watch and a cache of what these have shown. An actor sees the store through its
apiserver's cache and through its own answers, whichever is newer, and sends that revision along:
conflicts arise as they do in a cluster.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import IntEnum
from typing import NamedTuple


class Verb(IntEnum):
    """What a step asks of the store, in the shapes that kube-apiserver sends."""

    CREATE = 0
    """Txn: if MOD = 0 then put."""
    UPDATE = 1
    """Txn: if MOD = the revision seen then put, else read; again with what was read, a few times.
    An object that was never seen is read first."""
    DELETE = 2
    """Txn: if MOD = the revision seen then delete, else read; likewise."""
    ADOPT = 3
    """UPDATE of the first of ``candidates`` that is seen without an owner; if another was faster,
    of the next. The actor is bound to the name of the one it got."""
    GET = 4
    """Range of one key."""
    LIST = 5
    """Range of all keys that start with ``key``, in pages of ``limit`` at one revision."""
    COUNT = 6
    """Range that only counts them."""
    COMPACT = 7
    """kube-apiserver's compaction: Txn on the version of ``key``; its winner compacts to the
    revision that it had seen one interval earlier."""
    STATUS = 8
    """Maintenance.Status."""
    GRANT = 9
    """LeaseGrant; sent by the apiserver when a step needs a lease and there is none to share."""
    READ_AT = 10
    """Range of one key at the revision that the actor saw ``think`` ago or longer: history."""
    REVOKE = 11
    """Never planned; in recorded traces only."""
    OTHER = 12
    """Likewise: any other call of a recorded trace."""


WRITES = (Verb.CREATE, Verb.UPDATE, Verb.DELETE, Verb.ADOPT)
"""Txns on an object; a compaction's is told by its digest."""


class Edit(IntEnum):
    """How a written value comes about."""

    REPLACE = 0
    """A value of the step's own."""
    INCREMENT = 1
    """What was seen, its ``"count"`` raised by one."""
    APPEND = 2
    """What was seen, with one more entry in its list of steps."""


BOUND = b"{bound}"
"""In a key: the name that the actor got by ``ADOPT``."""


class Step(NamedTuple):
    """One intent. Times are microseconds; ``due_us`` counts from the start of the load."""

    verb: Verb
    key: bytes
    role: str
    """What it is in the storm, for latency by role and for evidence: ``claim.assign``."""
    due_us: int = -1
    """Absolute; never sent before the actor's previous step is answered, but counted from here.
    Negative: ``think_us`` after the previous answer."""
    think_us: int = 0
    shape: str = ""
    """Which kind of object the value imitates, a key of ``values.SHAPES``."""
    size: int = 0
    """Bytes of the value; an APPEND adds as many."""
    edit: Edit = Edit.REPLACE
    lease_ttl: int = 0
    """Seconds; the object is put with a lease of that TTL, shared as kube-apiserver shares them."""
    limit: int = 0
    """Of each page of a LIST."""
    candidates: tuple[bytes, ...] = ()
    """Keys for ADOPT, best first."""
    owner: str = ""
    """Who owns the object that is written; ADOPT takes those without."""
    refusal: int = 0
    """gRPC code with which the store must refuse this step; 0: it must not."""


class Actor(NamedTuple):
    """Steps taken one at a time through one apiserver."""

    name: str
    apiserver: int
    steps: tuple[Step, ...]


class Object(NamedTuple):
    """Something that exists before the load starts."""

    key: bytes
    shape: str
    size: int
    owner: str = ""


class Start(IntEnum):
    """Where a watcher begins."""

    LIST = 0
    """Pages of a list at one revision, then everything after it."""
    NOW = 1
    """The revision after the one at which the watch is created."""


class Watcher(NamedTuple):
    """A client of its own that watches all keys with a prefix, beside the apiservers' caches."""

    name: str
    prefix: bytes
    start: Start = Start.LIST
    prev_kv: bool = True
    progress: bool = False
    no_put: bool = False
    no_delete: bool = False
    events_per_second: int = 0
    """Reads no faster than that; 0: as fast as it can."""


class Trouble(IntEnum):
    """What is done to the server or to connections, on purpose."""

    DROP = 0
    """All connections of apiservers and watchers end, half of them by RST; then each comes back:
    ``resume`` per cent from the revision last seen, ``stale`` per cent from the beginning of
    history, the rest by a new list."""
    KILL = 1
    """kill -9 of the server, and a start on the same data."""
    PAUSE = 2
    """SIGSTOP of the server for ``lasts_us``; in its place SHARD where a target can do that."""
    SHARD = 3
    """A part of the server's storage is stopped and started by commands of the user's."""


class Disturbance(NamedTuple):
    """One trouble at one time; only servers that the benchmark started can be killed or paused."""

    at_us: int
    trouble: Trouble
    lasts_us: int = 0
    resume: int = 100
    stale: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that a run will do."""

    duration_us: int
    """Of the load: steps are due before it; what has begun by then is finished."""
    warm_up_us: int = 0
    """Operations due earlier are recorded and judged, and kept out of latencies."""
    apiservers: int
    resources: tuple[bytes, ...]
    """Prefixes that every apiserver caches, ``/registry/pods/``; each costs a connection."""
    preload: tuple[Object, ...] = ()
    actors: tuple[Actor, ...] = ()
    watchers: tuple[Watcher, ...] = ()
    disturbances: tuple[Disturbance, ...] = ()
    progress_requests_us: int = 0
    """Every so often each apiserver asks for progress on its watches; 0: never."""

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for a plan that cannot be run."""
        for actor in self.actors:
            if not 0 <= actor.apiserver < self.apiservers:
                raise ValueError(f"{actor.name}: there is no apiserver {actor.apiserver}")

    @property
    def steps(self) -> int:
        """How many intents there are."""
        return sum(len(actor.steps) for actor in self.actors)

    def fingerprint(self) -> str:
        """SHA-256 of every intent: the same for every target, or the runs are not comparable."""
        digest = hashlib.sha256()
        for line in _lines(self):
            digest.update(line.encode())
            digest.update(b"\n")
        return digest.hexdigest()

    def beside(self, other: "Plan") -> "Plan":
        """Both at once, for as long as this one takes; actors keep their apiservers."""
        return Plan(
            duration_us=self.duration_us,
            warm_up_us=self.warm_up_us,
            apiservers=max(self.apiservers, other.apiservers),
            resources=tuple(dict.fromkeys(self.resources + other.resources)),
            preload=self.preload + other.preload,
            actors=self.actors + other.actors,
            watchers=self.watchers + other.watchers,
            disturbances=self.disturbances + other.disturbances,
            progress_requests_us=self.progress_requests_us or other.progress_requests_us,
        )


def _lines(plan: Plan) -> Iterator[str]:
    """One line for every part of a plan, in its order."""
    assert is_dataclass(plan)
    for field in fields(plan):
        part = getattr(plan, field.name)
        if isinstance(part, tuple):
            yield from _rows(field.name, part)
        else:
            yield f"{field.name} {part!r}"


def _rows(name: str, rows: Iterable[object]) -> Iterator[str]:
    for row in rows:
        if isinstance(row, Actor):
            yield f"actor {row.name} {row.apiserver}"
            for step in row.steps:
                yield repr(tuple(map(_plain, step)))
        else:
            yield f"{name} {_plain(row)!r}"


def _plain(part: object) -> object:
    """Enumerations by number and rows as tuples, so that a new name changes no fingerprint."""
    if isinstance(part, IntEnum):
        return int(part)
    return tuple(map(_plain, part)) if isinstance(part, tuple) else part
