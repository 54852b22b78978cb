"""Small pictures of images, as text that a page can hold."""

import base64
import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from .data import Sample

JPEG_QUALITY = 80


@dataclasses.dataclass(frozen=True)
class Sprite:
    """Many thumbnails in one picture, row by row.

    Attributes:
        uri: The picture, as a data URI.
        columns: How many stand in a row.
        side: Width and height of each, in pixels.
    """

    uri: str
    columns: int
    side: int


def thumbnail(sample: Sample, side: int) -> str:
    """An image scaled to fit a square, as a data URI."""
    return data_uri(_fitted(sample.open(), side))


def sprite(samples: Sequence[Sample], side: int) -> Sprite:
    """Thumbnails of images in one picture, each in the middle of its square."""
    columns = math.ceil(len(samples) ** 0.5)
    rows = math.ceil(len(samples) / columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for i, sample in enumerate(samples):
        small = _fitted(sample.open(), side)
        left, top = i % columns * side, i // columns * side
        sheet.paste(small, (left + (side - small.width) // 2, top + (side - small.height) // 2))
    return Sprite(data_uri(sheet), columns, side)


def contact_sheet(rows: list[list[Image.Image]], side: int, gap: int = 2) -> str:
    """Images in rows, as one data URI."""
    width, height = (n * (side + gap) - gap for n in (max(map(len, rows)), len(rows)))
    sheet = Image.new("RGB", (width, height), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(_fitted(image, side), (x * (side + gap), y * (side + gap)))
    return data_uri(sheet)


def to_image(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Image.Image:
    """A picture of a network's input, `(channels, height, width)`, its normalisation undone."""
    channels = pixels.permute(1, 2, 0).numpy() * np.array(std) + np.array(mean)
    levels = (channels.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)


def data_uri(image: Image.Image) -> str:
    """An image as PNG, which suits drawings, or JPEG, which suits photographs: the smaller one."""
    encoded = {}
    for kind, options in (("png", {}), ("jpeg", {"quality": JPEG_QUALITY})):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        encoded[kind] = stream.getvalue()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


def from_data_uri(uri: str) -> Image.Image:
    """The image that `data_uri` encoded."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """The image scaled down to fit a square, or up by a whole factor, which keeps it sharp."""
    factor = side // max(image.size)
    if factor > 1:
        size = (factor * image.width, factor * image.height)
        return image.resize(size, Image.Resampling.NEAREST)
    if factor == 1:
        return image
    scale = side / max(image.size)
    size = tuple(max(1, round(scale * x)) for x in image.size)  # of a long strip, too
    return image.resize(size, Image.Resampling.BICUBIC)
