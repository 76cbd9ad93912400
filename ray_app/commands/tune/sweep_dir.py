"""A sweep: what it is, its event log, and a run for each trial. This record is all that it is.

    sweep.json  events.jsonl  trials/trial_0007-1f3a…/  final/trial_0007-1f3a…/seed_0/  sweep.html

Kinds in the event log: `run_started` (one per driver), `trial_created` (a setting is tried), `trial_process_died`
(and is started again), `trial_ended` (its result), `final_seed` (one seed's numbers on the test part), `run_ended`. A
trial's own progress is in its own event log.
"""

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ray_app.commands.tune.spec import Setting, SweepSpec
from ray_app.core.metrics import THETA, rate_key
from ray_app.errors import StoreError
from ray_app.parsing.json_text import parse_object
from ray_app.runs.event_log import EVENT_LOG, EventLog, entries, is_locked
from ray_app.runs.mirror import DRIVER_LEASE, Mirror
from ray_app.runs.run_dir import CHECKPOINTS, STATES, RunDir
from ray_app.store.atomic import disk_errors, write_file
from ray_app.store.filesystem import LocalDir, RemoteDir, open_storage
from ray_app.store.scratch import scratch_dir

SWEEP, PAGE = "sweep.json", "sweep.html"
SWEEP_HANDOVER_S = 5.0
"""How long a driver waits for the one before it, which may have just been killed."""
RUNS = ("trials/*", "final/*/*")
"""Patterns of run folders in a sweep."""
RUN_OF_SWEEP = re.compile(r"(trials|final)/[A-Za-z0-9_-]+(/seed_\d+)?")
Status = Literal["waiting", "running", "finished", "stopped", "failed"]
"""`stopped`: by the scheduler, since others were better. `waiting` and `running` trials can still be resumed."""
TIE_BREAK = 1e-6
"""Weight of the mean cosine when running trials are compared: less than one pair in half a million, so that it only
decides between equal objectives."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial and its state."""

    index: int
    """Number of the trial."""
    name: str
    """Number and a hash of the setting: the same in every run of the sweep."""
    setting: Setting
    """Values of the searched settings."""
    parameters: int
    """Trained parameters of its adapter."""
    status: Status = "waiting"
    """Status of the trial."""
    objective: float | None = None
    """Objective at its best checkpoint."""
    accept_rate: float | None = None
    """cosine_accept_rate_0.80 at its best checkpoint."""
    lift: float | None = None
    """Lift over the best baseline, at its best checkpoint."""
    epochs: int = 0
    """Finished epochs."""
    best_epoch: int = 0
    """Epoch of the best checkpoint."""
    steps: int = 0
    """Optimizer steps."""
    seconds: float = 0.0
    """Seconds that a process worked on it."""
    latency_ms: float | None = None
    """Latency of one pair, if it is an objective."""
    reason: str | None = None
    """Reason of its failure."""
    ended_at: float | None = None
    """Unix time of its end."""

    @property
    def rank(self) -> tuple[float, int, int]:
        """Sort key, smaller is better: the objective, then fewer parameters, then the earlier trial."""
        assert self.objective is not None
        return -self.objective, self.parameters, self.index


@contextmanager
def open_sweep(where: str) -> Iterator["SweepDir"]:
    """Yield the sweep that a path or URI names, started or not; delete the scratch folder of one at a URI after."""
    storage = open_storage(where)
    if isinstance(storage, LocalDir):
        yield SweepDir(storage.path)
    else:
        with scratch_dir() as folder:
            yield SweepDir(folder, storage)


