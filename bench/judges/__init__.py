"""The judges: is what a run has recorded what etcd would have done?

    records -> Case (history, what each watch was owed and got) -> judges -> verdicts

Judges know nothing of the storm, and believe nothing that they can compute: the history is made
of what was sent, acknowledged and shown, and everything else must follow from it. Each judge is a
function from a case to a verdict; the first paragraph of its docstring is the guarantee that it
checks, and what users read of it.
What cannot be known (writes of unknown outcome, keys that no watch covers) is not judged.
Everything is counted over whole columns, because a run has millions of rows; only one step per
watch, per list and per piece of evidence is taken one by one.
"""

from collections.abc import Callable
from dataclasses import replace

from bench.judges import attendance, contents, leases, origins, reads, watch, writes
from bench.judges.case import Case
from bench.records import Records
from bench.verdicts import Verdict, rule_of

Judge = Callable[[Case], Verdict]

JUDGES: tuple[Judge, ...] = (
    attendance.everyone,
    watch.ordered,
    watch.unique,
    watch.atomic,
    watch.reliable,
    watch.resumable,
    watch.bookmarkable,
    watch.filtered,
    contents.prev_kv,
    contents.is_create,
    reads.final_state,
    writes.cas_chains,
    writes.durable,
    contents.version_arithmetic,
    writes.revision,
    reads.snapshot,
    leases.ttl_window,
    leases.ttl_overdue,
    watch.lag_drains,
    origins.attributable,
)
"""In the order in which verdicts are told."""


def judge(records: Records) -> list[Verdict]:
    """What every judge says of one run."""
    case = Case(records)
    return [replace(each(case), rule=rule_of(each)) for each in JUDGES]
