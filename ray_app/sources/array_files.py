"""Columns of features from files: .npy, .npz, .safetensors, Parquet, or a folder of Hugging Face `datasets`.

A column is named `NAME` (in the command's own file or folder), `FILE.npy`, `FILE.txt` (a name on each line), or
`FILE:NAME`. Arrays in .npz and .safetensors with an array `NAME_lengths` hold sequences one after the other, so many
rows for each.

Shapes: N = pairs, W = token width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ray_app.errors import InputError
from ray_app.listing import data_in
from ray_app.parsing.json_text import parse_object
from ray_app.parsing.text import read_utf8
from ray_app.parsing.zip_archive import ZIP_ERRORS, open_zip

HEADER_ERRORS = (TokenError, SyntaxError)
"""Exceptions of NumPy for the damaged header of an array, in addition to those of a damaged file."""
BATCH_ROWS = 64
"""Rows of a table that are decoded at a time."""


@dataclass(frozen=True, slots=True)
class ArrayInput:
    """Columns found: as arrays, or as rows that are read one after the other."""

    arrays: dict[str, Any] | None
    """Columns by name, each as long as there are pairs."""
    rows: Iterator[dict[str, Any]] | None
    """Rows of a table, by name; instead of `arrays`."""
    pairs: int
    """Number of pairs."""
    files: tuple[Path, ...]
    """Files that were opened."""


def open_arrays(path: Path | None, columns: Mapping[str, str]) -> ArrayInput:
    """Open the columns, `{"event": NAME, …}`, of which all but event and target may be missing in `path`.

    InputError: a file that cannot be read as its suffix says, a name that is not in it, or Python objects in it.
    """
    if path is not None and is_table(path):
        return open_table(path, columns)
    found, files = {}, []
    for role, name in columns.items():
        source, _, inner = name.rpartition(":")
        where = Path(source or name) if source or Path(name).suffix in (".npy", ".txt") else path
        if where is None:
            if role in ("event", "target"):
                raise InputError(f"no file is named for '{name}'; name one, or give --{role} FILE.npy or FILE:NAME")
            continue
        if is_table(where):
            raise InputError(f"{where} is a table: name it as the only file, and its columns by --event and --target")
        column = read_column(where, inner or name)
        if column is not None:
            found[role] = column
            files.append(where)
        elif role in ("event", "target") or source:
            raise InputError(f"{where} has no array '{inner or name}'; it has {', '.join(names_in(where)) or 'none'}")
    return ArrayInput(found, None, len(found["event"]), tuple(dict.fromkeys(files)))


def is_table(path: Path) -> bool:
    """Return True for a Parquet file or a folder."""
    return path.is_dir() or path.suffix == ".parquet"


def read_column(path: Path, name: str) -> Any:
    """Return an array, or a list of arrays (tokens, W); None if the file has none of this name."""
    try:
        if path.suffix == ".txt":
            return [line.strip() for line in read_utf8(path).splitlines()]
        if path.suffix != ".npy" and name not in names_in(path):
            return None
        column, lengths = _array_in(path, name), f"{name}_lengths"
        if not column.ndim:
            raise InputError(f"{path}: '{name}' is one number; a column has one row for each pair")
        return cut(column, _array_in(path, lengths), f"{path}: {name}") if lengths in names_in(path) else column
    except (*ZIP_ERRORS, *HEADER_ERRORS, SafetensorError) as error:
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise InputError(
                f"{path} holds Python objects (dtype object), which are never unpickled; save plain arrays, "
                "sequences of different lengths as one array (all tokens, width) with an array NAME_lengths in .npz"
            ) from error
        raise InputError(f"{path} cannot be read: {error}") from error


def names_in(path: Path) -> list[str]:
    """Return the names of a file's arrays. InputError: a suffix that is not known."""
    if path.suffix == ".npz":
        with path.open("rb") as file, open_zip(file) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            return list(file.keys())
    if path.suffix in (".npy", ".txt"):
        return [path.stem]
    raise InputError(
        f"{path} is no file of arrays: .npy, .npz, .safetensors, .parquet and folders of Hugging Face datasets are"
    )


def _array_in(path: Path, name: str) -> NDArray[Any]:
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            array = archive[name]
        if not isinstance(array, np.ndarray):
            raise ValueError(f"'{name}' in it is no array")
        return array
    with safe_open(path, "np") as file:
        if file.get_slice(name).get_dtype() != "BF16":
            return file.get_tensor(name)
    with safe_open(path, "pt") as file:  # numpy has no bfloat16; float32 holds every one exactly
        return file.get_tensor(name).float().numpy()


