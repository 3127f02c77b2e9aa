"""Limits for tests: like those of production, some smaller, so that a test can reach them soon."""

from kvstore.transport.limits import Limits

KIB = 1024
MIB = 1024 * KIB

TEST_LIMITS = Limits(
    connections_max=1_000,
    connections_per_address_max=1_000,
    handshake_timeout=10.0,
    preface_timeout=10.0,
    first_request_timeout=120.0,
    streams_per_connection_max=1_000,
    message_bytes_max=2 * MIB,
    request_bytes_total_max=64 * MIB,
    request_timeout=60.0,
    stream_window_bytes=1 * MIB,
    connection_window_bytes=8 * MIB,
    frame_bytes_max=16 * KIB,
    header_bytes_max=16 * KIB,
    header_count_max=64,
    continuations_max=8,
    templates_max=16,
    template_bytes_max=1 * KIB,
    resets_per_second_max=1_000,
    faults_per_second_max=100,
    settings_per_second_max=50,
    settings_entries_max=32,
    control_per_second_max=50_000,
    small_data_per_second_max=1_000,
    refusals_per_second_max=1_000,
    unserved_per_second_max=10_000,
    ping_interval_min=5.0,
    ping_strikes_max=2,
    keepalive_interval=7_200.0,
    keepalive_timeout=20.0,
    outbox_low_bytes=64 * KIB,
    socket_bytes_max=256 * KIB,
    unread_bytes_max=2 * MIB,
    turn_bytes_max=1 * MIB,
    output_bytes_max=16 * MIB,
    output_bytes_total_max=256 * MIB,
    output_stall_timeout=60.0,
    http1_header_bytes_max=16 * KIB,
    http1_body_bytes_max=2 * MIB,
    http1_timeout=30.0,
)
