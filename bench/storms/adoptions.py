"""What became of a burst's claims: each adopts one Sandbox and becomes Ready, once.

An actor whose every candidate has an owner already goes on without: it leaves an ADOPT that was
lost and never sent, with the time at which it looked. Whether none was free then, the records tell
of the Sandboxes that were there before the load: each was until somebody tried to adopt it.
"""

import numpy as np
from numpy.typing import NDArray

from bench.plan import Verb
from bench.records import NEVER_US, PRELOADED, Frame, Outcome, Records
from bench.storms import attempts, objects, timing
from bench.verdicts import Verdict, rule_of, verdict


def claims(ops: Frame) -> dict[int, bytes]:
    """Names of the claims by their actors."""
    creates = ops.where(timing.begins(ops, "role", b"claim.create"))
    keys = creates.text("key")
    pairs = zip(creates["actor"].tolist(), creates["key"].tolist(), strict=True)
    return {actor: keys[key].rpartition(b"/")[2] for actor, key in pairs}


def adopted_is_ready(judge: str, records: Records, ops: Frame, candidates: int) -> Verdict:
    """Claims, adoptions and Readys are as many, but for actors that met an error.

    And for those that had not come to their Ready when the run was cut short; and one adopts
    nothing if no candidate was free.
    """
    names, actors = claims(ops), int(ops["actor"].max(initial=-1)) + 1
    done = ops.where(attempts.written(ops))
    created, adopted, ready = (
        _times(done, role, actors) for role in (b"claim.create", b"claim.adopt", b"claim.ready")
    )
    excused = attempts.troubled_actors(ops)
    if records.facts["state"] != "COMPLETE":
        begun = _times(ops, b"claim.ready", actors) > 0
        excused = np.union1d(excused, np.flatnonzero(~begun & (adopted <= 1)))
    judged = np.setdiff1d(np.flatnonzero(created), excused)
    without = _without(records, ops, candidates)
    evidence = []
    for actor in judged.tolist():
        free = without.get(actor, b"")
        if ready[actor] == 1 and (adopted[actor] == 1 or (adopted[actor] == 0 and free is None)):
            continue
        told = f", though {free.decode()} was free" if free else ", without any error"
        evidence.append(
            f"{names[actor].decode()} adopted {adopted[actor]} Sandboxes and was made Ready "
            f"{ready[actor]} times{told}"
        )
    lacking = "no claim was created and met no error"
    rule = rule_of(adopted_is_ready)
    return verdict(judge, len(judged), evidence, rule=rule, lacking=lacking)


def _times(ops: Frame, role: bytes, actors: int) -> NDArray[np.int64]:
    """How many rows with that role each actor has."""
    return np.bincount(ops["actor"][timing.begins(ops, "role", role)], minlength=actors)


def _without(records: Records, ops: Frame, candidates: int) -> dict[int, bytes | None]:
    """By actors that found every candidate owned: one that was free; nothing if none was."""
    adopts = ops.where(ops["verb"] == Verb.ADOPT)
    tried = adopts.where(
        (attempts.written(adopts) | attempts.unsure(adopts)) & (adopts["sent"] >= 0)
    )
    since: dict[int, int] = {}
    """When a Sandbox may first have been owned, by the code of its key."""
    for key, sent in zip(tried["key"].tolist(), tried["sent"].tolist(), strict=True):
        since[key] = min(sent, since.get(key, sent))
    preloaded = records.frame(PRELOADED)
    keys, owned = preloaded.text("key"), {}
    for key in preloaded["key"][timing.begins(preloaded, "key", objects.SANDBOXES)].tolist():
        owned[_place(keys[key])] = (since.get(key, NEVER_US), keys[key])
    lost = adopts.where((adopts["outcome"] == Outcome.CONFLICT) & (adopts["sent"] < 0))
    found: dict[int, bytes | None] = {}
    for actor, key, at in zip(
        *(lost[name].tolist() for name in ("actor", "key", "done")), strict=True
    ):
        pool, first = _place(keys[key])
        places = ((pool, number) for number in range(first, first + candidates))
        known = (owned[place] for place in places if place in owned)
        found[actor] = next((name for since_us, name in known if since_us > at), None)
    return found


def _place(sandbox: bytes) -> tuple[bytes, int]:
    """Its pool, and its number there: ``/registry/.../<namespace>/<pool>-<number>-<suffix>``."""
    pool, number, _ = sandbox.rsplit(b"-", 2)
    return pool, int(number)
