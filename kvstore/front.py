"""The listeners: which socket serves what, over which transport, and what they report.

Client listeners serve gRPC and, on the same ports, the HTTP pages; metrics listeners serve pages
only, of another choice, and are a server of their own with the same limits.
With ``--transport grpcio`` clients are served by grpcio, whose ports speak no HTTP/1.1.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvstore.clock import Clock
from kvstore.errors import StoppedError
from kvstore.listen import Address, ListenError, address_of, bind, cannot_listen
from kvstore.logs import Logger
from kvstore.options import ServeOptions, TlsOptions, TransportKind
from kvstore.transport.api import CallObserver, HttpHandler, Kind, Method
from kvstore.transport.limits import Limits
from kvstore.transport.server import Server, Stats
from kvstore.transport.tls import Tls, TlsFiles, describe

if TYPE_CHECKING:
    from kvstore.transport.grpcio_server import GrpcioServer

Reporter = Callable[[str, Exception], None]


class Bound(NamedTuple):
    """A bound socket, its address as given, and the URL it really has."""

    address: Address
    sock: socket.socket
    url: str


class Sockets(NamedTuple):
    """Everything that is listened on."""

    clients: list[Bound]
    metrics: list[Bound]

    def close(self) -> None:
        """Close what is still open, and remove the files of UNIX sockets. Idempotent."""
        for bound in (*self.clients, *self.metrics):
            bound.sock.close()
            if bound.address.path:
                Path(bound.address.path).unlink(missing_ok=True)


def bind_all(options: ServeOptions) -> Sockets:
    """Bind every listen URL; raises ``ListenError``, and then none is bound."""
    if options.transport is TransportKind.GRPCIO:
        _grpcio_server()
        for address in options.listen_client_urls:
            if address.tls:
                raise ListenError(f"--transport grpcio does not serve https: {address.url}")
    bound: list[Bound] = []
    addresses = [*options.listen_client_urls, *options.listen_metrics_urls]
    try:
        for address in addresses:
            sock = bind(address)
            bound.append(Bound(address, sock, address_of(sock, address)))
    except ListenError:
        Sockets(bound, []).close()
        raise
    clients = len(options.listen_client_urls)
    return Sockets(bound[:clients], bound[clients:])


def make_tls(options: TlsOptions | None, log: Logger) -> Tls | None:
    """The certificates; raises ``ListenError`` for files that do not serve."""
    if options is None:
        return None
    files = TlsFiles(
        certificate=options.cert_file,
        key=options.key_file,
        client_ca=options.trusted_ca_file,
        require_client_certificate=options.trusted_ca_file is not None,
    )

    def changed(trouble: str | None) -> None:
        if trouble is None:
            log.info("certificates reloaded", files=[str(path) for path in files.paths()])
        else:
            log.error("certificates not reloaded; the old ones stay in use", reason=trouble)

    try:
        return Tls(files, changed)
    except OSError as error:  # ssl.SSLError, too
        raise ListenError(describe(files, error)) from error


def _grpcio_server() -> "type[GrpcioServer]":
    """The reference transport; raises ``ListenError`` where grpcio is not installed."""
    try:
        from kvstore.transport.grpcio_server import GrpcioServer  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ListenError(f"--transport grpcio needs kvstore[grpcio]: {error}") from error
    return GrpcioServer


class Front:
    """All listeners of a server. Made on the thread of the running event loop."""

    def __init__(
        self,
        *,
        sockets: Sockets,
        tls: Tls | None,
        kind: TransportKind,
        methods: Sequence[Method],
        client_pages: HttpHandler,
        metrics_pages: HttpHandler,
        limits: Limits,
        clock: Clock,
        on_failure: Reporter,
        observer: CallObserver,
        log: Logger,
    ) -> None:
        def handshake_failed(peer: str, error: Exception) -> None:
            log.debug("TLS handshake failed", peer=peer, reason=str(error) or type(error).__name__)

        self._sockets = sockets
        self._tls = tls
        self._grpcio = None

        def server(methods: Sequence[Method], pages: HttpHandler) -> Server:
            return Server(
                methods=methods,
                http_handler=pages,
                limits=limits,
                clock=clock.monotonic,
                wall=clock.wall,
                on_failure=on_failure,
                observer=observer,
                on_handshake_failed=handshake_failed,
            )

        self._metrics = server((), metrics_pages)
        self._clients = server(methods, client_pages)
        if kind is TransportKind.GRPCIO:
            self._grpcio = _grpcio_server()(
                methods=methods,
                limits=limits,
                clock=clock.monotonic,
                on_failure=on_failure,
                observer=observer,
            )

    async def listen(self) -> None:
        """Begin to accept; raises ``ListenError``."""
        for bound in self._sockets.metrics:
            self._listen(self._metrics, bound, http1_only=True)
        if self._grpcio is None:
            for bound in self._sockets.clients:
                self._listen(self._clients, bound, http1_only=False)
            return
        for bound in self._sockets.clients:
            path = bound.address.path
            host, port = ("", 0) if path else bound.sock.getsockname()[:2]
            bound.sock.close()
            at = f"unix:{path}" if path else f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            await self._grpcio.listen(at)
        await self._grpcio.start()

    def _listen(self, server: Server, bound: Bound, *, http1_only: bool) -> None:
        tls = self._tls if bound.address.tls else None
        try:
            server.listen(bound.sock, tls=tls, http1_only=http1_only)
        except OSError as error:
            raise cannot_listen(bound.url, error) from error

    async def drain(self, grace_seconds: float) -> None:
        """Stop to accept, let unary calls finish, end streams as etcd does; then close."""
        message = StoppedError.text
        if self._grpcio is not None:
            await self._grpcio.drain(grace_seconds, message=message)
        await self._clients.drain(grace_seconds, message=message)
        await self._metrics.drain(1.0, message=message)
        self._sockets.close()

    def collect(self) -> Iterator[Metric]:
        """What goes over the network, and what was refused."""
        stats = self._clients.stats()
        yield from _traffic(stats)
        labels = ["grpc_type", "grpc_service", "grpc_method"]
        started = CounterMetricFamily("grpc_server_started", "Calls that began.", labels=labels)
        received = CounterMetricFamily(
            "kvstore_stream_messages_received", "Messages received on streams.", labels=labels
        )
        sent = CounterMetricFamily(
            "kvstore_stream_messages_sent", "Messages sent on streams.", labels=labels
        )
        for route in self._clients.method_stats():
            if route.started:
                _, service, name = route.path.decode().split("/")
                label = [route.kind.name.lower(), service, name]
                started.add_metric(label, route.started)
                if route.kind is not Kind.UNARY:
                    received.add_metric(label, route.messages_received)
                    sent.add_metric(label, route.messages_sent)
        yield from (started, received, sent)


def _traffic(stats: Stats) -> Iterator[Metric]:
    counters = (
        ("etcd_network_client_grpc_received_bytes", "Bytes received.", stats.bytes_received),
        ("etcd_network_client_grpc_sent_bytes", "Bytes sent.", stats.bytes_sent),
        ("kvstore_connections_accepted", "Connections accepted.", stats.connections_accepted),
        ("kvstore_handshakes_failed", "TLS handshakes that failed.", stats.handshakes_failed),
    )
    for name, meaning, number in counters:
        yield CounterMetricFamily(name, meaning, number)
    gauges = (
        ("kvstore_connections", "Connections.", stats.connections),
        ("kvstore_calls", "Calls in progress, streams included.", stats.calls),
        ("kvstore_request_bytes", "Bytes of requests not yet whole.", stats.request_bytes),
        (
            "kvstore_output_bytes",
            "Bytes of answers that clients have not read.",
            stats.output_bytes,
        ),
    )
    for name, meaning, number in gauges:
        yield GaugeMetricFamily(name, meaning, number)
    refused = CounterMetricFamily(
        "kvstore_limits_reached", "How often each limit was reached.", labels=["limit"]
    )
    for limit, count in stats.refusals.items():
        refused.add_metric([limit], count)
    faults = CounterMetricFamily(
        "kvstore_protocol_faults", "Connections ended, by HTTP/2 error code.", labels=["code"]
    )
    for code, count in stats.faults.items():
        faults.add_metric([str(code)], count)
    yield refused
    yield faults
