"""`ray-app correlate`: what cosine acceptance predicts about token acceptance, on captured traces with states.

An aligned state means the token whose target state, among other stretches' rows, is nearest to it; it matches
where that is the target's own token at the same place. Ray Data runs one task for each file and adapter.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console
from rich.table import Table as TerminalTable

from ray_app import errors
from ray_app.cluster.connection import allow_long_tasks, cluster
from ray_app.config.base import flat
from ray_app.config.speculative import CorrelateConfig
from ray_app.core.speculative.correlation import REPORT_THETAS, Places, cosines, judge, rank_correlation
from ray_app.core.speculative.prompts import AnsweredPrompt, States
from ray_app.core.speculative.verification import accepted_prefix
from ray_app.drafters.hidden_states import AdapterDrafter
from ray_app.drafters.recorded_states import answers_with_states, bootstrap_blocks, read_files, require_states
from ray_app.drafters.replay import Fold, folds_of
from ray_app.errors import CheckpointError, InputError, StoreError
from ray_app.reports.figures import reliability_figure
from ray_app.reports.html import Cell, Figure, Row, Section, Table, Text, page
from ray_app.store.atomic import write_file
from ray_app.store.provenance import provenance
from ray_app.store.traces import TraceFile

REFERENCE_ADAPTERS = ("raw", "mean_target")
"""The drafter's states as they are; the mean of the target's, the same at every place."""
PAGE, NUMBERS = "correlation.html", "correlation.json"
CORRELATION_HEADS = (
    "mean cos",
    "cos > 0.80",
    "match rate",
    "P(match | cos > 0.80)",
    "AUC",
    "calibration error",
    "in a row",
)
"""Columns of the results table."""
BOOTSTRAP_BLOCK = 20
"""Neighbouring rows that the bootstrap draws together where sequences are not named."""


@dataclass(frozen=True, slots=True)
class AdapterScore:
    """One adapter on one file."""

    row_N: np.ndarray
    """Row number in the file for each place."""
    cos_N: np.ndarray
    """Cosines."""
    match_N: np.ndarray
    """Matches."""
    prefixes: list[int]
    """Tokens that match in a row from the start, for each row."""


def run_correlate(cfg: CorrelateConfig) -> dict[str, Any]:
    """Write correlation.json and correlation.html; returns the --json object.

    InputError: traces without states, or damaged ones. CheckpointError: an adapter that does not verify or fit.
    ConfigError: too few rows. StoreError: a folder that cannot be written.
    """
    if cfg.out.exists() and not cfg.out.is_dir():
        raise StoreError(f"{cfg.out} is a file; --out names the folder for {NUMBERS} and {PAGE}.")
    files = read_files(cfg.traces, cfg.vocabulary, cfg.end_token)
    for file in files:
        require_states(file, "correlate")
    adapters = _named([path.absolute() for path in cfg.adapter])
    folds = [folds_of([trace.sequence for trace in file.traces], cfg.folds, cfg.fold_gap) for file in files]
    judged = _judge_all(cfg, files, folds, adapters)
    block_of = bootstrap_blocks(files, BOOTSTRAP_BLOCK)
    num_blocks = 1 + max(block for each in block_of for block in each)
    places = {
        name: Places(
            np.concatenate([one.cos_N for one in each]),
            np.concatenate([one.match_N for one in each]),
            np.concatenate([np.asarray(block_of[n])[one.row_N] for n, one in enumerate(each)]),
        )
        for name, each in judged.items()
        if any(len(one.cos_N) for one in each)
    }
    if not places:
        raise InputError("no row has a place where both models said something; there is nothing to compare.")
    numbers = {
        name: {
            **judge(each, num_blocks, np.random.default_rng(0)),
            "accepted_in_a_row": float(np.mean([n for one in judged[name] for n in one.prefixes])),
        }
        for name, each in places.items()
    }
    result = {
        "rows": sum(len(file.traces) for file in files),
        "blocks": num_blocks,
        "rejected": [asdict(bad) for file in files for bad in file.rejected],
        "folds": max(len(each) for each in folds),
        "fold_gap": cfg.fold_gap,
        "baselines": {name: numbers[name] for name in REFERENCE_ADAPTERS if name in numbers},
        "adapters": {name: numbers[name] for name in adapters if name in numbers},
        "rank_correlation": rank_correlation(
            {name: places[name] for name in adapters if name in places}, num_blocks, np.random.default_rng(0)
        ),
        "provenance": provenance(sys.argv, "", config=flat(cfg)),
    }
    result["verdict"] = verdict(result)
    cfg.out.mkdir(parents=True, exist_ok=True)
    write_file(cfg.out / NUMBERS, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    write_file(cfg.out / PAGE, correlation_page(result).encode())
    return {**result, "files": [str(cfg.out / NUMBERS), str(cfg.out / PAGE)]}


def render_correlate(result: dict[str, Any], console: Console) -> None:
    """Return the table, the plain sentences and the files."""
    table = TerminalTable(
        title=f"{result['rows']:,} rows, {result['blocks']} sequences or stretches", title_justify="left"
    )
    table.add_column("states", overflow="fold", min_width=12)
    for heading in CORRELATION_HEADS:
        table.add_column(heading, justify="right")
    for name, cells in table_rows(result):
        table.add_row(name, *cells)
    console.print(table)
    for sentence in result["verdict"]:
        console.print(sentence, style="bold")
    for path in result["files"]:
        console.print(path, soft_wrap=True)


def verdict(result: dict[str, Any]) -> list[str]:
    """Return the conclusions in plain sentences."""
    said = ["Cosine acceptance is not token acceptance: a place is accepted by cosine where cos_sim > θ."]
    for name, numbers in result["adapters"].items():
        rate, above = numbers["cosine_accept_rate"]["0.80"], numbers["match_rate_above"]["0.80"]
        says = f"{name}: cosine accepts {rate:.1%} of the places at θ 0.80"
        says += f", of which {above:.1%} bear the target's token" if above is not None else ""
        said.append(f"{says}; of all places {numbers['match_rate']:.1%} do, {_auc(numbers)}.")
    ranks = result["rank_correlation"]
    rho, interval = ranks["cosine_accept_rate_0.80"], ranks["interval95"]["cosine_accept_rate_0.80"]
    if rho is None:
        said.append(f"Rank correlation over adapters needs three that differ; there are {ranks['adapters']}.")
    else:
        span = f", 95 % interval {interval[0]:+.2f} to {interval[1]:+.2f}" if interval else ""
        said.append(
            f"Over {ranks['adapters']} adapters cosine acceptance ranks as tokens do with ρ = {rho:+.2f}{span}."
        )
    return said


def table_rows(result: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Cells for a terminal and for the page, the baselines first."""
    lines = []
    for name, numbers in {**result["baselines"], **result["adapters"]}.items():
        above, interval = numbers["match_rate_above"]["0.80"], numbers["interval95"]["match_rate_above"]["0.80"]
        span = f" [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else ""
        cells = [
            f"{numbers['cos_mean']:.3f}",
            f"{numbers['cosine_accept_rate']['0.80']:.1%}",
            f"{numbers['match_rate']:.1%}",
            "–" if above is None else f"{above:.1%}{span}",
            "–" if numbers["auc"] is None else f"{numbers['auc']:.3f}",
            f"{numbers['calibration_error']:.3f}",
            f"{numbers['accepted_in_a_row']:.2f}",
        ]
        lines.append((f"{name} (baseline)" if name in result["baselines"] else name, cells))
    return lines


