"""A flipped bit or a cut end is found before the file is used, and the error names the file: few of each kind.

benchmarks/data/corruption.py does the same with many.
"""

from pathlib import Path

from benchmarks.data import corruption


def test_damage_in_any_file_is_found_before_use_and_the_file_named(tmp_path: Path) -> None:
    kinds = corruption.kinds(tmp_path)
    assert len({kind.path.name for kind in kinds}) == 12
    for seed, kind in enumerate(kinds):
        counts = corruption.measure(kind, 10, 10, seed)
        for how, count in counts.items():
            where = f"{kind.path.name}, {how}: {count}"
            assert count["tried"] >= 10, where
            assert count["found"] + count.get("left_out", 0) == count["tried"], where
            assert count["named"] == count["found"], where
            assert (kind.path.name, how) == ("events.jsonl", "cuts") or "left_out" not in count, where


def test_plain_loading_misses_most_flips_in_weights(tmp_path: Path) -> None:
    (weights,) = (kind for kind in corruption.kinds(tmp_path) if kind.path.name == "model.safetensors")
    flips = corruption.measure(weights, 20, 0, 0)["flips"]
    assert flips["found"] == flips["tried"] == 20
    assert flips["plain_noticed"] < 10
