"""Every number that bounds what one peer, or all peers together, can make the transport hold or do.

There are no defaults here: the composition root owns the numbers.
Each field says what happens when the limit is reached; each has a test that attacks it over a
socket while another client is served.
"Per second" limits are buckets: that many at once, refilled at that rate.
Sizes are in bytes, times in seconds.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of one server; several listeners share them."""

    connections_max: int
    """Connections of the server, unfinished handshakes included; above: closed at once."""
    connections_per_address_max: int
    """Of those, from one address (UNIX sockets have none); above: closed at once."""
    handshake_timeout: float
    """TLS handshake; later: closed."""
    preface_timeout: float
    """From the connection to the HTTP/2 preface or the first bytes of HTTP/1.1; later: closed. Then
    again as much to the acknowledgement of our SETTINGS; later: GOAWAY SETTINGS_TIMEOUT."""
    first_request_timeout: float
    """From the preface to the first request; later: GOAWAY NO_ERROR, closed."""

    streams_per_connection_max: int
    """Calls in progress on one connection, advertised; above: RST_STREAM REFUSED_STREAM."""
    message_bytes_max: int
    """One request message, refused by its length prefix before it is buffered; above:
    ResourceExhausted with grpc-go's text."""
    request_bytes_total_max: int
    """Bytes of unfinished requests, and of large headers of calls in progress, over all
    connections; above: unfinished requests of those that hold the most, or the call that exceeds it
    if it has more than an even share, get ResourceExhausted."""
    request_timeout: float
    """From the headers of a call to the end of its only request, and in a bidirectional stream from
    the first byte of a message to its last; later: ResourceExhausted. A frame or a header block
    that does not end: GOAWAY NO_ERROR."""
    stream_window_bytes: int
    """Flow-control window granted to each stream; above: FLOW_CONTROL_ERROR on the stream."""
    connection_window_bytes: int
    """Likewise for a connection, 65,535 or more; above: GOAWAY FLOW_CONTROL_ERROR."""
    frame_bytes_max: int
    """SETTINGS_MAX_FRAME_SIZE, 16,384 to 16,777,215; above: GOAWAY FRAME_SIZE_ERROR."""

    header_bytes_max: int
    """Decoded header list of a request, 32 bytes a field added (RFC 9113 section 6.5.2); above:
    answered 431. Four times that undecoded, or any excess before our SETTINGS are acknowledged (the
    rest of such a block is not read, and with it the dynamic table is lost): GOAWAY
    ENHANCE_YOUR_CALM."""
    header_count_max: int
    """Fields of a request; above: answered 431."""
    continuations_max: int
    """CONTINUATION frames of one header block; above: GOAWAY ENHANCE_YOUR_CALM."""
    templates_max: int
    """Header blocks remembered per connection; above: the least recently used is forgotten."""
    template_bytes_max: int
    """Size of a header block worth remembering; larger ones are decoded each time."""

    resets_per_second_max: int
    """RST_STREAM frames by the peer while we still worked on the call; above: GOAWAY
    ENHANCE_YOUR_CALM."""
    faults_per_second_max: int
    """Streams that we reset for the peer's mistakes (provoked resets); likewise."""
    settings_per_second_max: int
    """SETTINGS frames; likewise."""
    settings_entries_max: int
    """Entries of one SETTINGS frame (nghttp2 takes as many); above: GOAWAY ENHANCE_YOUR_CALM."""
    control_per_second_max: int
    """PING, PRIORITY, WINDOW_UPDATE and unknown frames; likewise."""
    small_data_per_second_max: int
    """DATA frames that are empty or tiny and do not finish a request; likewise."""
    refusals_per_second_max: int
    """Calls answered with a status because of what their headers say; likewise."""
    unserved_per_second_max: int
    """Calls answered REFUSED_STREAM, which need not be the peer's mistake; likewise."""
    ping_interval_min: float
    """A client that pings oftener than this, or oftener than every two hours without a call, gets a
    strike (etcd ``--grpc-keepalive-min-time``; gRPC proposal A8)."""
    ping_strikes_max: int
    """Strikes allowed; above: GOAWAY ENHANCE_YOUR_CALM ``too_many_pings``."""
    keepalive_interval: float
    """A connection from which nothing has come for so long is pinged (etcd
    ``--grpc-keepalive-interval``)."""
    keepalive_timeout: float
    """A ping of ours that is not answered for so long: closed (``--grpc-keepalive-timeout``)."""

    outbox_low_bytes: int
    """A blocked stream is told ``writable`` when its outbox has fallen to this."""
    socket_bytes_max: int
    """Bytes handed to the socket's buffer ahead of the kernel; above: answers wait in outboxes."""
    unread_bytes_max: int
    """Bytes in the socket's buffer, refusals and acknowledgements among them; above: nothing is
    read from the peer until it has read. More than ``socket_bytes_max + turn_bytes_max``, so that
    answers alone do not bring it about."""
    turn_bytes_max: int
    """Bytes of large answers cut into frames in one turn of the loop, per connection, and as many
    of small ones sent uncut; the rest follows in later turns."""
    output_bytes_max: int
    """Unread answers of one connection, the largest not counted; above: RST_STREAM REFUSED_STREAM
    for further calls."""
    output_bytes_total_max: int
    """Unread answers of all connections, those of HTTP/1.1 and in sockets' buffers included; above:
    the connection with the most is closed."""
    output_stall_timeout: float
    """A peer that reads nothing for so long while answers wait is disconnected."""

    http1_header_bytes_max: int
    """Request line and headers of an HTTP/1.1 request; above: 431."""
    http1_body_bytes_max: int
    """Body of an HTTP/1.1 request; above: 413."""
    http1_timeout: float
    """An HTTP/1.1 request from its first byte to its last, and silence between two; later:
    closed."""

    def __post_init__(self) -> None:
        """What HTTP/2 cannot express is a mistake of the caller."""
        assert 65_535 <= self.connection_window_bytes < 2**31
        assert self.stream_window_bytes < 2**31
        assert 16_384 <= self.frame_bytes_max < 2**24
