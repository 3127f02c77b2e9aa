"""One actor: takes its steps in order, each when it is due, and records every call.

    waiting --due--> (lease) --> (read what was never seen) --> called --answered--> next step
                                        ^                          |
                                        +---- conflict: again -----+   at most ATTEMPTS_MAX

A conflict is answered by what the Txn's else-branch read, and tried again with that. After an
outcome that is unknown the step is over (what was sent may be done) and the next one waits for
``BACKOFF_US``, as a controller's queue makes it wait. A step that was due and of which nothing was
sent is recorded too: as never sent, never answered. An ADOPT whose candidates all have owners is
lost to them, and recorded as a conflict that was never sent.
"""

from functools import partial
from typing import NamedTuple

from bench.client import requests
from bench.clock import now_us
from bench.drive.apiserver import Apiserver, Known
from bench.drive.listing import Listing, Origin
from bench.drive.site import Line
from bench.plan import BOUND, WRITES, Actor, Edit, Step, Verb
from bench.records import Outcome
from bench.values import append, digest, increment, is_owned, value
from kvstore.pb import rpc_pb2 as pb

ATTEMPTS_MAX = 5
BACKOFF_US = 200_000
_DEADLINE_EXCEEDED = 4
_NEVER_US = 1 << 62


class _Call(NamedTuple):
    """A call in progress."""

    path: bytes
    line: Line
    verb: Verb
    key: bytes
    operation: int
    connection: int
    due_us: int
    sent_us: int
    expected: int
    mark: int
    at: int


class _Answer(NamedTuple):
    """What came back, as the columns of OPS say it; ``counted`` is ``count``."""

    outcome: Outcome
    revision: int
    found: int = -1
    counted: int = -1
    mark: int = -1


