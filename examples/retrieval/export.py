"""Write the trained network, its embeddings and how to use both, for use without this repository.

    python examples/retrieval export RUN
    python examples/retrieval export RUN --images FOLDER --output NEW_FOLDER

The network is written by `torch.export`, the embeddings of the test images, or of the images below
a folder, to an npz. README.md in the new folder says how to load them and how an image is prepared.
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .arguments import parser_for_run
from .configuration import of_run, splits_of_run
from .data import Sample
from .disk import new
from .embeddings import embed_samples
from .errors import UserError
from .image_tree import Skipped, read_trees, summary
from .network import load_best
from .processes import find_device, say
from .run_folder import RunFolder
from .trunks import SmallTransform, TimmTransform, Transform

TOLERANCE = 1e-4  # between the network and what was written, of embeddings of length 1
SMALL_CODE = '''\
def prepare(image):
    """The largest square in the middle, resized; pixels from -1 to 1."""
    image = image.convert("{mode}")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    image = image.resize(({size}, {size}), Image.Resampling.BILINEAR, box)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 127.5 - 1
    return pixels.reshape({size}, {size}, -1).permute(2, 0, 1)
'''
TIMM_CODE = """\
import json

import timm

config = json.load(open("transform.json"))
prepare = timm.data.create_transform(**config, is_training=False)  # of an image in mode RGB
"""
README = """\
# {title}

`model.pt2` maps images, `(batch, {channels}, {height}, {width})` in float32, to embeddings,
`(batch, {d})`, of length 1: their products are cosine similarities. It needs torch {torch} or
newer alone. `embeddings.npz` holds `embeddings`, `names` and `labels` of {n} images, and
`transform.json` how an image is prepared. Images of more than eight bits are scaled to eight
before, and transparent ones laid on white.

```python
import numpy as np
import torch
from PIL import Image

{prepare}
model = torch.export.load("model.pt2").module()
stored = np.load("embeddings.npz")
with torch.no_grad():
    query = model(prepare(Image.open("query.jpg")).unsqueeze(0))[0]
similarities = stored["embeddings"] @ query.numpy()
for i in similarities.argsort()[::-1][:10]:
    print(f"{{similarities[i]:.4f}}", stored["names"][i], stored["labels"][i])
```
"""


class Normalized(torch.nn.Module):
    """A network whose embeddings are brought to length 1."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed a batch."""
        return torch.nn.functional.normalize(self.network(images))


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    flags = parser_for_run(prog, __doc__, "--data-root", "--device", "--workers")
    flags.add_argument("--output", metavar="FOLDER", help="a new folder (default RUN/export)")
    flags.add_argument(
        "--images", metavar="FOLDER", help="images to embed; by default those of the run's test"
    )
    return flags


def run(args: argparse.Namespace) -> int:
    """Export; returns the exit code."""
    run = RunFolder.existing(args.run)
    output = Path(args.output) if args.output else run.path / "export"
    if output.exists():
        raise UserError(f"{output} exists; name a new folder by --output")
    config = of_run(run)
    network, transform = load_best(args.run)
    skipped: list[Skipped] = []
    samples = _samples(args, config, skipped)
    device = find_device(args.device)
    embeddings, places = embed_samples(network, samples, transform, device, args.workers, skipped)
    if skipped:
        say(f"skipped {len(skipped)} files and folders:", *summary(skipped))
    if not places:
        raise UserError("no image that can be read")
    samples = [samples[i] for i in places]
    images = torch.stack([transform(x.open()) for x in samples[:2]])
    program = _exported(network.cpu(), images)
    described, code = _described(transform)
    channels, height, width = images.shape[1:]
    text = README.format(
        title=run.path.resolve().name,
        channels=channels,
        height=height,
        width=width,
        d=embeddings.shape[1],
        n=len(samples),
        torch=torch.__version__.partition("+")[0],
        prepare=code,
    )
    with new(output) as folder:
        folder.mkdir()
        # torch's writer of archives aborts the process where a disk is full.
        stream = io.BytesIO()
        torch.export.save(program, stream)
        (folder / "model.pt2").write_bytes(stream.getbuffer())
        _check(torch.export.load(folder / "model.pt2").module(), images, embeddings[: len(images)])
        np.savez(
            folder / "embeddings.npz",
            embeddings=embeddings.numpy(),
            names=np.array([x.name for x in samples]),
            labels=np.array([x.label for x in samples]),
        )
        (folder / "transform.json").write_text(json.dumps(described, indent=2) + "\n")
        (folder / "README.md").write_text(text, encoding="utf-8")
    say(f"{len(samples)} embeddings and the network: {output}")
    return 0


def _samples(
    args: argparse.Namespace, config: dict[str, Any], skipped: list[Skipped]
) -> list[Sample]:
    if not args.images:
        return splits_of_run(RunFolder.existing(args.run), config, args.data_root).test.samples
    root = Path(args.images)
    if not root.is_dir():
        raise UserError(f"--images: expected a folder of images, got {args.images}")
    # The folder in which an image lies says what it shows, if anything does.
    return [
        Sample(str(x.path), x.path.parent.name, x.path)
        for x in read_trees([root.resolve()], 0, skipped)[0]
    ]


def _exported(network: torch.nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    if len(images) == 1:  # a batch of one would be taken for a constant
        images = images.expand(2, -1, -1, -1).contiguous()
    batch = torch.export.Dim("batch")
    return torch.export.export(
        Normalized(network).eval(), (images,), dynamic_shapes=({0: batch},), strict=False
    )


def _check(model: torch.nn.Module, images: torch.Tensor, expected: torch.Tensor) -> None:
    with torch.no_grad():
        off = (model(images) - expected).abs().max().item()
    if not off <= TOLERANCE:
        raise UserError(
            f"the network that was written differs from the run's: an embedding by {off:.2g}"
        )


def _described(transform: Transform) -> tuple[dict[str, Any], str]:
    if isinstance(transform, SmallTransform):
        described = {
            "mode": transform.mode,
            "crop": "largest centred square",
            "size": transform.size,
            "interpolation": "bilinear",
            "mean": 127.5,
            "std": 127.5,
        }
        return described, SMALL_CODE.format(mode=transform.mode, size=transform.size)
    assert isinstance(transform, TimmTransform)
    return transform.config, TIMM_CODE
