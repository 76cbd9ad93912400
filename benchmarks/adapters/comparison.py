"""Every strategy and every baseline on the same test pairs, with several seeds.

    python -m benchmarks.adapters.comparison --store stores/scenes --folder runs/adapters --name scenes
    python -m benchmarks.adapters.comparison --store stores/drive --folder runs/footage --name footage
    python -m benchmarks.adapters.comparison --store stores/scenes --folder runs/tokens --name tokens --tokens
    python -m benchmarks.adapters.comparison --store stores/features --folder runs/features --name features --encoder

Settings were chosen on validation parts; the test part is read once a run, here. Each run's numbers lie in the
folder: finished runs are not repeated, interrupted ones are resumed, and two processes may share the folder.
Writes benchmarks/results/adapters_NAME.json from everything in it.
"""

import argparse
import json
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.provenance import provenance, require_commit, save
from ray_app.cluster.connection import cluster
from ray_app.commands.evaluate.command import run_evaluate
from ray_app.commands.quickstart import RECIPE
from ray_app.commands.train.command import run_train
from ray_app.config.base import SplitConfig
from ray_app.config.evaluate import EvaluateConfig
from ray_app.config.train import TrainConfig
from ray_app.core.adapters.registry import STRATEGIES
from ray_app.core.adapters.sequences import sequence_cosine
from ray_app.runs.run_dir import RunDir
from ray_app.store.manifest import MANIFEST, Features, FeatureSpec
from ray_app.store.pair_store import Pair, PairStore, publish, write_part
from ray_app.store.split import split_pairs

LOWRANK = {"strategy": "lowrank", "num_epochs": 60, "early_stop_patience": 60, "schedule": "cosine"}
SWEPT = {
    "num_epochs": 12,
    "hidden_dim": 512,
    "learning_rate": 8.4e-3,
    "weight_decay": 0.019,
    "dropout": 0.2,
    "cosine_weight": 0.31,
    "accept_weight": 0.5,
}
"""Best of 32 settings on the validation part of 1,020 pairs of scenes."""
REFERENCE = {"num_epochs": 3}
SETTINGS: dict[str, dict[str, Any]] = {
    "conv": {"strategy": "conv", "num_epochs": 12, "early_stop_patience": 12, **RECIPE},
    "lowrank": {**LOWRANK},
    "lowrank, swept": {**LOWRANK, **SWEPT},
    "ridge": {"strategy": "ridge"},
    "bottleneck": {"strategy": "bottleneck", "hidden_dim": 64, **REFERENCE},
    "bottleneck, spectral": {"strategy": "bottleneck", "hidden_dim": 64, "init": "pca", **REFERENCE},
    "lightweight": {"strategy": "lightweight", **REFERENCE},
    "lightweight, spectral": {"strategy": "lightweight", "init": "pca", **REFERENCE},
    "lightweight_reference": {"strategy": "lightweight_reference", **REFERENCE},
}
"""`lightweight` is the reference's recipe: its diagram, hidden 512, batch 32, learning rate 1e-3, 3 epochs."""
BY_TOKENS = {
    name: {"strategy": name, "num_epochs": 6, "schedule": "cosine"}
    for name in STRATEGIES
    if name.startswith("token_")
}
TOKENS: dict[str, dict[str, Any]] = {
    **{f"{name}, cosine": {**settings, "mse_weight": 0.0} for name, settings in BY_TOKENS.items()},
    **{f"{name}, spectral": {**settings, "init": "pca"} for name, settings in BY_TOKENS.items()},
    "token_causal, next": {**BY_TOKENS["token_causal"], "init": "pca", "next_position_weight": 0.5},
    **BY_TOKENS,
}
"""Without the squared error, from the mean target on, and as they are by default: an event patch is five times as
long as a target's. `token_causal, next`: its own loss too, with the weight that the cosine of the same position has,
as the reference's project halves the two; the other rows of `token_causal` are plain causal attention."""
EPOCHS = {"num_epochs": 6, "early_stop_patience": 6, "schedule": "cosine", "learning_rate": 3e-3}
CONTRAST = {"contrastive_weight": 0.05, "centred_weight": 1.0}
ENCODED: dict[str, dict[str, Any]] = {
    "token_bottleneck, features": {"strategy": "token_bottleneck", "init": "pca", **EPOCHS},
    "token_bottleneck, contrast": {"strategy": "token_bottleneck", "init": "pca", **EPOCHS, **CONTRAST},
    "lowrank, contrast": {"strategy": "lowrank", **EPOCHS, "num_epochs": 20, "learning_rate": 1e-3, **CONTRAST},
    "ridge, features": {"strategy": "ridge"},
}
"""Adapters of at most a million parameters on features of an encoder. Strategy, weights and rate were chosen by three
folds of the drives that are not in the test part: there `token_bottleneck` led, and contrast raised no lift."""
ALL = SETTINGS | TOKENS | ENCODED
PATCH = 16
"""Side of a patch that is one token, of images at half their size: 49 tokens of 768 numbers."""
BASELINES = ("before", "white", "mean_target", "shuffled", "previous_window")


