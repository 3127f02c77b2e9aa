"""A temporary PostgreSQL for tests that are not Python; run it with ``python -m``.

It prints the URL of a database, then obeys one word a line, ``kill`` (as a crash would) or
``start``, and prints ``done`` after each. The end of its input ends it and removes everything, so
that nothing outlives who started it, however that ends. Without a PostgreSQL it prints why in one
line, and its exit code is ``NONE_HERE``.
"""

import sys

from tests.backends.postgres_cluster import MISSING, find_programs, temporary_cluster

NONE_HERE = 3


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run until the input ends; the exit code."""
    programs = find_programs()
    if programs is None:
        _say(MISSING)
        return NONE_HERE
    with temporary_cluster(programs) as cluster:
        words = {"kill": lambda: cluster.stop("immediate"), "start": cluster.start}
        _say(cluster.plain_url())
        for line in sys.stdin:
            words[line.strip()]()
            _say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
