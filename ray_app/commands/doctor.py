"""`ray-app doctor`: what this machine or cluster lacks, on one screen. Looks, and changes nothing without --fix.

torch, mlflow and Ray are imported where they are looked at, so that one that is broken does not hide the others.
"""

import json
import os
import platform
import re
import shlex
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.text import Text

from ray_app.cluster.env_defaults import token_path
from ray_app.cluster.private_folder import private_folder
from ray_app.cluster.reachability import CONNECT_S, connection_error
from ray_app.config.base import TrackingFlags
from ray_app.config.submit import DoctorConfig
from ray_app.errors import ConfigError, ResourceError
from ray_app.parsing.redact import redact
from ray_app.terminal import make_console

State = Literal["ok", "info", "warning", "problem"]
STYLES: dict[State, str] = {"ok": "green", "info": "dim", "warning": "yellow", "problem": "bold red"}
NAME_WIDTH = 14
GIB = 2**30
REQUIRED_PACKAGES = ("ray", "torch", "mlflow", "pyarrow")
MIN_CPUS = 2
MIN_MEMORY_GIB = 8
MIN_SHM_GIB = 2
MIN_DISK_GIB = 5
RAY_S = 40.0
"""Longest time for Ray, which tries a refused token for 20 s."""
JOIN_RAY = """
import json, sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print(json.dumps({"nodes": sum(node["Alive"] for node in ray.nodes()), **ray.cluster_resources()}))
"""


@dataclass(frozen=True, slots=True)
class DoctorCheck:
    """One thing that was looked at."""

    name: str
    """Thing that was checked."""
    state: State
    """A `problem` makes the exit code 1; `info` is neither good nor bad."""
    value: str
    """Value that was found."""
    fix: str = ""
    """Advice for fixing it; empty where nothing is wrong."""


def run_doctor(cfg: DoctorConfig) -> dict[str, Any]:
    """Show each check as soon as it is done: torch, MLflow and Ray take seconds. Return all of them."""
    console, checks = make_console(), []
    for check in all_checks(cfg):
        show_check(check, console)
        checks.append(asdict(check))
    return {"checks": checks, "problems": sum(check["state"] == "problem" for check in checks)}


def all_checks(cfg: DoctorConfig) -> Iterator[DoctorCheck]:
    """Yield the checks in the order of the screen."""
    yield check_python(platform.python_version())
    yield from (check_package(name) for name in REQUIRED_PACKAGES)
    yield check_cpus(len(os.sched_getaffinity(0)), os.cpu_count() or 1)
    yield check_memory(memory_bytes())
    yield check_shm(Path("/dev/shm"))
    yield check_disk(Path.cwd())
    yield check_socket_folder()
    yield check_gpu()
    yield check_tracking(cfg.tracking_uri)
    yield check_ray(cfg.address or os.environ.get("RAY_ADDRESS"))
    yield check_auth_mode(os.environ.get("RAY_AUTH_MODE"))
    yield check_token(token_path(), fix=cfg.fix)


def show_check(check: DoctorCheck, console: Console) -> None:
    """Print a line for a check, and the fix below one that needs it."""
    line = Text.assemble(f"{check.name:<{NAME_WIDTH}} ", (f"{check.state:<8}", STYLES[check.state]), check.value)
    console.print(line, soft_wrap=True)
    if check.fix:
        console.print(Text(f"{'':<{NAME_WIDTH + 9}}→ {check.fix}"), soft_wrap=True)


def render_doctor(result: dict[str, Any], console: Console) -> None:
    """Print how many problems there are; each check has its line already."""
    count = result["problems"]
    console.print(f"{count} problem{'' if count == 1 else 's'}", style="bold red" if count else "bold green")


def check_python(found: str) -> DoctorCheck:
    """Return the interpreter against what the package declares."""
    try:
        asked = metadata("ray-app")["Requires-Python"]
    except PackageNotFoundError:
        return not_installed("python")
    if satisfies(found, asked):
        return DoctorCheck("python", "ok", found)
    return DoctorCheck("python", "problem", f"{found}; ray-app needs {asked}", "run `make setup` with such a Python")


def check_package(name: str) -> DoctorCheck:
    """Return an installed package against what the package declares."""
    try:
        declared = metadata("ray-app").get_all("Requires-Dist") or []
    except PackageNotFoundError:
        return not_installed(name)
    asked = next((str(wanted.specifier) for wanted in map(Requirement, declared) if wanted.name == name), "")
    try:
        found = version(name)
    except PackageNotFoundError:
        return DoctorCheck(name, "problem", f"is not installed; ray-app needs {asked or 'it'}", "run `make setup`")
    if satisfies(found, asked):
        return DoctorCheck(name, "ok", found)
    return DoctorCheck(name, "problem", f"{found}; ray-app needs {asked}", "run `make setup`")


def satisfies(installed: str, asked: str) -> bool:
    """Return True if a version is in a range such as `>=3.17.2,<3.18`; pre-releases count as versions."""
    return SpecifierSet(asked).contains(installed, prereleases=True)