def correlation_page(result: dict[str, Any]) -> str:
    """Return the page as HTML."""
    everyone = {**result["baselines"], **result["adapters"]}
    thetas = [f"{theta:.2f}" for theta in REPORT_THETAS]
    above = [Row(name, [match_cell(numbers, theta) for theta in thetas]) for name, numbers in everyone.items()]
    figure = Figure(
        reliability_figure({name: numbers["reliability"] for name, numbers in everyone.items()}),
        "Share of positions that match against their mean cosine, for each kind of states; the numbers are in "
        f"{NUMBERS} under reliability.",
        "Share of positions with the target's token, against their mean cosine. On the diagonal the cosine would be "
        "the probability of acceptance.",
    )
    rejected = [f"rejected: {bad['file']}, line {bad['line']}: {bad['reason']}" for bad in result["rejected"]]
    return page(
        "Cosine acceptance against token acceptance",
        "Cosine acceptance against token acceptance",
        f"{result['rows']:,} rows in {result['blocks']} sequences or stretches, {result['folds']} folds: whole "
        f"sequences where a file names several, else stretches with a gap of {result['fold_gap']} rows. An aligned "
        "state is taken for the token of the nearest target state in other folds; it matches where that is the "
        "target's token at the same position. Intervals are 95 %, by bootstrap over sequences.",
        [
            *({"text": sentence, "warning": False} for sentence in result["verdict"]),
            *({"text": line, "warning": True} for line in rejected),
        ],
        [
            Section(
                "Results",
                [Table(["states", *CORRELATION_HEADS], [Row(name, cells) for name, cells in table_rows(result)])],
            ),
            Section("P(match | cos > θ)", [Table(["states", *(f"θ {theta}" for theta in thetas)], above)]),
            Section("The cosine taken as a probability", [figure]),
            Section("Next", [Text("ray-app evaluate --token-report links this page from an adapter's report.")]),
        ],
    )


