"""`ray-app compare` of checkpoints: all on the same test pairs; JSON and one page."""

import sys
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as TerminalTable

from ray_app.cluster.connection import cluster
from ray_app.commands.evaluate.command import as_image, as_json, settings
from ray_app.commands.evaluate.context import EvaluationContext
from ray_app.commands.evaluate.evaluator import EvaluatorHandle
from ray_app.commands.evaluate.report import data_warnings, next_section, outcome, print_warnings, verdict_sentence
from ray_app.config.evaluate import CompareConfig
from ray_app.core.adapters.registry import num_parameters
from ray_app.core.evaluation import BASELINES
from ray_app.core.metrics import THETA, rate_key
from ray_app.listing import data_in
from ray_app.reports.figures import INK, PALETTE, is_narrow, log_scale, svg
from ray_app.reports.folder import COMPARISON_FILES, claim_report_folder
from ray_app.reports.html import Figure, Pictures, Row, Section, Table, page, picture
from ray_app.store.atomic import write_file
from ray_app.store.checkpoint import Checkpoint, load_checkpoint
from ray_app.store.pair_store import PairStore
from ray_app.store.provenance import provenance
from ray_app.tracking.model_registry import checkpoint_folder

NUM_EXAMPLE_PAIRS = 4
"""Test pairs, of different sequences where there are enough, that are drawn as every adapter aligns them."""
KEY, HIGH = rate_key(THETA), "0.90"


@dataclass(frozen=True, slots=True)
class CandidateResult:
    """One checkpoint of a comparison."""

    name: str
    """The argument that named it."""
    result: dict[str, Any]
    """Metrics on the test part, size and latency."""
    aligned_PD: NDArray[np.float32]
    """Outputs on the pairs that are drawn, shape (P, D)."""


def compare_checkpoints(cfg: CompareConfig) -> dict[str, Any]:
    """Evaluate the checkpoints one after the other. StoreError, CheckpointError, RegistryError: as of `evaluate`."""
    claim_report_folder(cfg.out, COMPARISON_FILES)
    context = EvaluationContext.open(cfg, cfg.needed_store)
    store, test = context.store, context.split.test
    record = provenance(sys.argv, store.fingerprint, config=settings(cfg))
    drawn = test[pictured(store.index.sequence[test])] if has_images(store) else test[:0]
    event_PE, target_PD = store.read_rows(drawn)
    candidates = []
    with cluster(cfg.address):
        mean_target_D = context.mean_target()
        for name in cfg.checkpoints:
            with checkpoint_folder(name, cfg) as folder:
                checkpoint = load_checkpoint(folder)
                with closing(context.evaluator(checkpoint, mean_target_D)) as evaluator:
                    candidates.append(evaluate_candidate(name, checkpoint, evaluator, context, event_PE))
    adapters = labelled(candidates)
    best = max(candidates, key=lambda candidate: candidate.result["lift"])
    result = {
        "verdict": verdict_sentence(best.result).replace("The adapter", label_of(adapters, best), 1),
        "adapters": {label: candidate.result for label, candidate in adapters.items()},
        "baselines": {
            name: best.result["baselines"][name] for name in best.result["baselines"] if name != "shuffled"
        },
        "provenance": record,
    }
    drawings = pictures(store, drawn, event_PE, target_PD, adapters)
    contents = as_json(result), comparison_page(result, best, drawings).encode()
    files = dict(zip(COMPARISON_FILES[:2], contents, strict=True))
    cfg.out.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        write_file(cfg.out / file, data)
    return {**result, "files": [str(cfg.out / file) for file in files]}


def evaluate_candidate(
    name: str, checkpoint: Checkpoint, evaluator: EvaluatorHandle, context: EvaluationContext, event_PE: NDArray[Any]
) -> CandidateResult:
    """Metrics, size and latency of one checkpoint, with its answers on the pairs that are drawn."""
    label = f"test pairs, {checkpoint.config.strategy}"
    evaluation = evaluator.evaluate(context.split.test, context.batch_size, label)
    size = {
        "checkpoint": name,
        "strategy": checkpoint.config.strategy,
        "parameters": num_parameters(checkpoint.adapter),
        "checkpoint_bytes": sum(file.stat().st_size for file in data_in(checkpoint.folder)),
        "latency_ms": evaluator.latency_ms(),
    }
    aligned_PD = evaluator.align(event_PE) if len(event_PE) else np.zeros((0, 1), np.float32)
    return CandidateResult(name, {**context.result(evaluation, checkpoint), **size}, aligned_PD)


def labelled(candidates: list[CandidateResult]) -> dict[str, CandidateResult]:
    """Candidates by strategy; by folder too where a strategy comes twice."""
    count = Counter(candidate.result["strategy"] for candidate in candidates)
    labels: dict[str, CandidateResult] = {}
    for candidate in candidates:
        strategy = candidate.result["strategy"]
        label = strategy if count[strategy] == 1 else f"{strategy} ({Path(candidate.name).name})"
        labels[label if label not in labels else f"{label} {len(labels) + 1}"] = candidate
    return labels


