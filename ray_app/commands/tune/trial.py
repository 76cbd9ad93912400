"""A trial of a sweep in its own process: the training loop, between a shared data set and Ray Tune.

Its run folder is all its memory. Killed at any point, it goes on from there; every epoch is told to Tune by each
process that works for it, those of the ones before too, so that a scheduler that was started anew knows them.
"""

import re
import time
from collections.abc import Set
from typing import Any

import ray
import torch
from ray import tune

from ray_app.cluster.reachability import node_is_alive
from ray_app.commands.train.loop import WorkerContext, is_finished, train_epochs
from ray_app.commands.train.shared_dataset import SharedDataset, pairs_of, start_of
from ray_app.commands.train.state import TrainState
from ray_app.commands.tune.sweep_dir import scheduler_metric, scores
from ray_app.config.train import TrainConfig
from ray_app.core.metrics import THETA, rate_key
from ray_app.runs.event_log import EventLog, entries, entries_since_start
from ray_app.runs.run_dir import RunDir, open_run

RATE = f"cosine_accept_rate_{rate_key(THETA)}"
TIMED_PASSES = 30
"""Forward passes of one pair, of which the median is the latency."""


def run_trial(config: dict[str, Any], placed: dict[str, SharedDataset]) -> None:
    """A trainable of Ray Tune. `config["trial"]`: `train` (a TrainConfig), `data` (a key of `placed`), `objective`,
    `latency`, `threads`, `provenance`.

    A failure that would come again is told in the event log, and the trial ends. Any other error is raised, so that
    Tune starts the trial again; the second time for the same cause it ends, too.
    """
    config = config["trial"]
    cfg = TrainConfig.model_validate(config["train"])
    torch.set_num_threads(config["threads"])
    with open_run(cfg.out) as run, run.event_log() as log:
        cfg = cfg.at(run.path)
        trial = TrialReporter(cfg, run, log, config)
        if entries(cfg.folder)[-1]["kind"] == "run_ended":
            return  # killed between its last line and its last word to Tune
        told = entries_since_start(cfg.folder)
        if reason := give_up_reason(
            told, dead_nodes({line["node"] for line in told if line["kind"] == "workers_started"})
        ):
            trial.fail(reason)
            return
        log.write("workers_started", node=ray.get_runtime_context().get_node_id(), time=time.time())
        try:
            trial.tell_past_epochs()
            data = placed[config["data"]]
            device = torch.device("cuda" if cfg.use_gpu else "cpu")
            worker = WorkerContext(cfg, data.store, 0, 1, device, start_of(data, cfg))
            pairs = pairs_of(data, worker)
            train_epochs(worker, run, pairs, log, config["provenance"], trial.report)
        except Exception as error:
            trial.failed_with(error)
        else:
            if any(line["kind"] == "failed" for line in entries_since_start(cfg.folder)):
                trial.end("FAILED")


class TrialReporter:
    """What a trial tells its event log and Tune."""

    def __init__(self, cfg: TrainConfig, run: RunDir, log: EventLog, config: dict[str, Any]) -> None:
        self.cfg, self.run, self.log, self.config = cfg, run, log, config

    def report(self, state: TrainState, _: dict[str, Any]) -> None:
        """One epoch. The end is told first, for Tune may not come back after it."""
        if self.config["latency"] and not any(line["kind"] == "latency" for line in entries(self.cfg.folder)):
            self.log.write("latency", ms=latency_ms(state))
        if is_finished(state, self.cfg):
            self.end("FINISHED")
        lines = entries(self.cfg.folder)
        self.tell(lines, state.epoch)

    def tell_past_epochs(self) -> None:
        """What earlier processes have done."""
        lines = entries(self.cfg.folder)
        for n, line in enumerate(lines):
            if line["kind"] == "epoch":
                self.tell(lines[: n + 1], line["epoch"])

    def tell(self, lines: list[dict[str, Any]], epoch: int) -> None:
        """To Tune, which answers by going on, or never. The driver may end the event log meanwhile."""
        metrics = metrics_of(lines, epoch, self.config["objective"])
        with self.run.released(self.log):
            tune.report(metrics)

    def end(self, status: str) -> None:
        """The last line. No artifacts: of a trial's weights only the best of a sweep are kept, and in its folder."""
        self.log.write("run_ended", status=status, artifacts=None, time=time.time())

    def fail(self, reason: str) -> None:
        """It ends here, for a reason."""
        self.log.write("failed", error=reason, time=time.time())
        self.end("FAILED")

    def failed_with(self, error: Exception) -> None:
        """Raises the error for another try, unless it is the second of its kind."""
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        again = told_before(cause, entries_since_start(self.cfg.folder))
        self.log.write("exception", cause=cause, time=time.time())
        if again:
            self.fail(f"twice the same: {cause}")
        else:
            raise error


def told_before(cause: str, lines: list[dict[str, Any]]) -> bool:
    """Whether an earlier error of these lines is of this kind."""
    return normalise_error(cause) in [normalise_error(line["cause"]) for line in lines if line["kind"] == "exception"]


def normalise_error(cause: str) -> str:
    """A cause without its numbers: places, sizes and addresses differ from one time to the next."""
    return re.sub(r"\b(0x[0-9a-f]+|nan|inf|\d[\d.,_]*(e[+-]?\d+)?)\b", "#", cause, flags=re.IGNORECASE)


def metrics_of(lines: list[dict[str, Any]], epoch: int, objective: str) -> dict[str, Any]:
    """What Tune is told after an epoch."""
    found = scores(lines, objective)
    return {
        "epoch": epoch,
        "compared": scheduler_metric(lines, objective),
        RATE: found["accept_rate"],
        "lift": found["lift"],
    }


def dead_nodes(nodes: Set[str]) -> Set[str]:
    """Those of some nodes, by their ids, that have no raylet any more."""
    return nodes - {node["NodeID"] for node in ray.nodes() if node["NodeID"] in nodes and node_is_alive(node)}


def give_up_reason(lines: list[dict[str, Any]], gone: Set[str]) -> str | None:
    """Why a trial is not tried again: its process died twice, under one driver, without a step in between.

    A process that went with its node is not counted: that is no doing of the trial's.
    """
    begun: list[tuple[int, str]] = []
    step = 0
    for line in lines:
        if line["kind"] == "step":
            step = line["global_step"]
        elif line["kind"] == "workers_started":
            begun.append((step, line["node"]))
        elif line["kind"] == "exception":  # it was alive to tell
            begun.pop()
    deaths = [at for at, node in begun if node not in gone]
    if len(deaths) >= 2 and deaths[-1] == step:
        return f"its process died twice before step {step + 1}"
    return None


def latency_ms(state: TrainState) -> float:
    """Median milliseconds of a forward pass of one pair, on the device that it trains on."""
    adapter = state.objective.adapter.eval()
    device = next(iter(adapter.state_dict().values())).device
    event_1E = torch.zeros(1, adapter.config.event_dim, device=device)
    seconds = []
    with torch.no_grad():
        for _ in range(TIMED_PASSES):
            began = time.perf_counter()
            adapter(event_1E)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return 1e3 * sorted(seconds)[len(seconds) // 2]
