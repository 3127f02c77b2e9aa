"""What agents keep in a control plane: where it is stored, what it is called, how big it is.

Prefixes are those of kube-apiserver: custom resources below their group, nodes below "minions".
Sizes are bytes as stored, measured on agent-sandbox's objects. Values are named by their shape in
``bench.values``; a plan holds none of them.
Names must be unique in a run and the same for one seed, so they are made of counters and of the
plan's own ``random.Random``.
"""

import random

from bench.plan import Step, Verb

PODS = b"/registry/pods/"
EVENTS = b"/registry/events/"
"""kube-apiserver has no cache of these: they are watched by clients, not by apiservers."""
NODES = b"/registry/minions/"
LEASES = b"/registry/leases/"
MASTER_LEASES = b"/registry/masterleases/"
CONFIG_MAPS = b"/registry/configmaps/"
SANDBOXES = b"/registry/agents.x-k8s.io/sandboxes/"
CLAIMS = b"/registry/extensions.agents.x-k8s.io/sandboxclaims/"
POOLS = b"/registry/extensions.agents.x-k8s.io/sandboxwarmpools/"
RUNS = b"/registry/tekton.dev/pipelineruns/"

HEALTH = b"/registry/health"
COMPACT_REV_KEY = b"compact_rev_key"

CLAIM_NEW_BYTES, CLAIM_READY_BYTES = 525, 1_840
SANDBOX_NEW_BYTES, SANDBOX_READY_BYTES = 2_960, 4_040
POD_NEW_BYTES, POD_READY_BYTES = 2_560, 3_520
POOL_BYTES = 940
EVENT_BYTES = 600
LEASE_BYTES = 400
RUN_BYTES, RUN_ENTRY_BYTES = 3_000, 517

EVENT_TTL = 3_660
"""Seconds: an hour, and the minute for which kube-apiserver shares a lease."""

_NAME_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
"""What Kubernetes makes names of: no vowels, nothing that looks like another letter."""


def tenant(number: int) -> str:
    """The namespace of one tenant."""
    return f"tenant-{number:03}"


def key(resource: bytes, namespace: str, name: str) -> bytes:
    """Where an object is stored."""
    return b"%b%b/%b" % (resource, namespace.encode(), name.encode())


def suffix(draw: random.Random) -> str:
    """Five characters at the end of a generated name, ``x7k2p``."""
    return "".join(draw.choices(_NAME_LETTERS, k=5))


def create(key: bytes, role: str, shape: str, size: int, *, think_us: int = 0) -> Step:
    """An object comes to be, after the step before it."""
    return Step(Verb.CREATE, key, role, think_us=think_us, shape=shape, size=size)


def update(
    key: bytes, role: str, shape: str, size: int, *, think_us: int = 0, owner: str = ""
) -> Step:
    """It is rewritten as a whole, after the step before it."""
    return Step(Verb.UPDATE, key, role, think_us=think_us, shape=shape, size=size, owner=owner)


def delete(key: bytes, role: str, *, think_us: int = 0) -> Step:
    """It goes, after the step before it."""
    return Step(Verb.DELETE, key, role, think_us=think_us)


def event(namespace: str, about: str, reason: str, *, think_us: int = 0) -> Step:
    """An Event about an object: a create with a lease, for reasons of one word: ``Scheduled``.

    Its name is the object's and a number made from the reason, so that one object has at most one
    event for each; kube-apiserver's recorder uses a time there.
    """
    name = f"{about}.{int.from_bytes(reason.encode()[:8].ljust(8), 'big'):016x}"
    return Step(
        Verb.CREATE,
        key(EVENTS, namespace, name),
        f"event.{reason.lower()}",
        think_us=think_us,
        shape="event",
        size=EVENT_BYTES,
        lease_ttl=EVENT_TTL,
    )
