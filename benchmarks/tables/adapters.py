"""Tables of docs/results/adapters.md."""

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.results_tables import Table, facts, percent, points, read, uncommitted

STRATEGIES = {
    "conv": "`conv`, 12 epochs",
    "ridge": "`ridge`",
    "lowrank": "`lowrank`, 60 epochs",
    "bottleneck": "`bottleneck`, hidden 64",
    "bottleneck, spectral": "`bottleneck`, `--init pca`",
    "lightweight_reference": "`lightweight_reference`",
    "lightweight": "`lightweight`",
    "lightweight, spectral": "`lightweight`, `--init pca`",
}


TOKEN_KINDS = ("token_bottleneck", "token_multilayer", "token_wide", "token_attention", "token_causal")


TOKENS = {
    **{f"{name}, spectral": f"`{name}`, `--init pca`" for name in TOKEN_KINDS},
    "token_causal, next": "`token_causal`, `--init pca`, next-position loss",
    **{f"{name}, cosine": f"`{name}`, cosine alone" for name in TOKEN_KINDS},
    **{name: f"`{name}`, default losses" for name in TOKEN_KINDS},
}


FEATURES = {
    "token_bottleneck, features": "`token_bottleneck`, default losses",
    "token_bottleneck, contrast": "`token_bottleneck`, contrast and centred cosine",
    "lowrank, contrast": "`lowrank`, contrast and centred cosine",
    "ridge, features": "`ridge`",
}


BASELINES = ("before", "white", "mean_target", "shuffled", "previous_window")


def adapters(result: str, names: dict[str, str]) -> Table:
    """Mean over the seeds whose run was made by committed code; an adapter that has none is left out."""
    runs, rows = read(result)["runs"], []
    for name, label in names.items():
        seeds = [run for run in runs.get(name, {}).values() if not uncommitted(run["provenance"])]
        if not seeds:
            continue
        low, high = (pick(run["lift_interval95"]["0.80"][i] for run in seeds) for i, pick in ((0, min), (1, max)))
        means = {theta: statistics.mean(run["accept"][theta] for run in seeds) for theta in ("0.80", "0.90")}
        rows.append(
            (
                label,
                f"{seeds[0]['parameters']:,}",
                str(len(seeds)),
                percent(means["0.80"]),
                percent(means["0.90"]),
                points(statistics.mean(run["lift"]["0.80"] for run in seeds)),
                points(low),
                points(high),
                f"{statistics.mean(run['centred_cos_sim'] for run in seeds):.3f}",
                percent(statistics.mean(run["retrieval"]["R@1"] for run in seeds)),
            )
        )
    columns = ("adapter", "parameters", "seeds", "accepted, θ 0.80", "θ 0.90", "lift, θ 0.80", "lowest", "highest")
    return Table((*columns, "centred cosine", "R@1"), rows, [result])


def baselines(result: str, name: str) -> Table:
    """Baselines of one adapter's first committed run."""
    run = next(run for run in read(result)["runs"][name].values() if not uncommitted(run["provenance"]))
    rows = [
        (
            f"`{key}`",
            f"{baseline['cos_sim_mean']:.3f}",
            *(percent(baseline["cosine_accept_rate"][theta]) for theta in ("0.80", "0.90")),
        )
        for key, baseline in run["baselines"].items()
        if key in BASELINES
    ]
    return Table(("baseline", "mean cos_sim", "accepted, θ 0.80", "θ 0.90"), rows, [result], named=False)


def best_baseline(run: dict[str, Any], theta: str) -> float:
    """Return the share that the best baseline accepts."""
    rates = {key: baseline["cosine_accept_rate"] for key, baseline in run["baselines"].items()}
    return max(rate[theta] for key, rate in rates.items() if key != "previous_window")


