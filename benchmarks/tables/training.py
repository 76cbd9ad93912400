"""Tables of docs/results/training.md."""

from collections.abc import Callable

from benchmarks.results_tables import Table, facts, percent, points, read

BASELINES = ("before", "white", "mean_target", "shuffled", "previous_window")


def step_facts() -> Table:
    job = "splits/sequence/train/result"
    return facts(
        ("step, `ray-app train`, one worker", "train_step", "lower_quartile_ms/ours", "{:.0f} ms", ""),
        ("· plain PyTorch loop", "train_step", "lower_quartile_ms/plain", "{:.0f} ms", ""),
        ("· ratio", "train_step", "ratio", "{:.2f}", "1.05"),
        ("· ratio in one process without Ray", "train_step", "ratio_in_one_process_without_ray", "{:.2f}", ""),
        ("from the command to the first step", "train_start", "train_median_s", "{:.0f} s", "12 s"),
        ("· of the shortest program with Ray Train", "train_start", "short_program_s/first_step", "{:.0f} s", ""),
        (
            "waiting for data after the first epoch",
            "train_step",
            "data_wait_fraction_after_first_epoch/0",
            percent,
            "3 %",
        ),
        ("cost of safe checkpoints in 3 epochs", "save_cost", "share_of_three_epoch_run", percent, "5 %"),
        ("· more than a bare write, a save", "save_cost", "extra_s", "{:.1f} s", ""),
        (
            "on an H200, `train --use-gpu`: a step",
            "reference_job_gpu",
            f"{job}/step_seconds",
            lambda s: f"{1e3 * s:.1f} ms",
            "",
        ),
        ("· pairs/s", "reference_job_gpu", f"{job}/pairs_per_second", "{:,.0f}", ""),
        ("· share of it waiting for pairs", "reference_job_gpu", f"{job}/data_wait_fraction", percent, ""),
        (
            "· the command, of it saving checkpoints",
            "reference_job_gpu",
            lambda r: ", ".join(
                f"{seconds:.0f} s"
                for train in (r["splits"]["sequence"]["train"],)
                for seconds in (train["seconds"], train["result"]["save_seconds"])
            ),
            "{}",
            "",
        ),
    )


def gpu_facts() -> Table:
    return facts(
        ("forward and cosine, compiled, pairs/s", "gpu_adapter", "pairs_per_s/compiled", "{:,.0f}", "1,000,000"),
        (
            "· as it is, bound by arithmetic",
            "gpu_adapter",
            lambda r: f"{r['pairs_per_s']['eager']:,.0f}; {r['floors']['pairs_per_s_by_operations']:,.0f}",
            "{}",
            "",
        ),
        ("3 epochs of 4,166 pairs", "gpu_adapter", "training/seconds", "{:.2f} s", "3 s"),
        ("· bound by bytes", "gpu_adapter", "floors/training_s_by_bytes", "{:.2f} s", ""),
    )


def reference_job() -> Table:
    splits = read("reference_job")["splits"]
    test = {by: split["evaluate"]["result"] for by, split in splits.items()}
    train = {by: split["train"]["result"] for by, split in splits.items()}
    memory = {by: split["train"]["peak_mib"] for by, split in splits.items()}

    def row(what: str, number: Callable[[str], str]) -> tuple[str, str, str]:
        return what, number("sequence"), number("window")

    def accepted(by: str, name: str) -> str:
        return percent(test[by]["baselines"][name]["cosine_accept_rate"]["0.80"])

    rows = [
        row("test pairs", lambda by: f"{test[by]['pairs']:,}"),
        row(
            "test windows that overlap a training window",
            lambda by: percent(splits[by]["inspect"]["test_windows_overlapping_train"]),
        ),
        row(
            "mean cos_sim before, of the adapter",
            lambda by: f"{test[by]['baselines']['before']['cos_sim_mean']:.3f}, {test[by]['cos_sim_mean']:.3f}",
        ),
        *(row(f"accepted at θ 0.80: `{name}`", lambda by, name=name: accepted(by, name)) for name in BASELINES),
        row("accepted at θ 0.80: adapter", lambda by: percent(test[by]["cosine_accept_rate"]["0.80"])),
        row("lift, points", lambda by: points(test[by]["lift"])),
        row("· 95 %", lambda by: " to ".join(points(end) for end in test[by]["interval95"]["lift"][:2])),
        row("centred cosine", lambda by: f"{test[by]['centered_cos_sim_mean']:.3f}"),
        row("R@1", lambda by: percent(test[by]["retrieval"]["R@1"])),
        row("training, a step", lambda by: f"{train[by]['seconds']:.0f} s, {train[by]['step_seconds']:.2f} s"),
        row(
            "peak memory of the worker, of all processes",
            lambda by: ", ".join(f"{memory[by][f'{who}_private'] / 1024:.1f} GiB" for who in ("worker", "all")),
        ),
    ]
    return Table(("", "split by sequence", "split by window"), rows, ["reference_job"])


def scaling() -> Table:
    result = read("scaling")
    rows = [
        (
            f"{count} raylets",
            f"{run['prepare_pairs_per_s']:.2f}",
            *(f"{1e3 * run[f'step_s_{size}']:.0f}" for size in ("small", "large")),
            *(
                f"{1e3 * result['parts_and_model'][size]['steps'][count][f'of_it_{part}_s']:.0f}"
                for size in ("small", "large")
                for part in ("computing", "all_reduce", "waiting")
            ),
        )
        for count, run in result["by_workers"].items()
    ]
    parts = ("computing", "all-reduce", "waiting")
    columns = ("", "prepare, pairs/s", "step, 4.8 M parameters, ms", "step, 19.3 M, ms")
    return Table(
        (*columns, *(f"{part}, 4.8 M" for part in parts), *(f"{part}, 19.3 M" for part in parts)), rows, ["scaling"]
    )


