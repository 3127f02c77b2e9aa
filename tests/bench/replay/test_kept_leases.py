"""A lease that a recorded client keeps alive lives longer than it was granted for."""

from pathlib import Path

import pytest

from bench.plan import Verb
from tests.bench.judges.world import TTL, World, fresh, number, verdict_of

LATE_US = 8_000_000


def kept_key(world: World) -> dict[str, int | bytes]:
    """A lease of which a key went long after its time to live; gives the lease's grant."""
    grant = next(
        grant
        for grant in world.find("ops", verb=Verb.GRANT)
        if any(world.find("events", lease=grant["lease"]))
    )
    for name in ("due", "sent", "done"):
        grant[name] = number(grant, name) - LATE_US
    world.rows["incidents"].clear()
    return grant


@pytest.mark.slow
def test_lease_that_is_kept_alive_may_last(tmp_path: Path) -> None:
    """Without the keep-alive it is a violation, with it there is none; other leases are judged."""
    world = fresh()
    grant = kept_key(world)
    (tmp_path / "late").mkdir()
    assert not verdict_of(world, "TTL overdue", tmp_path / "late").passed
    alike = {"op": 20_000, "verb": Verb.OTHER, "lease": grant["lease"], "ttl": 0}
    world.rows["ops"].append(grant | alike)
    (tmp_path / "kept").mkdir()
    kept = verdict_of(world, "TTL overdue", tmp_path / "kept")
    assert kept.passed
    assert kept.checked
    assert TTL * 1_000_000 < LATE_US