def features() -> Table:
    """Adapters of encoder features, each at the θ where the best baseline accepts nearest to a third of the pairs."""
    encoded, pixels = read("adapters_features")["runs"], read("adapters_scenes")["runs"]["conv"]
    named = {label: encoded[name] for name, label in FEATURES.items() if name in encoded}
    rows = []
    for label, runs in {**named, "`conv`, on pixels": pixels}.items():
        seeds = [run for run in runs.values() if not uncommitted(run["provenance"])]
        first = seeds[0]
        theta = min(first["accept"], key=lambda each: abs(best_baseline(first, each) - 1 / 3))
        intervals = [run["lift_interval95"][theta] for run in seeds]
        rows.append(
            (
                label,
                f"{first['parameters']:,}",
                str(len(seeds)),
                theta,
                percent(best_baseline(first, theta)),
                percent(statistics.mean(run["accept"][theta] for run in seeds)),
                points(statistics.mean(run["lift"][theta] for run in seeds)),
                points(min(low for low, _ in intervals)),
                points(max(high for _, high in intervals)),
                f"{statistics.mean(run['centred_cos_sim'] for run in seeds):.3f}",
                percent(statistics.mean(run["retrieval"]["R@1"] for run in seeds)),
            )
        )
    columns = ("adapter", "parameters", "seeds", "θ", "best baseline", "accepted", "lift", "lowest", "highest")
    return Table((*columns, "centred cosine", "R@1"), rows, ["adapters_features", "adapters_scenes"])


def durations() -> Table:
    """Each window length at the θ where its best baseline accepts nearest to a third of the pairs."""
    rows = []
    for ms, each in read("durations")["durations"].items():
        theta = min(each["accept"], key=lambda theta, each=each: abs(best_baseline(each, theta) - 1 / 3))
        lift = each["lift"][theta]
        rows.append(
            (
                f"{int(ms) / 1000:g} s",
                str(each["pairs"]["test"]),
                theta,
                percent(best_baseline(each, theta)),
                percent(each["accept"][theta]["mean"]),
                f"{points(lift['mean'])} ± {100 * lift['std']:.1f}",
                f"{each['centred_cos_sim']['mean']:.3f}",
                f"{each['R@1_over_chance']['mean']:.1f}",
            )
        )
    columns = ("window", "test pairs", "θ", "best baseline", "accepted", "lift", "centred cosine", "R@1 over chance")
    return Table(columns, rows, ["durations"])


def race(key: str) -> Callable[[dict[str, Any]], float]:
    """Mean over the seeds of one number of the race."""
    return lambda result: statistics.mean(run[key] for run in result["runs"])


def speed_facts() -> Table:
    return facts(
        ("one pair on one core: `conv`", "adapter_speed#latency", "conv/median_ms", "{:.1f} ms", ""),
        ("· `lowrank`", "adapter_speed#latency", "lowrank/median_ms", "{:.0f} ms", ""),
        ("· `lightweight`", "adapter_speed#latency", "lightweight/median_ms", "{:.0f} ms", ""),
        (
            "`conv` to `lightweight`'s acceptance, share of its training time",
            "adapter_speed#race",
            race("share"),
            "{:.3f}",
            "0.1",
        ),
        ("· after its first training steps", "adapter_speed#race", race("share_trained"), "{:.3f}", "0.1"),
        ("· by the clock, start of the command included", "adapter_speed#race", race("share_wall"), "{:.2f}", "0.1"),
    )


def recording_facts() -> Table:
    name = "serve_recordings"
    return facts(
        (
            "300,000 events in, aligned feature out, as the caller sees it: p50",
            name,
            "p50_ms/caller",
            "{:.0f} ms",
            "",
        ),
        ("· p99", name, "p99_ms", "{:.0f} ms", ""),
        ("· drawing the event image, p50", name, "p50_ms/draw", "{:.1f} ms", ""),
        ("· encoding it", name, "p50_ms/encode", "{:.1f} ms", ""),
        ("· the adapter", name, "p50_ms/adapter", "{:.1f} ms", ""),
        ("· encoding, share of the whole", name, "encoding_share", percent, "≥ 60 %"),
    )


TABLES: dict[str, Callable[[], Table]] = {
    "adapters-scenes": lambda: adapters("adapters_scenes", STRATEGIES),
    "adapters-footage": lambda: adapters("adapters_footage", STRATEGIES),
    "adapters-tokens": lambda: adapters("adapters_tokens", TOKENS),
    "adapters-features": features,
    "durations": durations,
    "baselines-features": lambda: baselines("adapters_features", "token_bottleneck, features"),
    "baselines-scenes": lambda: baselines("adapters_scenes", "conv"),
    "baselines-footage": lambda: baselines("adapters_footage", "lowrank"),
    "baselines-tokens": lambda: baselines("adapters_tokens", "token_bottleneck, spectral"),
    "adapter-speed": speed_facts,
    "recordings": recording_facts,
}
