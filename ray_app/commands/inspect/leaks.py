"""Leaks between two sets of windows: identical features, overlapping windows, near-duplicates.

Shapes: N = pairs of an index; where two stores are compared, those of both, concatenated.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ray_app.commands.inspect.scan import StoreScan, is_picture
from ray_app.core.image_similarity import NEAR, nearest
from ray_app.store.pair_store import PairIndex, PairStore
from ray_app.store.split import Rows, Split, overlapping_row

Kind = Literal["identical", "near", "overlapping"]
Side = Literal["event", "target"]
FEATURE_SIDES: tuple[Side, ...] = ("event", "target")
SHOWN = 2
"""Examples of each kind, from different sequences where possible."""
MEASURE = (
    f"near-duplicates: correlation of {NEAR} or more between 16 × 16 brightness cells, minus their surroundings; "
    "identical: every stored number equal. A feature whose numbers are all the same is blank and not compared."
)


@dataclass(frozen=True, slots=True)
class Example:
    """Two windows that should not both be there. Rows are positions in the compared index."""

    kind: Kind
    """Kind of what both have in common."""
    side: Side | None
    """Feature they share; None for overlapping windows."""
    correlation: float | None
    """Correlation of near-duplicates."""
    row: int
    """Row of the window."""
    other: int
    """Row of the window in the other set."""


@dataclass(frozen=True, slots=True)
class Leaks:
    """Windows of one set that are in another too; each counts at most once in each kind."""

    part: str
    """Name of the set."""
    against: str
    """Name of the other set."""
    windows: int
    """Windows in the set."""
    compared_with: int
    """Windows in the other set."""
    identical: dict[Side, int]
    """Windows whose feature occurs in the other set, number for number."""
    near: dict[Side, int]
    """Windows whose picture is a near-duplicate of one in the other set, and identical to none."""
    overlapping: int
    """Windows that overlap one of the other set in time, in the same sequence."""
    any: int
    """Windows with any of these."""
    examples: tuple[Example, ...]
    """The worst cases."""

    def as_json(self, index: PairIndex) -> dict[str, Any]:
        """JSON values, with the windows of the examples by name and time."""
        examples = [
            {
                **asdict(example),
                "row": describe_pair(index, example.row),
                "other": describe_pair(index, example.other),
            }
            for example in self.examples
        ]
        return {**asdict(self), "examples": examples}


@dataclass(frozen=True, slots=True)
class LeakComparison:
    """A comparison with the index and the stores of its rows."""

    leaks: Leaks
    """Counts and examples."""
    index: PairIndex
    """Index that rows are positions in."""
    stores: tuple[PairStore, ...]
    """Stores whose indices are concatenated in it."""

    def pictures(self, row: int) -> dict[Side, NDArray[np.uint8]]:
        """Pictures of a window, shape (H, W, 3), by side; none for a feature that is not a picture."""
        store = self.stores[0]
        if row >= len(store.index):
            row, store = row - len(store.index), self.stores[1]
        values = dict(zip(FEATURE_SIDES, store.read_rows([row]), strict=True))
        return {
            side: np.ascontiguousarray(values[side][0].reshape(store.feature(side).shape).transpose(1, 2, 0))
            for side in FEATURE_SIDES
            if is_picture(store.feature(side))
        }


def leaks_of_split(index: PairIndex, scan: StoreScan, split: Split) -> list[Leaks]:
    """Compare validation with training, and test with both. Parts without windows are left out."""
    parts = {"train": split.train, "val": split.val, "test": split.test}
    return [
        find_leaks(index, scan, (name, parts[name]), (other, parts[other]))
        for name, other in (("test", "train"), ("test", "val"), ("val", "train"))
        if len(parts[name]) and len(parts[other])
    ]


def find_leaks(index: PairIndex, scan: StoreScan, part: tuple[str, Rows], other: tuple[str, Rows]) -> Leaks:
    """Compare the rows of `part` with those of `other`; neither is empty."""
    (name, rows), (other_name, other_rows) = part, other
    matches: list[tuple[Kind, Side | None, Rows, NDArray[np.floating]]] = []
    for side in FEATURE_SIDES:
        same = _identical(getattr(scan, f"{side}_hash"), rows, other_rows)
        sketch_NK = getattr(scan, f"{side}_sketch")
        nearest_N, correlation_N = nearest(sketch_NK[rows], sketch_NK[other_rows])
        near = np.where((correlation_N >= NEAR) & (same < 0), other_rows[nearest_N], -1)
        matches += [("identical", side, same, np.ones(len(rows))), ("near", side, near, correlation_N)]
    overlap = overlapping_row(index, rows, other_rows)
    matches.append(("overlapping", None, overlap, np.zeros(len(rows))))
    count = {(kind, side): int(np.count_nonzero(partner >= 0)) for kind, side, partner, _ in matches}
    examples = [
        Example(kind, side, round(float(value[n]), 4) if kind == "near" else None, int(rows[n]), int(partner[n]))
        for kind, side, partner, value in matches
        for n in _worst(index.sequence[rows], partner, value)
    ]
    return Leaks(
        part=name,
        against=other_name,
        windows=len(rows),
        compared_with=len(other_rows),
        identical={side: count["identical", side] for side in FEATURE_SIDES},
        near={side: count["near", side] for side in FEATURE_SIDES},
        overlapping=count["overlapping", None],
        any=int(np.count_nonzero(np.any([partner >= 0 for _, _, partner, _ in matches], axis=0))),
        examples=tuple(examples),
    )


def joined_index(stores: list[PairStore]) -> PairIndex:
    """Concatenate the stores' indices; sequences have one name only where they are the same recording."""
    parts = [replace(store.index, sequence=recordings(store)) for store in stores]
    return PairIndex(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(PairIndex)})


