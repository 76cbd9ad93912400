"""A trial of a sweep as its event log has it, and how trials are ranked. No Ray and no file.

Only a trial's best checkpoint counts, that of the lowest validation loss.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from ray_app.config.tune import TOKENS
from ray_app.core.thresholds import THETA, rate_key

Setting = dict[str, Any]
"""Values of the searched settings, as JSON has them."""
Status = Literal["waiting", "running", "finished", "stopped", "failed"]
"""`stopped`: by the scheduler, since others were better. `waiting` and `running` trials can still be resumed."""
STATUS_OF_END: dict[str, Status] = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}
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
    tokens_per_target_pass: float | None = None
    """Tokens per target pass at its best checkpoint, of a drafter."""
    lift: float | None = None
    """Lift over the best baseline, at its best checkpoint; a drafter has none."""
    cos_sim: float | None = None
    """Mean cosine at its best checkpoint."""
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

    @classmethod
    def recorded(cls, line: dict[str, Any]) -> Self:
        """Trial of a `trial_created` or `trial_ended` line."""
        return cls(**{name: line[name] for name in cls.__dataclass_fields__ if name in line})

    def after(self, lines: Sequence[dict[str, Any]], objective: str) -> Self:
        """Return the trial as these lines of its own event log have it."""
        reached: dict[str, Any] = {"status": "running", "seconds": active_seconds(lines)}
        reached["steps"] = max((line["global_step"] for line in lines if line["kind"] == "step"), default=0)
        reached["latency_ms"] = next((line["ms"] for line in lines if line["kind"] == "latency"), None)
        if epochs := [line for line in lines if line["kind"] == "epoch"]:
            best = min(epochs, key=lambda line: line["val"]["loss"])
            reached |= {"epochs": epochs[-1]["epoch"], "best_epoch": best["epoch"]}
            reached |= {name: best["val"].get(name) for name in ("lift", TOKENS)}
            reached["accept_rate"] = best["val"]["cosine_accept_rate"][rate_key(THETA)]
            reached["cos_sim"] = best["val"]["cos_sim_mean"]
            reached["objective"] = reached[objective if objective in ("lift", TOKENS) else "accept_rate"]
        if lines and lines[-1]["kind"] == "run_ended":
            reached |= {"status": STATUS_OF_END[lines[-1]["status"]], "ended_at": lines[-1]["time"]}
            reached["reason"] = next((line["error"] for line in lines[::-1] if line["kind"] == "failed"), None)
        return replace(self, **reached)

    def after_each_epoch(self, lines: Sequence[dict[str, Any]], objective: str) -> Iterator[Self]:
        """Yield the trial as it was after each epoch in these lines."""
        for n, line in enumerate(lines, 1):
            if line["kind"] == "epoch":
                yield self.after(lines[:n], objective)

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics that Ray Tune gets after an epoch.

        `compared` is the objective plus TIE_BREAK times the mean cosine: the objective is a count of validation
        pairs, so many trials are equal, and a scheduler stops none of equal ones.
        """
        assert self.objective is not None
        assert self.cos_sim is not None
        compared = self.objective + TIE_BREAK * self.cos_sim
        return {"trial": self.name, "epoch": self.epochs, "compared": compared, "seconds": self.seconds}

    @property
    def shown_objective(self) -> float | None:
        """Objective as figures have it: tokens per target pass, or a rate in percent."""
        if self.objective is None or self.tokens_per_target_pass is not None:
            return self.objective
        return 100 * self.objective

    @property
    def rank(self) -> tuple[float, int, int]:
        """Sort key, smaller is better: the objective, then fewer parameters, then the earlier trial."""
        assert self.objective is not None
        return -self.objective, self.parameters, self.index

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for the event log."""
        return asdict(self)


def trial_name(index: int, setting: Setting) -> str:
    """Return number and hash of the setting."""
    digest = hashlib.sha256(json.dumps([setting], sort_keys=True).encode()).hexdigest()
    return f"trial_{index:04d}-{digest[:8]}"


def active_seconds(lines: Iterable[dict[str, Any]]) -> float:
    """Seconds from each start of a process to its last event."""
    total, started, last = 0.0, None, 0.0
    for line in lines:
        if line["kind"] == "workers_started":
            total += last - started if started is not None else 0.0
            started = last = line["time"]
        elif started is not None and line["kind"] in ("step", "epoch", "failed", "run_ended"):
            last = line["time"]
    return total + (last - started if started is not None else 0.0)


def scored(trials: Iterable[Trial]) -> list[Trial]:
    """Trials that finished an epoch and did not fail, best first."""
    with_objective = [trial for trial in trials if trial.objective is not None and trial.status != "failed"]
    return sorted(with_objective, key=lambda trial: trial.rank)


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """Trial with the best objective; of equal ones that with fewer parameters, then the earlier one."""
    return next(iter(scored(trials)), None)


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Trials best first, then those that failed or have no objective."""
    best_first = scored(trials)
    return best_first + [trial for trial in trials if trial not in best_first]