class SweepDir:
    """Folder of a sweep: `sweep.json`, the event log and the runs below `path`."""

    def __init__(self, path: Path, remote: RemoteDir | None = None) -> None:
        """`path`: the sweep's folder, or a scratch folder where the sweep is kept at `remote`."""
        self.path = path
        self.mirror = Mirror(path, remote)

    def __str__(self) -> str:
        """Return the path or URI that `--resume` and `--watch` take."""
        return str(self.mirror)

    @property
    def name(self) -> str:
        """Last part of the path or URI."""
        return str(self.mirror.storage).rpartition("/")[2]

    @property
    def resume(self) -> str:
        """Command that resumes the sweep."""
        return f"ray-app tune --resume {shlex.quote(str(self))}"

    def shown(self, path: Path) -> str:
        """Return the path or URI of a file or folder of the sweep, valid on every machine."""
        return str(self) if path == self.path else self.mirror.storage.uri_of(str(path.relative_to(self.path)))

    def refresh(self) -> None:
        """Download the sweep so far. StoreError: there is none, or it names a run outside of it."""
        if self.mirror.remote is None:
            return
        try:
            self.mirror.download_file(SWEEP)
        except FileNotFoundError as error:
            raise StoreError(f"{self.mirror.storage} is not the folder of a sweep: it has no {SWEEP}") from error
        self.mirror.pull()
        if not (self.path / EVENT_LOG).is_file():
            return  # it is about to start
        lines = self.entries()
        ended = {line["name"] for line in lines if line["kind"] == "trial_ended"}
        for line in lines:
            if line["kind"] == "final_seed":
                self._run(line["run"]).refresh()
            elif line["kind"] == "trial_created":
                run = self.run(line["name"])
                if line["name"] not in ended or not (run.path / EVENT_LOG).is_file():
                    run.refresh()

    def download_artifacts(self) -> None:
        """Download the checkpoints of its final runs, for the tracking server."""
        for path in self.runs("final/*/*"):
            if (artifacts := entries(path)[-1].get("artifacts")) is not None:
                self._run(str(path.relative_to(self.path))).download(artifacts)

    def upload(self, folder: Path) -> None:
        """Upload files that were made in `path`."""
        self.mirror.upload_files(folder)

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the sweep."""
        write_file(self.path / name, data)
        self.mirror.upload_files(self.path / name)

    def files(self) -> list[str]:
        """Return paths or URIs of its record and its page."""
        names = sorted(self.mirror.storage.listdir())
        return [self.shown(self.path / name) for name in names if name.startswith((SWEEP, EVENT_LOG, PAGE))]

    def require_free(self) -> None:
        """Raise StoreError if anything is in the way of a new sweep."""
        try:
            names = self.mirror.storage.listdir()
        except FileNotFoundError:
            return
        except NotADirectoryError:
            names = {self.name}
        names = {name for name in names if not name.startswith(DRIVER_LEASE)}
        if SWEEP in names:
            raise StoreError(f"{self} holds a sweep already; resume it with `{self.resume}`, or name another `out`")
        if names:
            raise StoreError(f"{self} already holds something; name a new folder for the sweep")

    def create(self, metadata: Mapping[str, Any]) -> None:
        """Start a sweep here. StoreError if anything is in the way; nothing is deleted.

        Of several that start at one moment, the one that locks the event log first has the folder.
        """
        self.require_free()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with EventLog(self.path, patience_s=0.0):
            if (self.path / SWEEP).is_file():
                self.require_free()
            self.write(SWEEP, json.dumps(dict(metadata), indent=1).encode())

    @contextmanager
    def exclusive(self, created: Mapping[str, Any] | None = None) -> Iterator[EventLog]:
        """Open the sweep's event log for its one driver; start the sweep first with the metadata `created`.

        StoreError: another process drives the sweep.
        """
        with self.mirror.lease():
            if created is not None:
                self.create(created)
            with self.mirror.writing(), EventLog(self.path, SWEEP_HANDOVER_S) as log:
                yield log

    def has_driver(self) -> bool:
        """Return True if a driver holds the event log, or at a URI has renewed its lease."""
        driven = self.mirror.is_driven()
        return is_locked(self.path) if driven is None else driven

    def metadata(self) -> dict[str, Any]:
        """Return what it was started with: `name`, `key`, `created`, `spec`, `store_fingerprint`.

        StoreError: no sweep.
        """
        try:
            return parse_object((self.path / SWEEP).read_bytes())
        except (OSError, ValueError) as error:
            raise StoreError(f"{self} is not the folder of a sweep: {SWEEP} cannot be read ({error})") from error

    @property
    def spec(self) -> SweepSpec:
        """Settings that the sweep was started with."""
        return SweepSpec.model_validate({**self.metadata()["spec"], "out": str(self)})

    def entries(self) -> list[dict[str, Any]]:
        """Lines of the sweep's event log. StoreError: it is missing, or a line is damaged."""
        if not (self.path / EVENT_LOG).is_file():
            raise StoreError(
                f"{self.shown(self.path / EVENT_LOG)} is missing: it is the record of what was tried, and "
                "the sweep cannot be resumed without it. Restore it from a copy, or start a new sweep."
            )
        return entries(self.path)

    def event_times(self) -> list[float]:
        """Times of all lines of its event logs, in order."""
        folders = (self.path, *self.runs("trials/*"))
        return sorted(line["time"] for folder in folders for line in entries(folder) if "time" in line)

    def runs(self, *patterns: str) -> list[Path]:
        """Run folders that have an event log, of all RUNS or of these patterns."""
        return sorted(
            path.parent for pattern in patterns or RUNS for path in self.path.glob(f"{pattern}/{EVENT_LOG}")
        )

    def sessions(self) -> list[tuple[float, float]]:
        """Time of each start and of the last event before the next start."""
        starts = [line["time"] for line in self.entries() if line["kind"] == "run_started"]
        times = self.event_times()
        return [
            (begin_s, max(moment for moment in times if begin_s <= moment < next_s))
            for begin_s, next_s in itertools.pairwise([*starts, float("inf")])
        ]

    def used_seconds(self) -> float:
        """Seconds of search of all starts but the newest."""
        return sum(end_s - begin_s for begin_s, end_s in self.sessions()[:-1])

    def run(self, name: str) -> RunDir:
        """Run folder of a trial."""
        return self._run(f"trials/{name}")

    def final(self, name: str, seed: int) -> RunDir:
        """Run folder of one seed of the final training of a trial's setting."""
        return self._run(f"final/{name}/seed_{seed}")

    def _run(self, folder: str) -> RunDir:
        if not RUN_OF_SWEEP.fullmatch(folder):  # read from a file
            raise StoreError(f"{self} is damaged: its event log names {folder!r}, which is no run of a sweep")
        return RunDir(self.path / folder, self.mirror.child(folder))

    def trials(self) -> list[Trial]:
        """All trials by number; the state of those that have not ended is read from their own event logs."""
        spec = self.spec
        trials: dict[str, Trial] = {}
        for line in self.entries():
            if line["kind"] == "trial_created":
                trials[line["name"]] = Trial(*(line[key] for key in ("index", "name", "setting", "parameters")))
            elif line["kind"] == "trial_ended":
                trials[line["name"]] = Trial(**{key: line[key] for key in Trial.__dataclass_fields__})
        return [
            trial if trial.ended_at else Trial(**asdict(trial) | self.trial_status(trial.name, spec))
            for trial in trials.values()
        ]

    def trial_status(self, name: str, spec: SweepSpec) -> dict[str, Any]:
        """State of a trial by its own event log, as fields of Trial; empty if it has not started."""
        run = self.run(name)
        run.refresh()
        if not (run.path / EVENT_LOG).is_file():
            return {}
        lines = entries(run.path)
        reached = {"seconds": active_seconds(lines), "status": "running", **scores(lines, spec.objective)}
        reached["steps"] = max((line["global_step"] for line in lines if line["kind"] == "step"), default=0)
        reached["latency_ms"] = next((line["ms"] for line in lines if line["kind"] == "latency"), None)
        if lines and lines[-1]["kind"] == "run_ended":
            reached["ended_at"] = lines[-1]["time"]
            reached["status"] = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}[lines[-1]["status"]]
            reached["reason"] = next((line["error"] for line in lines[::-1] if line["kind"] == "failed"), None)
        return reached

    def curve(self, name: str, objective: str) -> list[tuple[int, float]]:
        """Epoch and scheduler metric of each finished epoch of a trial."""
        folder = self.run(name).path
        lines = entries(folder) if (folder / EVENT_LOG).is_file() else []
        ends = [n for n, line in enumerate(lines, 1) if line["kind"] == "epoch"]
        return [(lines[n - 1]["epoch"], scheduler_metric(lines[:n], objective)) for n in ends]

    def end_trial(self, log: EventLog, trial: Trial) -> None:
        """Log how a trial ended, and delete what only resuming it would need."""
        log.write("trial_ended", **asdict(trial))
        run = self.run(trial.name)
        best = run.best_on_disk
        for kind in (STATES, CHECKPOINTS):
            run.delete_checkpoints(kind, best)

    def prune_checkpoints(self, trials: list[Trial], num: int) -> None:
        """Delete the weights of ended trials that are not among the best `num`. 0: all are kept."""
        ranked = sorted((trial for trial in trials if trial.objective is not None), key=lambda trial: trial.rank)
        for trial in ranked[num:] if num else ():
            if trial.ended_at:
                self.run(trial.name).delete_checkpoints(CHECKPOINTS)