def recordings(store: PairStore) -> NDArray[np.str_]:
    """Name of each pair's recording that is valid across stores, shape (N,).

    Names of sequences are not enough: rendered drives differ by seed, files of videos or of DAVIS by SHA-256.
    """
    source, sequence = store.manifest.source, store.index.sequence
    if source.get("name") == "scenes":
        return np.char.add(sequence, f" (seed {source['seed']}, renderer {source['renderer']})")
    known = [*source.get("videos", ()), *source.get("recordings", ())]
    files = {file["sequence"]: f" ({file['sha256'][:12]})" for file in known if "sha256" in file}
    return np.array([name + files.get(name, "") for name in sequence.tolist()])


def describe_pair(index: PairIndex, row: int) -> dict[str, Any]:
    """A window by name and time."""
    return {
        "sequence": str(index.sequence[row]),
        "t_start_us": int(index.t_start_us[row]),
        "t_end_us": int(index.t_end_us[row]),
    }


def _identical(hashes: NDArray[np.str_], rows: Rows, others: Rows) -> Rows:
    """One of `others` with the hash of each row, or −1; an empty hash equals none."""
    first = {
        text: row for row, text in zip(others[::-1].tolist(), hashes[others[::-1]].tolist(), strict=True) if text
    }
    return np.array([first.get(text, -1) for text in hashes[rows].tolist()], np.int64)


def _worst(sequence: NDArray[np.str_], partner: Rows, correlation: NDArray[np.floating]) -> Iterator[int]:
    """Positions of the most similar windows with a partner, one for each sequence before a second of any."""
    candidates = np.flatnonzero(partner >= 0)
    candidates = candidates[np.argsort(-correlation[candidates], kind="stable")]
    _, first = np.unique(sequence[candidates], return_index=True)
    first.sort()
    rest = np.setdiff1d(np.arange(len(candidates)), first)
    yield from candidates[np.concatenate([first, rest])][:SHOWN].tolist()
