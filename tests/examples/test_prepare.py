"""The same picture reads the same in every mode, bit depth and orientation."""

import struct

import numpy as np
import pytest
from benchmark_trees import stored
from PIL import Image, ImageOps
from retrieval.data import LabelledImages, Sample, load_splits
from retrieval.errors import UserError
from retrieval.network import load_best
from retrieval.prepare import Prepare, as_eight_bits
from retrieval.trunks import SmallTransform, TimmTransform

RAMP = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
GREY = Image.fromarray(RAMP)


def read(content):
    return Sample("x", "y", content).open()


def pixels(image):
    return np.asarray(image.convert("L")).astype(int)


def wide(dtype, factor):
    return Image.fromarray((RAMP.astype(np.float64) * factor).astype(dtype))


def tiff_of_12_bits():
    """Three bytes for two pixels, which Pillow reads and does not write."""
    values = (RAMP.ravel() * 4095.0 / 255).round().astype(int)
    pairs = zip(values[::2].tolist(), values[1::2].tolist(), strict=True)
    packed = bytes(
        x
        for first, second in pairs
        for x in (first >> 4, (first & 15) << 4 | second >> 8, second & 255)
    )
    height, width = RAMP.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags[279] = len(packed)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, x) for tag, x in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(packed))
    return head + packed + struct.pack("<H", len(tags)) + entries + bytes(4)


SAME = {
    **{mode: stored(GREY.convert(mode), "PNG") for mode in ("L", "LA", "P", "RGB", "RGBA")},
    "CMYK": stored(GREY.convert("RGB").convert("CMYK"), "TIFF"),
    "YCbCr": stored(GREY.convert("RGB").convert("YCbCr"), "TIFF"),
    "I;16 PNG": stored(wide(np.uint16, 257), "PNG"),
    "I;16 TIFF": stored(wide(np.uint16, 257), "TIFF"),
    "I;16 TIFF, 0 is white": stored(
        Image.fromarray(65535 - RAMP.astype(np.uint16) * 257), "TIFF", tiffinfo={262: 0}
    ),
    "I;12 TIFF": tiff_of_12_bits(),
    "I of 8 bits": stored(wide(np.int32, 1), "TIFF"),
    "I of 16 bits": stored(wide(np.int32, 257), "TIFF"),
    "I of 32 bits": stored(wide(np.int32, (2**31 - 1) / 255), "TIFF"),
    "I below 0": stored(wide(np.int32, 1000).point(lambda x: x - 5000), "TIFF"),
    "F to 1": stored(wide(np.float32, 1 / 255), "TIFF"),
    "F to 255": stored(wide(np.float32, 1), "TIFF"),
    "F to 65535": stored(wide(np.float32, 257), "TIFF"),
}


@pytest.mark.parametrize("kind", SAME)
def test_every_mode_reads_alike(kind):
    image = read(SAME[kind])
    assert image.mode in ("L", "RGB")
    assert np.abs(pixels(image) - RAMP).max() <= 2


def test_a_palette_with_alpha_and_one_bit_read_alike():
    image = as_eight_bits(GREY.convert("P").convert("PA"))  # no file format holds it
    assert image.mode == "RGB"
    assert (pixels(image) == RAMP).all()
    ink = RAMP > 100
    assert (pixels(read(stored(Image.fromarray(ink), "PNG"))) == ink * 255).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L", "RGB", "I;16"])
def test_transparent_parts_become_white(mode):
    black = np.zeros((8, 8), np.uint8)
    black[:, 4:] = 90
    image, options = Image.fromarray(black), {"transparency": (0, 0, 0) if mode == "RGB" else 0}
    if mode == "I;16":
        image = Image.fromarray(black.astype(np.uint16) * 257)
    elif mode in ("LA", "RGBA"):
        image, options = image.convert(mode), {}
        image.putalpha(Image.fromarray(np.where(black == 0, 0, 255).astype(np.uint8)))
    else:
        image = image.convert(mode)
    result = pixels(read(stored(image, "PNG", **options)))
    assert (result[:, :4] == 255).all()
    assert (abs(result[:, 4:] - 90) <= 1).all()


TURNS = [
    *(None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180),
    *(Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90),
    *(Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270),
]


@pytest.mark.parametrize(("orientation", "turn"), list(enumerate(TURNS, 1)))
def test_exif_turns_the_image_upright_once(orientation, turn):
    image = GREY if turn is None else GREY.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = read(stored(image, "PNG", exif=exif))
    assert (pixels(upright) == RAMP).all()
    assert (pixels(as_eight_bits(upright)) == RAMP).all()


BROKEN_EXIF = {
    "text": b'Exif\0\0{"prompt": "fruit"}',
    "a header that is cut": b"Exif\0\0II*\0",
    "an entry that is cut": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0",
    "nothing": b"Exif\0\0",
}


