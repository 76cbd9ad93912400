"""Event recordings as `.npz` archives, a plain array for each column: nothing is unpickled, sizes are bounded."""

import io
import zipfile
from typing import Any

from ray_app.errors import InputError
from ray_app.parsing.zip_archive import ZIP_ERRORS, open_zip
from ray_app.sources.npy import EVENT_COLUMNS, TYPES, array_from, parse_header, parse_npy

INFLATED_BYTES = 32 * 2**20
"""An archive may inflate to this many bytes, or to twice its own: the events of a second of a busy drive."""
BYTES_OF_AN_EVENT = 12
"""An event counts as this many bytes at least: narrow columns are widened when they are checked."""
CHUNK_BYTES = 2**18
ZIP_MAGIC = b"PK\x03\x04"


def parse_recording(data: bytes | memoryview, where: str) -> dict[str | int, Any]:
    """Return the columns of an `.npz` or `.npy` file's bytes, by how they begin. InputError: neither is read."""
    return parse_npz(data, where) if bytes(data[:4]) == ZIP_MAGIC else parse_npy(data, where)


def parse_npz(data: bytes | memoryview, where: str) -> dict[str | int, Any]:
    """Return the event columns of an `.npz` file's bytes, as numpy.savez and savez_compressed write them.

    InputError: damaged, no plain arrays, or more bytes when inflated than are read.
    """
    limit = left = max(INFLATED_BYTES, 2 * len(data))
    columns: dict[str | int, Any] = {}
    try:
        with open_zip(io.BytesIO(data)) as archive:
            for name in EVENT_COLUMNS:
                if f"{name}.npy" not in archive.NameToInfo:
                    has = ", ".join(each[:40] for each in archive.namelist()[:20]) or "none"
                    raise InputError(f"{where}: no column {name}; the archive has {has}, and needs x, y, t, p")
                member = memoryview(_inflated(archive, f"{name}.npy", left))
                code, shape, fortran, at = parse_header(member)
                if code[-2:] not in TYPES:
                    raise InputError(f"{where}: '{name}' is of type {code}, which is none of {', '.join(TYPES)}")
                dtype = TYPES[code[-2:]]
                dtype = dtype.newbyteorder(">") if code[0] == ">" else dtype
                columns[name] = array_from(member[at:], dtype, shape, fortran)
                left -= len(member)
                if BYTES_OF_AN_EVENT * columns[name].size > limit:
                    raise ValueError(_too_large())
    except ZIP_ERRORS as error:
        raise InputError(f"{where} is no .npz file that can be read: {error}") from error
    return columns


def _inflated(archive: zipfile.ZipFile, name: str, limit: int) -> bytearray:
    """Return a member's bytes. ValueError: more than `limit`, or another compression than savez_compressed has."""
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed with method {info.compress_type}; only deflate is read")
    out = bytearray()
    with archive.open(info) as member:
        while chunk := member.read(CHUNK_BYTES):
            out += chunk
            if len(out) > limit:
                raise ValueError(_too_large())
    return out


def _too_large() -> str:
    return (
        f"its columns take more than {INFLATED_BYTES >> 20} MiB and twice its size when inflated; send fewer events"
    )
