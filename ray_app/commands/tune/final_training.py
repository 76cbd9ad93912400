"""Final training: the winner, trained on all but the test part with several seeds, and evaluated on the test part.

The number of epochs is that of the trial's best checkpoint, since no validation part is left to stop early by. The
test part is read here for the first time, once for each seed. The first seed is the one to promote, whatever its
result.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_app.commands.evaluate.command import run_evaluate
from ray_app.commands.promote.command import run_promote
from ray_app.commands.train.command import run_train
from ray_app.commands.tune.spec import SweepSpec, train_config
from ray_app.commands.tune.sweep_dir import SweepDir, Trial
from ray_app.config.evaluate import EvaluateConfig, PromoteConfig
from ray_app.config.train import TrainConfig
from ray_app.config.tune import TuneConfig
from ray_app.core.metrics import THETA, rate_key
from ray_app.runs.event_log import EventLog
from ray_app.runs.run_dir import RunDir

LOGGED_KEYS = (
    "lift",
    "best_baseline",
    "interval95",
    "cos_sim_mean",
    "centered_cos_sim_mean",
    "pairs",
    "verdict",
    "try_next",
)
"""Keys of an evaluation that are logged with its rate."""


def run_final(cfg: TuneConfig, folder: SweepDir, log: EventLog, best: Trial) -> None:
    """Train and evaluate each seed that the event log does not have yet, and log it. Promote if asked to."""
    spec = folder.spec
    done = {line["seed"] for line in folder.entries() if line["kind"] == "final_seed" and line["trial"] == best.name}
    for seed in range(spec.num_final_seeds):
        if seed in done:
            continue
        run = folder.final(best.name, seed)
        trained = run_train(final_config(cfg, spec, best, seed, run), parent_key=folder.metadata()["key"])
        report = run.path.with_name(f"{run.path.name}-report")
        evaluated = run_evaluate(evaluation_config(cfg, spec, best, trained["checkpoint"], report))
        folder.upload(report)
        log.write(
            "final_seed",
            trial=best.name,
            seed=seed,
            run=str(run.path.relative_to(folder.path)),
            test={"accept_rate": evaluated["cosine_accept_rate"][rate_key(THETA)]}
            | {key: evaluated[key] for key in LOGGED_KEYS},
            report=str((report / "report.html").relative_to(folder.path)),
            time=time.time(),
        )
    if cfg.promote:
        first = str(folder.final(best.name, 0))
        outcome = run_promote(PromoteConfig(run=first, **shared_flags(cfg, spec, best)))
        log.write("promoted", trial=best.name, promoted=outcome["promoted"], reason=outcome["reason"])


def final_config(cfg: TuneConfig, spec: SweepSpec, best: Trial, seed: int, run: RunDir) -> TrainConfig:
    """Settings of the final training of one seed; a run that has started is resumed."""
    base = train_config(
        spec,
        best.setting,
        str(run),
        tracking_uri=cfg.tracking_uri,
        experiment=cfg.experiment,
        model_name=cfg.model_name,
        address=cfg.address,
    )
    changed = {
        "train_on_val": True,
        "num_epochs": best.best_epoch,
        "seed": seed,
        "num_workers": spec.final_workers,
        "cpus_per_worker": None,
        "resume": str(run) if run.claimed else None,
    }
    return TrainConfig.model_validate({**base.model_dump(), **changed})


def evaluation_config(cfg: TuneConfig, spec: SweepSpec, best: Trial, checkpoint: str, report: Path) -> EvaluateConfig:
    """Settings of the evaluation of a final checkpoint."""
    return EvaluateConfig(store=spec.store, checkpoint=checkpoint, out=report, **shared_flags(cfg, spec, best))


def shared_flags(cfg: TuneConfig, spec: SweepSpec, best: Trial) -> dict[str, Any]:
    """Split, cluster and tracking server, for evaluate and promote."""
    split = {name: getattr(spec, name) for name in ("split", "split_seed", "test_share", "val_share")}
    durations = best.setting.get("durations", spec.base.get("durations", spec.durations))
    tracking = {name: getattr(cfg, name) for name in ("tracking_uri", "experiment", "model_name", "address")}
    return {**split, "durations": tuple(durations), "use_gpu": spec.use_gpu, **tracking}


def final_result(finals: Sequence[dict[str, Any]], folder: SweepDir) -> dict[str, Any]:
    """Mean and spread over seeds on the test part, and a sentence of them."""
    rates, lifts = ([line["test"][key] for line in finals] for key in ("accept_rate", "lift"))
    spread = {
        name: {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "min": min(values),
            "max": max(values),
        }
        for name, values in (("accept_rate", rates), ("lift", lifts))
    }
    rate, lift = spread["accept_rate"], spread["lift"]
    verdict = "beats the best baseline with every seed" if lift["min"] > 0 else "does not beat the best baseline"
    if lift["min"] <= 0 < lift["max"]:
        verdict = "beats the best baseline with some seeds and not with others"
    runs = [folder.shown(folder.path / line["run"]) for line in finals]
    return {
        "test": spread,
        "seeds": [{"seed": line["seed"], "run": run, **line["test"]} for line, run in zip(finals, runs, strict=True)],
        "run": runs[0],
        "try_next": finals[0]["test"]["try_next"],
        "sentence": (
            f"On the test part the winner {verdict}: cosine_accept_rate_{rate_key(THETA)} {100 * rate['mean']:.1f} % "
            f"± {100 * rate['std']:.1f} over {len(finals)} seeds, lift {100 * lift['mean']:+.1f} ± "
            f"{100 * lift['std']:.1f} points."
        ),
    }
