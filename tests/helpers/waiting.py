"""Wait for an event in a test: for what must come, however busy the machine is."""

import time
from collections.abc import Callable

LONGEST_S = 400.0


def wait_until(holds: Callable[[], bool]) -> None:
    """Return once it holds; fail after LONGEST_S."""
    deadline = time.monotonic() + LONGEST_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
