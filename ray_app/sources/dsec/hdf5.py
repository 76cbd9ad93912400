"""HDF5 datasets that can be read whole: HDF5 itself fills what it does not find with zeros, without a word."""

import importlib
from math import prod
from pathlib import Path

import h5py

from ray_app.errors import InputError


def require_whole(dataset: h5py.Dataset, path: Path) -> None:
    """InputError: a filter is not installed, or a part of the values was never written or cannot be found.

    `path` is the dataset's file.
    """
    if missing := _missing_filters(dataset):
        raise InputError(
            f"{path}: '{dataset.name}' is compressed with the HDF5 filter {missing[0]}, which is not installed; "
            "`pip install hdf5plugin` brings it"
        )
    if flaw := _flaw(dataset, path):
        raise InputError(f"{path}: '{dataset.name}' {flaw}")


def _flaw(dataset: h5py.Dataset, path: Path) -> str:
    """Return why the dataset's values are not all its own, or an empty text."""
    if dataset.external:
        return f"keeps its values outside, in {dataset.external[0][0]!r}; copy them into the file (h5repack does)"
    if dataset.is_virtual:
        sources = dataset.virtual_sources()
        for source in sources:
            wanted = source.vspace.get_select_npoints()
            if _size_of_source(path, source.file_name, source.dset_name) < wanted:
                return (
                    f"is a virtual dataset, of which {wanted} values lie in '{source.dset_name}' of "
                    f"{source.file_name!r}, where they are not found"
                )
        mapped = sum(source.vspace.get_select_npoints() for source in sources)
        return "" if mapped >= dataset.size else f"has a source for {mapped} of {dataset.size} values only"
    if dataset.chunks:
        there = dataset.id.get_num_chunks()
        whole = prod(-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        return "" if there >= whole else f"holds {there} of its {whole} blocks; was its writing cut off?"
    compact = dataset.id.get_create_plist().get_layout() == h5py.h5d.COMPACT
    return "" if compact or not dataset.size or dataset.id.get_storage_size() else "was never written"


def _size_of_source(path: Path, file_name: str, dataset_name: str) -> int:
    """Number of values of a virtual dataset's source, looked for where HDF5 does; 0 if there is no whole one."""
    places = [path] if file_name == "." else [path.parent / file_name, path.resolve().parent / file_name]
    places += [] if file_name == "." else [path.parent / Path(file_name).name, Path(file_name)]
    for place in places:
        if place.is_file():
            try:
                with h5py.File(place, "r", locking="best-effort") as file:
                    found = file.get(dataset_name)
                    whole = isinstance(found, h5py.Dataset) and not _flaw(found, place)
                    return int(found.size) if whole else 0
            except (OSError, RuntimeError, KeyError, ValueError):
                return 0
    return 0


def _missing_filters(dataset: h5py.Dataset) -> list[int]:
    """Numbers of the HDF5 filters that the dataset needs and that nothing here provides."""
    plan = dataset.id.get_create_plist()
    needed = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    missing = [number for number in needed if not h5py.h5z.filter_avail(number)]
    if missing:
        try:
            importlib.import_module("hdf5plugin")  # registers Blosc, number 32001
        except ImportError:
            return missing
    return [number for number in missing if not h5py.h5z.filter_avail(number)]