def not_installed(name: str) -> DoctorCheck:
    return DoctorCheck(
        name, "problem", "ray-app itself is not installed, so nothing declares versions", "run `make setup`"
    )


def check_cpus(usable: int, present: int) -> DoctorCheck:
    """CPUs that this process may use."""
    found = str(usable) if usable == present else f"{usable} of {present}"
    if usable < MIN_CPUS:
        return DoctorCheck(
            "CPUs", "warning", found, f"with fewer than {MIN_CPUS}, reading and training cannot overlap"
        )
    return DoctorCheck("CPUs", "ok", found)


def memory_bytes(limits: tuple[Path, ...] = (Path("/sys/fs/cgroup/memory.max"),)) -> int:
    """Return the machine's memory, or the container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    texts = [path.read_text(encoding="utf-8").strip() for path in limits if path.is_file()]
    return min([total, *(int(text) for text in texts if text.isdigit())])


def check_memory(total: int) -> DoctorCheck:
    """Memory in all."""
    found = f"{total / GIB:.1f} GiB"
    if total < MIN_MEMORY_GIB * GIB:
        fix = f"training at full width is safe from {MIN_MEMORY_GIB} GiB up; below, take a smaller --hidden-dim"
        return DoctorCheck("memory", "warning", found, fix)
    return DoctorCheck("memory", "ok", found)


def check_shm(path: Path) -> DoctorCheck:
    """Shared memory, where Ray keeps its objects."""
    if not path.is_dir():
        return DoctorCheck(str(path), "warning", "is not there", "Ray falls back to the disk, which is slow")
    total = shutil.disk_usage(path).total
    found = f"{total / GIB:.1f} GiB"
    if total < MIN_SHM_GIB * GIB:
        fix = f"Ray's object store wants {MIN_SHM_GIB} GiB; in a container: --shm-size={MIN_SHM_GIB}g"
        return DoctorCheck(str(path), "warning", found, fix)
    return DoctorCheck(str(path), "ok", found)


def check_disk(folder: Path) -> DoctorCheck:
    """Free disk where stores and runs are written by default."""
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if free < MIN_DISK_GIB * GIB:
        fix = f"a run at full width keeps up to {MIN_DISK_GIB} GiB of checkpoints and state; make room"
        return DoctorCheck("disk", "warning", found, fix)
    return DoctorCheck("disk", "ok", found)


def check_socket_folder() -> DoctorCheck:
    """Folder of Ray's sockets, whose names are short: TMPDIR may be too long, or not writable."""
    try:
        return DoctorCheck("sockets", "ok", f"below {private_folder()}")
    except ResourceError as error:
        return DoctorCheck("sockets", "problem", str(error))


def check_gpu() -> DoctorCheck:
    """GPUs that torch can use, and NCCL, by which several of them train together."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        return cannot_import("GPU", error)
    built_for = torch.version.cuda
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and built_for is None:
            fix = "install the CUDA build of the same torch version"
            return DoctorCheck(
                "GPU", "warning", f"a driver is here, but torch {torch.__version__} is built without CUDA", fix
            )
        return DoctorCheck("GPU", "info", "none; everything runs on CPUs")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = f"{len(names)} × {', '.join(sorted(set(names)))}, CUDA {built_for}"
    if not torch.distributed.is_nccl_available():
        return DoctorCheck("GPU", "warning", f"{found}, without NCCL", "several GPUs cannot train together; one can")
    return DoctorCheck("GPU", "ok", f"{found}, with NCCL")


def check_tracking(uri: str | None) -> DoctorCheck:
    """Check that the tracking server or database answers. A database that does not exist is not created."""
    try:
        from mlflow import MlflowClient

        from ray_app.tracking.mlflow_logger import TRACKING_ERRORS, failure_cause, is_away
        from ray_app.tracking.uri import database_file, tracking_uri
    except ImportError as error:
        return cannot_import("MLflow", error)
    try:
        where = tracking_uri(TrackingFlags(tracking_uri=uri))
    except ConfigError as error:
        return DoctorCheck("MLflow", "problem", str(error))
    if (file := database_file(where)) and (early := check_sqlite(file)):
        return early
    try:
        with short_requests():
            MlflowClient(where).search_experiments(max_results=1)
    except TRACKING_ERRORS as error:
        away = is_away(error)
        return check_schema(where, str(error)) or DoctorCheck(
            "MLflow",
            "problem",
            f"{redact(where)} {'does not answer' if away else 'refuses this user'}: {failure_cause(error)}",
            f"{'start it' if away else 'ask for the right to use it'}, or name another with --tracking-uri",
        )
    return DoctorCheck("MLflow", "ok", f"{redact(where)} answers")


def check_sqlite(path: Path) -> DoctorCheck | None:
    """Return the reason why MLflow cannot open this file, or None. MLflow puts its tables into any database."""
    if not path.exists():
        return DoctorCheck("MLflow", "info", f"{path} is not there yet; it will be made")
    try:
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        finally:
            connection.close()
    except sqlite3.Error as error:
        fix = "name another with --tracking-uri sqlite:///FILE.db"
        return DoctorCheck("MLflow", "problem", f"{path} cannot be read as a database: {error}", fix)
    if not tables:
        return DoctorCheck("MLflow", "info", f"{path} is empty; MLflow's tables will be made in it")
    if "alembic_version" not in tables:
        fix = "name another with --tracking-uri sqlite:///FILE.db"
        return DoctorCheck("MLflow", "problem", f"{path} is a database of something else than MLflow", fix)
    return None


def check_schema(uri: str, message: str) -> DoctorCheck | None:
    """Return a problem if the database's schema is of another MLflow than the one installed; None otherwise."""
    match = re.search(r"database schema \(found version (\w+)", message)
    if match is None:
        return None
    installed = version("mlflow")
    known = (path.name for path in (files("mlflow.store.db_migrations") / "versions").iterdir())
    if any(name.startswith(f"{match[1]}_") for name in known):
        found = f"{redact(uri)} was made by an older MLflow than {installed}"
        return DoctorCheck(
            "MLflow", "problem", found, f"copy the database, then: mlflow db upgrade {shlex.quote(redact(uri))}"
        )
    found = f"{redact(uri)} was made by a newer MLflow than {installed} (schema {match[1]} is unknown to it)"
    return DoctorCheck("MLflow", "problem", found, "name another database with --tracking-uri")


