"""Ctrl-C while Ray starts."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupt_after() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended: Ray's core crashes if it is interrupted while it starts.

    A second one ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = False

    def hold(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        nonlocal held
        if held:
            os._exit(130)
        held = True
        print("Ray is starting, and is stopped in a moment", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            raise KeyboardInterrupt
