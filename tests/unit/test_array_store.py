"""Stores from arrays: vectors of two widths, images, ragged sequences; a row that cannot be used is refused."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from ray_app import cli
from ray_app.data.array_store import write_store
from ray_app.errors import InputError, RayAppError, StoreError
from ray_app.sources.array_files import open_arrays
from ray_app.store.manifest import REJECTED, Manifest
from ray_app.store.pair_store import PairStore

N, E, D, W = 30, 6, 9, 4
COLUMNS = {name: name for name in ("event", "target", "sequence", "t_start_us", "t_end_us")}


def vectors(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    event, target = (rng.normal(size=(N, width)).astype(np.float32) for width in (E, D))
    return {"event": event, "target": target, "sequence": [f"drive {n // 6}" for n in range(N)]}


def ragged(seed: int = 0) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {
        side: [rng.normal(size=(length, W)).astype(np.float32) for length in rng.integers(1, most + 1, N)]
        for side, most in (("event", 3), ("target", 5))
    }


def contents(store: Path) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    opened = PairStore.open(store)
    event, target = opened.read_rows(np.arange(N))
    return event, target, opened.index.sequence.tolist(), opened.index.t_start_us


def test_vectors_of_two_widths_come_back_with_their_names_and_times(tmp_path: Path) -> None:
    given = vectors()
    manifest = write_store(tmp_path / "store", **given, source={"encoder": "mine"})
    assert (manifest.pairs, manifest.sequences, manifest.rejected) == (N, 5, 0)
    assert (manifest.features.event.shape, manifest.features.target.shape) == ((E,), (D,))
    assert manifest.source == {"name": "arrays", "events": "unknown", "encoder": "mine"}
    event, target, sequence, starts = contents(tmp_path / "store")
    np.testing.assert_array_equal(event, given["event"])
    np.testing.assert_array_equal(target, given["target"])
    assert sequence == given["sequence"]
    assert starts[:7].tolist() == [0, 1_000_000, 2_000_000, 3_000_000, 4_000_000, 5_000_000, 0]


def test_given_times_are_kept_and_set_the_order(tmp_path: Path) -> None:
    starts = np.arange(N)[::-1] * 500_000
    write_store(tmp_path / "store", **vectors(), t_start_us=starts, duration="500ms")
    opened = PairStore.open(tmp_path / "store")
    assert set(opened.manifest.durations) == {"500ms"}
    assert (np.diff(opened.index.t_start_us[:6]) == 500_000).all()


def test_images_are_pixels_and_float64_is_stored_as_float32(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (N, 3, 4, 5), dtype=np.uint8)
    features = write_store(tmp_path / "store", event=images, target=vectors()["target"].astype(np.float64)).features
    assert (features.event.kind, features.event.scale) == ("images", 1 / 255)
    assert (features.target.kind, features.target.dtype) == ("vectors", "float32")
    np.testing.assert_array_equal(contents(tmp_path / "store")[0], images.reshape(N, -1))


def test_sequences_of_different_lengths_have_one_limit_on_both_sides(tmp_path: Path) -> None:
    given = ragged()
    features = write_store(tmp_path / "store", **given).features
    assert features.event.shape == features.target.shape == (5, W)
    event = contents(tmp_path / "store")[0].reshape(N, 5, W)
    for stored, tokens in zip(event, given["event"], strict=True):
        np.testing.assert_array_equal(stored[: len(tokens)], tokens)
        assert not stored[len(tokens) :].any()


def test_a_generator_and_tensors_of_torch_write_what_arrays_write(tmp_path: Path) -> None:
    given = vectors()
    arrays = write_store(tmp_path / "a", **given)
    rows = ({name: given[name][n] for name in given} for n in range(N))
    assert write_store(tmp_path / "b", rows).fingerprint == arrays.fingerprint
    tensors = {side: torch.from_numpy(given[side]) for side in ("event", "target")}
    assert write_store(tmp_path / "c", **tensors, sequence=given["sequence"]).fingerprint == arrays.fingerprint


def with_value(array: np.ndarray, row: int, value: float) -> np.ndarray:
    changed = array.copy()
    changed[row, 0] = value
    return changed


GOOD = vectors()
OBJECTS = np.empty(2, dtype=object)
OBJECTS[:] = [np.ones(3), np.ones(2)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"event": GOOD["event"][:7]}, "event has 7, target has 30"),
        ({"sequence": ["a"] * 3}, "sequence has 3"),
        ({"event": OBJECTS, "target": GOOD["target"][:2], "sequence": "a"}, "dtype object"),
        ({"event": GOOD["event"].astype(np.int64)}, "event holds int64; convert it to uint8"),
        ({"event": with_value(GOOD["event"], 4, np.nan)}, "row 4: the event has 1 of 6 numbers that are not finite"),
        ({"target": with_value(GOOD["target"], 2, np.inf)}, "row 2: the target has 1 of 9"),
        ({"target": np.zeros((N, D), np.float32)}, "all zeros, and a zero vector has no cosine"),
        (
            {"event": [np.ones(3), np.ones(2)], "target": GOOD["target"][:2], "sequence": "a"},
            "row 1: event is float32",
        ),
        ({"event": GOOD["event"].reshape(N, 1, 1, 1, E)}, "row 0: event has the shape"),
        ({"t_start_us": np.full(N, -1)}, r"row 0: its window \[-1"),
        ({"t_start_us": np.arange(N) + 0.5}, "whole number of microseconds"),
        ({"t_start_us": np.full(N, 2**64 - 1, np.uint64)}, "divide nanoseconds by 1000"),
        ({"t_start_us": np.arange(N) * 10**9 + 17 * 10**17}, "divide nanoseconds by 1000"),
        ({"t_start_us": np.arange(N), "t_end_us": 1_000_000 + 2 * np.arange(N)}, "16 different lengths"),
        ({"sequence": [1.5] * N}, "named by text or a whole number, not by 1.5"),
        ({"event": np.zeros((0, E), np.float32), "target": np.zeros((0, D), np.float32), "sequence": "a"}, "no pair"),
    ],
)
def test_what_cannot_be_a_store_is_refused_with_its_row(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RayAppError, match=words):
        write_store(tmp_path / "store", **{**GOOD, **change})
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_a_few_bad_rows_are_rejected_where_that_is_allowed(tmp_path: Path) -> None:
    event = with_value(GOOD["event"], 4, np.nan)
    twice = {**GOOD, "event": event, "t_start_us": np.arange(N) * 1_000_000}
    for name in ("event", "target", "t_start_us"):
        twice[name] = np.concatenate([twice[name], twice[name][:1]])
    twice["sequence"] = [*GOOD["sequence"], GOOD["sequence"][0]]
    manifest = write_store(tmp_path / "store", **twice, max_rejected_fraction=0.1)
    assert (manifest.pairs, manifest.rejected) == (N - 1, 2)
    lines = [json.loads(line) for line in (tmp_path / "store" / REJECTED).read_text().splitlines()]
    assert [line["position"] for line in lines] == ["row 4", "row 30"]
    assert lines[1]["reason"] == "the same pair once more"


def test_a_store_is_never_written_over_and_an_interrupted_one_is_written_again(tmp_path: Path) -> None:
    def breaks_off():
        yield {"event": np.ones(3, np.float32), "target": np.ones(2, np.float32)}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_store(tmp_path / "store", breaks_off())
    write_store(tmp_path / "store", **GOOD)
    assert [path.name for path in sorted((tmp_path / "store").iterdir())] == [
        "arrays-00000.parquet",
        "manifest.json",
        "rejected.jsonl",
    ]
    with pytest.raises(StoreError, match="already holds a complete pair store"):
        write_store(tmp_path / "store", **GOOD)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(StoreError, match="already holds something else"):
        write_store(tmp_path / "notes", **GOOD)


def write_files(folder: Path) -> dict[str, list[str]]:
    """The same vectors as files of each kind: the arguments of `prepare arrays` for each."""
    event, target, names = GOOD["event"], GOOD["target"], GOOD["sequence"]
    np.savez(folder / "all.npz", event=event, target=target, sequence=np.array(names))
    np.save(folder / "e.npy", event)
    np.save(folder / "t.npy", target)
    (folder / "names.txt").write_text("\n".join(names))
    save_file({"event": torch.tensor(event), "mine": torch.tensor(target)}, folder / "a.safetensors")
    table = pa.table({"event": list(event), "target": list(target), "sequence": names})
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(target.ravel()), D)
    (folder / "parts").mkdir()
    for n, rows in enumerate((slice(0, 11), slice(11, N))):
        part = {"event": list(event[rows]), "target": fixed[rows], "sequence": names[rows]}
        pq.write_table(pa.table(part), folder / "parts" / f"{n}.parquet")
    saved_dataset(folder / "hf", table)
    apart = ["--event", str(folder / "e.npy"), "--target", str(folder / "t.npy")]
    return {
        "npz": [str(folder / "all.npz")],
        "npy": [*apart, "--sequence", str(folder / "names.txt")],
        "safetensors": [
            *("--event", f"{folder}/a.safetensors:event", "--target", f"{folder}/a.safetensors:mine"),
            *("--sequence", str(folder / "names.txt")),
        ],
        "parquet": [str(folder / "a.parquet")],
        "folder": [str(folder / "parts")],
        "datasets": [str(folder / "hf")],
    }


def saved_dataset(folder: Path, table: pa.Table) -> None:
    """A folder as `datasets.Dataset.save_to_disk` writes it: an Arrow stream, its state and its description."""
    folder.mkdir()
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=7)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("kind", ["npz", "npy", "safetensors", "parquet", "folder", "datasets"])
def test_every_kind_of_file_gives_the_store_of_its_arrays(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = write_files(tmp_path)[kind]
    assert cli.run(["prepare", "arrays", *argv, "--out", str(tmp_path / "store"), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["pairs"], result["sequences"], result["rejected"]) == (N, 5, 0)
    assert Manifest.read(tmp_path / "store").fingerprint == write_store(tmp_path / "other", **GOOD).fingerprint


def test_sequences_in_files_are_those_of_lists(tmp_path: Path) -> None:
    given = ragged()
    expected = write_store(tmp_path / "lists", **given).fingerprint
    arrays = {}
    for side, sequences in given.items():
        arrays[side] = np.concatenate(sequences)
        arrays[f"{side}_lengths"] = np.array([len(tokens) for tokens in sequences])
    np.savez(tmp_path / "r.npz", **arrays)
    save_file({name: torch.tensor(array) for name, array in arrays.items()}, tmp_path / "r.safetensors")
    nested = {side: [tokens.tolist() for tokens in sequences] for side, sequences in given.items()}
    kind = pa.list_(pa.list_(pa.float32()))
    pq.write_table(pa.table({side: pa.array(rows, kind) for side, rows in nested.items()}), tmp_path / "r.parquet")
    for suffix in ("npz", "safetensors", "parquet"):
        argv = [str(tmp_path / f"r.{suffix}"), "--out", str(tmp_path / suffix)]
        assert cli.run(["prepare", "arrays", *argv]) == 0
        assert Manifest.read(tmp_path / suffix).fingerprint == expected


def test_bfloat16_becomes_float32_exactly(tmp_path: Path) -> None:
    values = torch.tensor(GOOD["event"]).bfloat16()
    save_file({"event": values, "target": torch.tensor(GOOD["target"])}, tmp_path / "b.safetensors")
    given = open_arrays(tmp_path / "b.safetensors", COLUMNS)
    assert given.arrays is not None
    np.testing.assert_array_equal(given.arrays["event"], values.float().numpy())


def npy_header(kind: str, shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": kind, "fortran_order": False, "shape": shape})
    return out.getvalue()


def damaged(folder: Path) -> None:
    np.save(folder / "objects.npy", OBJECTS, allow_pickle=True)
    np.savez(folder / "half.npz", event=GOOD["event"])
    tokens = {"event": np.ones((5, W)), "event_lengths": np.array([2, 2]), "target": np.ones((2, D))}
    np.savez(folder / "lengths.npz", **tokens)
    np.savez(folder / "number.npz", event=np.float32(1), target=GOOD["target"])
    whole = (folder / "half.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[:-30])
    (folder / "flipped.npz").write_bytes(whole[:200] + bytes([whole[200] ^ 255]) + whole[201:])
    (folder / "array.npz").write_bytes((folder / "objects.npy").read_bytes())
    with zipfile.ZipFile(folder / "huge.npz", "w") as archive:
        archive.writestr("event.npy", npy_header("<f4", (2**40, 4)))
    with zipfile.ZipFile(folder / "text.npz", "w") as archive:
        archive.writestr("event.npy", "text")
    header = npy_header("<f4", (2, 4))
    (folder / "header.npy").write_bytes(header.replace(b"}", b" "))
    kind = pa.map_(pa.string(), pa.float32())
    pq.write_table(pa.table({"event": pa.array([[("a", 1.0)]], kind), "target": [[1.0]]}), folder / "map.parquet")
    names = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    rows = {"event": [[1.0]], "target": [[1.0]], "sequence": names}
    pq.write_table(pa.table(rows), folder / "names.parquet")
    (folder / "cut.safetensors").write_bytes(b"\x10")
    (folder / "cut.parquet").write_bytes(b"PAR1")
    (folder / "a.csv").write_text("1,2")
    (folder / "empty").mkdir()
    (folder / "splits").mkdir()
    (folder / "splits" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    pq.write_table(pa.table({"event": [[1.0], None], "target": [[1.0], [2.0]]}), folder / "null.parquet")
    pq.write_table(pa.table({"event": [[[1.0], [1.0, 2.0]]], "target": [[1.0]]}), folder / "uneven.parquet")
    picture = pa.array([{"bytes": b"x", "path": "a.png"}])
    pq.write_table(pa.table({"event": picture, "target": [[1.0]]}), folder / "pictures.parquet")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--event", "objects.npy", "--target", "objects.npy"], "never unpickled"),
        (["half.npz"], "no array 'target'; it has event"),
        (["number.npz"], "'event' is one number; a column has one row for each pair"),
        (["cut.npz"], "cut.npz cannot be read: File is not a zip file"),
        (["flipped.npz"], "flipped.npz cannot be read: Bad CRC-32"),
        (["array.npz"], "array.npz cannot be read: File is not a zip file"),
        (["huge.npz"], "huge.npz cannot be read: Unable to allocate"),
        (["text.npz"], "text.npz cannot be read: 'event' in it is no array"),
        (["--event", "header.npy", "--target", "header.npy"], "header.npy cannot be read"),
        (["map.parquet"], "holds pictures or other structures"),
        (["names.parquet"], "names.parquet is damaged: 'utf-8' codec can't decode"),
        (["lengths.npz"], "has 5 tokens, its lengths add up to 4"),
        (["cut.safetensors"], "cut.safetensors cannot be read"),
        (["cut.parquet"], "cannot be read as a table"),
        (["a.csv"], "no file of arrays: .npy, .npz"),
        (["empty"], "neither a folder of Parquet files nor"),
        (["splits"], "holds several data sets; name one of them"),
        (["null.parquet"], "event has no value in row 1"),
        (["uneven.parquet"], "lists of different lengths within one value"),
        (["pictures.parquet"], "holds pictures or other structures"),
        (["null.parquet", "--target", "feature"], "no column 'feature'; it has event, target"),
        ([], "no file is named for 'event'"),
        (["nowhere.npz"], "nowhere.npz does not exist"),
        (["half.npz", "--target", "null.parquet:target"], "is a table: name it as the only file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    damaged(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["prepare", "arrays", *argv, "--out", "store"]) == 2
    said = capfd.readouterr().err.replace("\n", " ")
    assert words in said
    assert "Traceback" not in said


def test_names_of_windows_files_are_the_names_alone(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfa\r\na \r\nb\r\n")
    for name in ("e", "t"):
        np.save(tmp_path / f"{name}.npy", np.ones((3, 2), np.float32))
    columns = {"event": f"{tmp_path}/e.npy", "target": f"{tmp_path}/t.npy", "sequence": f"{tmp_path}/names.txt"}
    given = open_arrays(None, columns).arrays
    assert given is not None
    assert given["sequence"] == ["a", "a", "b"]


def test_rows_of_another_layout_than_those_before_are_refused(tmp_path: Path) -> None:
    rows = [{"event": np.ones(3), "target": np.ones(2)}, {"event": np.ones((2, 3)), "target": np.ones(2)}]
    with pytest.raises(InputError, match=r"row 1: event is float32 of shape \[2, 3\]"):
        write_store(tmp_path / "store", iter(rows))
