"""Calls of a replay, from the request that is sent to the rows that records have of its answer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple

from google.protobuf.message import DecodeError, Message

from bench.clock import now_us
from bench.drive.site import NO_CONNECTION, UNKNOWN_CODES
from bench.plan import Verb
from bench.records import Outcome, Recorder
from bench.replay.script import Call, merged
from bench.replay.shapes import (
    INVALID_ARGUMENT,
    Result,
    Shape,
    effects_of,
    prefix_of,
    result_of,
    shape_of,
    tell_deleted,
)
from bench.replay.translation import Translation
from bench.values import digest
from kvstore.pb import rpc_pb2 as pb
from kvstore.transport import grpc


class Page(NamedTuple):
    """Where the next page of a list begins, and at what revision."""

    first: int
    """The call that asked for the first page."""
    number: int
    start: bytes
    revision: int


FIRST = Page(-1, 0, b"", 0)
NOBODY = -1
"""The actor of rows that are no operation."""
LONG_AGO_US = 0
"""When rows were due that are no call: before the load, of which figures take no notice."""


WITHHELD = "changes members, leader or logins"
NO_LEASE = "names a lease that there is not"
EMPTY = "a stream on which nothing was said"
CUT_OFF = "the replay ended before"
"""Why a call was not sent; also ``NO_CONNECTION``."""
UNJUDGED = "calls of which it is not known what they wrote"


@dataclass(slots=True)
class Counts:
    """What a replay has done beside its records."""

    begun: set[int] = field(default_factory=set)
    """Recorded calls of which something was sent."""
    unsent: dict[int, str] = field(default_factory=dict)
    """Of a call, why something of it was not sent."""
    unjudged: Counter[str] = field(default_factory=Counter)
    """Calls whose writes judges cannot follow, by method."""
    otherwise: Counter[str] = field(default_factory=Counter)
    """Calls that came out otherwise than recorded: refused or not, won or lost. By method."""

    @property
    def sent(self) -> int:
        """How many of the recorded calls were sent."""
        return len(self.begun)

    def not_sent(self, calls: Sequence[Call], *, whole: bool) -> dict[str, Counter[str]]:
        """Methods of the recorded calls that were not sent, by why; with ``sent`` these are all.

        ``whole``: the replay came to its end, so what nobody gave a reason for has nothing to send.
        """
        found: dict[str, Counter[str]] = {}
        for call in calls:
            if call.number not in self.begun:
                why = self.unsent.get(call.number, EMPTY if whole else CUT_OFF)
                found.setdefault(why, Counter())[call.rpc.name.decode()] += 1
        return found


def named(calls: Mapping[str, int]) -> str:
    """Calls by method as text: ``2 KV/Txn, 1 Watch/Watch``."""
    return ", ".join(f"{many:,} {method}" for method, many in calls.items())


class Calls:
    """All calls of one replay that have one answer."""

    def __init__(
        self, recorders: Mapping[str, Recorder], translation: Translation, counts: Counts
    ) -> None:
        self.recorders = recorders
        self.translation = translation
        self.counts = counts
        self.operations = count()
        self._pages: dict[tuple[int, bytes], Page] = {}
        """By connection and where the page began when it was recorded."""

    def sending(self, call: Call, request: Message, connection: int, due_us: int) -> "Sending":
        """A recorded request, made one of the replay's."""
        page = FIRST
        if isinstance(request, pb.RangeRequest):
            found = self._pages.pop((call.connection, request.key), None)
            if found is not None and prefix_of(request):
                page = found
                request.key = found.start
                if request.revision:
                    request.revision = found.revision
        if page is FIRST or not isinstance(request, pb.RangeRequest):
            lost = call.lost() is not None
            self.translation.request(call.connection, request, lost=lost)
        tell_deleted(request)
        shape = shape_of(request)
        inside = isinstance(request, pb.RangeRequest) and request.key != shape.key
        if shape.verb == Verb.LIST and page is FIRST and inside:
            shape.verb = Verb.OTHER  # a page whose beginning nobody knows
        if shape.unjudged:
            shape.verb = Verb.OTHER
        return Sending(self, call, request, shape, page, connection, due_us)

    def turned(self, sending: "Sending", then: pb.RangeResponse, now: pb.RangeResponse) -> None:
        """A page was read: the next one begins behind it."""
        if then.more and then.kvs and now.more and now.kvs:
            page, call = sending.page, sending.call
            first = call.number if page is FIRST else page.first
            revision = sending.shape.at or now.header.revision
            self._pages[call.connection, then.kvs[-1].key + b"\0"] = Page(
                first, page.number + 1, now.kvs[-1].key + b"\0", revision
            )


