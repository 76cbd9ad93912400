"""Tables of the README."""

from collections.abc import Callable

from benchmarks.results_tables import Table, facts, percent, points, read
from benchmarks.tables.adapters import adapters
from benchmarks.tables.speculative import drafters

SHOWN = ("0.70", "0.80", "0.90", "0.95")
DRAFTERS = ("eventgpt", "previous_window", "hybrid")


def adapters_table() -> Table:
    """Two strategies and the mean target on rendered scenes, and the reference's recipe on its own pairs."""
    table = adapters("adapters_scenes", {"conv": "`conv`", "lowrank": "`lowrank`"})
    rows = [(row[0], row[1], row[2], row[3], *row[5:8]) for row in table.rows]
    baseline = read("adapters_scenes")["runs"]["conv"]["0"]["baselines"]["mean_target"]["cosine_accept_rate"]["0.80"]
    split = read("reference_job")["splits"]["sequence"]
    job = split["evaluate"]["result"]
    lifts = [points(number) for number in (job["lift"], *job["interval95"]["lift"])]
    parameters = f"{split['train']['result']['parameters']:,}"
    rows.append(("mean target, a constant", "0", "–", percent(baseline), "0.0", "–", "–"))
    rows.append(
        (
            f"`lightweight`, on {job['pairs']:,} other pairs",
            parameters,
            "1",
            percent(job["cosine_accept_rate"]["0.80"]),
            *lifts,
        )
    )
    columns = ("adapter", "parameters", "seeds", "accepted, θ 0.80", "lift, points", "95 % from", "to")
    return Table(columns, rows, ["adapters_scenes", "reference_job"])


def system_table() -> Table:
    drawn = "runs/middle_1_worker/million_events_drawn_per_s_per_core/median"

    return facts(
        ("`train`: a step against a plain PyTorch loop", "train_step", "ratio", "{:.2f} times", "1.05"),
        (
            "`train`: two workers against one with both cores",
            "parallelism",
            "cells/2 workers, feature/speed_of_one",
            "{:.2f} times",
            "1.0",
        ),
        ("`prepare dsec`: events drawn a core", "prepare_dsec", drawn, "{:.1f} million/s", "15 million/s"),
        ("10 kills of a sweep: trials run twice", "tune_chaos", "trials_run_to_the_end_twice", "{}", "0"),
    )


def quickstart_table() -> Table:
    """Table that `make quickstart` ends with."""
    result = read("quickstart")
    scores = {f"`{name}`": baseline for name, baseline in result["baselines"].items()}
    scores["**adapter**"] = result
    rows = [
        (name, f"{score['cos_sim_mean']:.3f}", *(percent(score["cosine_accept_rate"][theta]) for theta in SHOWN))
        for name, score in scores.items()
    ]
    rows.append(("**lift, points**", "", *(points(result["lift_by_theta"][theta]) for theta in SHOWN)))
    return Table(("", "mean cos_sim", *(f"θ {theta}" for theta in SHOWN)), rows, ["quickstart"])


def drafters_table() -> Table:
    table = drafters()
    rows = [(row[0], row[1], row[4], row[7]) for row in table.rows if row[0].strip("`") in DRAFTERS]
    return Table(("drafter", "tokens per target pass", "match rate", "speed-up at most"), rows, ["replay"])


TABLES: dict[str, Callable[[], Table]] = {
    "readme-adapters": adapters_table,
    "readme-drafters": drafters_table,
    "readme-quickstart": quickstart_table,
    "readme-system": system_table,
}
