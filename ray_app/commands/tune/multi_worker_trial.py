"""A trial of several workers: a Ray Train group of its own, whose event log is told to Ray Tune as it grows.

The process that Tune starts only waits and tells, so it claims no CPU: on a small cluster it would take them from the
very workers that it waits for.
"""

import threading
import time
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError

from ray_app.commands.train.command import run_worker_group
from ray_app.commands.train.shared_dataset import SharedDataset
from ray_app.commands.tune.trial import metrics_of
from ray_app.config.train import TrainConfig
from ray_app.runs.event_log import entries, entries_since_start, last_start_time, tail
from ray_app.runs.run_dir import RunDir, open_run

RESOURCES = {"CPU": 0.0, "memory": 1_000_000}
"""What the waiting process claims; Ray wants it to claim something."""


def run_group_trial(config: dict[str, Any], placed: dict[str, SharedDataset]) -> None:
    """A trainable of Ray Tune; `config` as of `run_trial`. Ray Train starts workers that die again, not Tune."""
    config = config["trial"]
    cfg = TrainConfig.model_validate(config["train"])
    with open_run(cfg.out) as run:
        run.refresh()
        with run.synced():
            failed = tell_epochs(config, cfg, run, placed[config["data"]])
        if failed and not isinstance(failed[0], RayActorError | WorkerGroupError):
            raise failed[0]
        told = entries_since_start(run.path)
        with run.event_log() as log:
            if failed:
                log.write("failed", error=f"its workers died: {str(failed[0]).splitlines()[0]}", time=time.time())
            log.write(
                "run_ended",
                status="FAILED" if failed or any(line["kind"] == "failed" for line in told) else "FINISHED",
                artifacts=None,
                time=time.time(),
            )
        lines = entries(run.path)
    epochs = [line["epoch"] for line in lines if line["kind"] == "epoch"]
    if epochs and epochs[-1] == cfg.num_epochs:  # told last, for Tune may not come back after it
        tune.report(metrics_of(lines, epochs[-1], config["objective"]))


def tell_epochs(config: dict[str, Any], cfg: TrainConfig, run: RunDir, data: SharedDataset) -> list[Exception]:
    """The group from its start to its end; Tune hears of each epoch but the last. Returns what the group raised."""
    failed: list[Exception] = []
    done = threading.Event()

    def work() -> None:
        name, cpus = f"{config['name']}-{int(time.time() * 1000)}", cfg.cpus_per_worker or 1.0
        told = {"started": last_start_time(run.path), "held": True, "threads": config["threads"], "placed": data}
        told["provenance"] = config["provenance"]
        try:
            run_worker_group(cfg, run, cpus, name, told)
            run.refresh()
        except Exception as error:
            failed.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name="group", daemon=True).start()
    lines: list[dict[str, Any]] = []
    for new in tail(run.path, done):
        for line in new:
            lines.append(line)
            if line["kind"] == "epoch" and line["epoch"] < cfg.num_epochs:
                tune.report(metrics_of(lines, line["epoch"], config["objective"]))
    return failed
