"""Record what real clients say to an etcd, and say it again to another server.

``record`` stands between clients and an etcd, hands every byte on and keeps it with its time.
``replay`` sends such a trace to servers under test, with revisions and leases translated, and
leaves the same raw records as a storm, so that the same judges judge it.

    client -- proxy -- etcd            trace -- script -- player -- server under test
                |                                            |
                +--> trace (trace.py)                        +--> records (bench/records.py)
"""

from bench.replay.record import record
from bench.replay.session import replay
from bench.replay.trace import TraceError

__all__ = ["TraceError", "record", "replay"]
