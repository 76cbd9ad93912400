"""Table of docs/results/sweeps.md."""

from collections.abc import Callable

from benchmarks.results_tables import Table, facts, percent


def tune_facts() -> Table:
    orders = "other_orders/mean_cosine_between_equals"
    return facts(
        (
            "a trial, submitted to first step, median of 20",
            "tune_overhead",
            "own_process/median_s",
            "{:.2f} s",
            "3 s",
        ),
        ("· the first trial", "tune_overhead", "own_process/first_s", "{:.1f} s", ""),
        (
            "· a `TorchTrainer` in each, median of 5",
            "tune_overhead",
            "torch_trainer_in_each/median_s",
            "{:.1f} s",
            "",
        ),
        ("memory for pairs, 4 trials against 1", "tune_memory", "ratio", "{:.2f} times", "1.1"),
        ("ASHA: share of all steps", "tune_asha", "share_of_steps", percent, "40 %"),
        ("· objective lost", "tune_asha", "objective_lost_points", "{:.1f} points", "0.5"),
        ("· share of steps, mean of 500 other orders", "tune_asha", f"{orders}/share_mean", percent, ""),
        ("· orders that stay within 40 %", "tune_asha", f"{orders}/at_most_40_percent", percent, ""),
        ("a sweep killed at random moments: kills", "tune_chaos", "kills", "{}", ""),
        ("· trials run to their end twice", "tune_chaos", "trials_run_to_the_end_twice", "{}", "0"),
        ("nodes killed under a sweep", "node_kills_tune", "nodes_killed", "{}", ""),
        ("· sweeps that ended wrong", "node_kills_tune", "jobs_that_ended_wrong", "{}", "0"),
        ("· until the lost trial had started again, median", "node_kills_tune", "median_s", "{:.0f} s", ""),
    )


TABLES: dict[str, Callable[[], Table]] = {
    "tune": tune_facts,
}
