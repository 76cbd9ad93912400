"""Tables of docs/results/data.md."""

from collections.abc import Callable
from typing import Any

from benchmarks.results_tables import Table, facts, percent, read


def total(how: str, key: str) -> Callable[[dict[str, Any]], int]:
    """Sum over the kinds of file. Of the event log cuts are not counted: a cut last line counts as never written."""
    return lambda result: sum(file[how][key] for file in result["files"].values() if "left_out" not in file[how])


def worst(kind: str, key: str = "largest_error") -> Callable[[dict[str, Any]], float]:
    """Largest error over the grey levels."""
    return lambda result: max(level[key] for level in result[kind])


def scene_facts() -> Table:
    splits = "mean_target_accept_rate_other_splits"
    drawn = "runs/middle_1_worker/million_events_drawn_per_s_per_core/median"
    return facts(
        ("mean cos_sim before", "scene_statistics", "cos_sim_mean", "{:.3f}", "0.60 to 0.70"),
        ("· standard deviation", "scene_statistics", "cos_sim_std", "{:.3f}", "0.08 to 0.12"),
        ("`mean_target` accepts at θ 0.80", "scene_statistics", "mean_target_accept_rate", percent, "30 to 70 %"),
        ("· lowest of nineteen other splits", "scene_statistics", lambda r: min(r[splits]), percent, ""),
        ("· highest of them", "scene_statistics", lambda r: max(r[splits]), percent, ""),
        ("events in 50 ms, median", "scene_statistics", "events_median", "{:,}", "165,000 to 1,550,000"),
        ("active pixels, median", "scene_statistics", "active_share_median", percent, "10 to 30 %"),
        ("positive events, mean", "scene_statistics", "positive_share_mean", percent, "50 to 65 %"),
        ("core-seconds a pair", "scene_statistics", "core_seconds_per_pair_total", "{:.3f} s", ""),
        ("store of 5,208 pairs", "reference_job", lambda r: r["prepare"]["seconds"] / 60, "{:.1f} min", "45 min"),
        ("· peak memory of a worker", "reference_job", "prepare/peak_mib/worker_rss", "{:.0f} MiB", "3 GiB"),
        ("events of a real 50 ms window drawn", "render_events", "vectorised_ms", "{:.2f} ms", ""),
        ("· by EventGPT's loop", "render_events", "loop_ms", "{:.0f} ms", ""),
        ("· ratio", "render_events", "ratio", "{:.0f}", "100"),
        ("shot noise against its formula, largest error", "simulator_noise", worst("shot_noise_5hz"), percent, "3 %"),
        ("leak against its formula, largest error", "simulator_noise", worst("leak_5hz"), percent, "1 %"),
        ("`prepare dsec`, events drawn a core", "prepare_dsec", drawn, "{:.1f} million/s", "15 million/s"),
    )


def dsec() -> Table:
    runs = read("prepare_dsec")["runs"]
    rows = [
        (
            f"`{run['flags'].replace('--pick', '--pairs-per-window')}`",
            str(run["workers"]),
            f"{run['million_events_drawn_per_s_per_core']['median']:.1f}",
            f"{run['million_events_covered_per_s_per_core']['median']:.1f}",
            f"{run['worker_peak_mib']['median']:.0f}",
            f"{run['seconds']['median']:.1f}",
        )
        for name, run in runs.items()
        if not name.startswith("of_four")
    ]
    columns = (
        "flags",
        "workers",
        "million events drawn/s a core",
        "covered/s a core",
        "peak MiB a worker",
        "seconds",
    )
    return Table(columns, rows, ["prepare_dsec"])


def dsec_facts() -> Table:
    loop = "against_the_loop"
    return facts(
        (
            "against the loop, without frames on either side",
            "prepare_dsec",
            f"{loop}/ratio_events_side/median",
            "{:.0f}",
            "",
        ),
        ("against the loop, our frame included", "prepare_dsec", f"{loop}/ratio_whole_pair/median", "{:.0f}", "100"),
        ("against the loop, drawing alone", "prepare_dsec", f"{loop}/ratio_drawing_alone/median", "{:.0f}", ""),
        ("four durations in one command", "prepare_dsec", "four_durations/together_s", "{:.1f} s", ""),
        ("· one after the other", "prepare_dsec", "four_durations/one_by_one_s", "{:.1f} s", ""),
        (
            "decompress and check, an event",
            "prepare_dsec",
            "floor/decompress_and_check_ns_per_event/median",
            "{:.1f} ns",
            "",
        ),
        ("draw, an event", "prepare_dsec", "floor/draw_ns_per_event/median", "{:.1f} ns", ""),
        ("decode a PNG frame", "prepare_dsec", "floor/decode_png_ms_per_frame/median", "{:.0f} ms", ""),
        ("align a frame", "prepare_dsec", "floor/align_ms_per_frame/median", "{:.0f} ms", ""),
    )


