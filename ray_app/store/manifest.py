"""Manifest of a pair store: features, source, counts, a checksum for each file, one fingerprint."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BeforeValidator,
    FailFast,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from ray_app.config.base import Config
from ray_app.errors import CheckpointError, StoreError
from ray_app.parsing.json_text import require_few_members
from ray_app.parsing.text import printable
from ray_app.store.atomic import sha256_bytes
from ray_app.store.filesystem import StorageDir, Where, open_storage

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
SCRATCH = ".prepare"
"""Folder in a store that is not finished."""
IMAGE_TOKENS = "image_tokens"
"""Name of the adapter that `demo build` trains."""
OF_DRAFTERS = ("early_exit", "eagle_head", "event_tokens", "constant_tokens")
"""Names of the adapters that `demo draft` trains."""
NUM_REJECTED_NAMED = 3
"""Rejected pairs that an error names."""

Text = Annotated[str, BeforeValidator(printable)]
"""Text that may name a file of any name."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]


class EncoderRecord(Config):
    """Encoder that made a feature: what another machine needs to make the same one."""

    model: str
    """Class of the model."""
    sha256: Sha256
    """Checksum of its configuration and of every weight that was used."""
    layer: int
    """Layer whose output is taken, from the last one, which is -1."""
    pool: str
    """Tokens of a picture that are kept: none (all), mean, cls, or a grid such as 3x3 of means."""
    projector: bool
    """True if the tokens went through the projector to the language model."""
    dtype: Literal["float32", "float16", "bfloat16"]
    """Number format of the forward pass."""
    num_images: int = Field(ge=1)
    """Pictures of one feature."""
    preprocessing: dict[str, Any]
    """Steps from a picture to the numbers that the model takes."""

    def __str__(self) -> str:
        parts = [f"layer {self.layer}", f"pool {self.pool}", *(["projector"] if self.projector else [])]
        parts += [f"{self.num_images} pictures"] if self.num_images > 1 else []
        return f"{self.model}, {', '.join(parts)}, SHA-256 {self.sha256[:12]}…"


class FeatureSpec(Config):
    """Layout of one feature's bytes: a little-endian array of this type and shape, times `scale`.

    A shape of two is a sequence: at most so many tokens of one width. Only the tokens that are there are stored;
    read, a feature is as wide as the longest, with zeros behind its end.
    """

    dtype: Literal["uint8", "float16", "bfloat16", "float32"]
    """Type of a stored number; bfloat16 is widened to float32 as it is read, which is exact."""
    shape: Annotated[tuple[Annotated[int, Field(ge=1, lt=2**40)], ...], Field(max_length=8), FailFast()]
    """Shape of one feature, for images (channels, height, width), for sequences (tokens, width)."""
    scale: float = Field(gt=0.0, allow_inf_nan=False)
    """Factor from a stored number to the value that an adapter sees."""
    encoder: EncoderRecord | None = None
    """Encoder that made it; None for pixels, and where it is not known."""

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `encoder` out where there is none: stores of pixels keep their bytes and fingerprints."""
        return {key: value for key, value in handler(self).items() if value is not None}

    def __str__(self) -> str:
        maker = f" by {self.encoder}" if self.encoder else ""
        return f"width {self.width} ({self.dtype} {list(self.shape)} × {self.scale:.6g}){maker}"

    @property
    def width(self) -> int:
        """Numbers in one feature."""
        return math.prod(self.shape)

    @property
    def kind(self) -> Literal["images", "sequences", "vectors"]:
        """Kind of the feature, by its shape."""
        kinds: dict[int, Literal["images", "sequences"]] = {3: "images", 2: "sequences"}
        return kinds.get(len(self.shape), "vectors")

    @property
    def token_width(self) -> int | None:
        """Width of a token, where a feature is a sequence."""
        return self.shape[1] if len(self.shape) == 2 else None

    @property
    def is_ragged(self) -> bool:
        """True if features differ in length: sequences, but for those of an encoder, which always gives as many."""
        return self.token_width is not None and self.encoder is None

    @property
    def value_range(self) -> tuple[float, float] | None:
        """Least and largest value that an adapter sees, where the stored type bounds them: 0 and 1 for pixels."""
        return (0.0, 255 * self.scale) if self.dtype == "uint8" else None

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

    def encoders(self) -> dict[str, str]:
        """Return in words what made each side that an encoder made."""
        sides = {"event": self.event.encoder, "target": self.target.encoder}
        return {side: str(encoder) for side, encoder in sides.items() if encoder}


class CheckpointDocument(Config, extra="ignore"):
    """Part of a checkpoint's config.json that says which features it takes."""

    adapter: dict[str, Any]
    """Settings of the adapter."""
    features: Features
    """Type, shape and scale of the features it was trained on."""


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
    durations: Annotated[dict[str, Annotated[int, Field(ge=1)]], BeforeValidator(require_few_members)]
    """Window lengths in the store: name to microseconds."""
    features: Features
    """Type, shape and scale of both features."""
    source: dict[str, Any]
    """Kind of source and every setting that shaped a pixel."""
    fingerprint: Sha256
    """Hash of all pairs and of their features' layout; independent of files and their order."""
    files: Annotated[tuple[PartRecord, ...], FailFast()]
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


