"""What `/v1` takes and gives, as the types that OpenAPI is written from. Unknown members are refused.

Shapes: B = pairs, W = width of a feature.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Wanted = Literal["aligned", "event_image", "aligned_image", "target_image"]


class Strict(BaseModel):
    """No unknown members, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class RawTensor(Strict):
    """Little-endian numbers."""

    data: str
    """Base64."""
    datatype: Literal["UINT8", "FP16", "BF16", "FP32"]
    """UINT8: pixels, scaled as the model's features are. Floats: values, from 0 to 1 for pixels."""
    shape: Annotated[list[int], Field(min_length=2, max_length=2)]
    """[B, W]."""


class Picture(Strict):
    """One image, resized as event images are."""

    png: str
    """Base64 of a PNG or JPEG file."""


class Recording(Strict):
    """Events of one sensor, drawn as event images are: the last event of a pixel wins."""

    recording: str
    """Base64 of an .npy file: a dictionary of the arrays x, y, t (µs) and p."""
    width: Annotated[int, Field(ge=1, le=4096)] = 640
    """Columns of the sensor."""
    height: Annotated[int, Field(ge=1, le=4096)] = 480
    """Rows of the sensor."""
    part: Literal["middle", "all"] = "middle"
    """The middle one of five images of equal event count, as in training; or one image of all events."""


def form(value: Any) -> str:
    """Which of the forms of an input this is."""
    if isinstance(value, dict):
        return next((key for key in ("png", "recording") if key in value), "data")
    return "rows"


Rows = Annotated[list[list[float]], Field(min_length=1)]
Event = Annotated[
    Annotated[Rows, Tag("rows")]
    | Annotated[RawTensor, Tag("data")]
    | Annotated[Picture, Tag("png")]
    | Annotated[Recording, Tag("recording")],
    Discriminator(form),
]
Target = Annotated[
    Annotated[Rows, Tag("rows")] | Annotated[RawTensor, Tag("data")] | Annotated[Picture, Tag("png")],
    Discriminator(form),
]


class AlignRequest(Strict):
    """Event features to align; with targets, also to verify."""

    event: Event
    """Numbers [B][W], raw numbers, an image, or an event recording."""
    target: Target | None = None
    """As many, of the target side."""
    theta: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.8
    """A pair is accepted where cos_sim > theta."""
    wanted: Annotated[list[Wanted] | None, Field(alias="return", default=None, max_length=4)]
    """What to send beside the verdicts; default: ["aligned"] from /v1/align, nothing from /v1/verify."""
    encoding: Literal["json", "base64", "png"] = "json"
    """Of `aligned`: numbers, raw FP32, or a picture with values cut to 0..1."""
    id: Annotated[str | None, Field(max_length=128)] = None
    """Echoed."""


class VerifyRequest(AlignRequest):
    """Event features and the targets they are judged by."""

    target: Target
    """As many, of the target side."""


class ModelName(BaseModel):
    """Who answered."""

    name: str
    version: str
    digest: str


class EncodedRow(BaseModel):
    """A row of raw numbers."""

    data: str
    datatype: Literal["FP32"]
    shape: list[int]


class Pair(BaseModel):
    """One pair's answer; members that were not asked for are left out."""

    cos_sim: float | None = None
    accepted: bool | None = None
    before: float | None = None
    aligned: list[float] | EncodedRow | str | None = None
    event_image: str | None = None
    aligned_image: str | None = None
    target_image: str | None = None


class AlignAnswer(BaseModel):
    """The pairs in their order."""

    id: str
    model: ModelName
    theta: float
    pairs: list[Pair]


class ProblemDocument(BaseModel):
    """RFC 9457, with `error` for clients of the v2 protocol."""

    type: str
    title: str
    status: int
    detail: str
    error: str
    code: str
    request_id: str
