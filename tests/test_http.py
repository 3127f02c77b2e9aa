"""The pages: paths, methods, checks and texts as etcd 3.6 gives them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from kvstore.http.health import HealthRoutes, Verdict
from kvstore.http.pages import make_routes
from kvstore.http.routes import Routes
from kvstore.transport.api import HttpRequest, HttpResponse

READY = (
    "[+]data_corruption ok\n[+]serializable_read ok\n"
    "[+]linearizable_read ok\n[+]non_learner ok\nok\n"
)
GUARDED = {"content-type": "text/plain; charset=utf-8", "x-content-type-options": "nosniff"}
CORS = {
    "access-control-allow-headers": "accept, content-type, authorization",
    "access-control-allow-methods": "POST, GET, OPTIONS, PUT, DELETE",
    "access-control-allow-origin": "*",
}


@dataclass
class FakeHealth:
    """A store that is as well as a test says."""

    raised: list[str] = field(default_factory=list)
    serializable: str | None = None
    linearizable: str | None = None
    parts: dict[str, str | None] = field(default_factory=dict)
    waiting: list[Verdict] | None = None
    """Verdicts that wait for the test, if it wants them to."""

    def alarms(self) -> Sequence[str]:
        """Those raised."""
        return self.raised

    def shards(self) -> dict[str, str | None]:
        """What is wrong with each."""
        return self.parts

    def check_read(self, verdict: Verdict, *, serializable: bool) -> None:
        """Answer at once, or when the test says."""
        if self.waiting is not None:
            self.waiting.append(verdict)
        else:
            verdict(self.serializable if serializable else self.linearizable)


class Pages:
    """Both sets of routes over one fake store."""

    def __init__(self, health: FakeHealth | None = None) -> None:
        self.store = health or FakeHealth()
        self.health = HealthRoutes(self.store)
        self.clients, self.metrics = make_routes(
            self.health, lambda: b"some_metric 1\n", lambda: b'{"shards":[]}'
        )
        self.late: list[HttpResponse] = []

    def ask(
        self, target: str, method: str = "GET", routes: Routes | None = None
    ) -> HttpResponse | None:
        """One request, of the client listener unless told otherwise."""
        request = HttpRequest(method, target, (), b"", respond=self.late.append)
        return (routes or self.clients).handle(request)

    def get(self, target: str, method: str = "GET") -> tuple[int, dict[str, str], str]:
        """Status, headers without CORS, and body of an answer that comes at once."""
        answer = self.ask(target, method)
        assert answer is not None
        headers = dict(answer.headers)
        assert CORS.items() <= headers.items()
        return (
            answer.status,
            {name: text for name, text in headers.items() if name not in CORS},
            answer.body.decode(),
        )


@pytest.mark.parametrize(
    ("target", "body"),
    [
        ("/health", '{"health":"true","reason":""}'),
        ("/health?serializable=true&exclude=NOSPACE", '{"health":"true","reason":""}'),
        ("/livez", "ok\n"),
        ("/livez?verbose", "[+]serializable_read ok\nok\n"),
        ("/livez?verbose&exclude=serializable_read", "ok\n"),
        ("/livez?verbose&exclude=unknown", "[+]serializable_read ok\nok\n"),
        ("/livez/serializable_read", "ok\n"),
        ("/livez/serializable_read?verbose=", "[+]serializable_read ok\nok\n"),
        ("/readyz", "ok\n"),
        (
            "/readyz?verbose",
            READY,
        ),
        (
            "/readyz?exclude=data_corruption&exclude=linearizable_read&verbose",
            "[+]serializable_read ok\n[+]non_learner ok\nok\n",
        ),
        ("/readyz/linearizable_read?verbose", "[+]linearizable_read ok\nok\n"),
        ("/version", '{"etcdserver":"3.6.16","etcdcluster":"3.6.0","storage":"3.6.0"}'),
        ("/metrics", "some_metric 1\n"),
        ("/shards", '{"shards":[]}'),
    ],
)
def test_everything_is_well(target: str, body: str) -> None:
    """Texts of a healthy member, as etcd 3.6.16 gives them."""
    status, _, found = Pages().get(target)
    assert (status, found) == (200, body)


@pytest.mark.parametrize("target", ["/", "/nope", "/livez/", "/livez/nope", "/version/"])
def test_unknown_path(target: str) -> None:
    """404 in plain text for every method."""
    for method in ("GET", "POST", "HEAD"):
        assert Pages().get(target, method) == (404, GUARDED, "404 page not found\n")


def test_unknown_path_of_the_gateway() -> None:
    """Below /v3/ etcd's gateway answers in its JSON."""
    found = Pages().get("/v3/nope")
    assert found == (404, {"content-type": "application/json"}, '{"code":5,"message":"Not Found"}')


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz", "/version"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD"])
def test_other_methods(path: str, method: str) -> None:
    """GET only, as in etcd, HEAD included."""
    assert Pages().get(path, method) == (405, {"allow": "GET", **GUARDED}, "Method Not Allowed\n")


def test_methods_of_metrics() -> None:
    """Metrics may be asked for with HEAD too, and with nothing else."""
    assert Pages().get("/metrics", "HEAD")[0] == 200
    assert Pages().get("/metrics", "POST")[1]["allow"] == "GET, HEAD"


def test_options() -> None:
    """A browser's question is answered for every path of the client listener, with nothing."""
    for path in ("/health", "/metrics", "/nope"):
        assert Pages().get(path, "OPTIONS") == (200, {}, "")


