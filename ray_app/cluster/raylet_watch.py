"""The raylet of this machine's own Ray: if it dies, Ray's core ends this process soon after, without a word."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

LOOK_INTERVAL_S = 1.0
EXIT_CODE = 2


@contextmanager
def explain_raylet_death(advice: str) -> Iterator[None]:
    """End this process with a sentence and `advice` if the raylet that it started dies within the block."""
    raylets = [child for child in psutil.Process().children() if child.name() == "raylet"]
    if len(raylets) != 1:  # a cluster that others started, or several nodes of a test
        yield
        return
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(LOOK_INTERVAL_S):
            if not is_running(raylets[0]):
                print(f"error: Ray on this machine ended: its raylet died. {advice}", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)

    thread = threading.Thread(target=watch, name="raylet", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def is_running(process: psutil.Process) -> bool:
    """Return True if a process has not ended; one that has stays as a zombie until its parent looks at it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
