"""Pictures as a model wants them, by the folder's own `preprocessor_config.json`, with Pillow and numpy.

What the library's processors do, number for number. After resize and crop a pixel is one of 256 values, so that
rescaling and normalisation are a table of 256 floats for each colour.
Shapes: H, W = pixels of a picture, C = 3 colours, h, w = pixels that the model takes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ray_app.encoders.model_folder import read_json
from ray_app.errors import InputError

CONFIG, JOINT_CONFIG = "preprocessor_config.json", "processor_config.json"
BILINEAR, BICUBIC = 2, 3
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ImagePreprocessing:
    """Steps from a picture to the numbers that a model takes, in this order; a step that is None is left out."""

    shortest_edge: int | None
    """Resize so that the shorter side has so many pixels…"""
    resize: tuple[int, int] | None
    """…or to this height and width."""
    resample: int
    """Filter of the resize, by Pillow's number."""
    crop: tuple[int, int] | None
    """Height and width of the middle part; a picture that is smaller gets a black border."""
    rescale: float | None
    """Factor from 8-bit numbers."""
    mean: tuple[float, ...] | None
    """Mean of each colour that is subtracted."""
    std: tuple[float, ...] | None
    """Standard deviation of each colour that is divided by."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every result."""
        size = self.crop or self.resize
        assert size, "checked where the config is read"
        return size

    def describe(self) -> dict[str, Any]:
        """Return the steps as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Self:
        """Return the steps that `describe` gave."""
        steps: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in description.items()
        }
        return cls(**steps)

    def __call__(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the model's input (C, h, w) of an RGB picture (H, W, C)."""
        return self.numbers(self.cut(image_HWC))

    def cut(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the part of a picture that the model sees, in its size (h, w, C)."""
        height, width = image_HWC.shape[:2]
        if size := self._resized(height, width):
            image = Image.fromarray(np.ascontiguousarray(image_HWC))
            image_HWC = np.asarray(image.resize((size[1], size[0]), Image.Resampling(self.resample)))
        if self.crop:
            image_HWC = _centre_crop(image_HWC, *self.crop)
        return image_HWC

    def numbers(self, image_hwC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the model's input (C, h, w) of what `cut` gave."""
        return np.stack([table[image_hwC[..., c]] for c, table in enumerate(self._table())])

    def _resized(self, height: int, width: int) -> tuple[int, int] | None:
        if self.shortest_edge is None:
            return self.resize
        short, long = sorted((height, width))
        new = self.shortest_edge, int(self.shortest_edge * long / short)
        return (new[1], new[0]) if width <= height else new

    def _table(self) -> NDArray[np.float32]:
        """Return the value of each 8-bit number in each colour, (C, 256), rounded as the library rounds."""
        values_V = np.arange(256, dtype=np.uint8)
        if self.rescale is not None:
            values_V = (values_V.astype(np.float64) * self.rescale).astype(np.float32)
        values_VC = np.repeat(values_V.astype(np.float32)[:, None], 3, axis=1)
        if self.mean and self.std:
            mean_C, std_C = np.array(self.mean, np.float32), np.array(self.std, np.float32)
            values_VC = ((values_VC - mean_C) / std_C).astype(np.float32)
        return np.ascontiguousarray(values_VC.T)


_CLIP = ImagePreprocessing(224, None, BICUBIC, (224, 224), 1 / 255, CLIP_MEAN, CLIP_STD)
PROCESSORS = {
    "CLIPImageProcessor": _CLIP,
    "CLIPFeatureExtractor": _CLIP,
    "VideoLlavaImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,
    "SiglipImageProcessor": ImagePreprocessing(None, (224, 224), BICUBIC, None, 1 / 255, HALF, HALF),
    "ViTImageProcessor": ImagePreprocessing(None, (224, 224), BILINEAR, None, 1 / 255, HALF, HALF),
    "MobileNetV2ImageProcessor": ImagePreprocessing(256, None, BILINEAR, (224, 224), 1 / 255, HALF, HALF),
}
"""The library's processors that take these steps in this order, with what each does where the config is silent."""
SQUARE = {"ViTImageProcessor"}
"""Processors for which a size of one number is a square; for the others it is the shorter side."""
STEPS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
)
WITHOUT_EFFECT = {"default_to_square", "data_format", "input_data_format", "return_tensors", "processor_class"}
"""Settings that change no number of an RGB picture."""


