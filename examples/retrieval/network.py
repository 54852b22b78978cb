"""The network of a run: as its configuration says, and as it was trained."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .data import Sample
from .embeddings import embed_samples
from .errors import UserError
from .prepare import Prepare
from .processes import find_device, say
from .run_folder import BEST, CONFIG, RunFolder, misfit
from .seeding import seed_everything
from .trunks import IMAGE_SIZES, LITE, SMALL, SmallTransform, Trunk, build_trunk

# How training images vary, unless timm prepares them, and whether they have colours.
CHARACTERS = {"mode": "L", "warp": True}
PHOTOGRAPHS = {"mode": "RGB", "crop": 0.8, "mirror": True}


def build(config: dict[str, Any]) -> Trunk:
    """The trunk as configured, with the transforms of its images."""
    if config["pretrained"] and config["trunk"] not in LITE:
        say(f"pretrained weights of {config['trunk']}: from timm's cache, or downloaded now")
    images = CHARACTERS if config["dataset"] in ("digits", "omniglot") else PHOTOGRAPHS
    size = config["image_size"] or IMAGE_SIZES[SMALL]  # None if timm prepares the images
    # Not known before the data are read, which makes 8 bits of their images itself.
    small = SmallTransform(size, **images, ranges=config.get("pixel_ranges"))
    return build_trunk(
        config["trunk"], config["pretrained"], config["image_size"], small, config["color_jitter"]
    )


def build_embedder(trunk: Trunk, config: dict[str, Any]) -> torch.nn.Module:
    """What maps the trunk's features to an embedding."""
    return torch.nn.Linear(trunk.num_features, config["embedding_size"])


def untrained(config: dict[str, Any]) -> tuple[torch.nn.Module, Prepare]:
    """The network that a run started with, in eval mode, and the transform of its images.

    The seed makes its weights again, as `train` makes them.
    """
    seed_everything(config["seed"])
    trunk = build(config)
    embedder = build_embedder(trunk, config)
    return torch.nn.Sequential(trunk.module, embedder).eval(), trunk.eval_transform


class Trained(NamedTuple):
    """The trained network of a run, and the transform that its images need.

    Attributes:
        network: Maps `(batch, channels, height, width)` to `(batch, embedding size)`; in eval mode.
        transform: Makes such an image of a PIL image.
    """

    network: torch.nn.Module
    transform: Prepare

    def embed(
        self, paths: Sequence[str | PathLike[str]], device: str = "auto", workers: int = 0
    ) -> torch.Tensor:
        """Embeddings of image files, `(N, d)` of length 1, in float32 on the CPU.

        Args:
            paths: The files.
            device: Where the network computes; it is moved there.
            workers: Loader processes; 0 loads in this one.

        Raises:
            TypeError: If `paths` is a single path.
            UserError: If an image cannot be read, or the device cannot be used.
        """
        if isinstance(paths, str | PathLike):
            raise TypeError(f"expected a list of paths, got {paths!r}")
        images = [Sample(str(x), "", Path(x)) for x in paths]
        return embed_samples(*self, images, find_device(device), workers)[0]


def load_best(path: str | PathLike[str]) -> Trained:
    """The trained network of the run in a folder, on the CPU.

    Raises:
        UserError: If there is no run, or it has not saved a network yet.
    """
    run = RunFolder.existing(path)
    config = {**run.read_config(), "pretrained": False}
    best = run.load_best()
    if best is None:
        written = (run.load_checkpoint() or {}).get("best")
        if written:
            raise UserError(
                f"{run.checkpoints / BEST}, of epoch {written['epoch']}, is missing; "
                f"train --resume {path} writes it again"
            )
        raise UserError(f"{path} holds no checkpoints/{BEST} yet")
    trunk = build(config)
    embedder = build_embedder(trunk, config)
    try:
        trunk.module.load_state_dict(best["models"]["trunk"])
        embedder.load_state_dict(best["models"]["embedder"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{run.checkpoints / BEST} does not fit the settings of its run, {run.path / CONFIG} "
            f"({misfit(error)})"
        ) from error
    return Trained(torch.nn.Sequential(trunk.module, embedder).eval(), trunk.eval_transform)
