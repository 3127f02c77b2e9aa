"""grpc.health.v1.Health: as grpc-go's server answers."""

import pytest

from kvstore.pb import health_pb2 as pb
from kvstore.rpc.health import HealthService
from tests.rpc.streams import HandStream, deliver, opened
from tests.stack import serve

SERVING = pb.HealthCheckResponse.SERVING
NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN


def request(service: str) -> bytes:
    """A HealthCheckRequest."""
    return pb.HealthCheckRequest(service=service).SerializeToString()


def statuses(stream: HandStream) -> list[int]:
    """What a watch was told."""
    return [pb.HealthCheckResponse.FromString(message).status for message in stream.sent]


@pytest.mark.parametrize(("draining", "status"), [(False, SERVING), (True, NOT_SERVING)])
def test_check_and_list_show_the_server_as_a_whole(*, draining: bool, status: int) -> None:
    """SERVING under the empty name until the server drains."""
    service = HealthService()
    if draining:
        service.drain()
    body = serve(service.check, request("")).body
    assert body is not None
    assert pb.HealthCheckResponse.FromString(body).status == status
    body = serve(service.list, b"").body
    assert body is not None
    listed = pb.HealthListResponse.FromString(body).statuses
    assert {name: answer.status for name, answer in listed.items()} == {"": status}


def test_check_knows_no_other_service() -> None:
    """Etcd registers the empty name alone."""
    failed = serve(HealthService().check, request("etcdserverpb.KV")).failed
    assert failed == (5, "unknown service")


def test_a_watch_is_told_when_the_server_drains() -> None:
    """Once now and once at the change; a watch that ended is told no more."""
    service = HealthService()
    stream, sink = opened(service.watch)
    ended, ended_sink = opened(service.watch)
    for one, its_sink in ((stream, sink), (ended, ended_sink)):
        deliver(its_sink, one, request(""))
        its_sink.half_closed()
        assert statuses(one) == [SERVING]
    ended_sink.closed()
    service.drain()
    service.drain()
    assert (statuses(stream), statuses(ended)) == ([SERVING, NOT_SERVING], [SERVING])
    late, late_sink = opened(service.watch)
    deliver(late_sink, late, request(""))
    assert statuses(late) == [NOT_SERVING]


def test_a_watch_of_an_unknown_service_stays_open() -> None:
    """SERVICE_UNKNOWN and no status: the service might still come."""
    service = HealthService()
    stream, sink = opened(service.watch)
    deliver(sink, stream, request("x"))
    service.drain()
    assert (statuses(stream), stream.status) == ([SERVICE_UNKNOWN], None)
    sink.closed()
