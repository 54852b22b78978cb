"""The network of a run: as its configuration says, and as it was trained."""

from typing import Any

import torch

from .errors import UserError
from .processes import say
from .run_folder import CONFIG, RunFolder
from .seeding import seed_everything
from .trunks import SMALL_IMAGE_SIZE, SmallTransform, Transform, Trunk, build_trunk

# How the small trunk's training images vary, and whether they have colours.
CHARACTERS = {"mode": "L", "warp": True}
PHOTOGRAPHS = {"mode": "RGB", "crop": 0.8, "mirror": True}


def build(config: dict[str, Any]) -> Trunk:
    """The trunk as configured, with the transforms of its images."""
    if config["pretrained"]:
        say(f"pretrained weights of {config['trunk']}: from timm's cache, or downloaded now")
    images = CHARACTERS if config["dataset"] in ("digits", "omniglot") else PHOTOGRAPHS
    size = config["image_size"] or SMALL_IMAGE_SIZE
    # Not known before the data are read, which makes 8 bits of their images itself.
    small = SmallTransform(size, **images, ranges=config.get("pixel_ranges"))
    return build_trunk(
        config["trunk"], config["pretrained"], config["image_size"], small, config["color_jitter"]
    )


def build_embedder(trunk: Trunk, config: dict[str, Any]) -> torch.nn.Module:
    """What maps the trunk's features to an embedding."""
    return torch.nn.Linear(trunk.num_features, config["embedding_size"])


def untrained(config: dict[str, Any]) -> tuple[torch.nn.Module, Transform]:
    """The network that a run started with, in eval mode, and the transform of its images.

    The seed makes its weights again, as `train` makes them.
    """
    seed_everything(config["seed"])
    trunk = build(config)
    embedder = build_embedder(trunk, config)
    return torch.nn.Sequential(trunk.module, embedder).eval(), trunk.eval_transform


def load_best(path: str) -> tuple[torch.nn.Module, Transform]:
    """The trained network of a run, in eval mode, and the transform that its images need.

    Args:
        path: A run folder.

    Returns:
        A module that maps `(batch, channels, size, size)` to `(batch, embedding size)`, on the
        CPU, and a function that makes a tensor of a PIL image.
    """
    run = RunFolder.existing(path)
    config = {**run.read_json(CONFIG), "pretrained": False}
    best = run.load_checkpoint("best.pt")
    if best is None:
        raise UserError(f"{path} holds no checkpoints/best.pt yet")
    trunk = build(config)
    embedder = build_embedder(trunk, config)
    trunk.module.load_state_dict(best["models"]["trunk"])
    embedder.load_state_dict(best["models"]["embedder"])
    return torch.nn.Sequential(trunk.module, embedder).eval(), trunk.eval_transform
