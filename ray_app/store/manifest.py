"""Manifest of a pair store: features, source, counts, a checksum for each file, one fingerprint."""

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from ray_app.config.base import Config
from ray_app.errors import StoreError
from ray_app.store.atomic import sha256_bytes
from ray_app.store.filesystem import StorageDir, Where, open_storage

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]


class FeatureSpec(Config):
    """Layout of one feature's bytes: a little-endian array of this type and shape, times `scale`.

    A shape of two is a sequence: at most so many tokens of one width. Only the tokens that are there are stored;
    read, a feature is as wide as the longest, with zeros behind its end.
    """

    dtype: Literal["uint8", "float16", "bfloat16", "float32"]
    """Type of a stored number; bfloat16 is widened to float32 as it is read, which is exact."""
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    """Shape of one feature, for images (channels, height, width), for sequences (tokens, width)."""
    scale: float = Field(gt=0.0, allow_inf_nan=False)
    """Factor from a stored number to the value that an adapter sees."""

    def __str__(self) -> str:
        return f"width {self.width} ({self.dtype} {list(self.shape)} × {self.scale:.6g})"

    @property
    def width(self) -> int:
        """Numbers in one feature."""
        return math.prod(self.shape)

    @property
    def token_width(self) -> int | None:
        """Width of a token, where a feature is a sequence."""
        return self.shape[1] if len(self.shape) == 2 else None

    @property
    def read_as(self) -> Literal["uint8", "float16", "float32"]:
        """Type of a number in memory."""
        return "float32" if self.dtype == "bfloat16" else self.dtype

    @property
    def item_bytes(self) -> int:
        """Bytes of one stored number."""
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of one stored feature; of a sequence, of the longest."""
        return self.width * self.item_bytes


PIXELS = FeatureSpec(dtype="uint8", shape=(3, 224, 224), scale=1 / 255)
"""The reference's feature: an image, resized, divided by 255, channels first, flattened."""


class Features(Config):
    """The two sides of a pair."""

    event: FeatureSpec
    """The drafter's side."""
    target: FeatureSpec
    """The side that an adapter is trained to reach."""


class FileRecord(Config):
    """One file of a store, as it was written."""

    name: FileName
    """File name in the store's folder."""
    bytes: int = Field(ge=0)
    """Size."""
    sha256: Sha256
    """Checksum of the whole file."""


class PartRecord(FileRecord):
    """One Parquet file of pairs."""

    pairs: int = Field(ge=1)
    """Rows."""


class Manifest(Config):
    """`manifest.json`. Written last: a folder without it is no store."""

    format: Literal["ray_app pair store"] = "ray_app pair store"
    """Kind of this file."""
    version: Literal[1] = 1
    """Version of this layout."""
    pairs: int = Field(ge=1)
    """Pairs in all files."""
    sequences: int = Field(ge=1)
    """Sequences that have a pair."""
    rejected: int = Field(ge=0)
    """Pairs that could not be built: lines of rejected.jsonl."""
    durations: dict[str, Annotated[int, Field(ge=1)]]
    """Window lengths in the store: name to microseconds."""
    features: Features
    """Type, shape and scale of both features."""
    source: dict[str, Any]
    """Kind of source and every setting that shaped a pixel."""
    fingerprint: Sha256
    """Hash of all pairs and of their features' layout; independent of files and their order."""
    files: tuple[PartRecord, ...]
    """Parquet files, sorted by name."""
    rejected_file: FileRecord
    """The file of rejected pairs, empty where there are none."""
    checksum: str = ""
    """SHA-256 of this manifest as written with this field empty."""

    def sealed(self) -> "Manifest":
        """Return the same manifest with its checksum."""
        bare = self.model_copy(update={"checksum": ""})
        return self.model_copy(update={"checksum": sha256_bytes(_dump(bare))})

    def write(self, folder: StorageDir) -> None:
        """Make the folder a store."""
        folder.write(MANIFEST, _dump(self.sealed()))

    @staticmethod
    def read(where: Where) -> "Manifest":
        """Return the folder's manifest. StoreError: there is none, or a byte of it has changed."""
        folder = open_storage(where)
        path = folder.file(MANIFEST)
        try:
            data = folder.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            state = "has no manifest.json, so it is no finished pair store" if folder.exists() else "does not exist"
            raise StoreError(
                f"{folder} {state}; `ray-app prepare` makes one (again, if it was interrupted)."
            ) from None
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole file"
            raise StoreError(f"{path} is damaged or of another version ({where}: {first['msg']}).") from error
        if data != _dump(manifest) or manifest.sealed() != manifest:
            raise StoreError(f"{path} is damaged: its checksum does not hold. Prepare the store again.")
        return manifest


def content_fingerprint(sample_ids: Iterable[str], features: Features) -> str:
    """SHA-256 over the sorted identities of pairs and the features' types, shapes and scales."""
    digest = hashlib.sha256(json.dumps(features.model_dump(mode="json"), sort_keys=True).encode())
    for sample_id in sorted(sample_ids):
        digest.update(sample_id.encode())
    return digest.hexdigest()


def _dump(manifest: Manifest) -> bytes:
    return (json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n").encode()
