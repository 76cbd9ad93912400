"""Unit tests start no Ray."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_ray_is_started() -> Iterator[None]:
    """Fail a module after which Ray runs in this process but did not before."""
    before = ray_runs()
    yield
    assert before or not ray_runs(), "a unit test started Ray; tests that need it belong in tests/integration"


def ray_runs() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()
