"""Folder and token of a Ray of our own, which are for this user alone. Imports no Ray.

Ray makes its session folders writable for everybody (0777), and its token readable. A folder above them that only
this user may enter closes both logs and sockets, from the moment in which they are made.
"""

import os
import re
import stat
import tempfile
from pathlib import Path

from ray_app.errors import ResourceError

PLAIN = re.compile(r"[\w./+@=-]+", re.ASCII)
"""Names that neither Ray's command lines nor HAProxy's configuration take for more than one word."""
MAX_LENGTH = 26
"""Longest path of the folder in bytes. Paths of sockets below it have up to 81 more, of 107 in all (AF_UNIX)."""


def private_folder() -> Path:
    """Return a short folder of mode 0700 for sockets and sessions, below RAY_TMPDIR, TMPDIR or /tmp.

    ResourceError: it belongs to another user, or none of them can be used.
    """
    for parent in filter(None, (os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp")):
        folder = Path(parent).absolute() / f"ray-app-{os.getuid()}"
        if len(os.fsencode(folder)) > MAX_LENGTH or not PLAIN.fullmatch(str(folder)):
            continue
        try:
            folder.mkdir(0o700, exist_ok=True)
            info = folder.lstat()
        except OSError:
            continue
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
            raise ResourceError(
                f"{folder} is not a folder of this user; remove it, or set RAY_TMPDIR to another folder."
            )
        folder.chmod(0o700)
        return folder
    raise ResourceError(
        f"no folder for Ray's sockets: neither RAY_TMPDIR, TMPDIR nor /tmp is writable and at most "
        f"{MAX_LENGTH - len(f'/ray-app-{os.getuid()}')} plain characters long; set RAY_TMPDIR to such a folder."
    )


def keep_token_private() -> None:
    """Restrict the token file, which Ray writes readable by everyone on the machine."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid():
        token.chmod(0o600)
