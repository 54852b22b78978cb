"""Any image that Pillow opens, brought to eight bits as a viewer would show it."""

import numpy as np
from PIL import Image, ImageOps

# Pixels that are wider than a byte although their container does not say how wide.
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
WHITE = 255


def as_eight_bits(image: Image.Image) -> Image.Image:
    """The image in mode `L` or `RGB`, upright, with transparent parts on white.

    Integers are divided by what their bit depth holds, so that 16 bits look like 8. A 32-bit file
    does not say how many bits are used: the smallest of 8, 16 and 32 that holds all its pixels is
    taken. Floating-point pixels are taken to reach to 1, to 255 or to 65535, in the same way.
    Pixels below 0 or above these limits are stretched from the darkest to the lightest.

    Raises:
        ValueError: If floating-point pixels are not finite.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image)
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (WHITE,) * 4), image)
    return image.convert("L" if grey else "RGB")


def _scaled(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("expected finite pixels, got NaN or infinity")
    low, high = float(pixels.min()), float(pixels.max())
    limits = [limit for limit in _limits(image) if high <= limit]
    if low >= 0 and limits:
        scaled = pixels * (WHITE / limits[0])
    else:
        scaled = (pixels - low) * (WHITE / max(high - low, 1e-12))
    if "transparency" in image.info:
        scaled[pixels == image.info["transparency"]] = WHITE
    return Image.fromarray(scaled.round().astype(np.uint8))


def _limits(image: Image.Image) -> tuple[int, ...]:
    """What a white pixel may be, from the narrowest depth to the widest."""
    if image.mode == "F":
        return 1, 255, 65535
    if image.mode.startswith("I;16") or image.format in SIXTEEN_BIT_FORMATS:
        return (65535,)
    return 255, 65535, 2**31 - 1
