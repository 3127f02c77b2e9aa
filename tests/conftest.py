"""What all tests share: event loops, what is set back after a server, how hard Hypothesis tries."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import HealthCheck, settings

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
"""Read when gRPC is imported. No child of ours uses it, and its handlers for those that do crash a
child now and then that is forked (to run as another user) while channels are in use.
"""

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile(
    "ci",
    max_examples=300,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("nightly", settings.get_profile("ci"), max_examples=20_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"debug": True}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """Run each async test under asyncio in debug mode and under uvloop."""
    return request.param


@pytest.fixture
def interpreter() -> Iterator[None]:
    """What a server sets for its process is set back."""
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.fixture
async def loop_handler() -> AsyncIterator[None]:
    """Likewise for its event loop."""
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    yield
    loop.set_exception_handler(handler)