def measured(store: Path, folder: Path, name: str, seed: int, *, use_gpu: bool) -> dict[str, Any]:
    """One run of `train` and `evaluate`."""
    run = folder / f"{name.replace(', ', '-')}-{seed}"
    common = {"store": store, "tracking_uri": f"sqlite:///{folder}/mlflow.db", "use_gpu": use_gpu}
    settings: dict[str, Any] = {"out": run, "seed": seed, **common, **ALL[name]}
    if (run / "run.json").is_file():
        settings = {**RunDir(run).metadata()["config"], "out": run, "resume": run}
    elif (subspaces := folder / "lowrank-0" / "init").is_dir() and (
        "init" in settings or settings["strategy"] == "lowrank"
    ):
        settings["init_from"] = subspaces  # those of the first run: they are the pairs', not the seed's
    trained = run_train(TrainConfig.model_validate(settings))
    report = run.with_name(f"{run.name}-report")
    result = run_evaluate(EvaluateConfig(checkpoint=str(run), out=report, **common))
    return {
        "provenance": provenance(),
        "parameters": trained["parameters"],
        "checkpoint_bytes": sum(file.stat().st_size for file in Path(trained["checkpoint"]).iterdir()),
        "epochs": trained["epochs"],
        "train_seconds": trained["seconds"],
        "step_seconds": trained["step_seconds"],
        "validation": {key: trained["val"][key] for key in ("loss", "cos_sim_mean", "cosine_accept_rate")},
        "cos_sim_mean": result["cos_sim_mean"],
        "accept": result["cosine_accept_rate"],
        "lift": result["lift_by_theta"],
        "lift_interval95": result["interval95"]["lift_by_theta"],
        "best_baseline": result["best_baseline"],
        "centred_cos_sim": result["centered_cos_sim_mean"],
        "retrieval": result["retrieval"],
        "baselines": {key: result["baselines"][key] for key in BASELINES if key in result["baselines"]},
        "pairs": result["pairs"],
        "split": result["split"],
    }


def token_store(images: PairStore, folder: Path) -> Path:
    """Return the same pairs as sequences of patches in bf16, for the adapters of tokens."""
    if (folder / MANIFEST).is_file():
        return folder
    folder.mkdir()
    _, height, width = images.feature("event").shape
    patches = height // 2 // PATCH, width // 2 // PATCH
    spec = FeatureSpec(dtype="bfloat16", shape=(patches[0] * patches[1], 3 * PATCH**2), scale=1.0)
    index, parts = images.index, []
    for file in range(len(images.files)):
        rows = np.flatnonzero(index.file == file)
        event, target = (
            as_tokens(side * images.feature(name).scale, (3, height, width))
            for name, side in zip(("event", "target"), images.read_rows(rows), strict=True)
        )
        pairs = [
            Pair(str(index.sequence[row]), int(index.t_start_us[row]), int(index.t_end_us[row]), event[n], target[n])
            for n, row in enumerate(rows)
        ]
        parts.append(write_part(folder, f"tokens-{file:04d}.parquet", pairs, Features(event=spec, target=spec)))
    source = {**images.manifest.source, "tokens": f"patches of {PATCH} pixels of images at half their size"}
    publish(
        folder,
        parts,
        features=Features(event=spec, target=spec),
        durations=images.manifest.durations,
        source=source,
        rejected=b"",
    )
    return folder