def cut(tokens: NDArray[Any], lengths: NDArray[Any], what: str) -> list[NDArray[Any]]:
    """Cut (all tokens, W) into sequences. InputError: the lengths do not add up."""
    if tokens.ndim != 2 or lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 1).any():
        raise InputError(
            f"{what} needs the shape (all tokens, width), and its lengths are whole numbers of 1 or more"
        )
    ends = np.cumsum(lengths)
    if not len(ends) or ends[-1] != len(tokens):
        raise InputError(f"{what} has {len(tokens)} tokens, its lengths add up to {int(lengths.sum())}")
    return np.split(tokens, ends[:-1])


def open_table(path: Path, columns: Mapping[str, str]) -> ArrayInput:
    """Open columns of a Parquet file, a folder of them, or a saved Hugging Face data set."""
    files = table_files(path)
    try:
        tables = [_Table(file) for file in files]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as a table: {str(error).splitlines()[0]}") from error
    has = tables[0].schema.names
    missing = [name for role, name in columns.items() if name not in has and role in ("event", "target")]
    if missing:
        raise InputError(
            f"{path} has no column '{missing[0]}'; it has {', '.join(has)}; name others by --event and --target"
        )
    wanted = {role: name for role, name in columns.items() if name in has}
    rows = (row for table in tables for row in table.rows(wanted))
    return ArrayInput(None, rows, sum(table.num_rows for table in tables), tuple(files))


def table_files(path: Path) -> list[Path]:
    """Return the files of a table. InputError: a folder that is none."""
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if (child / "state.json").is_file())
        raise InputError(
            f"{path} holds several data sets; name one of them: {', '.join(str(path / s) for s in splits)}"
        )
    if (path / "state.json").is_file():
        try:
            state = parse_object((path / "state.json").read_bytes())
            files = [path / Path(item["filename"]).name for item in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path / 'state.json'} is not that of a saved data set: {error}") from error
        if state.get("_indices_data_files"):
            raise InputError(f"{path} is a view on other rows; save it after `dataset.flatten_indices()`")
    else:
        files = [file for file in data_in(path) if file.suffix == ".parquet"]
    if not files:
        raise InputError(f"{path} is neither a folder of Parquet files nor of Hugging Face `Dataset.save_to_disk`")
    return files


class _Table:
    """One Parquet file, or one Arrow stream as `datasets` saves it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix == ".parquet":
            self._parquet = pq.ParquetFile(path)
            self.schema, self.num_rows = self._parquet.schema_arrow, self._parquet.metadata.num_rows
            self._batches: list[pa.RecordBatch] = []
        else:
            with pa.memory_map(str(path)) as file:
                self._batches = list(pa.ipc.open_stream(file))  # views of the mapped file
            self.schema = self._batches[0].schema if self._batches else pa.schema([])
            self.num_rows = sum(batch.num_rows for batch in self._batches)

    def rows(self, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Yield rows of some columns, `{role: name}`. InputError: damaged, or a value that is no array."""
        try:
            for batch in self._batches or self._parquet.iter_batches(BATCH_ROWS, columns=list(columns.values())):
                for n in range(batch.num_rows):
                    yield {
                        role: _value(batch.column(name), n, f"{self.path.name}: {name}")
                        for role, name in columns.items()
                    }
        except (OSError, ValueError, pa.ArrowException) as error:
            raise InputError(f"{self.path} is damaged: {str(error).splitlines()[0]}") from error


def _value(column: pa.Array, row: int, what: str) -> Any:
    """Return one value: a number, a text, or nested lists as an array."""
    if isinstance(column, pa.ExtensionArray):  # Array2D and the like of `datasets`
        column = column.storage
    cell = column[row]
    if not cell.is_valid:
        raise InputError(f"{what} has no value in row {row} of a batch; leave such rows out")
    if pa.types.is_struct(column.type) or pa.types.is_map(column.type):
        raise InputError(f"{what} holds pictures or other structures; features are lists of numbers")
    return _nested(cell.values, what) if hasattr(cell, "values") else cell.as_py()


def _nested(values: pa.Array, what: str) -> NDArray[Any]:
    """Return lists of lists of equal lengths as an array."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if values.null_count:
        raise InputError(f"{what} has a list with empty entries (null)")
    if not hasattr(values, "flatten") or not pa.types.is_nested(values.type):
        return values.to_numpy(zero_copy_only=False)
    inner = _nested(values.flatten(), what)
    if len(values) == 0 or len(inner) % len(values):
        raise InputError(f"{what} has lists of different lengths within one value; tokens need one width")
    lengths = pc.list_value_length(values)
    if len(lengths.unique()) > 1:
        raise InputError(f"{what} has lists of different lengths within one value; tokens need one width")
    return inner.reshape(len(values), -1, *inner.shape[1:])
