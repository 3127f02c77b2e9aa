"""What tests of the benchmark share."""

import pytest

from bench.targets import START_TIMEOUT


@pytest.fixture(autouse=True)
def slow_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that starts servers slowly adds no line to what a test expects to be told."""
    for module in ("bench.run.session", "bench.replay.session"):
        monkeypatch.setattr(f"{module}.SLOW_SECONDS", START_TIMEOUT)
