"""`ray-app submit -- train …`: one of our commands as a job on a cluster, followed to its end.

What travels is the working directory's own files, compressed at most 2 MiB; data stays where the cluster finds it.
The command is checked here before anything is sent. Its log is followed across lost connections, and its exit code is
ours.
"""

import asyncio
import os
import re
import shlex
import sys
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ray_app.cluster.job_client import JobClient, show_ended
from ray_app.cluster.working_dir import files_of
from ray_app.config.submit import SubmitConfig
from ray_app.errors import ConfigError, ResourceError
from ray_app.parsing.text import read_utf8
from ray_app.store.scratch import scratch_dir

STOP_WAIT_S = 120
"""From the request to stop to the kill: a training worker saves in between."""
SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")


def run_submit(cfg: SubmitConfig) -> dict[str, Any]:
    """Submit, follows and returns the --json object; `exit_code` is the job's own."""
    environment = job_environment(cfg)
    with packed(cfg.working_dir, cfg.max_upload_mib) as package:
        client = JobClient(cfg.address)
        runtime_env: dict[str, Any] = {"env_vars": environment} | ({"working_dir": str(package)} if package else {})
        if cfg.requirements:
            runtime_env["pip"] = requirement_lines(cfg.requirements)
        job = f"ray-app-{cfg.command[0]}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        size = package.stat().st_size if package else 0
        began = time.perf_counter()
        client.submit(job, entrypoint(cfg), runtime_env)
    print(f"submitted {job} to {client.address} ({size / 1e6:.1f} MB)", file=sys.stderr)
    result: dict[str, Any] = {
        "job": job,
        "address": client.address,
        "entrypoint": entrypoint(cfg),
        "uploaded_bytes": size,
        "status": "SUBMITTED",
        "exit_code": 0,
        "result": None,
    }
    if cfg.detach:
        return result
    try:
        result["result"] = asyncio.run(client.follow(job))
    except KeyboardInterrupt:
        logs, stop = (f"ray-app jobs {verb} {shlex.quote(job)}" for verb in ("logs", "stop"))
        print(f"the job continues; {logs} follows it, {stop} ends it", file=sys.stderr)
        raise
    return {**result, **client.state(job), "seconds": round(time.perf_counter() - began, 3)}


def entrypoint(cfg: SubmitConfig) -> str:
    """Return the command line that the cluster's head runs."""
    return shlex.join((cfg.python, "-m", "ray_app", *cfg.command))


def requirement_lines(path: Path) -> list[str]:
    """Return the requirements of a file, one a line, comments left out."""
    try:
        lines = [re.split(r"(?:^|\s)#", line)[0].strip() for line in read_utf8(path).splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--requirements {path} cannot be read: {error}") from error
    return [line for line in lines if line]


def job_environment(cfg: SubmitConfig) -> dict[str, str]:
    """Return variables of this process by name. ConfigError: a name looks like a secret's.

    Everyone who sees the cluster's dashboard can read a job's environment.
    """
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    for name in cfg.env:
        value = os.environ.get(name)
        if any(word in name.upper() for word in SECRET_WORDS) or "@" in (value or "").partition("://")[2]:
            raise ConfigError(
                f"--env {name} looks like a secret, and a job's environment is shown on the cluster's dashboard; put "
                "it into the environment of the cluster's nodes instead (docs/security.md)"
            )
        if value is None:
            raise ConfigError(f"--env {name}: there is no such variable here; set it, or leave it out")
        variables[name] = value
    return variables


@contextmanager
def packed(folder: Path, max_mib: float) -> Iterator[Path | None]:
    """Yield the folder's own files as a zip archive, the same bytes for the same files; None where there are none.

    ResourceError: it would have more than `max_mib`.
    """
    files = files_of(folder)
    if not any(file.parts[0] == "ray_app" for file in files):
        print(f"{folder} has no ray_app/ of its own: the cluster runs the one that it has installed", file=sys.stderr)
    with scratch_dir() as temporary:
        package = temporary / "working_dir.zip"
        with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                about = zipfile.ZipInfo.from_file(folder / file, file, strict_timestamps=False)
                about.date_time, about.compress_type = (1980, 1, 1, 0, 0, 0), zipfile.ZIP_DEFLATED
                archive.writestr(about, (folder / file).read_bytes())
                if package.stat().st_size > max_mib * 2**20:
                    raise ResourceError(_too_large(folder, files, max_mib))
        yield package if files else None


def _too_large(folder: Path, files: list[Path], max_mib: float) -> str:
    """Return what is wrong with a folder of which too much would travel."""
    sizes = {file: (folder / file).stat().st_size for file in files}
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
    listing = ", ".join(f"{file} ({sizes[file] / 2**20:.1f} MiB)" for file in largest)
    return (
        f"--working-dir {folder} holds {sum(sizes.values()) / 2**20:.1f} MiB, of which at most {max_mib:g} MiB "
        f"travel, compressed; the largest: {listing}. Data does not travel with a job: put it where the cluster "
        "finds it, and name its folders in .gitignore"
    )


def render_submit(result: dict[str, Any], console: Console) -> None:
    """Print how the job ended, or how to follow it; its log has been printed already."""
    if result["status"] == "SUBMITTED":
        job = shlex.quote(result["job"])
        console.print(
            f"follow it:  ray-app jobs logs {job}\nend it:     ray-app jobs stop {job}",
            soft_wrap=True,
        )
    else:
        show_ended(result, console)