def match_cell(numbers: dict[str, Any], theta: str) -> Cell:
    """P(match | cos > θ) in percent, with its interval."""
    rate, interval = numbers["match_rate_above"][theta], numbers["interval95"]["match_rate_above"][theta]
    if rate is None:
        return Cell("–")
    return Cell(
        f"{100 * rate:.1f} %", quiet=f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
    )


def _auc(numbers: dict[str, Any]) -> str:
    if numbers["auc"] is None:
        return "and with all places alike the cosine has nothing to tell apart"
    return f"and a matching place has the higher cosine with chance {numbers['auc']:.2f} (0.50: it says nothing)"


def _named(adapters: Sequence[Path]) -> dict[str, Path]:
    """Return adapters by the end of their path that is unique."""
    for parts in range(1, 1 + max((len(path.parts) for path in adapters), default=0)):
        named = {"/".join(path.parts[-parts:]): path for path in adapters}
        if len(named) == len(adapters) and not named.keys() & set(REFERENCE_ADAPTERS):
            return named
    return {str(path): path for path in adapters}


def _judge_all(
    cfg: CorrelateConfig, files: Sequence[TraceFile], folds: Sequence[Sequence[Fold]], adapters: dict[str, Path]
) -> dict[str, list[AdapterScore]]:
    """Return the scores of each file for each baseline and adapter."""
    tasks = [(name, n) for name in (*REFERENCE_ADAPTERS, *adapters) for n in range(len(files))]
    files = [replace(file, path=file.path.absolute()) for file in files]  # workers have a folder of their own

    def task(item: dict[str, Any]) -> dict[str, Any]:
        name, n = tasks[item["task"]]
        try:
            judged = _judge_file(files[n], name, adapters.get(name), folds[n])
        except (InputError, CheckpointError) as error:  # Ray Data would wrap it in an error of its own
            return {"task": item["task"], "kind": type(error).__name__, "error": str(error), "judged": ""}
        values = {name: getattr(judged, name).tolist() for name in ("row_N", "cos_N", "match_N")}
        text = json.dumps({**values, "prefixes": judged.prefixes})
        return {"task": item["task"], "kind": "", "error": "", "judged": text}

    found: dict[str, list[AdapterScore]] = {name: [] for name, _ in tasks}
    with cluster(cfg.address):
        dataset = ray.data.from_items([{"task": n} for n in range(len(tasks))], override_num_blocks=len(tasks))
        done = {row["task"]: row for row in allow_long_tasks(dataset.map(task)).iter_rows()}
    for number, (name, _) in enumerate(tasks):
        if done[number]["error"]:
            raise getattr(errors, done[number]["kind"])(done[number]["error"])
        values = json.loads(done[number]["judged"])
        found[name].append(
            AdapterScore(
                np.asarray(values["row_N"], np.int64),
                np.asarray(values["cos_N"], np.float64),
                np.asarray(values["match_N"], np.bool_),
                values["prefixes"],
            )
        )
    return found


def _judge_file(file: TraceFile, name: str, adapter: Path | None, folds: Sequence[Fold]) -> AdapterScore:
    rows: list[int] = []
    cos: list[float] = []
    match: list[bool] = []
    prefixes: list[int] = []
    answered = answers_with_states(file, adapter)
    for fold in folds:
        train = [answered[n] for n in fold.train]
        drafter = AdapterDrafter()
        drafter.fit(train)
        mean_D = np.concatenate([_target(each) for each in train]).mean(axis=0)
        for n in fold.test:
            each = answered[n]
            states_TD = _states_of(name, each, mean_D)
            if states_TD is None:
                continue
            tokens = drafter.tokens(replace(each.prompt, aligned_states=states_TD))
            places = min(len(tokens), len(each.answer))
            rows += [n] * places
            cos += cosines(states_TD[:places], _target(each)[:places]).tolist()
            match += [a == b for a, b in zip(tokens, each.answer, strict=False)]
            prefixes.append(accepted_prefix(tokens, each.answer))
    return AdapterScore(np.asarray(rows, np.int64), np.asarray(cos), np.asarray(match, np.bool_), prefixes)


def _states_of(name: str, each: AnsweredPrompt, mean_D: States) -> States | None:
    """Return the states of a baseline or adapter; None where raw states have another width than the target's."""
    event_TD = each.prompt.event_states
    assert event_TD is not None
    if name == "raw":
        return event_TD if event_TD.shape[1] == len(mean_D) else None
    if name == "mean_target":
        return np.repeat(mean_D[None], len(event_TD), axis=0)
    return each.prompt.aligned_states


def _target(each: AnsweredPrompt) -> States:
    assert each.target_states is not None
    return each.target_states
