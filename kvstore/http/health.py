"""``/health``, ``/livez`` and ``/readyz``, with the checks and texts of etcd 3.6.

The rules are etcd's (``server/etcdserver/api/etcdhttp/health.go``): ``/health`` answers JSON and
stops at the first trouble; the other two run named checks, show them with ``?verbose``, always show
them when one fails, skip those in ``?exclude=``, and serve each alone below their path.

**Degraded is not down.** With several shards ``/readyz`` has a check of each. A probe acts on all
of a server: whoever takes it out of service, or starts it anew, because one database is away takes
the keys of all others away as well, and brings nothing back. So the check of a shard that fails is
shown, asked for or not, and the answer stays 200, ``ok (degraded)``; alone, below its path, it is a
503 for whoever watches that shard. Down is what etcd calls so: home, without which nothing can be
committed for long, is what ``/health``, ``/livez`` and the other checks of ``/readyz`` ask for.

A check is a question that may take a while: it gets a callback and answers it with None or with
what is wrong. The store fails whoever waits longer than its shard timeout, so no check hangs.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, Protocol

from kvstore.http.routes import GUARDED, PLAIN, Query, Respond, Route
from kvstore.transport.api import HttpResponse

Verdict = Callable[[str | None], None]
Check = Callable[[Verdict], None]


class Health(Protocol):
    """What the checks ask of the store."""

    def alarms(self) -> Sequence[str]:
        """Names of raised alarms as etcd spells them: ``NOSPACE``, ``CORRUPT``."""

    def shards(self) -> Mapping[str, str | None]:
        """What is wrong with each shard (None: nothing), by name; empty if there is only one."""

    def check_read(self, verdict: Verdict, *, serializable: bool) -> None:
        """Can a read be answered? ``verdict`` gets None, or the error text that a client would."""


class HealthRoutes:
    """The routes, and counters of what the checks said for the metrics."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self.succeeded = 0
        """Answers of ``/health`` that said "true"."""
        self.failed = 0
        self.results: Counter[tuple[str, str, Literal["success", "error"]]] = Counter()
        """How often a check (path without its slash, name) ended so."""
        self.latest: dict[tuple[str, str], int] = {}
        """1 if the check's last run succeeded, else 0."""

    def routes(self) -> dict[str, Route]:
        """Every path served here."""

        def corruption(verdict: Verdict) -> None:
            raised = "CORRUPT" in self._health.alarms()
            verdict("alarm activated: CORRUPT" if raised else None)

        def serializable(verdict: Verdict) -> None:
            self._health.check_read(verdict, serializable=True)

        def linearizable(verdict: Verdict) -> None:
            self._health.check_read(verdict, serializable=False)

        def member(verdict: Verdict) -> None:
            verdict(None)

        def shard(name: str) -> Check:
            return lambda verdict: verdict(self._health.shards()[name])

        ready: dict[str, Check] = {
            "data_corruption": corruption,
            "serializable_read": serializable,
            "linearizable_read": linearizable,
            "non_learner": member,
        }
        shards = {f"shard_{name}": shard(name) for name in self._health.shards()}
        return {
            "/health": self._check_health,
            **self._checked("livez", {"serializable_read": serializable}, {}),
            **self._checked("readyz", ready, shards),
        }

    def _check_health(self, query: Query, respond: Respond) -> None:
        excluded = set(query.get("exclude", ()))
        for alarm in self._health.alarms():
            if alarm not in excluded:
                self._tell_health(respond, f"ALARM {alarm}")
                return

        def answered(trouble: str | None) -> None:
            self._tell_health(respond, "" if trouble is None else f"RANGE ERROR:{trouble}")

        serializable = query.get("serializable", [""])[0] == "true"
        self._health.check_read(answered, serializable=serializable)

    def _tell_health(self, respond: Respond, reason: str) -> None:
        told = {"health": "false" if reason else "true", "reason": reason}
        body = json.dumps(told, separators=(",", ":")).encode()
        if reason:
            self.failed += 1
            respond(HttpResponse(503, GUARDED, body + b"\n"))
        else:
            self.succeeded += 1
            respond(HttpResponse(200, PLAIN, body))

    def _checked(
        self, kind: str, checks: Mapping[str, Check], parts: Mapping[str, Check]
    ) -> dict[str, Route]:
        """The root of ``kind``, which runs all checks, and one path for each alone. ``parts`` are
        those that the root shows and does not fail for.
        """
        every = {**checks, **parts}

        def one(name: str) -> Route:
            return lambda query, respond: self._run(kind, {name: every[name]}, (), query, respond)

        def root(query: Query, respond: Respond) -> None:
            excluded = query.get("exclude", ())
            left = {name: check for name, check in every.items() if name not in excluded}
            self._run(kind, left, parts, query, respond)

        return {f"/{kind}": root, **{f"/{kind}/{name}": one(name) for name in every}}

    def _run(
        self,
        kind: str,
        checks: Mapping[str, Check],
        parts: Collection[str],
        query: Query,
        respond: Respond,
    ) -> None:
        """Run ``checks`` one after the other, then answer with what each said."""
        left = list(checks.items())
        lines: list[str] = []
        failed: set[str] = set()

        def proceed() -> None:
            if left:
                name, check = left.pop(0)
                check(lambda trouble: note(name, trouble))
            elif failed.difference(parts):
                respond(HttpResponse(503, GUARDED, ("".join(lines) + "\n").encode()))
            else:
                shown = "".join(lines) if failed or "verbose" in query else ""
                verdict = "ok (degraded)" if failed else "ok"
                respond(HttpResponse(200, GUARDED, f"{shown}{verdict}\n".encode()))

        def note(name: str, trouble: str | None) -> None:
            fine = trouble is None
            lines.append(f"[+]{name} ok\n" if fine else f"[-]{name} failed: {trouble}\n")
            if not fine:
                failed.add(name)
            self.results[kind, name, "success" if fine else "error"] += 1
            self.latest[kind, name] = int(fine)
            proceed()

        proceed()
