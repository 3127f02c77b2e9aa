"""What became of a step: its attempts together, as a user waits for all of them.

The records have one row per call. A step whose comparison failed is sent again with what was read,
and one on an object never seen reads it first, so a step is several rows; its latency is from when
it was due until its last answer, and whether it was done is what the last one says.
"""

import numpy as np
from numpy.typing import NDArray

from bench.plan import WRITES
from bench.records import FINAL, INCIDENTS, Frame, Outcome, Records
from bench.storms import timing


def steps(ops: Frame) -> Frame:
    """One row for every step of an actor: its last call, due when its first was.

    There is one more column, ``conflicts``: how many of its calls lost their comparison. An ADOPT
    that found no candidate without owner was lost before its last row, which was never sent.
    """
    ops = ops.where(np.lexsort((ops["op"], ops["step"], ops["actor"])))
    changes = np.diff(ops["actor"]).astype(bool) | np.diff(ops["step"]).astype(bool)
    first = np.flatnonzero(np.concatenate(([True], changes)))[: len(ops)]
    last = np.append(first[1:], len(ops))[: len(first)] - 1
    conflict = (ops["outcome"] == Outcome.CONFLICT) & (ops["sent"] >= 0)
    lost = np.cumsum(np.append(0, conflict))
    columns = {name: ops[name][last] for name in ops.columns}
    columns["due"] = ops["due"][first]
    columns["conflicts"] = lost[last + 1] - lost[first]
    return Frame(columns, {name: ops.text(name) for name in ("role", "key", "message")})


def written(ops: Frame) -> timing.Mask:
    """Rows that are acknowledged changes."""
    mask: timing.Mask = timing.is_verb(ops, WRITES) & (ops["outcome"] == Outcome.OK)
    return mask


def unsure(ops: Frame) -> timing.Mask:
    """Rows that are changes which may have been made or not."""
    unknown = (ops["outcome"] == Outcome.UNKNOWN) | (ops["done"] < 0)
    mask: timing.Mask = timing.is_verb(ops, WRITES) & unknown
    return mask


def troubled_actors(ops: Frame) -> NDArray[np.int64]:
    """Actors to which a call failed: what they do afterwards follows from that."""
    failed = (ops["outcome"] == Outcome.UNKNOWN) | (ops["outcome"] == Outcome.REFUSED)
    return np.unique(ops["actor"][(failed | (ops["done"] < 0)) & (ops["refusal"] == 0)])


def disturbance(records: Records) -> str:
    """Why what happened may have other causes than the load; empty: it was calm."""
    if records.facts["state"] != "COMPLETE":
        return "the run was cut short"
    disturbed = len(records.frame(INCIDENTS))
    return "server or connections were disturbed on purpose" if disturbed else ""


def is_calm(records: Records) -> bool:
    """Did the run come to its end, without trouble that was made on purpose?"""
    return not disturbance(records)


def final_values(records: Records) -> dict[bytes, tuple[int, bytes]]:
    """Version and value of every object that was there in the end."""
    final = records.frame(FINAL)
    keys, values = final.text("key"), final.text("value")
    rows = zip(
        final["key"].tolist(), final["version"].tolist(), final["value"].tolist(), strict=True
    )
    return {keys[key]: (version, values[value]) for key, version, value in rows}


def tally(frame: Frame, column: str) -> dict[bytes, int]:
    """How many rows have each byte string."""
    texts = frame.text(column)
    found, counts = np.unique(frame[column], return_counts=True)
    return {texts[code]: n for code, n in zip(found.tolist(), counts.tolist(), strict=True)}
