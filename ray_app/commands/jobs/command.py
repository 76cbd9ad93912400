"""`ray-app jobs list | logs | fetch | stop`: the jobs of a cluster."""

import asyncio
import json
import shlex
import sys
from datetime import datetime
from typing import Any

from rich.console import Console

from ray_app.cluster.job_client import JobClient, result_in, show_ended
from ray_app.config.submit import JobConfig, JobFetchConfig, JobLogsConfig, JobsConfig
from ray_app.store.filesystem import LocalDir


def run_jobs_list(cfg: JobsConfig) -> dict[str, Any]:
    """All jobs of the cluster, the newest first."""
    client = JobClient(cfg.address)
    return {"address": client.address, "jobs": client.jobs()}


def render_jobs_list(result: dict[str, Any], console: Console) -> None:
    """Print a line for each job; a narrow terminal breaks it, and cuts nothing."""
    for job in result["jobs"]:
        started = datetime.fromtimestamp(job["started"]).strftime("%Y-%m-%d %H:%M:%S")
        facts = [f"{job['job']}  {job['status'].lower():<9}", started]
        facts += [] if job["seconds"] is None else [f"{job['seconds']:.0f} s"]
        facts += [] if job["exit_code"] is None else [f"exit code {job['exit_code']}"]
        facts.append(job["entrypoint"].partition("-m ray_app ")[2] or job["entrypoint"])
        console.print("  ".join(facts), soft_wrap=True)
    if not result["jobs"]:
        console.print(f"{result['address']} has no jobs", soft_wrap=True)


def run_jobs_logs(cfg: JobLogsConfig) -> dict[str, Any]:
    """Print a job's log to its end, or with --no-follow what there is of it; then its state."""
    client = JobClient(cfg.address)
    found = asyncio.run(client.follow(cfg.job)) if cfg.follow else None
    if not cfg.follow:
        print(client.logs(cfg.job), end="", file=sys.stderr)
    return {"job": cfg.job, "result": found, **client.state(cfg.job)}


def render_jobs_logs(result: dict[str, Any], console: Console) -> None:
    """Print the state of a job."""
    show_ended(result, console)


def run_jobs_fetch(cfg: JobFetchConfig) -> dict[str, Any]:
    """Write JOB.log and JOB.json. StoreError: not there."""
    client = JobClient(cfg.address)
    log = client.logs(cfg.job)
    result = {"job": cfg.job, "result": result_in(log), **client.state(cfg.job)}
    folder = LocalDir(cfg.to.absolute())
    folder.write(f"{cfg.job}.log", log.encode())
    folder.write(f"{cfg.job}.json", json.dumps(result, indent=1).encode())
    return {**result, "files": [folder.uri_of(f"{cfg.job}.{ending}") for ending in ("log", "json")]}


def render_jobs_fetch(result: dict[str, Any], console: Console) -> None:
    """Print the state of a job, and the files."""
    show_ended(result, console)
    console.print(*result["files"], sep="\n", soft_wrap=True)


def run_jobs_stop(cfg: JobConfig) -> dict[str, Any]:
    """Asks a job to end. What it has saved is kept."""
    client = JobClient(cfg.address)
    asked = client.stop(cfg.job)
    return {"job": cfg.job, "asked": asked, **client.state(cfg.job)}


def render_jobs_stop(result: dict[str, Any], console: Console) -> None:
    """Print whether there was anything to stop."""
    if result["asked"]:
        logs = f"ray-app jobs logs {shlex.quote(result['job'])}"
        console.print(
            f"asked {result['job']} to stop; training saves within a step. {logs} shows the end",
            soft_wrap=True,
        )
    else:
        show_ended(result, console)
