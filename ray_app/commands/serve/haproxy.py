"""HAProxy that ends with the Ray process which started it.

Ray reads the path of the HAProxy binary from RAY_SERVE_HAPROXY_BINARY_PATH. The program written here asks Linux for
SIGTERM at the death of its parent and then becomes HAProxy. Without it HAProxy outlives a Ray that was killed, keeps
the port, and answers for an endpoint that is gone.
"""

import ctypes
import os
import shlex
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def write_binary(folder: Path, haproxy: str) -> Path:
    """Write an executable that runs `haproxy` bound to the life of its parent."""
    program = folder / "haproxy"
    command = shlex.join([sys.executable, "-IS", str(Path(__file__).resolve()), haproxy])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    program.chmod(0o700)
    return program


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
