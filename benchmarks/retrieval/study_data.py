"""The data sets of the study, in memory, split by classes.

Three, and CLINC150 once more with the transformer trained along.

The classes of a data set fall into three parts that share none: `fit`, `validation` and `test`. A
trial of the tuning trains on `fit` and is judged on `validation`; a final run trains on both
(`training`) and is measured on `test`. A part is read when it is asked for: tuning never asks for
`test`.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import networks
import numpy as np
import pretrained
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from retrieval.data import DATA_ROOT_VARIABLE, Sample, load_splits  # noqa: E402
from retrieval.trunks import SmallTransform  # noqa: E402

SPLIT_SEED = 0
VALIDATION_SHARE = 0.25  # of the training classes


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples of some classes.

    Attributes:
        inputs: (N, ...) float32, what the network takes.
        labels: (N,) int64, numbered from 0.
        classes: their names; a label is an index into them.
        coarse: (N,) int64, the coarse label that the class belongs to, numbered from 0.
    """

    inputs: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    coarse: Tensor

    def to(self, device: torch.device) -> "Part":
        """The same part with its tensors on a device."""
        tensors = {x: getattr(self, x).to(device) for x in ("inputs", "labels", "coarse")}
        return dataclasses.replace(self, **tensors)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """What the study needs to know of a data set.

    Attributes:
        name: as in the command line.
        read: (part, data root) -> Part; part is fit, validation, training or test.
        network: inputs to train on -> network, to embeddings of length networks.EMBEDDING_SIZE.
        untrained: makes what retrieves without training: the network, or less.
        augment: (inputs, generator) -> inputs, at every step.
        classes_per_batch: of a training step.
        steps: of the optimizer.
        about: what it is, for the documentation.
        examples_per_class: of a training step.
        learning_rate: of the untuned runs; Adam's default, but for fine-tuning.
        large_batches: (classes, examples per class), probed besides those of every data set.
        test_is_whole: whether `test` has all examples of its classes.
        head_rate: learning rate of the last layer of the network over that of the others.
        steps_of_grid, rates_of_grid: short and long training of the grid, and its learning rates
            over `learning_rate`.
    """

    name: str
    read: Callable[[str, str | None], Part]
    network: Callable[[Tensor], nn.Module]
    untrained: Callable[[], nn.Module]
    augment: Callable[[Tensor, torch.Generator], Tensor]
    classes_per_batch: int
    steps: int
    about: str
    examples_per_class: int = 4
    learning_rate: float = 1e-3
    large_batches: tuple[tuple[int, int], ...] = ()
    test_is_whole: bool = True
    head_rate: float = 1.0
    steps_of_grid: tuple[int, ...] = (100, 600)
    rates_of_grid: tuple[float, ...] = (1.0, 0.3)


def _root(data_root: str | None) -> Path:
    root = data_root or os.environ.get(DATA_ROOT_VARIABLE)
    if not root or not Path(root).is_dir():
        raise SystemExit(
            f"expected a folder with the data in --data-root or {DATA_ROOT_VARIABLE}, got {root!r}"
        )
    return Path(root)


def part_of_classes(names: Sequence[str], part: str) -> list[str]:
    """The classes of a part, from all classes: a third for `test`, a quarter of the rest held out.

    Raises:
        ValueError: an unknown part.
    """
    names = [sorted(names)[i] for i in np.random.default_rng(SPLIT_SEED).permutation(len(names))]
    test, training = names[: len(names) // 3], names[len(names) // 3 :]
    held_out = round(VALIDATION_SHARE * len(training))
    parts = {
        "test": test,
        "training": training,
        "validation": training[:held_out],
        "fit": training[held_out:],
    }
    if part not in parts:
        raise ValueError(f"part must be one of {', '.join(parts)}, got {part!r}")
    return sorted(parts[part])


def other_split(training: Part, test: Part, seed: int) -> tuple[Part, Part]:
    """As many classes to train on and to test with, chosen at random from those of both parts."""
    return other_splits(training, test, seed, [len(training.classes)])


def other_splits(training: Part, test: Part, seed: int, at: Sequence[int]) -> tuple[Part, ...]:
    """The classes of both parts in random order, cut into parts where `at` says.

    Coarse labels, whose numbers differ between parts, are left out: all are 0.
    """
    names = training.classes + test.classes
    inputs = torch.cat([training.inputs, test.inputs])
    labels = torch.cat([training.labels, test.labels + len(training.classes)])
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))

    def part(chosen: Tensor) -> Part:
        number = torch.full((len(names),), -1)
        number[chosen] = torch.arange(len(chosen))
        own = number.to(labels.device)[labels]
        kept = own >= 0
        classes = tuple(names[i] for i in chosen.tolist())
        return Part(inputs[kept], own[kept], classes, torch.zeros_like(own[kept]))

    return tuple(part(x.sort().values) for x in order.tensor_split(list(at)))


# --- CLINC150 -------------------------------------------------------------------------------

FEATURES = "minilm-features.npz"


def _features(folder: Path) -> Tensor:
    with np.load(folder / FEATURES) as file:
        return torch.from_numpy(file["features"].astype(np.float32))