def test_metrics_listener() -> None:
    """It has health and metrics, no version, and no CORS."""
    pages = Pages()
    for path, status in (("/metrics", 200), ("/health", 200), ("/livez", 200), ("/version", 404)):
        answer = pages.ask(path, routes=pages.metrics)
        assert answer is not None
        assert answer.status == status
        assert not CORS.keys() & dict(answer.headers).keys()
    answer = pages.ask("/health", "OPTIONS", pages.metrics)
    assert answer is not None
    assert answer.status == 405


class TestTrouble:
    """What a sick member says."""

    @pytest.mark.parametrize(
        ("store", "reason"),
        [
            (FakeHealth(raised=["NOSPACE"]), "ALARM NOSPACE"),
            (FakeHealth(raised=["CORRUPT"]), "ALARM CORRUPT"),
            (FakeHealth(linearizable="gone"), "RANGE ERROR:gone"),
        ],
    )
    def test_health(self, store: FakeHealth, reason: str) -> None:
        """503 and the first reason; etcd's line end after the JSON is there too."""
        pages = Pages(store)
        status, headers, body = pages.get("/health")
        assert (status, headers) == (503, GUARDED)
        assert (
            body == json.dumps({"health": "false", "reason": reason}, separators=(",", ":")) + "\n"
        )
        assert (pages.health.succeeded, pages.health.failed) == (0, 1)

    def test_excluded_alarm(self) -> None:
        """An alarm that is excluded is no reason, another one still is."""
        pages = Pages(FakeHealth(raised=["NOSPACE"]))
        assert pages.get("/health?exclude=NOSPACE")[0] == 200
        assert pages.get("/health?exclude=CORRUPT")[0] == 503
        assert pages.get("/readyz")[0] == 200

    def test_serializable(self) -> None:
        """Who asks for this member alone hears nothing of what it cannot commit."""
        pages = Pages(FakeHealth(linearizable="stuck"))
        assert pages.get("/health?serializable=true")[0] == 200
        assert pages.get("/health?serializable=yes")[0] == 503
        assert pages.get("/livez")[0] == 200

    def test_readyz(self) -> None:
        """503 with all checks, asked for or not; a failed one says why; etcd adds a line end."""
        pages = Pages(FakeHealth(linearizable="stuck", raised=["CORRUPT"]))
        expected = (
            "[-]data_corruption failed: alarm activated: CORRUPT\n[+]serializable_read ok\n"
            "[-]linearizable_read failed: stuck\n[+]non_learner ok\n\n"
        )
        assert pages.get("/readyz") == (503, GUARDED, expected)
        assert pages.get("/readyz?exclude=linearizable_read&exclude=data_corruption")[0] == 200
        assert pages.get("/readyz/non_learner")[0] == 200
        assert pages.health.results["readyz", "linearizable_read", "error"] == 1
        assert pages.health.latest["readyz", "linearizable_read"] == 0
        assert pages.health.latest["readyz", "non_learner"] == 1


class TestShards:
    """Of several shards one may be out: that is told, and takes nothing out of service."""

    def test_degraded(self) -> None:
        """200 with all checks, asked for or not; alone a shard that is out is a 503."""
        pages = Pages(FakeHealth(parts={"core": None, "events": "out: nobody is there"}))
        expected = (
            "[+]data_corruption ok\n[+]serializable_read ok\n[+]linearizable_read ok\n"
            "[+]non_learner ok\n[+]shard_core ok\n"
            "[-]shard_events failed: out: nobody is there\nok (degraded)\n"
        )
        assert pages.get("/readyz") == (200, GUARDED, expected)
        assert pages.get("/readyz?verbose") == (200, GUARDED, expected)
        assert pages.get("/readyz?exclude=shard_events") == (200, GUARDED, "ok\n")
        assert pages.get("/readyz/shard_core") == (200, GUARDED, "ok\n")
        status, _, body = pages.get("/readyz/shard_events")
        assert (status, body) == (503, "[-]shard_events failed: out: nobody is there\n\n")
        assert pages.health.latest["readyz", "shard_events"] == 0
        assert (pages.get("/health")[0], pages.get("/livez")[0]) == (200, 200)

    def test_down(self) -> None:
        """Home is another matter: without it nothing is ready, whatever the others say."""
        pages = Pages(FakeHealth(linearizable="stuck", parts={"core": "stuck", "events": None}))
        status, _, body = pages.get("/readyz")
        assert status == 503
        assert "[-]linearizable_read failed: stuck\n" in body
        assert "[+]shard_events ok\n" in body
        assert pages.get("/health")[0] == 503

    def test_all_is_well(self) -> None:
        """The answer is etcd's, and who asks sees the shards."""
        pages = Pages(FakeHealth(parts={"core": None, "events": None}))
        assert pages.get("/readyz")[2] == "ok\n"
        assert pages.get("/readyz?verbose")[2].endswith("[+]shard_events ok\nok\n")


def test_verdict_that_comes_later() -> None:
    """While a check waits nothing is answered; its verdict is, through the request's own way."""
    pages = Pages(FakeHealth(waiting=[]))
    waiting = pages.store.waiting
    assert waiting is not None
    assert pages.ask("/readyz?verbose") is None
    assert len(waiting) == 1
    waiting[0](None)
    assert pages.late == []
    waiting[1]("stuck")
    (answer,) = pages.late
    assert answer.status == 503
    assert b"[-]linearizable_read failed: stuck" in answer.body
    assert CORS.items() <= dict(answer.headers).items()
