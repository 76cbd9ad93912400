"""Ends the HAProxy of an endpoint when that endpoint's process is gone, however it went.

HAProxy belongs to no process of Ray's, so nobody ends it where Ray was ended first: by a signal to the whole group,
by a kill. A process in a session of its own waits for the end of a pipe that only the endpoint holds, and sees to
it. It imports nothing but the standard library, and so is small.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

AGAIN_S = 3.0
"""So long it looks again: what manages HAProxy starts another one while it is still there itself."""


@contextmanager
def watched(scratch: Path) -> Iterator[None]:
    """After this block, or this process, no HAProxy is left whose files are in `scratch`."""
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "ray_app.commands.serve.haproxy_watchdog", str(scratch)]
    watcher = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    try:
        yield
    finally:
        watcher.communicate()  # closes the pipe, and waits


def end_of(scratch: Path) -> list[int]:
    """Ends every process that names a file in `scratch`, but this one. Returns their ids."""
    ended = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # gone meanwhile, or another user's
            if f"{scratch}/".encode() in command.read_bytes():
                os.kill(number := int(command.parent.name), signal.SIGTERM)
                ended.append(number)
    return ended


def main() -> None:
    scratch = Path(sys.argv[1])
    sys.stdin.buffer.read()
    if end_of(scratch):
        until = time.monotonic() + AGAIN_S
        while time.monotonic() < until:
            time.sleep(0.1)
            end_of(scratch)


if __name__ == "__main__":
    main()