class Acting:
    """An actor at work; ``number`` is its index in the plan.

    ``done`` when no step is left, ``busy`` while one is under way.
    """

    __slots__ = (
        "_actor",
        "_apiserver",
        "_attempt",
        "_bound",
        "_candidate",
        "_due_us",
        "_failed",
        "_index",
        "_key",
        "_known",
        "_lease",
        "_missed",
        "_own",
        "_seen_revision",
        "_step",
        "_value",
        "_version",
        "busy",
        "done",
        "number",
    )

    def __init__(self, actor: Actor, number: int, apiserver: Apiserver) -> None:
        self.number = number
        self.done = not actor.steps
        self.busy = False
        self._actor = actor
        self._apiserver = apiserver
        self._index = -1
        self._step = actor.steps[0] if actor.steps else None
        self._bound: bytes | None = None
        self._own: dict[bytes, Known] = {}
        self._version = 0
        self._seen_revision = 0
        self._due_us = 0
        self._failed = False
        self._attempt = 0
        self._candidate = 0
        self._known: Known | None = None
        self._lease = 0
        self._missed = False
        """ADOPT got nothing because the cache did not show a candidate; that the others were
        faster is in order."""
        self._key = b""
        self._value = b""

    # From step to step.

    def begin(self) -> None:
        """Arrange for the first step; the load has started."""
        self._next(self._apiserver.site.zero_us)

    def _next(self, answered_us: int) -> None:
        """Arrange for the step after one that was answered then."""
        self._index += 1
        site = self._apiserver.site
        self.busy = False
        if self._index >= len(self._actor.steps):
            self._end()
            return
        step = self._step = self._actor.steps[self._index]
        due_us = site.zero_us + step.due_us if step.due_us >= 0 else answered_us + step.think_us
        send_us = due_us
        if self._failed:
            send_us = max(due_us, answered_us + BACKOFF_US)
            self._failed = False
        self._due_us = due_us if step.due_us >= 0 else send_us
        if site.over:
            self.leave()
        elif send_us > now_us():
            site.ticker.at(send_us, self._take)
        else:
            self._take()

    def _take(self) -> None:
        """A step is due."""
        step = self._step
        assert step is not None
        if self._apiserver.site.over:
            self.leave()
            return
        self.busy = True
        self._attempt = 0
        self._candidate = 0
        self._lease = 0
        self._key = step.key
        if BOUND in step.key and step.verb != Verb.ADOPT:
            if self._bound is None:
                if self._missed:
                    self._omit(self._index, self._due_us, "its actor adopted nothing")
                self._next(now_us())
                return
            self._key = step.key.replace(BOUND, self._bound)
        if step.lease_ttl:
            self._apiserver.lease(step.lease_ttl, self._leased)
        else:
            self._act(step)

    def _leased(self, lease: int) -> None:
        step = self._step
        assert step is not None
        self._lease = lease
        if lease:
            self._act(step)
        else:
            self._omit(self._index, self._due_us, "no lease")
            self._failed = True
            self._next(now_us())

    # What is not begun.

    def leave(self) -> None:
        """The load is over: record what was due by now and is not begun, and end.

        Left out, it would flatter the server that was slower. A step that counts from the answer
        before it is due only if it is the next one; one bound to what was not adopted never is.
        """
        if self.done or self._index < 0:
            return
        now, zero_us = now_us(), self._apiserver.site.zero_us
        bound = self._bound is not None or self._missed
        first = self._index + 1 if self.busy else self._index
        for index in range(first, len(self._actor.steps)):
            step = self._actor.steps[index]
            bound = bound or step.verb == Verb.ADOPT
            next_us = self._due_us if index == self._index else _NEVER_US
            due_us = zero_us + step.due_us if step.due_us >= 0 else next_us
            if due_us <= now and (bound or BOUND not in step.key):
                self._omit(index, due_us, "the load ended before it was begun")
        self._end()

    def _omit(self, index: int, due_us: int, why: str) -> None:
        """Record a step of which nothing was sent."""
        step, site = self._actor.steps[index], self._apiserver.site
        key = step.candidates[0] if step.candidates else step.key
        never = site.zero_us - 1  # is -1 in the records, whose times count from zero
        site.recorders["ops"].add(
            *(next(site.operations), -1, self.number, index, 0, step.verb),
            *(due_us, never, never, Outcome.UNKNOWN, _DEADLINE_EXCEEDED),
            *(-1, -1, -1, -1, 0, 0, -1, 0, step.refusal),
            *(step.role.encode(), key.replace(BOUND, self._bound or BOUND), why.encode()),
        )

    def _end(self) -> None:
        self.done = True
        self._own.clear()

    def _act(self, step: Step) -> None:
        """Send what the step asks for."""
        verb = step.verb
        if verb in (Verb.UPDATE, Verb.DELETE):
            self._change(step)
        elif verb == Verb.CREATE:
            self._value = self._replacement(step)
            message = requests.create(self._full(), self._value, self._lease)
            self._send(requests.TXN, message, expected=0, mark=digest(self._value))
        elif verb == Verb.ADOPT:
            self._adopt(step)
        elif verb == Verb.LIST:
            self._list(step)
        elif verb == Verb.COMPACT:
            self._compact()
        else:
            self._read(step)

    def _full(self) -> bytes:
        return self._apiserver.site.prefix + self._key

    # What is known, and what is written.

    def _look(self, key: bytes) -> Known | None:
        """What this actor knows of an object: the newer of its own answers and the cache."""
        own, known = self._own.get(key), self._apiserver.known(key)
        if own is None or (known is not None and known.revision > own.revision):
            return known
        return own

    def _replacement(self, step: Step) -> bytes:
        return value(
            run=self._apiserver.site.run,
            actor=self.number,
            seq=self._index,
            shape=step.shape,
            size=step.size,
            owner=step.owner,
        )

    def _edited(self, step: Step, known: Known) -> bytes:
        assert known.value is not None
        if step.edit == Edit.INCREMENT:
            run = self._apiserver.site.run
            return increment(known.value, run=run, actor=self.number, seq=self._index)
        if step.edit == Edit.APPEND:
            return append(known.value, f"{self.number}.{self._index}", step.size)
        return self._replacement(step)

    def _change(self, step: Step) -> None:
        """UPDATE or DELETE of an object as it is known; of one never seen, after reading it."""
        known = self._known = self._look(self._key)
        if known is None or known.value is None:
            self._send(requests.RANGE, requests.read(self._full(), limit=1), verb=Verb.GET)
            return
        self._change_known(step, known)

    def _change_known(self, step: Step, known: Known) -> None:
        revision = known.revision
        if step.verb == Verb.DELETE:
            message = requests.delete(self._full(), revision)
            self._send(requests.TXN, message, expected=revision, mark=-1)
            return
        written = self._value = self._edited(step, known)
        message = requests.update(self._full(), written, revision, self._lease)
        self._send(requests.TXN, message, expected=revision, mark=digest(written))

    def _adopt(self, step: Step) -> None:
        """The next candidate that is seen without an owner; none left: the step is over."""
        while self._candidate < len(step.candidates):
            self._key = step.candidates[self._candidate]
            known = self._look(self._key)
            if known is not None and known.value is not None and not is_owned(known.value):
                self._change_known(step, known)
                return
            self._missed = self._missed or known is None
            self._candidate += 1
        if self._missed:
            self._omit(self._index, self._due_us, "a candidate was never seen")
        else:
            self._forgo(step)
        self._next(now_us())

    def _forgo(self, step: Step) -> None:
        """Record an ADOPT that others were faster at, over now: no candidate is without owner."""
        site = self._apiserver.site
        site.recorders["ops"].add(
            *(next(site.operations), -1, self.number, self._index, self._attempt, step.verb),
            *(self._due_us, site.zero_us - 1, now_us(), Outcome.CONFLICT, 0),
            *(-1, -1, -1, -1, 0, 0, -1, 0, step.refusal),
            *(step.role.encode(), step.candidates[0], b"every candidate has an owner"),
        )

    def _read(self, step: Step) -> None:
        """GET, COUNT, READ_AT, STATUS."""
        key, at = self._full(), 0
        if step.verb == Verb.STATUS:
            self._send(requests.STATUS, b"")
            return
        if step.verb == Verb.COUNT:
            message = requests.read(key, requests.prefix_end(key), count=True)
        elif step.verb == Verb.READ_AT:
            at = self._apiserver.revision_at(now_us() - step.think_us)
            message = requests.read(key, revision=at)
        else:
            message = requests.read(key, limit=1)
        self._send(requests.RANGE, message, at=at)

    def _compact(self) -> None:
        """Try to be the apiserver that compacts in this interval."""
        written = self._value = b"%d" % self._seen_revision
        message = requests.compact_cas(self._full(), written, self._version)
        self._send(requests.TXN, message, mark=digest(written))

    def _compacting(self, revision: int) -> bool:
        """The Txn was won, at ``revision``: compact to what was seen one interval earlier."""
        before, self._seen_revision = self._seen_revision, revision
        self._version += 1
        if before:
            self._send(requests.COMPACT, requests.compact(before), at=before)
        return before > 0

    def _list(self, step: Step) -> None:
        def listed(revision: int) -> None:
            self._failed = revision < 0
            self._next(now_us())

        origin = Origin(self.number, self._index, step.role.encode())
        apiserver = self._apiserver
        line = apiserver.line(self._key)
        shown = apiserver.changed
        listing = Listing(apiserver.site, line, self._key, origin, listed, shown)
        listing.begin(self._due_us, limit=step.limit)

    # Calls.

    def _send(
        self,
        path: bytes,
        message: bytes,
        *,
        verb: Verb | None = None,
        expected: int = -1,
        mark: int = -1,
        at: int = 0,
    ) -> None:
        """One call, which goes to ``_answered`` with its answer."""
        step = self._step
        assert step is not None
        site = self._apiserver.site
        line = self._apiserver.line(self._key)
        kind = step.verb if verb is None else verb
        call = _Call(
            path=path,
            line=line,
            verb=kind,
            key=self._key,
            operation=next(site.operations),
            connection=line.number,
            due_us=self._due_us,
            sent_us=now_us(),
            expected=expected,
            mark=mark,
            at=at,
        )
        line.call(path, message, partial(self._answered, call))

    def _answered(self, call: "_Call", code: int, raw: bytes, text: str) -> None:
        """Record a call with its answer, and go on from there."""
        step, site = self._step, self._apiserver.site
        assert step is not None
        done_us = call.line.received_us() if code == 0 else now_us()
        if code:
            answer = _Answer(site.outcome(code, text), -1, mark=call.mark)
        else:
            answer = self._understood(call, raw)
        site.recorders["ops"].add(
            *(call.operation, call.connection, self.number, self._index, self._attempt),
            *(call.verb, call.due_us, call.sent_us, done_us, answer.outcome, code),
            *(call.expected, answer.revision, answer.found, answer.mark, self._lease, 0),
            *(answer.counted, call.at, step.refusal if call.verb == step.verb else 0),
            *(step.role.encode(), call.key, text.encode()),
        )
        if code == 0:
            site.head_revision = max(site.head_revision, answer.revision)
            self._apiserver.saw(done_us, answer.revision)
        self._due_us = done_us
        if answer.outcome == Outcome.OK:
            self._succeeded(step, call, answer.revision, done_us)
        elif answer.outcome == Outcome.CONFLICT:
            self._conflicted(step, call.key, answer.revision, done_us)
        else:
            self._failed = True
            self._next(done_us)

    def _understood(self, call: "_Call", raw: bytes) -> "_Answer":
        """What an answer that is no error says."""
        if call.path is requests.TXN:
            done = pb.TxnResponse.FromString(raw)
            revision = done.header.revision
            if done.succeeded:
                return _Answer(Outcome.OK, revision, mark=call.mark)
            return _Answer(Outcome.CONFLICT, revision, self._lost(done), mark=call.mark)
        if call.path is requests.RANGE:
            shown = pb.RangeResponse.FromString(raw)
            found, mark = self._shown(call, shown)
            return _Answer(Outcome.OK, shown.header.revision, found, shown.count, mark)
        if call.path is requests.COMPACT:
            return _Answer(Outcome.OK, pb.CompactionResponse.FromString(raw).header.revision)
        return _Answer(Outcome.OK, pb.StatusResponse.FromString(raw).header.revision)

    def _lost(self, answer: pb.TxnResponse) -> int:
        """The revision of what the else-branch read, which is remembered; 0: nothing is there."""
        for part in answer.responses:
            for kv in part.response_range.kvs:
                self._own[self._key] = Known(kv.mod_revision, kv.value)
                self._version = kv.version
                return kv.mod_revision
        if answer.responses:
            self._own[self._key] = Known(answer.header.revision, None)
            return 0
        return -1

    def _shown(self, call: "_Call", answer: pb.RangeResponse) -> tuple[int, int]:
        """Revision and digest of the object that GET or READ_AT read; remembered if it is new."""
        if call.verb not in (Verb.GET, Verb.READ_AT):
            return -1, -1
        operation, key, at = call.operation, call.key, call.at
        for kv in answer.kvs:
            mark = digest(kv.value)
            self._apiserver.site.recorders["items"].add(
                operation, kv.mod_revision, kv.create_revision, kv.version, kv.lease, mark, key
            )
            if not at:
                self._own[key] = Known(kv.mod_revision, kv.value)
            return kv.mod_revision, mark
        if not at:
            self._own[key] = Known(answer.header.revision, None)
        return 0, -1

    def _succeeded(self, step: Step, call: "_Call", revision: int, done_us: int) -> None:
        """An answer that is OK: the step is over, unless it was only the reading before it."""
        kind, key = call.verb, call.key
        if kind == Verb.GET and step.verb in (Verb.UPDATE, Verb.DELETE):
            known = self._own[key]
            if known.value is not None:
                self._change_known(step, known)
                return
        elif kind in WRITES:
            written = None if kind == Verb.DELETE else self._value
            self._own[key] = Known(revision, written)
            if kind == Verb.ADOPT:
                self._bound = key.rpartition(b"/")[2]
        elif kind == Verb.COMPACT and call.path is requests.TXN and self._compacting(revision):
            return
        self._next(done_us)

    def _conflicted(self, step: Step, key: bytes, revision: int, done_us: int) -> None:
        """Somebody was faster."""
        self._attempt += 1
        if step.verb == Verb.COMPACT:
            self._seen_revision = revision
            self._next(done_us)
            return
        if step.verb == Verb.ADOPT:
            self._adopt(step)
            return
        known = self._own.get(key)
        retry = self._attempt < ATTEMPTS_MAX and step.verb in (Verb.UPDATE, Verb.DELETE)
        if retry and known is not None and known.value is not None:
            self._change_known(step, known)
        else:
            self._next(done_us)