class Sending:
    """One call on its way."""

    def __init__(
        self,
        calls: Calls,
        call: Call,
        request: Message,
        shape: Shape,
        page: Page,
        connection: int,
        due_us: int,
    ) -> None:
        self.call, self.request, self.shape, self.page = call, request, shape, page
        self._calls = calls
        self._connection = connection
        self._operation = next(calls.operations)
        self._due_us = due_us
        self._sent_us = max(now_us(), due_us)

    def answered(self, code: int, answers: list[bytes], text: str, done_us: int) -> None:
        """The answer is there, or an error."""
        now: Message | None = None
        if code == 0:
            try:
                now = merged(self.call.rpc, answers)
            except DecodeError as error:
                code, text = grpc.INTERNAL, str(error)
        then = self.call.answer()
        if now is None:
            unknown = code in UNKNOWN_CODES and text is not NO_CONNECTION
            outcome = Outcome.UNKNOWN if unknown else Outcome.REFUSED
            mark, lease = self.shape.digest, self.shape.lease
            result = Result(self.shape.verb, outcome, digest=mark, lease=lease)
        else:
            result = result_of(self.shape, self.request, now)
            self._calls.translation.answered(self.call.connection, self.request, then, now)
            if isinstance(now, pb.RangeResponse) and isinstance(then, pb.RangeResponse):
                self._calls.turned(self, then, now)
        self._compare(code, then, now)
        effects = None if now is None else effects_of(self.request, now)
        if self.shape.unjudged and effects:
            self._record_all(result, effects, done_us)
            return
        if self.shape.unjudged and (effects is None and _wrote(result, now)):
            self._calls.counts.unjudged[self.call.rpc.name.decode()] += 1
        self._record(result, code, text, done_us)

    def _record_all(self, result: Result, effects: Sequence[Shape], done_us: int) -> None:
        """A row for each key that was written; figures see the first, which is the call's."""
        for number, shape in enumerate(effects):
            self.shape = shape
            one = replace(result, verb=shape.verb, outcome=Outcome.OK, digest=shape.digest)
            self._record(replace(one, lease=shape.lease), 0, "", done_us, beside=number > 0)

    def _compare(self, code: int, then: Message | None, now: Message | None) -> None:
        """Count what came out otherwise."""
        if self.call.code < 0:
            return
        won, wins = (getattr(answer, "succeeded", None) for answer in (then, now))
        if self.call.code != code or won != wins:
            self._calls.counts.otherwise[self.call.rpc.name.decode()] += 1

    def _record(
        self, result: Result, code: int, text: str, done_us: int, *, beside: bool = False
    ) -> None:
        """``beside``: it is another row of a call that has one."""
        shape, page = self.shape, self.page
        add = self._calls.recorders["items"].add
        for kv in result.items:
            mark = digest(kv.value)
            add(
                self._operation,
                kv.mod_revision,
                kv.create_revision,
                kv.version,
                kv.lease,
                mark,
                kv.key,
            )
        self._calls.recorders["ops"].add(
            self._operation,
            self._connection,
            NOBODY if beside else self.call.number if page is FIRST else page.first,
            0,
            page.number,
            result.verb,
            LONG_AGO_US if beside else self._due_us,
            self._sent_us,
            done_us,
            result.outcome,
            code,
            shape.expected,
            result.revision,
            result.found,
            result.digest,
            result.lease,
            shape.ttl,
            result.count,
            shape.at,
            INVALID_ARGUMENT if self.call.code == INVALID_ARGUMENT else 0,
            self.call.rpc.name,
            shape.key,
            text.encode(),
        )


def _wrote(result: Result, now: Message | None) -> bool:
    """May a call that judges cannot follow have written?"""
    if isinstance(now, pb.DeleteRangeResponse):
        return now.deleted > 0
    if isinstance(now, pb.TxnResponse):
        kinds = [part.WhichOneof("response") for part in now.responses]
        return any(kind != "response_range" for kind in kinds)
    return now is not None or result.outcome == Outcome.UNKNOWN