def label_of(adapters: dict[str, CandidateResult], wanted: CandidateResult) -> str:
    """Label of a candidate in the table."""
    return next(label for label, candidate in adapters.items() if candidate is wanted)


def has_images(store: PairStore) -> bool:
    """True if both features can be drawn."""
    return all(spec.kind == "images" and spec.shape[0] == 3 for spec in map(store.feature, ("event", "target")))


def pictured(sequences: NDArray[np.str_]) -> NDArray[np.int64]:
    """Positions of the pairs that are drawn: the middle one of sequences spread over all."""
    names = np.unique(sequences)
    chosen = names[np.linspace(0, len(names) - 1, min(NUM_EXAMPLE_PAIRS, len(names))).astype(int)]
    places = [np.flatnonzero(sequences == name) for name in chosen]
    if len(names) < NUM_EXAMPLE_PAIRS:  # one drive: spread over its windows
        return np.linspace(0, len(sequences) - 1, min(NUM_EXAMPLE_PAIRS, len(sequences))).astype(int)
    return np.array([of_one[len(of_one) // 2] for of_one in places])


def pictures(
    store: PairStore,
    rows: NDArray[np.int64],
    event_PE: NDArray[Any],
    target_PD: NDArray[Any],
    adapters: dict[str, CandidateResult],
) -> list[Pictures]:
    """Each drawn pair for the page: event, target, and each adapter's output."""
    event, target = store.feature("event"), store.feature("target")
    drawn = []
    for n, row in enumerate(rows):
        where = f"{store.index.sequence[row]} at {store.index.t_start_us[row] / 1e6:.3f} s"
        sides = {
            "event image": as_image(event_PE[n] * event.scale, event),
            "target": as_image(target_PD[n] * target.scale, target),
        }
        target_D = target_PD[n] * target.scale
        for label, candidate in adapters.items():
            aligned_D = candidate.aligned_PD[n]
            cos = float(aligned_D @ target_D / np.linalg.norm(aligned_D) / np.linalg.norm(target_D))
            sides[f"{label}: {cos:.3f}"] = as_image(aligned_D, target)
        shown = [picture(name, f"{name} of the pair {where}", pixels) for name, pixels in sides.items()]
        drawn.append(Pictures(shown, f"{where}; after each name the cosine with the target", columns="many"))
    return drawn


def result_rows(result: dict[str, Any]) -> list[Row]:
    """Rows of the results table: each baseline, then the adapters by falling lift."""
    rows = []
    for name, baseline in result["baselines"].items():
        rates = baseline["cosine_accept_rate"]
        kind = "baseline" if name in BASELINES else "context"
        cells = [f"{baseline['cos_sim_mean']:.4f}", f"{100 * rates[KEY]:.1f} %", f"{100 * rates[HIGH]:.1f} %"]
        rows.append(Row(name, cells + [""] * (len(COMPARISON_HEADS) - 4), kind))
    for name, metrics in rank_candidates(result):
        rates, retrieval = metrics["cosine_accept_rate"], metrics["retrieval"]
        low, high = (100 * bound for bound in metrics["interval95"]["lift"])
        cells = [
            f"{metrics['cos_sim_mean']:.4f}",
            f"{100 * rates[KEY]:.1f} %",
            f"{100 * rates[HIGH]:.1f} %",
            f"{100 * metrics['lift']:+.1f} ({low:+.1f} to {high:+.1f})",
            f"{metrics['centered_cos_sim_mean']:.3f}",
            "/".join(f"{100 * retrieval[f'R@{k}']:.1f}" for k in (1, 5, 10)),
        ]
        rows.append(Row(name, cells, "adapter"))
    return rows


def cost_rows(result: dict[str, Any]) -> list[Row]:
    """Rows of the cost table, in the same order."""
    return [
        Row(
            name,
            [
                f"{metrics['parameters']:,}",
                f"{metrics['checkpoint_bytes'] / 1e6:,.1f} MB",
                f"{metrics['latency_ms']:,.2f} ms",
            ],
        )
        for name, metrics in rank_candidates(result)
    ]


def rank_candidates(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Adapters with their names, by falling lift."""
    return sorted(result["adapters"].items(), key=lambda item: -item[1]["lift"])


COMPARISON_HEADS = ["answer", "cos_sim", f"θ {KEY}", f"θ {HIGH}", "lift, 95 % interval", "centred", "R@1/5/10, %"]
COST_HEADS = ["adapter", "parameters", "checkpoint", "one pair"]


def comparison_page(result: dict[str, Any], best: CandidateResult, drawings: list[Pictures]) -> str:
    """comparison.html."""
    named_rates = [
        f"{name} {100 * metrics['cosine_accept_rate'][KEY]:.1f} percent"
        for name, metrics in result["adapters"].items()
    ]
    solved = [name for name, metrics in rank_candidates(result) if not metrics["parameters"]]
    cost = Figure(
        cost_figure(result),
        f"Acceptance at θ {KEY} against trained parameters and against latency: {', '.join(named_rates)}.",
        "Left and high is better. Below the dashed line the best baseline does better.",
    )
    sections = [
        Section(
            "Results",
            [
                Table(
                    COMPARISON_HEADS,
                    result_rows(result),
                    "cos_sim: mean over the test pairs. θ: share of test pairs with cos_sim > θ. Lift: acceptance at "
                    f"θ {KEY} minus that of the best baseline (shuffled is each adapter's own), in percentage "
                    "points, with its bootstrap interval.",
                )
            ],
        ),
        Section(
            "What acceptance costs",
            [
                cost,
                Table(
                    COST_HEADS,
                    cost_rows(result),
                    "One pair: a forward pass on one core, or on the GPU."
                    + (
                        f" Solved, not trained: {', '.join(solved)}; the checkpoint holds the training pairs."
                        * bool(solved)
                    ),
                ),
            ],
        ),
        *([Section("The same pairs by each adapter", drawings)] if drawings else []),
        next_section({**best.result, "checkpoint": best.name}),
    ]
    return page(
        "Adapters side by side",
        result["verdict"],
        f"{best.result['pairs']:,} test pairs · split: {best.result['split']['label']}",
        data_warnings(best.result),
        sections,
        outcome(best.result),
    )


ADAPTER_MARKERS = "osD^vP*X<>"
"""One for each adapter in the figure, next to its colour."""


def cost_figure(result: dict[str, Any]) -> str:
    """Acceptance against parameters and against latency, each adapter a point, the best baseline a line."""
    baseline = max(
        result["baselines"][name]["cosine_accept_rate"][KEY] for name in result["baselines"] if name in BASELINES
    )
    adapters = rank_candidates(result)
    counts = [each["parameters"] for _, each in adapters]
    latencies = [max(each["latency_ms"], 1e-3) for _, each in adapters]
    none_trained = min(filter(None, counts), default=10) / 10  # x of a solved adapter: a log axis has no 0

    def draw(figure: Canvas) -> None:
        left, right = figure.subplots(*((2, 1) if is_narrow(figure) else (1, 2)), sharey=True)
        for n, (name, each) in enumerate(adapters):
            rate, label = each["cosine_accept_rate"][KEY], name if each["parameters"] else f"{name} (none trained)"
            look: dict[str, Any] = {
                "color": PALETTE[n % len(PALETTE)],
                "marker": ADAPTER_MARKERS[n % len(ADAPTER_MARKERS)],
                "s": 52,
            }
            left.scatter(each["parameters"] or none_trained, rate, label=label, **look)
            right.scatter(latencies[n], rate, **look)
        for axes, label in ((left, "trained parameters"), (right, "ms for one pair")):
            axes.axhline(baseline, color=INK, linewidth=1.0, linestyle="--", label="best baseline")
            axes.set(xlabel=label)
            axes.margins(y=0.15)
        left.set_ylabel(f"cosine_accept_rate at θ {KEY}")
        left.yaxis.set_major_formatter(PercentFormatter(1.0))
        log_scale(left, [parameters or none_trained for parameters in counts])
        log_scale(right, latencies)
        handles, labels = left.get_legend_handles_labels()
        columns = 1 if is_narrow(figure) else 4
        figure.legend(handles, labels, loc="outside upper left", frameon=False, ncols=columns, handletextpad=0.3)

    return svg("cost", draw, narrow_height=5.2 + 0.2 * len(adapters))


def render_checkpoints(result: dict[str, Any], console: Console) -> None:
    """Print two tables that fit a terminal, the verdict, the warnings and the files."""
    first = next(iter(result["adapters"].values()))
    title = f"{first['pairs']:,} test pairs; split: {first['split']['label']}"
    rows = result_rows(result)
    console.print(terminal_table(COMPARISON_HEADS[:6], [replace(row, cells=row.cells[:5]) for row in rows], title))
    further = {row.name: row.cells[5:] for row in rows}
    costs = [replace(row, cells=[*further[row.name], *row.cells]) for row in cost_rows(result)]
    console.print(terminal_table([COST_HEADS[0], *COMPARISON_HEADS[6:], *COST_HEADS[1:]], costs))
    console.print(result["verdict"], style="bold")
    print_warnings(data_warnings(first), console)
    for path in result["files"]:
        console.print(path, soft_wrap=True)


def terminal_table(heads: list[str], rows: list[Row], title: str | None = None) -> TerminalTable:
    """A table for the terminal: names on the left, numbers on the right."""
    table = TerminalTable(
        title=title, title_justify="left", header_style="bold", box=None, pad_edge=False, padding=(0, 1)
    )
    for n, head in enumerate(heads):
        table.add_column(head, justify="right" if n else "left", no_wrap=True)
    for row in rows:
        style = {"adapter": "bold", "context": "dim"}.get(row.kind)
        table.add_row(str(row.name), *map(str, row.cells), style=style)
    return table
