"""Ray's job API with our errors: find the cluster, submit, follow across lost connections, tell how a job ended."""

import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

from rich.console import Console

from ray_app.cluster.env_defaults import token_path
from ray_app.cluster.reachability import connection_error
from ray_app.core.back_off import back_off_s
from ray_app.errors import ResourceError
from ray_app.parsing.json_text import parse_object
from ray_app.parsing.redact import redact

LOST_S = 600.0
"""A cluster that does not answer for so long is given up; its job is not."""
LONGEST_PAUSE_S = 15.0
SILENCE_S = 20.0
"""Time without a line after which the log is requested again: a connection can die without a sign."""
AGENT_S = 30.0
"""Longest wait for a new cluster's first node that takes jobs."""
DASHBOARD_PORT = 8265
EXIT_STOPPED = 143
"""Exit code of a job that was stopped by hand, as of a process that SIGTERM ended."""
ADDRESS_SOURCES = {
    "store": "store",
    "checkpoint": "checkpoint",
    "mlflow_run_id": "MLflow run",
    "tracking_uri": "MLflow",
    "artifacts": "artifacts",
}
"""Keys of a command's --json object that say where something is; and what they are called."""

T = TypeVar("T")


class JobClient:
    """One cluster's job server."""

    def __init__(self, address: str | None) -> None:
        """ResourceError: no address, no answer, no permission, or another version of Ray."""
        self.address = job_server(address)
        use_token()
        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
        logging.getLogger("ray._private.runtime_env").setLevel(logging.WARNING)
        import ray
        from ray.job_submission import JobSubmissionClient

        self._client = call_job_api(self.address, lambda: JobSubmissionClient(self.address))
        theirs = getattr(self._client, "_server_ray_version", ray.__version__)
        if theirs != ray.__version__:
            raise ResourceError(
                f"the cluster at {self.address} runs Ray {theirs}, this is Ray {ray.__version__}; install "
                f"ray=={theirs} here, or ray=={ray.__version__} there (deploy/Containerfile pins it)"
            )

    def submit(self, job: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
        """Start a job of this name. A cluster that has only just come up is waited for.

        ResourceError: it has no node that takes jobs, or refuses this one.
        """
        began = time.monotonic()
        while True:
            try:
                call_job_api(
                    self.address,
                    lambda: self._client.submit_job(
                        entrypoint=entrypoint, submission_id=job, runtime_env=runtime_env
                    ),
                )
                return
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() - began > AGENT_S:
                    raise ResourceError(
                        f"the cluster at {self.address} does not take the job ({str(error).splitlines()[0]}); "
                        "`ray status` and its dashboard show what it lacks"
                    ) from error
                time.sleep(1.0)

    async def follow(self, job: str) -> dict[str, Any] | None:
        """Print the log as it grows, to standard error, once; returns the result of a command with --json."""
        log, lost_s, pauses = JobLog(), 0.0, 0
        while True:
            try:
                log.again()
                chunks = aiter(self._client.tail_job_logs(job))
                while (chunk := await asyncio.wait_for(anext(chunks, None), SILENCE_S)) is not None:
                    lost_s, pauses = 0.0, 0
                    log.take(chunk)
                if self._client.get_job_status(job).is_terminal():
                    return log.result()
            except TimeoutError:  # a silent job, or a connection that died without a word
                continue
            except Exception as error:  # the client raises RuntimeError and aiohttp's and requests' own
                self._known(job)
                if lost_s == 0.0:
                    print(f"lost the connection ({error or type(error).__name__}); trying again", file=sys.stderr)
                if lost_s >= LOST_S:
                    raise ResourceError(
                        f"{self.address} has not answered for {LOST_S:.0f} s; the job may still run: try "
                        f"ray-app jobs logs {job} later"
                    ) from error
            pauses += 1
            pause_s = back_off_s(pauses, LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)
            lost_s += pause_s

    def _known(self, job: str) -> None:
        """ResourceError if the server answers and does not know the job."""
        try:
            self._client.get_job_info(job)
        except OSError:  # no answer, so nothing is known
            return
        except RuntimeError as error:
            if "404" in str(error):
                raise ResourceError(f"{self.address} has no job '{job}'; ray-app jobs list shows its jobs") from None

    def state(self, job: str) -> dict[str, Any]:
        """Return `status`, `exit_code` (0 while it runs), `message` and `entrypoint` of a job."""
        info = call_job_api(self.address, lambda: self._client.get_job_info(job))
        status, code = str(info.status), info.driver_exit_code
        if status == "STOPPED":
            code = EXIT_STOPPED
        elif status == "FAILED" and not code:
            code = 1  # it never started
        return {
            "status": status,
            "exit_code": int(code or 0),
            "message": info.message,
            "entrypoint": info.entrypoint,
        }

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs, the newest first."""
        rows = [
            {
                "job": info.submission_id,
                "status": str(info.status),
                "exit_code": info.driver_exit_code,
                "started": (info.start_time or 0) / 1000,
                "seconds": ((info.end_time or 0) - (info.start_time or 0)) / 1000 if info.end_time else None,
                "entrypoint": redact(info.entrypoint),
            }
            for info in call_job_api(self.address, self._client.list_jobs)
            if info.submission_id
        ]
        return sorted(rows, key=lambda row: row["started"], reverse=True)

    def stop(self, job: str) -> bool:
        """Asks a job to end; False where it has ended already."""
        self._known(job)
        return call_job_api(self.address, lambda: self._client.stop_job(job))

    def logs(self, job: str) -> str:
        """Return the log of a job up to now."""
        self._known(job)
        return call_job_api(self.address, lambda: self._client.get_job_logs(job))


class JobLog:
    """A log that comes in pieces, and from its beginning again after each lost connection; printed once."""

    def __init__(self) -> None:
        self._text, self._at = "", 0

    def again(self) -> None:
        """Start again from the log's beginning."""
        self._at = 0

    def take(self, chunk: str) -> None:
        """Print what is new of this piece."""
        new = chunk[max(len(self._text) - self._at, 0) :]
        self._at += len(chunk)
        self._text += new
        print(new, end="", file=sys.stderr, flush=True)

    def result(self) -> dict[str, Any] | None:
        """Return the --json object that the command printed."""
        return result_in(self._text)


def result_in(log: str) -> dict[str, Any] | None:
    """Return the last line that is one JSON object."""
    found = [value for line in log.splitlines() if (value := as_object(line)) is not None]
    return found[-1] if found else None


def as_object(line: str) -> dict[str, Any] | None:
    """Return the JSON object that a line is, or None."""
    if not line.startswith("{"):
        return None
    try:
        return parse_object(line)
    except ValueError:
        return None


def job_server(address: str | None) -> str:
    """http://host:port of the cluster's dashboard, where jobs are taken. ResourceError where none is named."""
    named = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
    if not named.startswith(("http://", "https://")):
        raise ResourceError(
            f"jobs are taken at the address of a cluster's dashboard, such as http://127.0.0.1:{DASHBOARD_PORT}"
            f"{f'; {named} is not one' if named else ''}: name it with --address or RAY_API_SERVER_ADDRESS. "
            "`ray dashboard cluster.yaml` opens a tunnel to a launched cluster's"
        )
    if reason := connection_error(named, DASHBOARD_PORT):
        raise ResourceError(
            f"there is no cluster at {named} ({reason}); is the tunnel open (`ray dashboard cluster.yaml`, or "
            "`kubectl port-forward`)?"
        )
    return named.rstrip("/")


def use_token() -> None:
    """Make Ray's clients send the token of this user, which they do only if RAY_AUTH_MODE says so."""
    held = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if held or token_path().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def call_job_api(address: str, call: Callable[[], T]) -> T:
    """Return the value of a call. ResourceError: the user can fix what went wrong."""
    from ray.exceptions import AuthenticationError

    try:
        return call()
    except AuthenticationError as error:
        raise ResourceError(
            f"the cluster at {address} refuses this user ({str(error).splitlines()[0]}); put its token into "
            "RAY_AUTH_TOKEN, or into ~/.ray/auth_token with mode 0600"
        ) from error
    except OSError as error:
        raise ResourceError(f"the cluster at {address} does not answer: {error}") from error


def show_ended(result: dict[str, Any], console: Console) -> None:
    """Print how a job ended, where its results are, and how to resume it."""
    lines = [f"job {result['job']}: {result['status'].lower()}, exit code {result['exit_code']}"]
    if result["status"] == "FAILED" and result["message"]:
        lines.append(str(result["message"]).strip().splitlines()[0])
    if result["exit_code"] == EXIT_STOPPED and (command := resume_command(result["entrypoint"])):
        lines.append(f"what was saved is kept; resume with:  {command}")
    found = result.get("result") or {}
    lines += [f"{name}: {found[key]}" for key, name in ADDRESS_SOURCES.items() if found.get(key)]
    for line in lines:
        console.print(line, soft_wrap=True)


def resume_command(entrypoint: str) -> str | None:
    """Return the command that resumes a job; None for one that saves nothing before its end."""
    words = shlex.split(entrypoint.partition("-m ray_app ")[2])
    if words[:1] == ["prepare"]:
        return shlex.join(["ray-app", "submit", "--", *words])
    if words[:1] not in (["train"], ["tune"]):
        return None
    flags = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    named = [after for flag, after in pairwise(flags) if flag in ("--resume", "--out")]
    return f"ray-app submit -- {words[0]} --resume {shlex.quote(named[0]) if named else 'FOLDER'}"
