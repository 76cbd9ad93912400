"""What two sets of windows share that they should not: identical features, overlapping windows, near-duplicates.

Shapes: N = pairs of an index, two stores' one after the other where two are compared.
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
SIDES: tuple[Side, ...] = ("event", "target")
SHOWN = 2
"""Examples of each finding, of different sequences where there are."""
MEASURE = (
    f"near-duplicates: correlation of {NEAR} or more between sketches of 16 × 16 brightness cells, less their "
    "surroundings; identical: every stored number equal. A feature whose numbers are all the same shows nothing and "
    "is not compared."
)


@dataclass(frozen=True, slots=True)
class Example:
    """Two windows that should not both be there. Rows are positions in the compared index."""

    kind: Kind
    """What they have in common."""
    side: Side | None
    """Which feature; None for overlapping windows."""
    correlation: float | None
    """Of the two sketches, for near-duplicates."""
    row: int
    """The window."""
    other: int
    """The window on the other side."""


@dataclass(frozen=True, slots=True)
class Leaks:
    """Windows of one set that are also in another, in one way or the other; each counts once in a way."""

    part: str
    """Name of the set."""
    against: str
    """Name of the other."""
    windows: int
    """Windows in the set."""
    compared_with: int
    """Windows in the other."""
    identical: dict[Side, int]
    """Windows whose feature occurs in the other set, number for number."""
    near: dict[Side, int]
    """Windows whose picture is like one of the other set, and not identical to any."""
    overlapping: int
    """Windows that overlap one of the other set in time, in the same sequence."""
    any: int
    """Windows with any of these."""
    examples: tuple[Example, ...]
    """The worst."""

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
    """A comparison, and where its rows are."""

    leaks: Leaks
    """What was found."""
    index: PairIndex
    """What rows are positions in."""
    stores: tuple[PairStore, ...]
    """The stores whose indices follow each other there."""

    def pictures(self, row: int) -> dict[Side, NDArray[np.uint8]]:
        """Both pictures of a window, (H, W, 3); none of a feature that is no picture."""
        store = self.stores[0]
        if row >= len(store.index):
            row, store = row - len(store.index), self.stores[1]
        values = dict(zip(SIDES, store.read_rows([row]), strict=True))
        return {
            side: np.ascontiguousarray(values[side][0].reshape(store.feature(side).shape).transpose(1, 2, 0))
            for side in SIDES
            if is_picture(store.feature(side))
        }


def leaks_of_split(index: PairIndex, survey: StoreScan, split: Split) -> list[Leaks]:
    """Validation against training, and test against both. Parts without windows are left out."""
    parts = {"train": split.train, "val": split.val, "test": split.test}
    return [
        find_leaks(index, survey, (name, parts[name]), (other, parts[other]))
        for name, other in (("test", "train"), ("test", "val"), ("val", "train"))
        if len(parts[name]) and len(parts[other])
    ]


def find_leaks(index: PairIndex, survey: StoreScan, mine: tuple[str, Rows], others: tuple[str, Rows]) -> Leaks:
    """What the rows of `mine` share with those of `others`; neither is empty."""
    (name, rows), (other_name, other_rows) = mine, others
    found: list[tuple[Kind, Side | None, Rows, NDArray[np.floating]]] = []
    for side in SIDES:
        same = _identical(getattr(survey, f"{side}_hash"), rows, other_rows)
        sketch_NK = getattr(survey, f"{side}_sketch")
        place_N, likeness_N = nearest(sketch_NK[rows], sketch_NK[other_rows])
        near = np.where((likeness_N >= NEAR) & (same < 0), other_rows[place_N], -1)
        found += [("identical", side, same, np.ones(len(rows))), ("near", side, near, likeness_N)]
    overlap = overlapping_row(index, rows, other_rows)
    found.append(("overlapping", None, overlap, np.zeros(len(rows))))
    count = {(kind, side): int(np.count_nonzero(partner >= 0)) for kind, side, partner, _ in found}
    examples = [
        Example(kind, side, round(float(likeness[n]), 4) if kind == "near" else None, int(rows[n]), int(partner[n]))
        for kind, side, partner, likeness in found
        for n in _worst(index.sequence[rows], partner, likeness)
    ]
    return Leaks(
        part=name,
        against=other_name,
        windows=len(rows),
        compared_with=len(other_rows),
        identical={side: count["identical", side] for side in SIDES},
        near={side: count["near", side] for side in SIDES},
        overlapping=count["overlapping", None],
        any=int(np.count_nonzero(np.any([partner >= 0 for _, _, partner, _ in found], axis=0))),
        examples=tuple(examples),
    )


def joined_index(stores: list[PairStore]) -> PairIndex:
    """The stores' indices one after the other, with sequences called alike only where they are the same recording."""
    parts = [replace(store.index, sequence=recordings(store)) for store in stores]
    return PairIndex(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(PairIndex)})


def recordings(store: PairStore) -> NDArray[np.str_]:
    """For each pair a name of its recording that holds across stores: equal names of sequences are not enough for
    rendered drives, which are told apart by the seed, nor for files of videos or of DAVIS, by their SHA-256."""
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
    """For each of `rows` one of `others` with its hash, or −1; an empty hash equals none."""
    first = {
        text: row for row, text in zip(others[::-1].tolist(), hashes[others[::-1]].tolist(), strict=True) if text
    }
    return np.array([first.get(text, -1) for text in hashes[rows].tolist()], np.int64)


def _worst(sequence: NDArray[np.str_], partner: Rows, likeness: NDArray[np.floating]) -> Iterator[int]:
    """The most alike windows with a partner, one for each sequence before a second of any."""
    candidates = np.flatnonzero(partner >= 0)
    candidates = candidates[np.argsort(-likeness[candidates], kind="stable")]
    _, first = np.unique(sequence[candidates], return_index=True)
    first.sort()
    rest = np.setdiff1d(np.arange(len(candidates)), first)
    yield from candidates[np.concatenate([first, rest])][:SHOWN].tolist()
