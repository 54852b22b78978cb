"""Write the trained network, its embeddings and how to use both, for use without this repository.

    python examples/retrieval export RUN
    python examples/retrieval export RUN --images FOLDER --output NEW_FOLDER

The network is written by `torch.export`, the embeddings of the test images, or of the images below
a folder, to an npz. README.md in the new folder says how to load them, and prepare.py prepares
images as the network was trained to see them.
"""

import argparse
import dataclasses
import io
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import prepare
from .arguments import parser_for_run
from .configuration import of_run, splits_of_run
from .data import Sample
from .disk import new
from .embeddings import embed_samples
from .errors import UserError, require
from .image_tree import Skipped, read_trees, summary
from .network import load_best
from .processes import find_device, say
from .run_folder import RunFolder

TOLERANCE = 1e-4  # between the network and what was written, of embeddings of length 1
README = """\
# {title}

`model.pt2` maps images, `(batch, {channels}, {height}, {width})` in float32, to embeddings,
`(batch, {d})`, of length 1: their products are cosine similarities. `prepare.py` makes such an
image of any that Pillow opens, with the settings in `transform.json`. `embeddings.npz` holds
`embeddings`, `names` and `labels` of {n} images. The code needs torch {torch} or newer, NumPy and
Pillow:

```python
import json

import numpy as np
import torch
from PIL import Image
from prepare import Prepare

with open("transform.json") as file:
    prepare = Prepare(**json.load(file))
model = torch.export.load("model.pt2").module()


def embed(path):
    with Image.open(path) as image, torch.no_grad():
        return model(prepare(image).unsqueeze(0))[0].numpy()


stored = np.load("embeddings.npz")
similarities = stored["embeddings"] @ embed("query.jpg")
for i in similarities.argsort()[::-1][:10]:
    print(f"{{similarities[i]:.4f}}", stored["names"][i], stored["labels"][i])
```
"""
BOXES = """
The name of an image of which a box counts ends with that box: left, top, right and bottom, in
pixels of the upright image. Its embedding in `embeddings.npz` is of that part; `embed(path)` takes
the whole image.
"""
ONNX = """
`model.onnx` is the same network; it needs onnxruntime, NumPy and Pillow:

```python
import json

import onnxruntime
from PIL import Image
from prepare import Prepare

with open("transform.json") as file:
    prepare = Prepare(**json.load(file))
session = onnxruntime.InferenceSession("model.onnx")
with Image.open("query.jpg") as image:
    (embeddings,) = session.run(None, {"images": prepare.pixels(image)[None]})
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
    flags.add_argument(
        "--onnx", action="store_true", help="write the network as model.onnx as well"
    )
    return flags


def run(args: argparse.Namespace) -> int:
    """Export; returns the exit code."""
    run = RunFolder.existing(args.run)
    output = Path(args.output) if args.output else run.path / "export"
    if output.exists():
        raise UserError(f"{output} exists; name a new folder by --output")
    if args.onnx:
        require({"onnxscript": "onnxscript", "onnxruntime": "onnxruntime"})
    config = of_run(run)
    network, transform = load_best(args.run)
    skipped: list[Skipped] = []
    samples = _samples(args, config, skipped)
    device = find_device(args.device)
    embeddings, places = embed_samples(network, transform, samples, device, args.workers, skipped)
    if skipped:
        say(f"skipped {len(skipped)} files and folders:", *summary(skipped))
    if not places:
        raise UserError("no image that can be read")
    samples = [samples[i] for i in places]
    images = torch.stack([transform(x.open(transform.ranges)) for x in samples[:2]])
    program = _exported(network.cpu(), images)
    channels, height, width = images.shape[1:]
    text = README.format(
        title=run.path.resolve().name,
        channels=channels,
        height=height,
        width=width,
        d=embeddings.shape[1],
        n=len(samples),
        torch=torch.__version__.partition("+")[0],
    )
    text += BOXES if any(x.box for x in samples) else ""
    text += ONNX if args.onnx else ""
    with new(output) as folder:
        folder.mkdir()
        # torch's writer of archives aborts the process where a disk is full.
        stream = io.BytesIO()
        torch.export.save(program, stream)
        (folder / "model.pt2").write_bytes(stream.getbuffer())
        with (folder / "model.pt2").open("rb") as file:  # torch takes only paths that are UTF-8
            written = torch.export.load(file).module()
        with torch.no_grad():
            _check("model.pt2", written(images), embeddings)
        if args.onnx:
            content, made = _onnx(program, images)
            _check("model.onnx", made, embeddings)
            (folder / "model.onnx").write_bytes(content)
        np.savez(
            folder / "embeddings.npz",
            embeddings=embeddings.numpy(),
            names=np.array([x.name for x in samples]),
            labels=np.array([x.label for x in samples]),
        )
        settings = json.dumps(dataclasses.asdict(transform), indent=2)
        (folder / "transform.json").write_text(settings + "\n")
        shutil.copyfile(prepare.__file__, folder / "prepare.py")
        (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")
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


def _onnx(
    program: torch.export.ExportedProgram, images: torch.Tensor
) -> tuple[bytes, torch.Tensor]:
    """The network for onnxruntime, and what it makes of some images there."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of operations not in use
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        exported = torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=["images"]
        )
    content = exported.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content)
    return content, torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _check(name: str, made: torch.Tensor, embeddings: torch.Tensor) -> None:
    off = (made - embeddings[: len(made)]).abs().max().item()
    if not off <= TOLERANCE:
        raise UserError(f"{name} differs from the run's network: an embedding by {off:.2g}")
