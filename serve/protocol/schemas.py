"""Requests and answers as the types from which FastAPI writes OpenAPI. `/v1` also parses requests with them.

Shapes: B = pairs, W = width of a feature.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PlainValidator, Tag, with_config
from typing_extensions import TypedDict

from ray_app.datatypes import Datatype

Output = Literal["aligned", "cos_sim", "accepted"]
Wanted = Literal["aligned", "event_image", "aligned_image", "target_image"]


class Strict(BaseModel):
    """No unknown members, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class RawTensor(Strict):
    """Little-endian numbers."""

    data: str
    """Base64."""
    datatype: Datatype
    """UINT8: pixels, scaled as the model's features are. Floats: values, from 0 to 1 for pixels."""
    shape: Annotated[list[int], Field(min_length=2, max_length=2, fail_fast=True)]
    """[B, W]."""


class Picture(Strict):
    """One image, resized like event images, or encoded."""

    png: str
    """Base64 of a PNG, JPEG or WebP file."""


class Recording(Strict):
    """Events of one sensor, rendered as event images: the last event of a pixel wins."""

    recording: str
    """Base64 of an .npz file of the arrays x, y, t (µs) and p, or of an .npy file of a dictionary of them."""
    width: Annotated[int, Field(ge=1, le=4096)] = 640
    """Columns of the sensor."""
    height: Annotated[int, Field(ge=1, le=4096)] = 480
    """Rows of the sensor."""
    part: Literal["middle", "all"] = "middle"
    """The middle one of five images of equal event count, as in training; or one image of all events. An encoder that
    takes several event images gets as many, whatever this says."""


def form(value: Any) -> str:
    """Tag of the form in which an input was sent."""
    if isinstance(value, dict):
        return next((key for key in ("png", "recording") if key in value), "data")
    return "rows"


def lists(value: Any) -> Any:
    """Return rows as they are, unread and uncopied. ValueError: no list of lists."""
    if not isinstance(value, list) or not value or not all(type(row) is list for row in value):
        raise ValueError("must be a list of rows, each a list of numbers")
    return value


NumberRows = Annotated[list[list[float]], PlainValidator(lists, json_schema_input_type=list[list[float]])]
Event = Annotated[
    Annotated[NumberRows, Tag("rows")]
    | Annotated[RawTensor, Tag("data")]
    | Annotated[Picture, Tag("png")]
    | Annotated[Recording, Tag("recording")],
    Discriminator(form),
]
Target = Annotated[
    Annotated[NumberRows, Tag("rows")] | Annotated[RawTensor, Tag("data")] | Annotated[Picture, Tag("png")],
    Discriminator(form),
]


class AlignRequest(Strict):
    """Event features to align; with targets, also to verify."""

    event: Event
    """Numbers [B][W], raw numbers, an image, or an event recording."""
    target: Target | None = None
    """Target features, as many as event features."""
    theta: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.8
    """A pair is accepted where cos_sim > theta."""
    wanted: Annotated[
        Annotated[list[Wanted], Field(max_length=4, fail_fast=True)] | None, Field(alias="return", default=None)
    ]
    """Values to return with the verdicts; default: ["aligned"] for /v1/align, nothing for /v1/verify."""
    encoding: Literal["json", "base64", "png"] = "json"
    """Form of `aligned`: numbers, raw FP32, or a picture with values clipped to 0..1."""
    id: Annotated[str | None, Field(max_length=128)] = None
    """Returned in the answer."""


class VerifyRequest(AlignRequest):
    """Event features and their targets."""

    target: Target
    """Target features, as many as event features."""


class ModelName(BaseModel):
    """Model that answered."""

    name: str
    version: str
    digest: str


class EncodedRow(BaseModel):
    """A row of raw numbers."""

    data: str
    datatype: Literal["FP32"]
    shape: list[int]


class Pair(BaseModel):
    """Answer for one pair; members that were not requested are left out."""

    cos_sim: float | None = None
    accepted: bool | None = None
    before: float | None = None
    aligned: list[float] | EncodedRow | str | None = None
    event_image: str | None = None
    aligned_image: str | None = None
    target_image: str | None = None


class AlignAnswer(BaseModel):
    """Pairs in the order of the request."""

    id: str
    model: ModelName
    theta: float
    pairs: list[Pair]


class ProblemDocument(BaseModel):
    """RFC 9457 problem details, with `error` for clients of the v2 protocol."""

    type: str
    title: str
    status: int
    detail: str
    error: str
    code: str
    request_id: str


@with_config(ConfigDict(extra="forbid"))
class RawSize(TypedDict):
    """Parameters of a tensor whose bytes follow the JSON header."""

    binary_data_size: NotRequired[Annotated[int, Field(ge=0)]]


@with_config(ConfigDict(extra="forbid"))
class RawWanted(TypedDict):
    """Parameters of a requested output."""

    binary_data: NotRequired[bool]


@with_config(ConfigDict(extra="forbid", use_attribute_docstrings=True))
class InferInput(TypedDict):
    """One input tensor."""

    name: Literal["event", "target"]
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
    """[B, W]."""
    datatype: Datatype
    data: NotRequired[list[float] | list[list[float]]]
    """Numbers, flat or nested; left out where raw bytes follow."""
    parameters: NotRequired[RawSize]


@with_config(ConfigDict(extra="forbid"))
class InferRequestedOutput(TypedDict):
    """One output to return."""

    name: Output
    parameters: NotRequired[RawWanted]


@with_config(ConfigDict(extra="forbid", use_attribute_docstrings=True))
class InferParameters(TypedDict):
    """Settings of a v2 request."""

    theta: NotRequired[Annotated[float, Field(ge=-1, le=1)]]
    """A pair is accepted where cos_sim > theta; default 0.8."""
    binary_data_output: NotRequired[bool]
    timeout: NotRequired[Annotated[int, Field(ge=0)]]
    """Microseconds."""
    priority: NotRequired[Any]


@with_config(ConfigDict(extra="forbid"))
class InferRequestDocument(TypedDict):
    """JSON of a v2 request; raw tensors may follow it."""

    id: NotRequired[str | None]
    inputs: Annotated[list[InferInput], Field(min_length=1, max_length=2)]
    outputs: NotRequired[Annotated[list[InferRequestedOutput], Field(max_length=3)] | None]
    parameters: NotRequired[InferParameters | None]


@with_config(ConfigDict(extra="forbid"))
class InferOutput(TypedDict):
    """One output tensor."""

    name: Output
    datatype: Literal["FP32", "BOOL"]
    shape: list[int]
    data: NotRequired[list[float | bool]]
    parameters: NotRequired[RawSize]


@with_config(ConfigDict(extra="forbid"))
class InferResponseDocument(TypedDict):
    """JSON of a v2 answer; raw tensors may follow it."""

    id: NotRequired[str]
    model_name: str
    model_version: str
    outputs: list[InferOutput]