@contextmanager
def short_requests() -> Iterator[None]:
    """Return a tracking server that is silent is given up after a few seconds."""
    wanted = {"MLFLOW_HTTP_REQUEST_TIMEOUT": f"{CONNECT_S:.0f}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check_ray(address: str | None, limit_s: float = RAY_S) -> DoctorCheck:
    """Check that the cluster lets this user in. Joins it for a moment; starts and stops none.

    In a process of its own: at an address without Ray, `ray.init` ends the whole process after two minutes.
    """
    if not address or address == "local":
        return DoctorCheck("Ray", "info", "no address given; a command starts a cluster of its own on this machine")
    if address.startswith(("http://", "https://")):
        fix = "give the cluster's own address, host:6379; http:// is for `ray job submit`"
        return DoctorCheck("Ray", "problem", f"{address} is the address of a dashboard", fix)
    if address != "auto" and (reason := connection_error(address)):
        fix = "start the cluster, name another with --address, or unset RAY_ADDRESS"
        return DoctorCheck("Ray", "problem", f"nothing answers at {address}: {reason}", fix)
    try:
        done = subprocess.run(
            [sys.executable, "-c", JOIN_RAY, address], capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode(errors="replace") if error.stderr else ""
        return refused(address, said) or DoctorCheck(
            "Ray", "problem", f"{address} does not answer as Ray within {limit_s:.0f} s", "is it a Ray head's port?"
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return refused(address, done.stderr) or DoctorCheck(
            "Ray", "problem", f"{address} cannot be joined: {last}", "see `ray status` on its head"
        )
    has = json.loads(done.stdout.strip().splitlines()[-1])
    found = f"{address}: {has['nodes']} nodes, {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs"
    return DoctorCheck("Ray", "ok", found)


def refused(address: str, stderr: str) -> DoctorCheck | None:
    """Return a problem if Ray says that the key is missing or wrong."""
    if not re.search(r"Unauthenticated|AuthToken|AuthenticationError", stderr):
        return None
    fix = "copy ~/.ray/auth_token from its head to this machine (mode 0600), and set RAY_AUTH_MODE=token"
    return DoctorCheck("Ray", "problem", f"{address} refuses this user's token", fix)


def check_auth_mode(mode: str | None) -> DoctorCheck:
    """Check that this user's clusters ask for a key."""
    name = "RAY_AUTH_MODE"
    if mode is None:
        return DoctorCheck(
            name, "info", "not set: local clusters ask for the key, `ray start` only where there is one already"
        )
    if mode.lower() == "token":
        return DoctorCheck(name, "ok", mode)
    fix = "set RAY_AUTH_MODE=token: without it, anyone who reaches a cluster's ports can run code there"
    return DoctorCheck(name, "warning", mode, fix)


def check_token(path: Path, *, fix: bool) -> DoctorCheck:
    """Check that the key is readable by its owner alone; Ray lets everyone read it. `fix` sets mode 0600."""
    name = "Ray token"
    if not path.is_file():
        return DoctorCheck(name, "info", f"{path} is not there; Ray makes it with the first cluster")
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & 0o077:
        return DoctorCheck(name, "ok", f"{path} has mode {mode:04o}")
    found = f"{path} has mode {mode:04o}: others on this machine can use your clusters"
    if not fix:
        return DoctorCheck(name, "problem", found, f"`ray-app doctor --fix`, or: chmod 600 {shlex.quote(str(path))}")
    try:
        path.chmod(0o600)
    except OSError as error:
        return DoctorCheck(
            name, "problem", f"{found}; it cannot be changed: {error.strerror}", f"its owner: chmod 600 {path}"
        )
    return DoctorCheck(name, "ok", f"{path} had mode {mode:04o} and has 0600 now")


def cannot_import(name: str, error: BaseException) -> DoctorCheck:
    return DoctorCheck(name, "problem", f"cannot be looked at: {error}", "run `make setup`")