def _clinc150(
    part: str, data_root: str | None, inputs_of: Callable[[Path], Tensor] = _features
) -> Part:
    folder = _root(data_root) / "clinc150"
    with np.load(folder / FEATURES) as file:
        labels, intents = file["labels"], [str(x) for x in file["intents"]]
    domains = json.loads((folder / "domains.json").read_text())
    domain_of = {x.replace(" ", "_"): d for d, xs in domains.items() for x in xs}
    classes = part_of_classes(intents, part)
    number = {x: i for i, x in enumerate(classes)}
    of_label = np.array([number.get(x, -1) for x in intents])[labels]
    kept = of_label >= 0
    coarse_names = sorted(domains)
    coarse = np.array([coarse_names.index(domain_of[x]) for x in classes])
    return Part(
        inputs_of(folder)[torch.from_numpy(kept)],
        torch.from_numpy(of_label[kept]),
        tuple(classes),
        torch.from_numpy(coarse[of_label[kept]]),
    )


def _as_it_is(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs


@cache
def _token_ids(folder: Path) -> Tensor:
    content = json.loads((folder / "data_full.json").read_text())
    # The order of the features, which leave out what belongs to no intent.
    return networks.token_ids([x for split in ("train", "val", "test") for x, _ in content[split]])


def _clinc150_sentences(part: str, data_root: str | None) -> Part:
    """Token ids in place of features; of the test, a third of the examples of every class."""
    whole = _clinc150(part, data_root, _token_ids)
    if part != "test":
        return whole
    kept = torch.arange(len(whole.labels)) % 3 == 0
    return Part(whole.inputs[kept], whole.labels[kept], whole.classes, whole.coarse[kept])


# --- images ---------------------------------------------------------------------------------


@cache
def _splits(name: str, data_root: str):
    return load_splits(name, data_root, VALIDATION_SHARE, SPLIT_SEED)


def _reader_of_images(
    name: str, size: int, mode: str, coarse_of: Callable[[Sample], str]
) -> Callable[[str, str | None], Part]:
    transform = SmallTransform(size, mode)

    def read(part: str, data_root: str | None) -> Part:
        splits = _splits(name, str(_root(data_root)))
        chosen = {
            "fit": (splits.train,),
            "validation": (splits.val,),
            "training": (splits.train, splits.val),
            "test": (splits.test,),
        }
        if part not in chosen:
            raise ValueError(f"part must be one of {', '.join(chosen)}, got {part!r}")
        samples = [s for split in chosen[part] for s in split.samples]
        classes = sorted({s.label for s in samples})
        number = {x: i for i, x in enumerate(classes)}
        coarse = [coarse_of(s) for s in samples]
        coarse_names = sorted(set(coarse))
        inputs = torch.stack([transform(s.open()) for s in samples])
        return Part(
            inputs.contiguous(memory_format=torch.channels_last),
            torch.tensor([number[s.label] for s in samples]),
            tuple(classes),
            torch.tensor([coarse_names.index(x) for x in coarse]),
        )

    return read


def _kind_of_grocery(sample: Sample) -> str:
    """As the data set's coarse classes; mushrooms lie in two folders."""
    return Path(sample.name).parts[2].replace("Brown-Cap-", "")


@dataclasses.dataclass(frozen=True)
class Warp:
    """Turn, scale and shift every image of a batch at random, and mirror it if wished.

    Attributes:
        turn: largest angle, in radians.
        scale: largest change of the size, as a share.
        shift: largest shift, as a share of half the side.
        mirror: mirror every other image.
    """

    turn: float
    scale: float
    shift: float
    mirror: bool

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (N, channels, side, side) to as many; what lies outside repeats the border."""

        def between(most: float) -> Tensor:
            return ((2 * torch.rand(len(images), generator=generator) - 1) * most).to(images.device)

        angle, size = between(self.turn), 1 + between(self.scale)
        cos, sin = size * angle.cos(), size * angle.sin()
        flip = between(1).sign() if self.mirror else torch.ones_like(cos)
        right, down = between(self.shift), between(self.shift)
        matrix = torch.stack([cos * flip, -sin, right, sin * flip, cos, down], 1).view(-1, 2, 3)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        warped = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        return warped.contiguous(memory_format=torch.channels_last)


# --- pretrained image networks --------------------------------------------------------------

GROCERY_SIZE, SMALL_SIZE = 160, 96  # pixels


def _reader_of_whole(
    read: Callable[[Path], pretrained.Whole],
) -> Callable[[str, str | None], Part]:
    """Parts of what is read as a whole, once, by their classes."""
    read = cache(read)

    def read_part(part: str, data_root: str | None) -> Part:
        inputs, fine, coarse = read(_root(data_root))
        names, _ = pretrained.numbers(fine)
        chosen = set(part_of_classes(names, part))
        kept = torch.tensor([x in chosen for x in fine])
        classes, labels = pretrained.numbers([x for x in fine if x in chosen])
        _, kinds = pretrained.numbers([k for x, k in zip(fine, coarse, strict=True) if x in chosen])
        return Part(inputs[kept], labels, tuple(classes), kinds)

    return read_part


def _lite0_features(
    name: str, images: Callable[[Path], Iterator[pretrained.Labelled]], size: int
) -> Callable[[str, str | None], Part]:
    read = pretrained.images(images, size)
    return _reader_of_whole(pretrained.computed(name, pretrained.Lite0, read))


def _random_linear(features: Tensor) -> nn.Module:
    return nn.Linear(features.shape[1], networks.EMBEDDING_SIZE)


GROCERY_LITE0 = DataSet(
    "grocery_lite0",
    _lite0_features("grocery_lite0", pretrained.grocery160, GROCERY_SIZE),
    networks.linear_of_principal_components,
    nn.Identity,
    _as_it_is,
    classes_per_batch=40,
    steps=300,
    about="Grocery 160: photographs from shop shelves, as frozen features of EfficientNet-Lite0 "
    "under a linear layer 1280 -> 128 that starts as their principal components",
)

DATA_SETS = {
    "clinc150": DataSet(
        "clinc150",
        _clinc150,
        networks.linear_of_principal_components,
        nn.Identity,
        _as_it_is,
        classes_per_batch=55,
        steps=200,
        large_batches=((75, 4), (75, 13), (75, 27)),
        about="CLINC150: requests in 150 intents, as frozen features of all-MiniLM-L6-v2 under a "
        "linear layer 384 -> 128 that starts as their principal components",
    ),
    "clinc150_transformer": DataSet(
        "clinc150_transformer",
        _clinc150_sentences,
        networks.sentence_net,
        networks.SentenceNet,
        _as_it_is,
        classes_per_batch=16,
        steps=200,
        about="CLINC150: requests in 150 intents, all of all-MiniLM-L6-v2 trained along with the "
        "same layer",
        learning_rate=5e-5,
        test_is_whole=False,
        steps_of_grid=(20, 60),
    ),
    "omniglot": DataSet(
        "omniglot",
        _reader_of_images("omniglot", 28, "L", lambda s: s.label.split("/")[0]),
        lambda inputs: networks.small_net(1),
        lambda: networks.small_net(1),
        Warp(turn=0.25, scale=0.15, shift=0.15, mirror=False),
        classes_per_batch=28,
        steps=300,
        large_batches=((100, 4),),
        rates_of_grid=(3.0, 1.0),
        about="Omniglot small: handwritten characters at 28 x 28, a net of four convolutions "
        "trained from scratch",
    ),
    "grocery": DataSet(
        "grocery",
        _reader_of_images("grocery", 32, "RGB", _kind_of_grocery),
        lambda inputs: networks.small_net(3),
        lambda: networks.small_net(3),
        Warp(turn=0.1, scale=0.25, shift=0.15, mirror=True),
        classes_per_batch=28,
        steps=300,
        large_batches=((28, 14),),
        rates_of_grid=(3.0, 1.0),
        about="Grocery 64: photographs from shop shelves at 32 x 32, a net of four convolutions "
        "trained from scratch",
    ),
    "grocery_lite0": GROCERY_LITE0,
    "grocery_lite0_random": dataclasses.replace(
        GROCERY_LITE0,
        name="grocery_lite0_random",
        network=_random_linear,
        about="the same with a linear layer that starts at random",
    ),
    "emoji_lite0": dataclasses.replace(
        GROCERY_LITE0,
        name="emoji_lite0",
        read=_lite0_features("emoji_lite0", pretrained.emoji, SMALL_SIZE),
        classes_per_batch=64,
        large_batches=((128, 4), (256, 4)),
        about="Emoji: four drawings of each, as frozen features of EfficientNet-Lite0 under a "
        "linear layer 1280 -> 128 that starts as their principal components",
    ),
    "grocery_last_blocks": DataSet(
        "grocery_last_blocks",
        _reader_of_whole(
            pretrained.computed(
                "grocery_first_blocks",
                pretrained.FirstBlocks,
                pretrained.images(pretrained.grocery160, SMALL_SIZE),
            )
        ),
        lambda maps: networks.under_linear_layer(pretrained.LastBlocks, maps),
        pretrained.LastBlocks,
        _as_it_is,
        classes_per_batch=16,
        steps=300,
        about="Grocery 160 at 96 x 96, the last five of EfficientNet-Lite0's sixteen blocks "
        "trained along with a linear layer 1280 -> 128 that starts as principal components; "
        "BatchNorm as it was",
        learning_rate=1e-4,
        head_rate=10.0,
        steps_of_grid=(100, 400),
    ),
    "grocery_finetuned": DataSet(
        "grocery_finetuned",
        _reader_of_whole(pretrained.images(pretrained.grocery160, SMALL_SIZE)),
        lambda images: networks.under_linear_layer(pretrained.Lite0, images),
        pretrained.Lite0,
        Warp(turn=0.1, scale=0.25, shift=0.15, mirror=True),
        classes_per_batch=16,
        steps=240,
        about="Grocery 160 at 96 x 96, all of EfficientNet-Lite0 trained along with the same layer",
        learning_rate=1e-4,
        head_rate=10.0,
        steps_of_grid=(60, 240),
    ),
}
