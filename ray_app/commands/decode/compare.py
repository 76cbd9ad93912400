"""`ray-app compare` of runs of `decode`: every drafter on the rows that all runs have, next to the baselines.

Shapes: S = sequences, K = samples of the bootstrap.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as TerminalTable

from ray_app.commands.decode.files import RESULTS
from ray_app.commands.decode.summary import RATIOS, Line, divide, summarise, sums_of
from ray_app.commands.decode.table import span
from ray_app.config.evaluate import CompareConfig
from ray_app.core.speculative.metrics import block_bootstrap
from ray_app.errors import InputError
from ray_app.language_models.drafter_folder import part_file
from ray_app.parsing.json_text import parse_object
from ray_app.reports.folder import COMPARISON_FILES, DECODE_SETTINGS, claim_report_folder
from ray_app.reports.html import Cell, Outcome, Row, Section, Table, Text, page, write_output
from ray_app.store.capture_store import SHARDS, read_shard
from ray_app.store.manifest import OF_DRAFTERS

BASELINES = {
    "constant": ("a constant picture", "--drafter DIR --drafter-sees constant"),
    "other": ("another drive's picture", "--drafter DIR --drafter-sees other"),
    "nothing": ("no picture", "--drafter DIR --drafter-sees nothing"),
    "ngram": ("ngram", "--drafter ngram --learn-from TRACES"),
    "hybrid": ("hybrid", "--drafter hybrid"),
}
"""Drafters that every table has: what each is in words, and the flags of `decode` that measure it."""
SAME = ("source", "target_sees", "max_new_tokens", "temperature", "top_p", "dtype")
"""Settings without which two runs do not decode the same texts."""
NEXT = (
    "ray-app decode with the best of them on rows of your own; ray-app replay tries more drafters, without a model."
)
GAINS = ("tokens_per_target_pass", "speedup")
HEADS = ("drafter", "tokens per pass", "gain in tokens", "accepted", "speed-up", "gain in speed", "other texts")
Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """A run of `decode`."""

    name: str
    """Its folder's name."""
    settings: Mapping[str, Any]
    """Settings that it was started with."""
    lines: Mapping[Key, Line]
    """Its rows by id, sequence and question."""

    @property
    def target(self) -> dict[str, str]:
        """Return the checksums of the target's files."""
        files: dict[str, str] = self.settings["models"][str(self.settings["target"])]
        return files

    def baseline(self, drafter: str) -> str | None:
        """Return the key of `BASELINES` that a drafter is, by how it was asked for."""
        if drafter in ("ngram", "hybrid"):
            return drafter
        models = self.settings["models"]
        for name in (name for name in self.settings["drafter"] if name in models):
            folder = Path(name).name
            if drafter == folder:  # the only picture; by default none for a language model
                trained = models[name].keys() & set(map(part_file, OF_DRAFTERS))  # shown events, or a head on states
                shown = self.settings["drafter_sees"] or ([] if trained else ["nothing"])
                return next((sees for sees in shown if sees in BASELINES), None)
            for sees in BASELINES.keys() & self.settings["drafter_sees"]:
                if drafter == f"{folder}-{sees}":
                    return sees
        return None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A drafter of one run, on the rows that all runs have."""

    run: DecodeRun
    """The run."""
    drafter: str
    """Its name in the run."""
    lines: Sequence[Line]
    """Rows."""
    numbers: Mapping[str, Any]
    """Numbers as `decode` gives them."""

    @property
    def baseline(self) -> str | None:
        return self.run.baseline(self.drafter)


def compare_drafters(cfg: CompareConfig) -> dict[str, Any]:
    """Compare the drafters of some runs; write the page and return the --json object.

    InputError: a run that is damaged or not finished, of another target or other rows. StoreError: --out holds
    something else.
    """
    claim_report_folder(cfg.out, COMPARISON_FILES)
    runs = [read_run(Path(name)) for name in cfg.checkpoints]
    keys = common_rows(runs)
    candidates = labelled(runs, keys)
    best = {ratio: _best(candidates, ratio) for ratio in GAINS}
    drafters = {label: _numbers(candidate, best) for label, candidate in candidates.items()}
    missing = [key for key in BASELINES if all(each["baseline"] != key for each in drafters.values())]
    result = {
        "rows": len(keys),
        "sequences": len({sequence for _, sequence, _ in keys}),
        "drafters": drafters,
        "best_baseline": {ratio: label for ratio, (label, _) in best.items() if label},
        "baselines_missing": missing,
    }
    result["verdict"] = verdict(result)
    contents = json.dumps(result, indent=1, allow_nan=False).encode(), drafters_page(result).encode()
    for file, data in zip(COMPARISON_FILES[:2], contents, strict=True):
        write_output("--out", cfg.out / file, data)
    return {**result, "files": [str(cfg.out / file) for file in COMPARISON_FILES[:2]]}


def read_run(folder: Path) -> DecodeRun:
    """Return a finished run. InputError: it is not finished, or a file of it is damaged."""
    try:
        settings = parse_object((folder / DECODE_SETTINGS).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / DECODE_SETTINGS} cannot be read: {error}") from error
    if not (folder / RESULTS).is_file():
        raise InputError(f"{folder} is not finished: it has no {RESULTS}. Repeat the `ray-app decode` that began it.")
    lines: list[Line] = []
    for path in sorted((folder / SHARDS).glob("*.sha256")):
        shard = read_shard(folder, path.stem)
        if shard is None:
            raise InputError(f"{path} does not hold; repeat the `ray-app decode` that wrote it.")
        lines += shard.rows
    by_key = {(line["id"], line["sequence"], line["question"]): line for line in lines}
    if len(by_key) < len(lines):
        raise InputError(f"{folder} has rows of one id, sequence and question; name rows by an `id` of their own.")
    return DecodeRun(folder.absolute().name, settings, by_key)


def common_rows(runs: Sequence[DecodeRun]) -> list[Key]:
    """Return the rows of all runs, in order. InputError: there is none, or the targets did not say the same."""
    first = runs[0]
    for run in runs[1:]:
        differing = [name for name in SAME if run.settings[name] != first.settings[name]]
        if run.target != first.target:
            differing.insert(0, "target")
        if differing:
            raise InputError(
                f"{first.name} and {run.name} were decoded with other {', '.join(differing)}; their drafters cannot "
                "be compared. Decode both with the same."
            )
    keys = [key for key in first.lines if all(key in run.lines for run in runs)]
    if not keys:
        raise InputError(f"{', '.join(run.name for run in runs)} have no row in common; decode the same --max-rows.")
    for key in keys:
        texts = {tuple(run.lines[key]["target_tokens"]) for run in runs}
        if first.settings["temperature"] == 0.0 and len(texts) > 1:
            raise InputError(
                f"row {first.lines[key]['row']}: the target's own answers differ between the runs, as rounding does "
                "on another machine. Decode both on one, or with --dtype float32."
            )
    return keys


def labelled(runs: Sequence[DecodeRun], keys: Sequence[Key]) -> dict[str, Candidate]:
    """Return every drafter by its name, with that of its run where several have one of that name."""
    found = [
        Candidate(run, name, lines, summarise(lines, name, np.random.default_rng(0)))
        for run in runs
        for lines in [[run.lines[key] for key in keys]]
        for name in lines[0]["drafters"]
    ]
    count = Counter(each.drafter for each in found)
    labels: dict[str, Candidate] = {}
    for each in found:
        label = each.drafter if count[each.drafter] == 1 else f"{each.drafter} ({each.run.name})"
        labels[label if label not in labels else f"{label} {len(labels) + 1}"] = each
    return labels


def verdict(result: Mapping[str, Any]) -> str:
    """Return the result in one sentence."""
    rated = {label: each for label, each in result["drafters"].items() if each["baseline"] is None}
    name, best = max((rated or result["drafters"]).items(), key=lambda item: item[1]["tokens_per_target_pass"])
    said = f"{name} drafts {best['tokens_per_target_pass']:.2f} tokens per target pass"
    if not rated:
        return f"{said}, the most; every drafter here is a baseline."
    if not result["best_baseline"]:
        return f"{said}; no baseline was measured."
    gain = best["gain"]["tokens_per_target_pass"]
    more = "more" if gain["difference"] > 0 else "fewer"
    return f"{said}, {abs(gain['difference']):.2f} {more} than the best baseline, {gain['over']}."


def outcome(result: Mapping[str, Any]) -> Outcome:
    """Return whether a drafter beats the best baseline beyond doubt."""
    gains = [each["gain"]["tokens_per_target_pass"] for each in result["drafters"].values() if each["gain"]]
    if not gains:
        return "plain"
    best = max(gains, key=lambda gain: gain["difference"])
    if best["difference"] <= 0.0:
        return "loses"
    return "beats" if best["interval95"] and best["interval95"][0] > 0.0 else "unsure"


def table_rows(result: Mapping[str, Any]) -> list[Row]:
    """Return a line for each drafter, most tokens first, then every baseline, measured or not."""
    ranked = sorted(result["drafters"].items(), key=lambda item: -item[1]["tokens_per_target_pass"])
    rows = [Row(label, _cells(each), "adapter") for label, each in ranked if each["baseline"] is None]
    for label, each in ranked:
        if key := each["baseline"]:
            rows.append(Row(Cell(label, quiet=BASELINES[key][0]), _cells(each), "context"))
    for key in result["baselines_missing"]:
        empty = ["not measured", *["–"] * (len(HEADS) - 2)]
        rows.append(Row(Cell("–", quiet=BASELINES[key][0]), empty, "context"))
    return rows


def notes(result: Mapping[str, Any]) -> list[str]:
    """Return what is to be read with the table."""
    lines = [
        f"Rows that all runs have: {result['rows']:,}, sequences: {result['sequences']:,}; in brackets 95 % over "
        "sequences. A second line below a name says which baseline it is. A gain is over the best baseline on the "
        "same rows. A speed-up is over the plain decoding of the same run, in which the ways took turns."
    ]
    for key in result["baselines_missing"]:
        words, flags = BASELINES[key]
        lines.append(f"Not measured: {words}. Decode the same rows with {flags}, and compare that run too.")
    return lines


def drafters_page(result: Mapping[str, Any]) -> str:
    """Return the page as HTML."""
    words = notes(result)
    return page(
        "Drafters",
        result["verdict"],
        words[0],
        [{"text": text, "warning": True} for text in words[1:]],
        [
            Section("Drafters and baselines", [Table(list(HEADS), table_rows(result), key="tokens per pass")]),
            Section("Next", [Text(NEXT)]),
        ],
        outcome(result),
    )


def render_drafters(result: dict[str, Any], console: Console) -> None:
    """Print the table, what to read with it, and the files."""
    table = TerminalTable(title=result["verdict"], title_justify="left", box=None, pad_edge=False)
    for n, head in enumerate(HEADS):
        table.add_column(head, justify="right" if n else "left", no_wrap=not n)
    for row in table_rows(result):
        table.add_row(*map(_lines, (row.name, *row.cells)))
    console.print(table)
    for line in (*notes(result), *result["files"]):
        console.print(line, soft_wrap=True)


def _best(candidates: Mapping[str, Candidate], ratio: str) -> tuple[str, Candidate | None]:
    measured = {label: each for label, each in candidates.items() if each.baseline}
    return max(measured.items(), key=lambda item: item[1].numbers[ratio], default=("", None))


def _numbers(candidate: Candidate, best: Mapping[str, tuple[str, Candidate | None]]) -> dict[str, Any]:
    numbers = candidate.numbers
    gains: dict[str, Any] = {}
    for n, ratio in enumerate(GAINS):
        label, other = best[ratio]
        if other is not None and candidate.baseline is None:
            gains[ratio] = {"over": label, **_gain(candidate, other, ratio, np.random.default_rng(n))}
    kept = (*RATIOS, "interval95", "num_accepted_tokens_per_pos", "texts_that_differ", "rows", "stage_share")
    return {
        "run": candidate.run.name,
        "drafter": candidate.drafter,
        "baseline": candidate.baseline,
        "gain": gains,
        **{name: numbers[name] for name in kept},
    }


def _gain(one: Candidate, other: Candidate, ratio: str, rng: np.random.Generator) -> dict[str, Any]:
    """Return the difference of a ratio on the same rows, with 95 % over sequences."""
    place = list(RATIOS).index(ratio)
    both = np.concatenate([sums_of(each.lines, each.drafter) for each in (one, other)], axis=1)
    half = both.shape[1] // 2

    def difference(total_KM: np.ndarray) -> np.ndarray:
        values: np.ndarray = divide(total_KM[:, :half])[:, place] - divide(total_KM[:, half:])[:, place]
        return values

    low_high = None
    if len(both) > 1:
        low, high = block_bootstrap(both, difference, rng)
        low_high = [float(low), float(high)]
    return {"difference": float(difference(both.sum(axis=0, keepdims=True))[0]), "interval95": low_high}


def _lines(cell: str | Cell) -> str:
    return cell if isinstance(cell, str) else f"{cell.text}\n{cell.quiet}".rstrip()


def _cells(each: Mapping[str, Any]) -> list[str | Cell]:
    interval, differ = each["interval95"], each["texts_that_differ"]
    gains = dict.fromkeys(GAINS, Cell("–"))
    for ratio, gain in each["gain"].items():
        gains[ratio] = Cell(f"{gain['difference']:+.2f}", quiet=span(gain["interval95"]).strip())
    return [
        Cell(f"{each['tokens_per_target_pass']:.2f}", quiet=span(interval["tokens_per_target_pass"]).strip()),
        gains["tokens_per_target_pass"],
        f"{each['draft_acceptance_rate']:.1%}",
        Cell(f"{each['speedup']:.2f}×", quiet=span(interval["speedup"]).strip()),
        gains["speedup"],
        "sampled" if differ is None else f"{differ} of {each['rows']}",
    ]
