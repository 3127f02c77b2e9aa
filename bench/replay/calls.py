"""Calls of a replay, from the request that is sent to the rows that records have of its answer."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from google.protobuf.message import DecodeError, Message

from bench.clock import now_us
from bench.drive.site import NO_CONNECTION, UNKNOWN_CODES
from bench.plan import Verb
from bench.records import Outcome, Recorder
from bench.replay.script import Call, merged
from bench.replay.shapes import INVALID_ARGUMENT, Result, Shape, prefix_of, result_of, shape_of
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


@dataclass(slots=True)
class Counts:
    """What a replay has done beside its records."""

    sent: int = 0
    withheld: Counter[str] = field(default_factory=Counter)
    """Calls that were not sent, by method."""
    unjudged: Counter[str] = field(default_factory=Counter)
    """Calls whose writes judges cannot follow, by method."""
    otherwise: Counter[str] = field(default_factory=Counter)
    """Calls that came out otherwise than recorded: refused or not, won or lost. By method."""


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
        shape = shape_of(request)
        inside = isinstance(request, pb.RangeRequest) and request.key != shape.key
        if shape.verb == Verb.LIST and page is FIRST and inside:
            shape.verb = Verb.OTHER  # a page whose beginning nobody knows
        if shape.unjudged:
            shape.verb = Verb.OTHER
        self.counts.sent += 1
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
        if self.shape.unjudged and _wrote(result, now):
            self._calls.counts.unjudged[self.call.rpc.name.decode()] += 1
        self._record(result, code, text, done_us)

    def _compare(self, code: int, then: Message | None, now: Message | None) -> None:
        """Count what came out otherwise."""
        if self.call.code < 0:
            return
        won, wins = (getattr(answer, "succeeded", None) for answer in (then, now))
        if self.call.code != code or won != wins:
            self._calls.counts.otherwise[self.call.rpc.name.decode()] += 1

    def _record(self, result: Result, code: int, text: str, done_us: int) -> None:
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
            self.call.number if page is FIRST else page.first,
            0,
            page.number,
            result.verb,
            self._due_us,
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
