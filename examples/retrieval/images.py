"""Any image that Pillow opens, brought to eight bits as a viewer would show it."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageOps

# Pixels that are wider than a byte although their container does not say how wide.
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
WHITE = 255
# What a white pixel of 32 bits may be, from the narrowest depth to the widest.
WHITES = {"I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535)}
KINDS = {"I": "integers", "F": "floating point"}

# Kind, a key of `WHITES` -> the pixels that are black and white.
Ranges = Mapping[str, Sequence[float]]


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
    black_and_white: Sequence[float] = (0, 65535)
    if kind := kind_of_unknown_depth(image):
        black_and_white = (ranges or {}).get(kind) or range_of(*extremes(image))
    image = ImageOps.exif_transpose(image)
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


def ranges_of(many: Iterable[tuple[str, float, float]]) -> dict[str, tuple[float, float]]:
    """One range of each kind for all images with these `extremes`, so that they stay comparable."""
    kinds: dict[str, list[float]] = {}
    for kind, low, high in many:
        kinds.setdefault(kind, []).extend((low, high))
    return {kind: range_of(kind, min(x), max(x)) for kind, x in sorted(kinds.items())}


def _scaled(image: Image.Image, black: float, white: float) -> Image.Image:
    pixels = _finite_pixels(image)
    scaled = (pixels - black) * (WHITE / max(white - black, 1e-12))
    if "transparency" in image.info:
        scaled[pixels == image.info["transparency"]] = WHITE
    return Image.fromarray(scaled.round().clip(0, WHITE).astype(np.uint8))


def _finite_pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("expected finite pixels, got NaN or infinity")
    return pixels
