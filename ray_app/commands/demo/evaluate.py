"""`ray-app demo evaluate`: how well a target sees, on rendered drives that nothing was learnt from."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_app.commands.demo.answers import HELD_OUT, TRAINING, Picture, features_of, pictures
from ray_app.commands.demo.command import fetched
from ray_app.commands.demo.projector_start import solve_probe
from ray_app.commands.demo.shipped import shipped_target
from ray_app.commands.demo.sight import judge
from ray_app.commands.demo.target import demo_encoder
from ray_app.config.demo import DemoEvaluateConfig
from ray_app.errors import InputError
from ray_app.language_models.kinds import load, loader
from ray_app.scenes.captions import FACTS
from ray_app.scenes.facts import SceneFacts

PER_DRIVE = 4
"""Pictures of a drive."""


def run_demo_evaluate(cfg: DemoEvaluateConfig) -> dict[str, Any]:
    """Judge a target; return the --json object.

    InputError: it is no target that sees. Without TARGET: errors as `shipped_target`.
    """
    folder = cfg.target or shipped_target(cfg.cache)
    if not loader(folder).sees:
        raise InputError(f"{folder} sees no pictures; name a target that does.")
    target = load(folder, "float32", "cpu")
    encoder = demo_encoder(cfg.encoder or fetched("mobilenet_v2", cfg.cache))
    learnt = list(pictures(cfg.seed, TRAINING, cfg.num_train_drives, PER_DRIVE))
    facts = [each.facts for each in learnt]
    probe = solve_probe(features_of(encoder, learnt), facts)
    some = held_out(cfg.seed, cfg.num_test_drives)
    sight = judge(target, some, majority_of(facts), probe.answers(features_of(encoder, some)), cfg.seed)
    return {"target": str(folder), "blind": int(not sight["looks"]), "sight": sight}


def held_out(seed: int, num_drives: int) -> list[Picture]:
    """Return the pictures that targets are judged on."""
    return list(pictures(seed, HELD_OUT, num_drives, PER_DRIVE))


def majority_of(facts: Sequence[SceneFacts]) -> dict[str, str]:
    """Return the most frequent value of each kind of fact."""
    return {kind: Counter(map(fact.true, facts)).most_common(1)[0][0] for kind, fact in FACTS.items()}


def render_demo_evaluate(result: dict[str, Any], console: Console) -> None:
    """Print what the target says right, and what it needs its picture for."""
    sight = result["sight"]
    table = Table("right about held-out rendered scenes", "target", "95 %", "majority", "linear probe")
    for kind, each in sight["kinds"].items():
        low, high = each["interval95"]
        shares = [f"{100 * each[key]:.0f} %" for key in ("right", "majority", "probe")]
        table.add_row(kind, shares[0], f"{100 * low:.0f} to {100 * high:.0f} %", *shares[1:])
    console.print(table)
    losses = sight["loss"]
    console.print(
        f"{sight['pictures']} pictures of {sight['drives']} drives: {100 * sight['above_majority']:+.0f} points "
        f"above the majority on average; loss {losses['own']:.3f} with the own picture, {losses['other']:.3f} with "
        f"another drive's, {losses['none']:.3f} with none; {sight['distinct_texts']} different texts to one question"
    )
    if not sight["looks"]:
        console.print(
            f"{result['target']} does not look at its pictures: another drive's picture changes its loss by a factor "
            f"of {sight['loss_ratio_other']:.2f}, and it gives {sight['distinct_texts']} different texts."
        )
