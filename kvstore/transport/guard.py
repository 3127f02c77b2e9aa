"""What a peer may do how often: leaky buckets, and the strikes of gRPC's keepalive policy.

A bucket takes a second's worth at once and leaks at that rate; it is drained by the server's tick,
so that counting costs an addition and a comparison, and no clock.
A peer that overflows one gets GOAWAY ENHANCE_YOUR_CALM.

Strikes (grpc-go ``http2_server.go``, gRPC proposal A8): a ping is bad if it comes sooner than
``ping_interval_min`` after the last one, or sooner than two hours if there is no call in progress;
the first ping after we have sent headers or data is never bad and clears all strikes.
"""

from kvstore.transport.frames import ENHANCE_YOUR_CALM, ConnectionFault
from kvstore.transport.limits import Limits

_IDLE_PING_INTERVAL = 7_200.0

RESET = 0
FAULT = 1
SETTINGS = 2
CONTROL = 3
SMALL_DATA = 4
REFUSAL = 5
UNSERVED = 6
_NAMES = ("resets", "faults", "settings", "control", "small_data", "refusals", "unserved")


class Guard:
    """The buckets and strikes of one connection."""

    __slots__ = ("_last_ping", "_levels", "_limits", "_rates", "_strikes")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._rates = (
            limits.resets_per_second_max,
            limits.faults_per_second_max,
            limits.settings_per_second_max,
            limits.control_per_second_max,
            limits.small_data_per_second_max,
            limits.refusals_per_second_max,
            limits.unserved_per_second_max,
        )
        self._levels = [0.0] * len(self._rates)
        self._strikes = 0
        self._last_ping = float("-inf")

    def count(self, what: int) -> None:
        """One more of ``what``; raises ``ConnectionFault`` when it is one too many."""
        level = self._levels[what] = self._levels[what] + 1
        if level > self._rates[what]:
            raise ConnectionFault(ENHANCE_YOUR_CALM, f"too_many_{_NAMES[what]}")

    def drain(self, seconds: float) -> None:
        """Let the buckets leak for ``seconds``."""
        levels = self._levels
        for what, rate in enumerate(self._rates):
            if levels[what]:
                levels[what] = max(0.0, levels[what] - rate * seconds)

    def ping(self, now: float, *, calls: int, answered: bool) -> None:
        """A ping by the peer with ``calls`` in progress; raises ``ConnectionFault``.

        ``answered``: headers or data were sent since the last ping.
        """
        last = self._last_ping
        self._last_ping = now
        if answered:
            self._strikes = 0
            return
        interval = self._limits.ping_interval_min if calls else _IDLE_PING_INTERVAL
        if now < last + interval:
            self._strikes += 1
            if self._strikes > self._limits.ping_strikes_max:
                raise ConnectionFault(ENHANCE_YOUR_CALM, "too_many_pings")
