"""How a server that was started is asked to stop."""

import psutil
import pytest

from bench.targets import Running


def connections_when_stopped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many of our connections each server still had when it was asked to stop."""
    stop, left = Running.stop, list[int]()

    def stopping(server: Running, seconds: float) -> None:
        mine = psutil.Process().net_connections("tcp")
        connected = [one for one in mine if one.status == psutil.CONN_ESTABLISHED]
        left.append(sum(one.raddr[-1] == server.port for one in connected))
        stop(server, seconds)

    monkeypatch.setattr(Running, "stop", stopping)
    return left
