"""What is served where: the routes of the client listener and those of the metrics listener."""

import json
from collections.abc import Callable

from kvstore.http.health import HealthRoutes
from kvstore.http.routes import JSON, Query, Respond, Route, Routes
from kvstore.transport.api import HttpResponse
from kvstore.version import ETCD_CLUSTER_VERSION, ETCD_VERSION, STORAGE_VERSION

_VERSION = json.dumps(
    {
        "etcdserver": ETCD_VERSION,
        "etcdcluster": ETCD_CLUSTER_VERSION,
        "storage": STORAGE_VERSION,
    },
    separators=(",", ":"),
).encode()
_HEAD = frozenset({"/metrics"})
_METRICS_TYPE = (("content-type", "text/plain; version=0.0.4; charset=utf-8"),)


def make_routes(
    health: HealthRoutes, expose_metrics: Callable[[], bytes], tell_shards: Callable[[], bytes]
) -> tuple[Routes, Routes]:
    """Routes for client listeners and for metrics listeners.

    ``expose_metrics()`` returns all metrics in Prometheus' text format 0.0.4, ``tell_shards()``
    every shard and route as JSON.
    """

    def metrics(_: Query, respond: Respond) -> None:
        respond(HttpResponse(200, _METRICS_TYPE, expose_metrics()))

    def shards(_: Query, respond: Respond) -> None:
        respond(HttpResponse(200, JSON, tell_shards()))

    def version(_: Query, respond: Respond) -> None:
        respond(HttpResponse(200, JSON, _VERSION))

    observed: dict[str, Route] = {**health.routes(), "/metrics": metrics, "/shards": shards}
    clients = Routes({**observed, "/version": version}, head=_HEAD, cors=True)
    return clients, Routes(observed, head=_HEAD, cors=False)
