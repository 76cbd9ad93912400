"""A `.pt` file of torch.save, read without unpickling: its values as a tree, tensors as torch.save describes them.

The pickle's opcodes are walked, nothing that it names is looked up or called, and a tensor takes the bytes that the
file has for it, never those that it claims.
"""

import math
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_app.errors import CheckpointError
from ray_app.parsing.pickle_tree import Call, Name, Reference, parse_pickle, type_name
from ray_app.parsing.zip_archive import ZIP_ERRORS, open_zip

LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of what torch.save wrote before torch 1.6: not a zip archive, but pickles one after the other."""
PICKLE = "/data.pkl"
DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16}
"""Types of weights by the names of their storages."""
PLAIN_NAMES = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)|torch\.(Size|device|[A-Z]\w*Storage)"
    r"|torch\.(bool|b?float\d+|u?int\d+)",
    re.ASCII,
)
"""Names that torch.save writes for tensors and their types."""
MAX_PICKLE_BYTES = 2**24
"""Largest pickle; the numbers of tensors are not in it, and the reference's has a few kilobytes."""
MAX_OPCODES = 300_000
"""Most opcodes; the reference's has some hundred."""
CHUNK_BYTES = 2**20


class TorchArchive:
    """A whole archive of torch.save, its checksums verified."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        """CheckpointError: damaged, or no archive of torch.save."""
        records = archive.infolist()
        found = [record for record in records if record.filename.endswith(PICKLE)]
        if not found:
            raise CheckpointError(f"{path} is a zip archive, but not one of torch.save: it has no data.pkl.")
        if packed := [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]:
            raise CheckpointError(f"{path}: {packed[0]} is compressed, which torch.save never does.")
        if damaged := archive.testzip():
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not hold.")
        self._path, self._archive = path, archive
        self._folder = found[0].filename.removesuffix(PICKLE)
        self._storages: dict[str, bytearray] = {}

    def tree(self, is_config: Callable[[Name], bool]) -> Any:
        """Return the file's values: dictionaries, lists and plain values, and calls as they were written.

        CheckpointError: it asks for more than tensors and `is_config` names, or is no tree of plain values.
        """
        asked: list[Name] = []

        def note(name: Name) -> bool:
            asked.append(name)
            return True

        flaw, tree = None, None
        try:
            data = self._read(self._folder + PICKLE, MAX_PICKLE_BYTES)
            tree = parse_pickle(memoryview(data), note, MAX_OPCODES)
        except ValueError as error:
            flaw = error
        foreign = {str(name) for name in asked if not PLAIN_NAMES.fullmatch(str(name)) and not is_config(name)}
        if foreign:
            raise CheckpointError(
                f"{self._path} asks for {', '.join(sorted(foreign))[:500]}; nothing was loaded, because only plain "
                "values, tensors and the reference's config are accepted."
            )
        if flaw:
            raise CheckpointError(f"{self._path} cannot be read as a torch checkpoint: {flaw}.") from flaw
        return items_of(tree)

    def tensor(self, value: Any, where: str) -> Tensor:
        """Return the tensor that a part of the tree describes. CheckpointError, naming `where`: no whole weight."""
        if isinstance(value, Call) and value.name.name == "_rebuild_parameter" and value.args:
            value = value.args[0]
        match value:
            case Call(
                name=Name(name="_rebuild_tensor_v2"),
                args=(
                    Reference(id=("storage", Name(name=kind), str(key), _, _)),
                    offset,
                    tuple(size),
                    tuple(stride),
                    *_,
                ),
            ):
                pass
            case _:
                raise CheckpointError(f"{self._path}: {where} is a {type_name(value)}; it must be a tensor.")
        if kind not in DTYPES:
            raise CheckpointError(f"{self._path}: {where} is of {kind}; it must be one of {', '.join(DTYPES)}.")
        if any(type(number) is not int or number < 0 for number in (offset, *size)):
            raise CheckpointError(f"{self._path}: {where} has no whole shape.")
        contiguous = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
        if any(
            n > 1 and step != whole for n, step, whole in zip(size, stride, contiguous, strict=False)
        ):  # an expanded tensor claims more memory than the file has bytes
            raise CheckpointError(f"{self._path}: {where} is not contiguous, as the weights of a module are.")
        first, count = offset * DTYPES[kind].itemsize, math.prod(size)
        try:
            if key not in self._storages:
                self._storages[key] = self._read(f"{self._folder}/data/{key}")
            data = memoryview(self._storages[key])[first:]
            return torch.frombuffer(data, dtype=DTYPES[kind], count=count).reshape(size)
        except (*ZIP_ERRORS, KeyError) as error:
            raise CheckpointError(f"{self._path}: {where} has not the bytes of its shape {list(size)}.") from error

    def _read(self, name: str, limit: int | None = None) -> bytearray:
        """Return a record's bytes. ValueError: more than `limit`."""
        data = bytearray()
        with self._archive.open(name) as file:
            while chunk := file.read(CHUNK_BYTES):
                data += chunk
                if limit is not None and len(data) > limit:
                    raise ValueError(f"its pickle has more than {limit:,} bytes")
        return data


@contextmanager
def open_torch_archive(path: Path) -> Iterator[TorchArchive]:
    """Open a `.pt` file, reading every byte of it. CheckpointError: no whole archive of torch.save."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; name a .pt file of the reference.")
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY))
            if start == LEGACY:
                raise CheckpointError(
                    f"{path} was written by torch before 1.6, as bare pickles; save it again with a newer torch."
                )
            if not zipfile.is_zipfile(file):
                if start.startswith(b"PK\x03\x04"):
                    raise CheckpointError(f"{path} is truncated: the directory at its end is missing. Copy it again.")
                raise CheckpointError(f"{path} is not a torch checkpoint, which is a zip archive of torch.save.")
            with open_zip(file) as archive:
                yield TorchArchive(path, archive)
    except ZIP_ERRORS as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(f"{path} is damaged: {text}.") from error


def items_of(tree: Any) -> Any:
    """Return an ordered dictionary, which is pickled as a call, as a dictionary; anything else as it is."""
    ordered = isinstance(tree, Call) and tree.name.name == "OrderedDict" and tree.args == ()
    return tree.items if ordered else tree