def as_tokens(image_BD: NDArray[Any], shape: tuple[int, ...]) -> list[bytes]:
    """Each image's patches, row by row, as a store keeps them."""
    image = torch.tensor(image_BD, dtype=torch.float32).view(-1, *shape)
    small = torch.nn.functional.avg_pool2d(image, 2)
    token_BWT = torch.nn.functional.unfold(small, PATCH, stride=PATCH)
    stored = token_BWT.transpose(1, 2).bfloat16().view(torch.int16).numpy().astype("<i2")
    return [tokens.tobytes() for tokens in stored]


def own_colours(folder: Path) -> dict[str, float]:
    """Return the score of knowing the mean colour of each target's own patches, on the test part.

    A mean cosine over patches does not see how bright each is, which is most of what a picture's events tell of it.
    """
    store = PairStore.open(folder)
    target_BD = torch.from_numpy(store.read_rows(split_pairs(store.index, SplitConfig()).test)[1])
    colour = target_BD.unflatten(1, (-1, 3, PATCH**2)).mean(dim=3, keepdim=True).expand(-1, -1, -1, PATCH**2)
    cos_B = sequence_cosine(colour.flatten(1), target_BD, 3 * PATCH**2)
    rates = {f"accept_{theta:.2f}": float((cos_B > theta).double().mean()) for theta in (0.8, 0.9, 0.95)}
    return {"cos_sim_mean": float(cos_B.mean()), **rates}


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Over seeds."""
    return {
        "accept_0.80": spread([run["accept"]["0.80"] for run in runs]),
        "accept_0.90": spread([run["accept"]["0.90"] for run in runs]),
        "accept_0.95": spread([run["accept"]["0.95"] for run in runs]),
        "lift_0.80": spread([run["lift"]["0.80"] for run in runs]),
        "lift_0.90": spread([run["lift"]["0.90"] for run in runs]),
        "lift_0.80_lowest_bound": min(run["lift_interval95"]["0.80"][0] for run in runs),
        "lift_0.90_lowest_bound": min(run["lift_interval95"]["0.90"][0] for run in runs),
        "cos_sim_mean": spread([run["cos_sim_mean"] for run in runs]),
        "centred_cos_sim": spread([run["centred_cos_sim"] for run in runs]),
        **{f"R@{k}": spread([run["retrieval"][f"R@{k}"] for run in runs]) for k in (1, 5, 10)},
        "R@1_over_chance": spread([run["retrieval"]["R@1"] / run["retrieval"]["chance_R@1"] for run in runs]),
        "train_seconds": spread([run["train_seconds"] for run in runs]),
        "parameters": runs[0]["parameters"],
        "checkpoint_bytes": runs[0]["checkpoint_bytes"],
        "seeds": len(runs),
    }


def collected(folder: Path) -> dict[str, Any]:
    """All runs whose numbers lie in the folder, by strategy and seed."""
    runs = {
        name: {path.stem.rpartition("-")[2]: json.loads(path.read_text()) for path in paths}
        for name in ALL
        if (paths := sorted(folder.glob(f"{name}-[0-9]*.json")))
    }
    return {
        "settings": {name: ALL[name] for name in runs},
        "summary": {name: summary(list(each.values())) for name, each in runs.items()},
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the runs")
    parser.add_argument("--name", required=True, help="of the result")
    parser.add_argument("--tokens", action="store_true", help="cut the images into patches; the adapters of tokens")
    parser.add_argument("--encoder", action="store_true", help="the store has features of an encoder")
    parser.add_argument("--strategies", nargs="+", choices=[*ALL], help="default: all")
    parser.add_argument("--use-gpu", action="store_true", help="train and evaluate there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    store = token_store(PairStore.open(args.store), args.folder / "store") if args.tokens else args.store
    names = args.strategies or (TOKENS if args.tokens else ENCODED if args.encoder else SETTINGS)
    wanted = {args.folder / f"{name}-{seed}.json": (name, seed) for seed in args.seeds for name in names}
    with nullcontext() if all(path.is_file() for path in wanted) else cluster(None):
        for path, (name, seed) in wanted.items():
            if not path.is_file():
                path.write_text(json.dumps(measured(store, args.folder, name, seed, use_gpu=args.use_gpu)))
    context = {"own_colours": own_colours(store)} if args.tokens else {}
    save(f"adapters_{args.name}", {**context, **collected(args.folder)})


if __name__ == "__main__":
    require_commit()
    main()