@pytest.mark.parametrize("dpi", [{}, {"dpi": (72, 72)}], ids=["", "dpi"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", BROKEN_EXIF)
def test_exif_that_cannot_be_read_turns_nothing(exif, form, dpi):
    content = stored(GREY.convert("RGB"), form, exif=BROKEN_EXIF[exif], **dpi)
    assert np.abs(pixels(read(content)) - RAMP).max() < 40
    images = LabelledImages([Sample("x", "y", content)], ["y"], Prepare((8, 8)))
    for _ in range(2):
        assert images[0][0].shape == (3, 8, 8)


def test_an_error_of_a_transform_or_of_pixels_names_the_image():
    def transform(image):
        raise MemoryError("too large")

    images = LabelledImages([Sample("x", "y", SAME["L"])], ["y"], transform)
    with pytest.raises(UserError, match="cannot read the image x: too large"):
        images[0]
    with pytest.raises(UserError, match="cannot read the image x: expected finite pixels"):
        read(stored(wide(np.float32, np.nan), "TIFF"))


@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (123, 123), (64, 1), (3, 900)])
def test_an_image_is_scaled_and_cropped_as_by_torchvision(size, crop_mode, crop_pct):
    noise = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    prepare = Prepare((32, 32), "RGB", crop_mode, crop_pct, "bicubic", mean, std)
    width = height = int(32 / crop_pct)
    if crop_mode == "center":
        shorter = min(size)
        width, height = (int(width * x / shorter) for x in size)
    expected = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    expected = expected.crop((left, top, left + 32, top + 32))
    if crop_mode == "border":
        expected = ImageOps.pad(image, (32, 32), color=(128, 102, 76))
    expected = (np.asarray(expected) / 255 - mean) / std
    made = prepare(image)
    assert made.shape == (3, 32, 32)
    assert np.abs(made.permute(1, 2, 0).numpy() - expected).max() < 0.03
    assert (prepare.pixels(image) == made.numpy()).all()


def test_transforms_take_images_of_any_depth():
    deep = wide(np.uint16, 257)
    small = SmallTransform(8, "L")
    assert (small(deep) - small(GREY)).abs().max() < 0.01
    seen = TimmTransform(lambda image: image)(deep)
    assert seen.mode == "RGB" and np.abs(pixels(seen) - RAMP).max() <= 1


def write_deep(root, dtype, whites):
    """Four classes of five images; `whites` are the brightest pixels of the first class."""
    for label in "abcd":
        (root / label).mkdir(parents=True)
        for i in range(5):
            white = whites[i] if label == "a" else whites[0]
            Image.fromarray((RAMP * (white / 255)).astype(dtype)).save(root / label / f"{i}.tif")


# The brightest pixel of each image of a class, and what is white in all images then.
DEPTHS = {
    "floats to 1": (np.float32, [1, 0.5, 0.25, 0.1, 1], 1),
    "floats to 255": (np.float32, [255, 1, 0.5, 20, 3], 255),
    "floats to 65535": (np.float32, [255, 1, 256, 20, 3], 65535),
    "integers of 8 bits": (np.int32, [255, 1, 30, 20, 3], 255),
    "integers of 16 bits": (np.int32, [255, 1, 60000, 20, 3], 65535),
    "more than any depth": (np.float32, [255, 1, 1e6, 20, 3], 1e6),
}


@pytest.mark.parametrize("skip_verify", [False, True], ids=["", "skip-verify"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_images_of_32_bits_have_one_depth_in_a_data_set(tmp_path, capsys, depth, skip_verify):
    dtype, whites, white = DEPTHS[depth]
    write_deep(tmp_path, dtype, whites)
    splits = load_splits("folder", str(tmp_path), 0.4, 0, skip_verify=skip_verify)
    (kind,) = splits.pixel_ranges
    assert splits.pixel_ranges[kind] == pytest.approx((0, white), rel=1e-6)
    assert f"is taken for black, {white:g} for white" in capsys.readouterr().out
    seen = 0
    for part in (splits.train, splits.val, splits.test):
        part.transform = pixels
        for i, sample in enumerate(part.samples):
            own = whites[int(sample.name[-5])] if sample.label == "a" else whites[0]
            assert part[i][0].max() == pytest.approx(255 * own / white, abs=1)
            seen += 1
    assert seen == 20


def test_a_trained_network_scales_as_its_training_did(trained, tmp_path, strict_json):
    write_deep(tmp_path / "data", np.float32, [200, 100, 50, 20, 1])
    run = trained("--data-root", tmp_path / "data", "--batch-size", 4)
    assert strict_json(run / "config.json")["pixel_ranges"] == {"F": [0, 255]}
    _, transform = load_best(run)
    dark, light = (transform(wide(np.float32, x / 255)).max() for x in (1, 300))
    assert dark == pytest.approx(1 / 127.5 - 1, abs=0.01)
    assert light == 1


def test_an_image_that_cannot_be_read_does_not_decide_the_depth(tmp_path):
    write_deep(tmp_path, np.float32, [1, 1, 1, 1, 1])
    Image.fromarray(np.full((8, 8), np.inf, np.float32)).save(tmp_path / "a" / "0.tif")
    splits = load_splits("folder", str(tmp_path), 0.4, 0)
    assert splits.pixel_ranges == {"F": (0, 1)}
    assert [x.name for x in splits.skipped] == [str(tmp_path / "a" / "0.tif")]