def read_preprocessing(folder: Path) -> ImagePreprocessing:
    """Return the steps that a folder's config asks for. InputError: no config, or a step that is not supported."""
    path, config = _config(folder)
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type")).removesuffix("Fast")
    if kind not in PROCESSORS:
        raise InputError(f"{path} asks for the processor {kind}; supported are {', '.join(PROCESSORS)}.")
    for key, value in config.items():
        known = key in (*STEPS, *WITHOUT_EFFECT) or key.endswith(("_type", "_map", "_version")) or key[0] == "_"
        if not known and value not in (None, False, [], {}, ""):
            raise InputError(
                f"{path} asks for {key}: {value}, which is not supported; supported: {', '.join(STEPS)}."
            )
    steps = PROCESSORS[kind]
    if not config.get("do_resize", True):
        steps = replace(steps, shortest_edge=None, resize=None)
    elif (size := config.get("size")) is not None:
        steps = replace(steps, **_size(size, kind in SQUARE, path))
    if not config.get("do_center_crop", steps.crop is not None):
        steps = replace(steps, crop=None)
    elif (crop := config.get("crop_size")) is not None:
        steps = replace(steps, crop=_size(crop, True, path)["resize"])
    if (steps.crop or steps.resize) is None:
        raise InputError(
            f"{path} makes pictures of different sizes: it does not crop them, nor resize to one height and width."
        )
    return replace(steps, **_numbers(steps, config, path))


def _config(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """Return the config and its file, which may be that of a processor of pictures and texts."""
    if not (folder / CONFIG).is_file() and (folder / JOINT_CONFIG).is_file():
        part = read_json(folder, JOINT_CONFIG).get("image_processor")
        if isinstance(part, dict):
            return folder / JOINT_CONFIG, part
    return folder / CONFIG, read_json(folder, CONFIG)


def _size(size: Any, square: bool, path: Path) -> dict[str, Any]:
    """Return the two fields that a size of a config means."""
    if isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    match {key: value for key, value in size.items() if value is not None} if isinstance(size, dict) else size:
        case {"shortest_edge": int(edge), **rest} if not rest and not square:
            return {"shortest_edge": edge, "resize": None}
        case {"height": int(height), "width": int(width), **rest} if not rest:
            return {"shortest_edge": None, "resize": (height, width)}
    raise InputError(f"{path}: the size {size} is not supported; give shortest_edge, or height and width.")


def _numbers(steps: ImagePreprocessing, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return filter, factor, mean and standard deviation."""
    resample = config.get("resample", steps.resample)
    rescale = config.get("rescale_factor", steps.rescale) if config.get("do_rescale", True) else None
    mean = std = None
    if config.get("do_normalize", True):
        mean, std = _colours(config.get("image_mean", steps.mean)), _colours(config.get("image_std", steps.std))
        if mean is None or std is None or not all(std):
            raise InputError(
                f"{path}: image_mean and image_std must be 1 or 3 numbers each, and none of image_std 0."
            )
    if resample not in set(Image.Resampling):
        raise InputError(f"{path}: resample {resample} is no filter of Pillow, 0 to 5.")
    return {"resample": int(resample), "rescale": rescale, "mean": mean, "std": std}


def _colours(value: Any) -> tuple[float, ...] | None:
    """Return one number for each colour, or None."""
    numbers = [value] * 3 if isinstance(value, int | float) else value
    if isinstance(numbers, list | tuple) and len(numbers) == 3 and all(isinstance(n, int | float) for n in numbers):
        return tuple(float(n) for n in numbers)
    return None


def _centre_crop(image_HWC: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Return the middle, with black where the picture is smaller; of an odd border the larger part comes first."""
    missing = [max(wanted - there, 0) for wanted, there in zip((height, width), image_HWC.shape, strict=False)]
    if any(missing):
        border = [(-(-n // 2), n // 2) for n in missing]
        image_HWC = np.pad(image_HWC, (*border, (0, 0)))
    top, left = (image_HWC.shape[0] - height) // 2, (image_HWC.shape[1] - width) // 2
    return image_HWC[top : top + height, left : left + width]