def trial_name(index: int, setting: Setting) -> str:
    """Return number and hash of the setting."""
    digest = hashlib.sha256(json.dumps([setting], sort_keys=True).encode()).hexdigest()
    return f"trial_{index:04d}-{digest[:8]}"


def scores(lines: list[dict[str, Any]], objective: str) -> dict[str, Any]:
    """Metrics of a trial at its best checkpoint, that of the lowest validation loss, as fields of Trial."""
    epochs = [line for line in lines if line["kind"] == "epoch"]
    if not epochs:
        return {}
    best = best_epoch(epochs)
    rate, lift = best["val"]["cosine_accept_rate"][rate_key(THETA)], best["val"]["lift"]
    return {
        "objective": lift if objective == "lift" else rate,
        "accept_rate": rate,
        "lift": lift,
        "epochs": epochs[-1]["epoch"],
        "best_epoch": best["epoch"],
    }


def scheduler_metric(lines: list[dict[str, Any]], objective: str) -> float:
    """Metric that a scheduler compares: the objective plus TIE_BREAK times the mean cosine at the same checkpoint.

    The objective is a count of validation pairs, so many trials are equal, and a scheduler stops none of equal ones.
    """
    best = best_epoch([line for line in lines if line["kind"] == "epoch"])
    return scores(lines, objective)["objective"] + TIE_BREAK * best["val"]["cos_sim_mean"]


