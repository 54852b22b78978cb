"""An image file made ready for a network: any image that Pillow opens, as a viewer would show it.

It needs NumPy and Pillow, for tensors torch, and nothing of what lies beside it: an export holds
a copy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps

if TYPE_CHECKING:
    import torch

# Pixels that are wider than a byte although their container does not say how wide.
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
WHITE = 255
# What a white pixel of 32 bits may be, from the narrowest depth to the widest.
WHITES = {"I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535)}
# What makes an image upright, by its orientation in EXIF data.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Kind, a key of `WHITES` -> the pixels that are black and white.
Ranges = Mapping[str, Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Prepare:
    """PIL image in any mode to a normalised tensor, `(channels, height, width)` in float32.

    `pixels` makes the same as a NumPy array.

    Attributes:
        size: Width and height of the result, in pixels.
        mode: `"L"` for one channel, `"RGB"` for three.
        crop_mode: Where an image has other proportions than `size`, `"center"` takes the middle of
            it, `"squash"` all of it, in the new proportions, and `"border"` all of it in its own,
            with borders of the colour `mean`.
        crop_pct: How much of width and height of that is kept, in the middle; for a border all is.
        interpolation: The name of one of Pillow's resampling filters.
        mean: What is subtracted from pixels between 0 and 1, for each channel or for all.
        std: What they are divided by then.
        ranges: What is black and white in images of 32 bits, see `as_eight_bits`.
    """

    size: Sequence[int]
    mode: str = "RGB"
    crop_mode: str = "center"
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    mean: Sequence[float] = (0.5,)
    std: Sequence[float] = (0.5,)
    ranges: Ranges | None = None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.pixels(image))

    def pixels(self, image: Image.Image) -> np.ndarray:
        """What the network takes, without torch."""
        image = as_eight_bits(image, self.ranges).convert(self.mode)
        size, method = tuple(self.size), Image.Resampling[self.interpolation.upper()]
        if self.crop_mode == "border":
            color = tuple(round(WHITE * x) for x in self.mean)
            image = ImageOps.pad(image, size, method, color)
        else:
            image = image.resize(size, method, self._box(*image.size))
        return normalised(image, self.mean, self.std)

    def _box(self, width: int, height: int) -> tuple[float, ...]:
        """What is kept of an image, if it is first scaled to whole pixels, as torchvision does."""
        across, down = (math.floor(x / self.crop_pct) for x in self.size)
        if self.crop_mode == "center" and width * down < height * across:
            down = int(across * height / width)
        elif self.crop_mode == "center":
            across = int(down * width / height)
        scale = width / across, height / down
        starts = round((across - self.size[0]) / 2), round((down - self.size[1]) / 2)
        ends = starts[0] + self.size[0], starts[1] + self.size[1]
        return tuple(
            x * by for corner in (starts, ends) for x, by in zip(corner, scale, strict=True)
        )


def normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Pixels of eight bits as `(channels, height, width)`, scaled to 0 to 1 and normalised."""
    pixels = np.array(image, np.float32).reshape(image.height, image.width, -1)
    mean, std = np.array(mean, np.float32), np.array(std, np.float32)
    return np.ascontiguousarray((pixels / (WHITE * std) - mean / std).transpose(2, 0, 1))


def as_eight_bits(image: Image.Image, ranges: Ranges | None = None) -> Image.Image:
    """The image in mode `L` or `RGB`, upright, with transparent parts on white.

    Integers are divided by what their bit depth holds, so that 16 bits look like 8. A 32-bit file
    does not say how many bits are used, see `range_of`.

    Args:
        image: In any mode.
        ranges: What is black and white in 32-bit images; by default, what suits this image alone.

    Raises:
        ValueError: If floating-point pixels are not finite.
    """
    black_and_white = _range_of_16_bits(image)
    if kind := kind_of_unknown_depth(image):
        black_and_white = (ranges or {}).get(kind) or range_of(*extremes(image))
    image = _upright(image)
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image, *black_and_white)
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (WHITE,) * 4), image)
    return image.convert("L" if grey else "RGB")


def kind_of_unknown_depth(image: Image.Image) -> str | None:
    """A key of `WHITES` if the file has 32 bits for a pixel, which may hold fewer; else None."""
    if image.mode == "I" and image.format in SIXTEEN_BIT_FORMATS:
        return None
    return image.mode if image.mode in WHITES else None


def extremes(image: Image.Image) -> tuple[str, float, float] | None:
    """Of a 32-bit image, its kind and its smallest and largest pixel; else None."""
    kind = kind_of_unknown_depth(image)
    if kind is None:
        return None
    pixels = _finite_pixels(image)
    return kind, float(pixels.min()), float(pixels.max())


def range_of(kind: str, low: float, high: float) -> tuple[float, float]:
    """Which pixels are black and white where the smallest and the largest are these.

    Black is 0 and white the smallest of 255, 65535 and 2^31 - 1 that holds all integers, or of 1,
    255 and 65535 that holds all floating-point pixels. Where some are below 0 or above these, the
    smallest is black and the largest white.
    """
    whites = [white for white in WHITES[kind] if high <= white]
    return (0.0, float(whites[0])) if low >= 0 and whites else (low, high)


def _range_of_16_bits(image: Image.Image) -> Sequence[float]:
    """Black and white where pixels have 16 bits or, as a TIFF may say, fewer, or 0 for white."""
    tags = getattr(image, "tag_v2", {})
    largest = 2 ** max(tags.get(ExifTags.Base.BitsPerSample, (16,))) - 1
    white_is_zero = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    return (largest, 0) if white_is_zero else (0, largest)


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF data turn it, without these; what cannot be read does not turn it."""
    image.load()  # here, so that errors of pixels are not taken for those of EXIF data
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # text instead of a TIFF, or a part of one, fails in many ways
        turn = None
    if turn is None:
        return image
    upright = image.transpose(turn)
    upright.info = {k: v for k, v in upright.info.items() if k == "transparency"}
    return upright


def _scaled(image: Image.Image, black: float, white: float) -> Image.Image:
    pixels = _finite_pixels(image)
    span = math.copysign(max(abs(white - black), 1e-12), white - black)
    scaled = (pixels - black) * (WHITE / span)
    if "transparency" in image.info:
        scaled[pixels == image.info["transparency"]] = WHITE
    return Image.fromarray(scaled.round().clip(0, WHITE).astype(np.uint8))


def _finite_pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("expected finite pixels, got NaN or infinity")
    return pixels
