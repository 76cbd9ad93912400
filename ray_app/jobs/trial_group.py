"""A trial of several workers: a Ray Train group of its own, whose journal is told to Ray Tune as it grows.

The process that Tune starts only waits and tells, so it claims no CPU: on a small cluster it would take them from the
very workers that it waits for.
"""

import threading
import time
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError

from ray_app.config.train import TrainConfig
from ray_app.jobs.journal import Journal, entries, follow, newest_start, since_start
from ray_app.jobs.run_folder import RunFolder
from ray_app.jobs.sweep_data import Placed
from ray_app.jobs.train import group
from ray_app.jobs.trial import metrics_of

RESOURCES = {"CPU": 0.0, "memory": 1_000_000}
"""What the waiting process claims; Ray wants it to claim something."""


def run_group_trial(config: dict[str, Any], placed: dict[str, Placed]) -> None:
    """A trainable of Ray Tune; `config` as of `run_trial`. Ray Train starts workers that die again, not Tune."""
    config = config["trial"]
    cfg = TrainConfig.model_validate(config["train"])
    data, run = placed[config["data"]], cfg.folder
    failed: list[Exception] = []
    done = threading.Event()

    def work() -> None:
        name, cpus = f"{run.name}-{int(time.time() * 1000)}", cfg.cpus_per_worker or 1.0
        told = {"started": newest_start(run), "held": True, "threads": config["threads"], "placed": data}
        told["provenance"] = config["provenance"]
        try:
            group(cfg, RunFolder(run), cpus, name, told)
        except Exception as error:
            failed.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name="group", daemon=True).start()
    lines: list[dict[str, Any]] = []
    for new in follow(run, done):
        for line in new:
            lines.append(line)
            if line["kind"] == "epoch" and line["epoch"] < cfg.num_epochs:
                tune.report(metrics_of(lines, line["epoch"], config["objective"]))
    if failed and not isinstance(failed[0], RayActorError | WorkerGroupError):
        raise failed[0]
    told = since_start(run)
    with Journal(run) as journal:
        if failed:
            journal.write("failure", error=f"its workers died: {str(failed[0]).splitlines()[0]}", time=time.time())
        journal.write(
            "end",
            status="FAILED" if failed or any(line["kind"] == "failure" for line in told) else "FINISHED",
            artifacts=None,
            time=time.time(),
        )
    epochs = [line["epoch"] for line in entries(run) if line["kind"] == "epoch"]
    if epochs and epochs[-1] == cfg.num_epochs:  # told last, for Tune may not come back after it
        tune.report(metrics_of(entries(run), epochs[-1], config["objective"]))
