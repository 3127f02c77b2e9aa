"""Paths, methods and the answers that all of them share, as etcd's HTTP server gives them.

Compared byte by byte with etcd 3.6: 404 and 405 are plain text with ``nosniff``; below ``/v3/`` a
path that does not exist is answered in the gateway's JSON; the client listener adds CORS headers
to everything and answers OPTIONS itself, the metrics listener does not.
"""

from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import parse_qs, unquote

from kvstore.transport.api import HttpRequest, HttpResponse

Headers = tuple[tuple[str, str], ...]
Query = Mapping[str, list[str]]
"""Values of each name in the query, in order; a name without a value has the empty one."""
Respond = Callable[[HttpResponse], None]
Route = Callable[[Query, Respond], None]
"""Answers one GET, at once or later."""

PLAIN: Final[Headers] = (("content-type", "text/plain; charset=utf-8"),)
GUARDED: Final[Headers] = (*PLAIN, ("x-content-type-options", "nosniff"))
"""Of texts that a browser must not take for something else."""
JSON: Final[Headers] = (("content-type", "application/json"),)

_CORS: Final[Headers] = (
    ("access-control-allow-headers", "accept, content-type, authorization"),
    ("access-control-allow-methods", "POST, GET, OPTIONS, PUT, DELETE"),
    ("access-control-allow-origin", "*"),
)
_NOT_FOUND = HttpResponse(404, GUARDED, b"404 page not found\n")
_NOT_FOUND_V3 = HttpResponse(404, JSON, b'{"code":5,"message":"Not Found"}')


def refused(allow: str) -> HttpResponse:
    """405, naming the methods that are served."""
    return HttpResponse(405, (("allow", allow), *GUARDED), b"Method Not Allowed\n")


class Routes:
    """Finds the route of a request; GET only, as in etcd, and HEAD where ``head`` says so."""

    def __init__(self, routes: Mapping[str, Route], *, head: frozenset[str], cors: bool) -> None:
        self._routes = routes
        self._head = head
        self._cors = _CORS if cors else ()

    def handle(self, request: HttpRequest) -> HttpResponse | None:
        """The answer to ``request``, or None if it comes later through its ``respond``."""
        at_once: list[HttpResponse] = []
        returned = False

        def respond(response: HttpResponse) -> None:
            whole = response._replace(headers=(*self._cors, *response.headers))
            if returned:
                request.respond(whole)
            else:
                at_once.append(whole)

        self._dispatch(request, respond)
        returned = True
        return at_once[0] if at_once else None

    def _dispatch(self, request: HttpRequest, respond: Respond) -> None:
        path, _, query = request.target.partition("?")
        route = self._routes.get(unquote(path))
        if self._cors and request.method == "OPTIONS":
            respond(HttpResponse(200, (), b""))
        elif route is None:
            respond(_NOT_FOUND_V3 if path.startswith("/v3/") else _NOT_FOUND)
        elif request.method == "GET" or (request.method == "HEAD" and path in self._head):
            route(parse_qs(query, keep_blank_values=True), respond)
        else:
            respond(refused("GET, HEAD" if path in self._head else "GET"))
