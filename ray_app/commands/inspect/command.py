"""`ray-app inspect`: verify a pair store, describe it, and look for leaks between its parts or with another store.

Ray Data reads every file once (scan.py); everything else is computed from the measures it keeps of each pair.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ray_app.cluster.connection import cluster
from ray_app.commands.inspect.contact_sheet import write_contact_sheet
from ray_app.commands.inspect.leaks import MEASURE, LeakComparison, find_leaks, joined_index, leaks_of_split
from ray_app.commands.inspect.page import inspect_page, leaks_headline, statistics_lines
from ray_app.commands.inspect.scan import StoreScan, is_picture, scan_store
from ray_app.commands.inspect.statistics import NIGHT_RULE, sequence_statistics, window_statistics
from ray_app.config.prepare import InspectConfig
from ray_app.core.metrics import AlignmentCounts
from ray_app.reports.html import require_suffix, write_output
from ray_app.store.manifest import REJECTED
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs


def run_inspect(cfg: InspectConfig) -> dict[str, Any]:
    """Read and verify every file once. StoreError names the first that is damaged.

    With `durations`, all numbers are of the pairs with these window lengths; the other store is taken whole.
    """
    require_suffix("--picture", cfg.picture, ".png")
    require_suffix("--html", cfg.html, ".html")
    store = PairStore.open(cfg.store, cfg.durations)
    other = PairStore.open(cfg.against) if cfg.against else None
    if cfg.picture:
        write_contact_sheet(store, cfg.picture)
    with cluster(cfg.address):
        scans = [scan_store(one) for one in (store, other) if one]
    split = split_pairs(store.index, cfg.split_config)
    leaks = [LeakComparison(leak, store.index, (store,)) for leak in leaks_of_split(store.index, scans[0], split)]
    if other:
        leaks.append(leaks_between(store, other, scans))
    result = {
        **describe_store(store),
        "store": str(cfg.store),
        "verified": True,
        "split": {
            "by": split.by,
            "train": len(split.train),
            "val": len(split.val),
            "test": len(split.test),
            "test_windows_overlapping_train": split.test_windows_overlapping_train,
            "label": split.label,
        },
        "before": cosine_before(scans[0]),
        "windows": window_statistics(store.index, scans[0]),
        "by_sequence": sequence_statistics(store.index, scans[0]),
        "night_rule": NIGHT_RULE,
        "against": describe_store(other) if other else None,
        "leaks": [comparison.leaks.as_json(comparison.index) for comparison in leaks],
        "leak_rule": MEASURE,
        "picture": str(cfg.picture) if cfg.picture else None,
        "html": str(cfg.html) if cfg.html else None,
    }
    result["warnings"] = list(inspect_warnings(result, store))
    if cfg.html:
        write_output("--html", cfg.html, inspect_page(result, store.index, scans[0], leaks).encode())
    return result


def describe_store(store: PairStore) -> dict[str, Any]:
    """Identity and contents of a store, as JSON values."""
    manifest = store.manifest
    names, counts = np.unique(store.index.duration, return_counts=True)
    return {
        "store": str(store.folder),
        "pairs": len(store.index),
        "sequences": len(np.unique(store.index.sequence)),
        "rejected": manifest.rejected,
        "fingerprint": manifest.fingerprint,
        "durations": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "source": manifest.source,
        "features": manifest.features.model_dump(mode="json"),
        "files": len(manifest.files),
        "bytes": sum(file.bytes for file in manifest.files),
    }


def cosine_before(scan: StoreScan) -> dict[str, float | None]:
    """Mean and standard deviation of the raw cosines; None if the two features differ in width."""
    if np.isnan(scan.cosine).any():
        return {"cos_sim_mean": None, "cos_sim_std": None}
    means = AlignmentCounts.of(scan.cosine).means()
    return {name: means[name] for name in ("cos_sim_mean", "cos_sim_std")}


def leaks_between(store: PairStore, other: PairStore, scans: Sequence[StoreScan]) -> LeakComparison:
    """Compare all windows of the store with all of the other."""
    index = joined_index([store, other])
    rows = np.arange(len(index))
    own, others = rows[: len(store.index)], rows[len(store.index) :]
    leaks = find_leaks(index, StoreScan.joined(list(scans)), ("store", own), ("other", others))
    return LeakComparison(leaks, index, (store, other))


def inspect_warnings(result: dict[str, Any], store: PairStore) -> Iterator[str]:
    """Sentences about numbers that are missing or left out."""
    windows = result["windows"]
    for name, what in (("events_drawn", "event counts"), ("frame_minus_window_centre_ms", "times of frames")):
        if windows[name] is None:
            yield f"no {what}: the source does not know them, or an older version prepared the store"
    if windows["events_drawn"] and not windows["events_per_window"]:
        yield "events of whole windows are unknown: only the part that is drawn was simulated or read"
    sides = [side for side in ("event", "target") if not is_picture(store.feature(side))]
    if sides:
        yield f"no brightness and no near-duplicates of {' and '.join(sides)}: these features are not pictures"
    elif windows["active_share_of_drawn_image"] is None:
        yield "no active pixels: the event pictures are not white with red and blue, as EventGPT draws"
    for side, count in windows["blank"].items():
        if count:
            yield f"{count:,} {side} features are blank (all numbers the same) and not compared"


def render_inspect(result: dict[str, Any], console: Console) -> None:
    """Print the description, the table of leaks and the warnings."""
    source, split, before = result["source"], result["split"], result["before"]
    lost = f" (reasons in {REJECTED})" if result["rejected"] else ""
    lengths = ", ".join(f"{count:,} of {name}" for name, count in result["durations"].items())
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("store", result["store"])
    table.add_row("source", f"{source['name']}, events {source['events']}")
    table.add_row("pairs", f"{result['pairs']:,}; windows: {lengths}")
    table.add_row("sequences", f"{result['sequences']:,}{daytimes(result['by_sequence'])}")
    table.add_row("rejected", f"{result['rejected']:,}{lost}")
    for side, spec in result["features"].items():
        shape = " × ".join(map(str, spec["shape"]))
        table.add_row(side, f"{shape} {spec['dtype']}, times {spec['scale']:.6g}")
    table.add_row("size", f"{result['bytes'] / 1e6:,.1f} MB in {result['files']:,} files")
    table.add_row("checksums", "all match")
    for name, text in statistics_lines(result["windows"]):
        table.add_row(name, text)
    table.add_row(
        "split", f"train {split['train']:,}, val {split['val']:,}, test {split['test']:,}: {split['label']}"
    )
    if before["cos_sim_mean"] is None:
        table.add_row("cos_sim before", "not defined: the two features differ in width")
    else:
        table.add_row("cos_sim before", f"{before['cos_sim_mean']:.4f} ± {before['cos_sim_std']:.4f}")
    table.add_row("fingerprint", result["fingerprint"])
    if result["against"]:
        table.add_row("other", f"{result['against']['store']}, {result['against']['pairs']:,} pairs")
    for name in ("picture", "html"):
        if result[name]:
            table.add_row(name, result[name])
    console.print(table)
    console.print(leaks_table(result["leaks"]))
    for note in (*result["warnings"], result["leak_rule"], result["night_rule"]):
        console.print(f"- {note}", style="dim")


def daytimes(sequences: list[dict[str, Any]]) -> str:
    """Number of sequences by day and by night, in words; empty if unknown."""
    count = Counter(line["daytime"] for line in sequences if line["daytime"])
    return ": " + ", ".join(f"{count[name]:,} by {name}" for name in ("day", "night")) if count else ""


def leaks_table(leaks: list[dict[str, Any]]) -> Table:
    """A row for each comparison: how many windows of the first set are in the second too, by kind."""
    leaking = sum(leak["any"] for leak in leaks)
    table = Table(title=leaks_headline(leaks), title_justify="left", title_style="bold red" if leaking else "bold")
    table.add_column("compared", no_wrap=True)
    for head in ("windows", "same\nevent", "same\ntarget", "near\nevent", "near\ntarget", "over-\nlap", "any"):
        table.add_column(head, justify="right")
    for leak in leaks:
        counts = (*leak["identical"].values(), *leak["near"].values(), leak["overlapping"], leak["any"])
        table.add_row(
            f"{leak['part']} in {leak['against']}", f"{leak['windows']:,}", *(f"{count:,}" for count in counts)
        )
    return table