def encoder_facts() -> Table:
    def equal(result: dict[str, Any]) -> str:
        return "equal" if result["bytes"]["equal"] else "not equal"

    return facts(
        ("pairs encoded by MobileNetV2 on both sides", "encoders", "mobilenet_v2/pairs", "{:,}", ""),
        ("· processor time, one thread", "encoders", "mobilenet_v2/cpu_seconds", "{:.1f} s", "≤ 60 s"),
        ("· share of the forward passes in it", "encoders", "mobilenet_v2/forward_fraction", percent, "≥ 80 %"),
        ("· the store", "encoders", "mobilenet_v2/store_mb", "{:.1f} MB", "≤ 50 MB"),
        ("· the same pairs as pixels", "encoders", "mobilenet_v2/pixels_mb", "{:.0f} MB", ""),
        ("stores of 1, 2 and 4 workers, and of 2 that are killed", "encoders", equal, "{}", "equal"),
        ("· kills", "encoders", "bytes/kills", "{}", "10"),
        (
            "video tower of a checkpoint",
            "encoders",
            lambda r: r["video_tower"]["tower_bytes"] / 1e6,
            "{:,.0f} MB",
            "",
        ),
        ("· bytes read, times its own", "encoders", "video_tower/read_ratio", "{:.2f}", "≤ 1.2"),
        ("· peak memory, times its bytes", "encoders", "video_tower/peak_ratio", "{:.2f}", "≤ 1.5"),
    )


def damage_facts() -> Table:
    return facts(
        ("single-bit flips tried", "corruption", total("flips", "tried"), "{:,}", ""),
        ("· found before use, file named", "corruption", total("flips", "named"), "{:,}", "all"),
        ("truncations tried", "corruption", total("cuts", "tried"), "{:,}", ""),
        ("· found before use, file named", "corruption", total("cuts", "named"), "{:,}", "all"),
    )


def name_of(path: str, counts: dict[str, Any]) -> str:
    """Name of a file today; two of them had another when the result was made."""
    name = path.split("/")[-1]
    return "events.jsonl" if "left_out" in counts["cuts"] else name.replace("quarantine", "rejected")


def damage() -> Table:
    """Bit flips and truncations by file."""
    files = read("corruption")["files"]
    rows = [
        (
            f"`{name_of(name, files[name])}` of a {name.split('/')[0]}",
            *(str(files[name][how][key]) for how in ("flips", "cuts") for key in ("tried", "found", "plain_noticed")),
        )
        for name in files
    ]
    columns = ("file", "flips", "found", "by a plain reader", "cuts", "found", "by a plain reader")
    return Table(columns, rows, ["corruption"])


def fuzz_readers() -> Table:
    """Spoiled files by kind, and the bounds that reading them has kept."""
    rows = [
        (
            kind,
            f"{found['examples']:,}",
            f"{found['outcomes'].get('refused', 0):,}",
            str(found["deaths"]),
            str(found["num_findings"]),
            f"{found['most_seconds_for_a_megabyte']:.2f}",
            f"{max(found['most_mib_beyond_four_times_the_file'], 0.0):.1f}",
        )
        for kind, found in read("fuzz_readers")["kinds"].items()
    ]
    columns = ("kind", "files", "refused", "processes that died", "findings", "most s/MB", "most MiB beyond 4 x file")
    return Table(columns, rows, ["fuzz_readers"])


def mutant_facts() -> Table:
    return facts(
        ("small wrong changes to the code", "mutants", "mutants", "{:,}", ""),
        ("· noticed by the tests of their file", "mutants", "noticed_share", percent, "95 %"),
    )


TABLES: dict[str, Callable[[], Table]] = {
    "data": scene_facts,
    "dsec": dsec,
    "dsec-facts": dsec_facts,
    "encoders": encoder_facts,
    "damage": damage_facts,
    "damage-by-file": damage,
    "fuzz-readers": fuzz_readers,
    "mutants": mutant_facts,
}
