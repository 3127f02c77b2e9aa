"""What the health checks ask of the store: see ``http.health.Health``."""

from collections.abc import Mapping, Sequence

from kvstore.answers import Then
from kvstore.commit import Commits
from kvstore.errors import StoppedError, StoreError
from kvstore.http.health import Verdict
from kvstore.shard import HOME
from kvstore.shard_queue import ShardQueue


class StoreHealth:
    """Answers the checks from the queues of the shards."""

    def __init__(self, commits: Commits) -> None:
        self._commits = commits

    def alarms(self) -> Sequence[str]:
        """None: there is no quota."""
        return ()

    def shards(self) -> Mapping[str, str | None]:
        """By name: why a shard does not serve, or does not commit and soon will not."""
        queues = self._commits.queues
        return {} if len(queues) == 1 else {queue.name: _trouble(queue) for queue in queues}

    def check_read(self, verdict: Verdict, *, serializable: bool) -> None:
        """A read of home: refused when it is lost, and if linearizable, when it does not commit.

        etcd's own linearizable read needs its raft loop, which a stuck disk stops; here a read
        waits for nothing that is durable, so the check asks for the shard's commits instead. What
        keeps it from committing follows etcd's text.
        """
        home = self._commits.queues[HOME]

        def told(error: StoreError | None) -> None:
            if error is None:
                verdict(None)
            else:
                why = f" (shard {home.name}: {home.trouble})" if home.trouble else ""
                verdict(error.text + why)

        if serializable:
            verdict(StoppedError.text if home.broken else None)
        else:
            self._commits.release((HOME,), Then(told), b"")


def _trouble(queue: ShardQueue) -> str | None:
    """What is wrong with a shard; None: nothing."""
    if queue.state == "serving" or queue.broken:
        return queue.broken or None
    return f"{queue.state}: {queue.trouble}" if queue.trouble else queue.state
