"""Convert numbers, base64, pictures and recordings to rows of features, or to what an encoder takes, and back.

Shapes: B = pairs, W = width of a feature, H, W = rows and columns of a picture, N = events, I = pictures of a pair,
C = 3 colours, h, w = pixels that an encoder takes.
"""

import asyncio
import base64
import binascii
import io
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from ray_app.encoders.preprocessing import ImagePreprocessing
from ray_app.store.manifest import FeatureSpec

from ..decoding.job import DecodeJob
from .body import number_rows, parse_object, present
from .errors import ApiError
from .open_inference import Limits, raw_rows, same_rows
from .schemas import AlignRequest, Picture, RawTensor, Recording

Decode = Callable[[DecodeJob, bytes | memoryview], Awaitable[NDArray[np.uint8]]]
"""Decodes a picture or recording in another process."""
MAX_MEMBERS = 20
"""Largest number of members of an object in a request; each unknown one would cost an error of its own."""


def parse_request(body: memoryview, kind: type[AlignRequest]) -> AlignRequest:
    """Parse a JSON body. ApiError 400: not JSON; 422: the member that does not fit."""
    try:
        document = few_members(parse_object(body))
        forms = {name: few_members(value) for name, value in document.items() if isinstance(value, dict)}
        return kind.model_validate(document | forms)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"][:6])
        raise ApiError(422, code_of(first), f"{where or 'the request'}: {first['msg']}.") from error


def few_members(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members that are not null. ApiError 422: so many that most are unknown, each of which costs time."""
    if len(document) > MAX_MEMBERS:
        detail = (
            f"an object has {len(document):,} members, the limit is {MAX_MEMBERS}; leave out those of no meaning."
        )
        raise ApiError(422, "unknown_field", detail)
    return present(document)


def code_of(error: Mapping[str, Any]) -> str:
    """Error code for the first member that does not fit."""
    if error["type"] == "extra_forbidden":
        return "unknown_field"
    return "theta" if error["loc"] and error["loc"][0] == "theta" else "field"


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures of pairs, as a side's encoder takes them."""

    images_BIChw: NDArray[np.uint8]
    """Resized and cropped."""

    def __len__(self) -> int:
        """B."""
        return len(self.images_BIChw)


Rows = Tensor | Pictures
"""Features (B, W), or pictures that the replica encodes."""


async def rows_of(request: AlignRequest, limits: Limits, decode: Decode) -> tuple[Rows, Rows | None]:
    """Events and targets in the types in which they were sent. ApiError 4xx: they do not fit."""
    event_BE = await _rows(request.event, "event", limits, decode)
    target_BD = None if request.target is None else await _rows(request.target, "target", limits, decode)
    same_rows(event_BE, target_BD)
    return event_BE, target_BD


async def _rows(value: Any, name: str, limits: Limits, decode: Decode) -> Rows:
    if not isinstance(value, Picture | Recording):
        return await asyncio.to_thread(_numbers, value, name, limits)
    text = value.png if isinstance(value, Picture) else value.recording
    return await row_of_file(value, await asyncio.to_thread(unbase64, text, name), name, limits, decode)


async def row_of_file(
    value: Picture | Recording, data: bytes | memoryview, name: str, limits: Limits, decode: Decode
) -> Rows:
    """Return one row of the bytes of a picture or a recording. ApiError 422: the model does not take such a file."""
    spec: FeatureSpec = getattr(limits.features, name)
    images_Chw = await decode(decode_job(spec, name, value, limits), data)
    if spec.encoder:
        return Pictures(images_Chw.reshape(1, -1, 3, *images_Chw.shape[1:]))
    return pixels(images_Chw, spec)


def _numbers(value: Any, name: str, limits: Limits) -> Tensor:
    spec: FeatureSpec = getattr(limits.features, name)
    if isinstance(value, RawTensor):
        data = memoryview(bytearray(unbase64(value.data, name)))
        return raw_rows(data, value.datatype, value.shape, name, limits)
    if len(value) > limits.max_batch:
        raise ApiError(
            422,
            "batch_limit",
            f"'{name}' has {len(value)} rows, the limit is {limits.max_batch}; send several requests.",
        )
    return number_rows(value, spec.width, name)


def unbase64(text: str, name: str) -> bytes:
    """Decode base64. ApiError 422 if it is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(422, "base64", f"'{name}' is not base64: {error}.") from error


def decode_job(spec: FeatureSpec, name: str, value: Picture | Recording, limits: Limits) -> DecodeJob:
    """Return what a decoder is asked for.

    ApiError 422: the model's features are neither images nor those of an encoder at hand, which takes so many.
    """
    how: dict[str, Any] = {"name": name}
    if spec.encoder is None:
        require_pixels(spec, name)
        rows, columns = spec.shape[1:]
    else:
        if name not in limits.encoders:
            raise ApiError(
                422,
                "encoder",
                f"'{name}' features of this model come from {spec.encoder}, which this endpoint does not have: start "
                f"it with --{name}-encoder DIR, or send features of {spec.width:,} numbers.",
            )
        steps, num_images = ImagePreprocessing.of(spec.encoder.preprocessing), spec.encoder.num_images
        if num_images > 1 and isinstance(value, Picture):
            instead = "a recording" if name == "event" else f"features of {spec.width:,} numbers"
            raise ApiError(
                422, "image", f"the encoder of '{name}' takes {num_images} pictures together; send {instead}."
            )
        rows, columns = steps.size
        how |= {"num_images": num_images, "steps": steps.describe()}
    if isinstance(value, Picture):
        return DecodeJob("image", rows, columns, **how)
    sensor = value.width, value.height
    return DecodeJob("recording", rows, columns, sensor, middle=value.part == "middle", **how)


def require_pixels(spec: FeatureSpec, name: str) -> None:
    """ApiError 422 unless the model's features are images."""
    if len(spec.shape) != 3 or spec.shape[0] != 3:
        raise ApiError(
            422, "image", f"'{name}' features of this model are not images but have the shape {list(spec.shape)}."
        )


def pixels(image_CHW: NDArray[np.uint8], spec: FeatureSpec) -> Tensor:
    """Row (1, W) of an image: uint8 as event images are stored, or values from 0 to 1 for other features."""
    row = torch.from_numpy(image_CHW.reshape(1, -1))
    return row if spec.dtype == "uint8" else row.float() / 255


def png_of(row_W: Tensor, spec: FeatureSpec) -> str:
    """Encode a row as base64 of a PNG. Values are clipped to 0..1; uint8 rows are pixels already."""
    values = row_W if row_W.dtype == torch.uint8 else (row_W.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return png_of_image(values.reshape(spec.shape).numpy())


def png_of_image(image_CHW: NDArray[np.uint8]) -> str:
    """Encode an image as base64 of a PNG."""
    image_HWC = np.ascontiguousarray(image_CHW.transpose(1, 2, 0))
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, "PNG", compress_level=1)
    return base64.b64encode(out.getvalue()).decode()