def parallelism() -> Table:
    result = read("parallelism")
    rows = [
        (
            name,
            f"{1e3 * cell['step_s']:.0f}",
            f"{cell['speed_of_one']:.2f}",
            f"{cell['bytes_sent_by_a_worker_a_step'] / 1e6:,.2f}" if "workers" in name else "–",
            f"{max(cell['peak_gib']):.1f}",
            f"{max(cell['peak_gib_with_save']):.1f}",
            f"{cell['save_s']:.1f}",
            f"{cell['largest_relative_loss_difference']:.0e}",
        )
        for name, cell in result["cells"].items()
    ]
    columns = ("", "a step, ms", "speed", "sent by a worker a step, MB", "peak memory, GiB", "· with a save")
    return Table((*columns, "a save, s", "loss differs by"), rows, ["parallelism"])


def memory() -> Table:
    keys = ("worker_gib", "worker_gib_until_first_step", "driver_gib", "spilled_gib")
    rows = [
        (
            name,
            "ends" if not run["exit_code"] else "refused" if not run["kills_by_the_kernel"] else "killed",
            f"{run['steps']:,}",
            *(f"{run[key]:.2f}" if run[key] else "–" for key in keys),
        )
        for name, run in read("larger_than_memory")["runs"].items()
    ]
    columns = ("", "run", "steps", "worker, GiB", "· until its first step", "driver, GiB", "spilled by Ray, GiB")
    return Table(columns, rows, ["larger_than_memory"])


def gpus() -> Table:
    """Arithmetic for GPUs, from assumed numbers, by pairs and by features."""
    result = read("parallelism")
    one = result["gpus"]["1"]["by_pairs"]["pairs_per_s"]
    rows = [
        (
            number,
            *(f"{each[way]['step_ms']:.1f}" for way in ("by_pairs", "by_features")),
            *(f"{each[way]['pairs_per_s'] / one:.1f}" for way in ("by_pairs", "by_features")),
        )
        for number, each in result["gpus"].items()
    ]
    columns = ("GPUs", "a step by pairs, ms", "by features, ms", "times one GPU, by pairs", "by features")
    return Table(columns, rows, ["parallelism"], named=False)


def failure_facts() -> Table:
    return facts(
        ("processes of a training killed", "chaos", "kills", "{}", ""),
        (
            "· runs with the undisturbed run's weights",
            "chaos",
            lambda r: f"{sum(run['equal'] for run in r['runs'])} of {len(r['runs'])}",
            "{}",
            "all",
        ),
        (
            "· steps lost or logged twice, pairs lost or seen twice",
            "chaos",
            lambda r: f"{r['steps_lost_or_logged_twice']:.0f}, {r['pairs_lost_or_seen_twice']:.0f}",
            "{}",
            "0",
        ),
        ("nodes killed under `prepare`", "node_kills_prepare", "nodes_killed", "{}", ""),
        ("· pairs lost", "node_kills_prepare", "pairs_lost", "{}", "0"),
        (
            "· to the next finished file: median, worst",
            "node_kills_prepare",
            lambda r: f"{r['median_s']:.0f} s, {r['worst_s']:.0f} s",
            "{}",
            "",
        ),
        (
            "MLflow away: points of a run, missing after `sync`",
            "tracking_outage",
            lambda r: f"{sum(r['rounds'][0]['points']):,}; {r['missing_after_sync']}",
            "{}",
            "0",
        ),
        (
            "· step time, server cut off for 60 s, never there",
            "tracking_outage",
            lambda r: f"{r['ratio_cut']:.2f}, {r['ratio_never']:.2f} times",
            "{}",
            "1.01",
        ),
        ("· a line of the event log", "tracking_outage", "event_log_line_us", "{:.0f} µs", ""),
        ("PostgreSQL killed: points missing after `sync`", "tracking_postgres", "path/missing_after_sync", "{}", "0"),
        ("`submit -- train`: code sent", "submit_time", "uploaded_mib", "{:.1f} MiB", "5 MiB"),
        (
            "· a first job, a later job to its first step",
            "submit_time",
            lambda r: ", ".join(f"{job['seconds_to_first_step_done']:.0f} s" for job in (r["cold"], r["warm"][0])),
            "{}",
            "",
        ),
        ("· of the first until its command runs", "submit_time", "cold/seconds_to_driver", "{:.0f} s", ""),
    )


def links() -> Table:
    rows = [
        (
            f"`{command}`",
            f"{cut['cut_s']:.0f} s",
            str(cut["progress_meanwhile"]),
            f"{cut['seconds_from_repair_to_progress']:.0f} s",
            "yes" if cut.get("weights_equal", cut.get("files_equal")) else "no",
        )
        for command, cuts in read("link_cuts")["cuts"].items()
        for cut in cuts
    ]
    columns = (
        "command",
        "link cut for",
        "files or steps meanwhile",
        "from repair to progress",
        "equal bytes at the end",
    )
    return Table(columns, rows, ["link_cuts"])


TABLES: dict[str, Callable[[], Table]] = {
    "step": step_facts,
    "gpu": gpu_facts,
    "reference-job": reference_job,
    "scaling": scaling,
    "parallelism": parallelism,
    "memory": memory,
    "gpus": gpus,
    "failures": failure_facts,
    "links": links,
}