def best_epoch(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """Line of the best checkpoint."""
    return min(epochs, key=lambda line: line["val"]["loss"])


def active_seconds(lines: list[dict[str, Any]]) -> float:
    """Seconds from each start of a process to its last event."""
    total, started, last = 0.0, None, 0.0
    for line in lines:
        if line["kind"] == "workers_started":
            total += last - started if started is not None else 0.0
            started = last = line["time"]
        elif started is not None and line["kind"] in ("step", "epoch", "failed", "run_ended"):
            last = line["time"]
    return total + (last - started if started is not None else 0.0)


def best_of(trials: list[Trial]) -> Trial | None:
    """Trial with the best objective; of equal ones that with fewer parameters, then the earlier one."""
    scored = [trial for trial in trials if trial.objective is not None and trial.status != "failed"]
    return min(scored, key=lambda trial: trial.rank, default=None)


def ranked(trials: list[Trial]) -> list[Trial]:
    """Trials with an objective, best first, then the others."""
    with_objective = sorted((trial for trial in trials if trial.objective is not None), key=lambda trial: trial.rank)
    return with_objective + [trial for trial in trials if trial.objective is None]


def pareto_front(trials: list[Trial], second: str) -> list[Trial]:
    """Trials that no other beats in the objective without losing in the second one, best objective first."""
    scored = [
        t for t in trials if t.objective is not None and t.status != "failed" and getattr(t, second) is not None
    ]
    front: list[Trial] = []
    for trial in sorted(scored, key=lambda t: (t.rank[0], getattr(t, second))):
        if not front or getattr(trial, second) < getattr(front[-1], second):
            front.append(trial)
    return front