def require_claimable(folder: StorageDir) -> set[str]:
    """Return names in a folder for a new store: none, or those of a prepare that was interrupted.

    StoreError: it holds a store, or something else.
    """
    try:
        existing = folder.listdir()
    except FileNotFoundError:
        return set()
    except NotADirectoryError:
        existing = {""}
    if MANIFEST in existing:
        raise StoreError(
            f"{folder} already holds a complete pair store (see `ray-app inspect`); name another folder for --out."
        )
    if existing and SCRATCH not in existing:
        raise StoreError(f"{folder} already holds something else; --out must be a new or empty folder.")
    return existing


def require_same_features(trained: Features, given: Features, checkpoint: str) -> None:
    """Raise CheckpointError unless a store has the features that a checkpoint was trained on."""
    for side in ("event", "target"):
        was, now = getattr(trained, side), getattr(given, side)
        if was != now:
            raise CheckpointError(
                f"{checkpoint} was trained on {side} features of {was}, the store has {now}. Use the store it was "
                "trained for, or train again."
            )


def require_target_features(strategy: str | None, checkpoint: str) -> None:
    """Raise CheckpointError for an adapter of image tokens, which a language model reads: it is not aligned."""
    if strategy == IMAGE_TOKENS:
        raise CheckpointError(
            f"{checkpoint} makes image tokens for a language model, and no target features to compare or to serve. "
            "`ray-app demo build` joins it with that model into a target; name that: `ray-app demo evaluate TARGET`, "
            "`ray-app demo decode --target TARGET`."
        )
    if strategy in OF_DRAFTERS:
        raise CheckpointError(
            f"{checkpoint} ({strategy}) is part of a drafter, and makes no target features to compare or to serve. "
            "`ray-app demo draft` joins such parts; name its folder: `ray-app decode --drafter FOLDER`."
        )


def content_fingerprint(sample_ids: Iterable[str], features: Features) -> str:
    """SHA-256 over the sorted identities of pairs and the features' types, shapes and scales."""
    digest = hashlib.sha256(json.dumps(features.model_dump(mode="json"), sort_keys=True).encode())
    for sample_id in sorted(sample_ids):
        digest.update(sample_id.encode())
    return digest.hexdigest()


class RejectedLine(Config):
    """One line of rejected.jsonl: a pair that is not in the store."""

    input: Text
    """File or drive that it should have come from."""
    position: Text
    """Position in the input."""
    reason: Text
    """Reason of the rejection."""


def rejected_lines(lines: Sequence[RejectedLine]) -> bytes:
    """Return the bytes of rejected.jsonl."""
    return "".join(json.dumps(line.model_dump(), ensure_ascii=False) + "\n" for line in lines).encode()


def require_few_rejected(
    folder: StorageDir, lines: Sequence[RejectedLine], total: int, max_rejected_fraction: float
) -> None:
    """StoreError if more than a fraction of all pairs is rejected, or all are; the lines are written first."""
    if len(lines) <= max_rejected_fraction * total and len(lines) < total:
        return
    folder.write(REJECTED, rejected_lines(lines))
    first = "; ".join(f"{line.input}, {line.position}: {line.reason}" for line in lines[:NUM_REJECTED_NAMED])
    raise StoreError(
        f"{len(lines)} of {total} pairs could not be built ({len(lines) / max(total, 1):.1%}; "
        f"--max-rejected-fraction allows {max_rejected_fraction:.1%}). The first: {first}. All are in "
        f"{folder.file(REJECTED)}. What was built stays: fix the input or allow more, and start again."
    )


def _dump(manifest: Manifest) -> bytes:
    return (json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n").encode()
