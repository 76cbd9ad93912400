"""Convert numbers, base64, pictures and recordings to rows of features, and back.

Shapes: B = pairs, W = width of a feature, H, W = rows and columns of a picture, N = events.
"""

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from ray_app.errors import InputError
from ray_app.events.render import equal_counts, event_image
from ray_app.sources.images import decode_image, resized
from ray_app.sources.npy import EVENT_COLUMNS, events_of, parse_npy
from ray_app.store.manifest import FeatureSpec

from .body import number_rows, parse_object
from .errors import ApiError
from .open_inference import Limits, raw_rows, same_rows
from .schemas import AlignRequest, Picture, RawTensor, Recording

NUM_IMAGES = 5
"""Event images per recording, by equal event count; the middle one is the event feature."""
MAX_PICTURE_PIXELS = 2**24
"""Largest number of pixels in a picture: 16.8 million."""


def parse_request(body: memoryview, kind: type[AlignRequest]) -> AlignRequest:
    """Parse a JSON body. ApiError 400: not JSON; 422: the member that does not fit."""
    try:
        return kind.model_validate(parse_object(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:6])
        raise ApiError(422, code_of(first), f"{where or 'the request'}: {first['msg']}.") from error


def code_of(error: Mapping[str, Any]) -> str:
    """Error code for the first member that does not fit."""
    if error["type"] == "extra_forbidden":
        return "unknown_field"
    return "theta" if error["loc"] and error["loc"][0] == "theta" else "field"


def rows_of(request: AlignRequest, limits: Limits) -> tuple[Tensor, Tensor | None]:
    """Events (B, E) and targets (B, D) in the types in which they were sent. ApiError 4xx: they do not fit."""
    event_BE = _rows(request.event, "event", limits)
    target_BD = None if request.target is None else _rows(request.target, "target", limits)
    same_rows(event_BE, target_BD)
    return event_BE, target_BD


def _rows(value: Any, name: str, limits: Limits) -> Tensor:
    spec: FeatureSpec = getattr(limits.features, name)
    if isinstance(value, RawTensor):
        data = memoryview(bytearray(unbase64(value.data, name)))
        return raw_rows(data, value.datatype, value.shape, name, limits)
    if isinstance(value, Picture):
        require_pixels(spec, name)
        return pixels(decode_picture(unbase64(value.png, name), name), spec)
    if isinstance(value, Recording):
        require_pixels(spec, name)
        return pixels(rendered(unbase64(value.recording, name), value), spec)
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


def require_pixels(spec: FeatureSpec, name: str) -> None:
    """ApiError 422 unless the model's features are images."""
    if len(spec.shape) != 3 or spec.shape[0] != 3:
        raise ApiError(
            422, "image", f"'{name}' features of this model are not images but have the shape {list(spec.shape)}."
        )


def decode_picture(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decode an image file to (H, W, 3). ApiError 422: unreadable."""
    try:
        return decode_image(data, f"the picture '{name}'", max_pixels=MAX_PICTURE_PIXELS)
    except InputError as error:
        raise ApiError(422, "image", f"{error}.") from error


def rendered(data: bytes, how: Recording) -> NDArray[np.uint8]:
    """Render the event image of a recording, (H, W, 3). ApiError 422: damaged, or outside of the sensor."""
    what = "the recording"
    try:
        content = parse_npy(data, what)
        for name in EVENT_COLUMNS:  # an array that claims more than was sent would be filled here
            column = content.get(name)
            if column is not None and not (isinstance(column, np.ndarray) and column.nbytes <= len(data)):
                raise InputError(f"{what}: '{name}' is not a plain array of the bytes sent")
        events = events_of(content, how.width, how.height, what)
        if how.part == "middle":
            events = equal_counts(events, NUM_IMAGES)[NUM_IMAGES // 2]
        return event_image(events)
    except InputError as error:
        raise ApiError(422, "recording", f"{error}.") from error


def pixels(image_HWC: NDArray[np.uint8], spec: FeatureSpec) -> Tensor:
    """Row (1, W) of an image: uint8 as event images are stored, or values from 0 to 1 for other features."""
    row = torch.from_numpy(resized(image_HWC, *spec.shape[1:]).reshape(1, -1).copy())
    return row if spec.dtype == "uint8" else row.float() / 255


def png_of(row_W: Tensor, spec: FeatureSpec) -> str:
    """Encode a row as base64 of a PNG. Values are clipped to 0..1; uint8 rows are pixels already."""
    values = row_W if row_W.dtype == torch.uint8 else (row_W.float().clamp(0, 1) * 255).round().to(torch.uint8)
    image_HWC = values.reshape(spec.shape).permute(1, 2, 0).contiguous().numpy()
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, "PNG", compress_level=1)
    return base64.b64encode(out.getvalue()).decode()
