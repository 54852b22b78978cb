"""What several test files need: the run's device and dtypes, batches, distances, the reference.

As in PML's own suite, TEST_DEVICE=cuda and TEST_DTYPES=float16,float32 choose device and dtypes.
"""

import contextlib
import csv
import io
import json
import os
import socket
import sqlite3
from importlib import metadata

import pytest
import reference
import torch
from pytorch_metric_learning import distances
from pytorch_metric_learning import losses as pml_losses

from pml_pnp.variants import VARIANTS as TABLE

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
# Relative tolerance of a loss against the float64 reference: a few units in the last place of the
# result for the half precisions, since everything before it is computed in float32.
RTOL = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-4, torch.float64: 1e-10}

VARIANTS = list(TABLE)
VARIANTS_OF_THE_PAPER = {"O": 5, "Iu": 7, "Ib": 9, "Ds": 12, "Dq": 13}  # and their equations

BUILT_IN = getattr(pml_losses, "PNPLoss", None)
IS_TORCH_2_4 = torch.__version__.startswith("2.4.")


def version_of(package):
    return tuple(map(int, metadata.version(package).split(".")[:2]))


def _why_no_triton():
    """Why the Triton kernel cannot run here, or None."""
    try:
        triton = version_of("triton")  # whose import takes longer than this
    except metadata.PackageNotFoundError:
        return "Triton is not installed"
    if torch.cuda.is_available():
        return None
    if triton < (3, 1):
        return "the interpreter of Triton 3.0 leaves results unwritten"
    if triton < (3, 6) and version_of("numpy") >= (2, 4):
        return "the interpreter of Triton before 3.6 fails with NumPy 2.4"
    return None


WHY_NO_TRITON = _why_no_triton()
needs_built_in = pytest.mark.skipif(BUILT_IN is None, reason="this PML has no PNPLoss of its own")


class Manhattan(torch.nn.Module):
    """A user's own distance, without any base class."""

    is_inverted = False

    def forward(self, query_emb, ref_emb=None):
        return torch.cdist(query_emb, query_emb if ref_emb is None else ref_emb, p=1)


class Bilinear(distances.BaseDistance):
    """A user's own similarity that is not symmetric and learns."""

    def __init__(self, d=8):
        super().__init__(is_inverted=True)
        self.weight = torch.nn.Parameter(torch.eye(d) + 0.1 * torch.randn(d, d))

    def compute_mat(self, query_emb, ref_emb):
        return query_emb @ self.weight.to(query_emb) @ ref_emb.T


DISTANCES = {
    "cosine": distances.CosineSimilarity,
    "dot": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    "lp": distances.LpDistance,
    "lp squared, not normalized": lambda: distances.LpDistance(normalize_embeddings=False, power=2),
    "l1": lambda: distances.LpDistance(p=1, normalize_embeddings=False),
    "snr": distances.SNRDistance,
    "batched cosine": lambda: distances.BatchedDistance(distances.CosineSimilarity(), batch_size=5),
    "batched lp": lambda: distances.BatchedDistance(distances.LpDistance(), batch_size=7),
    "user's own": Manhattan,
    "user's own, learning": Bilinear,
}


class Scale(torch.nn.Module):
    """A variant with a parameter and a number."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, r):
        return self.factor * torch.log1p(r) * self.weight


class Category(torch.Tensor):
    """A subclass that only has another name, as those of fastai and torchvision."""


def batch(n=24, d=8, classes=5, dtype=torch.float32, device="cpu", spread=0.3):
    """Embeddings that cluster loosely by class, and labels in random order with unequal classes.

    Loosely: with anneal 0.01 the ranks of a random batch saturate, and gradients vanish.
    """
    labels = torch.randint(0, classes, (n,))
    labels[0] = classes + 7  # a class of one
    centres = torch.randn(classes + 8, d)
    embeddings = 0.3 * centres[labels] + torch.randn(1, d) + spread * torch.randn(n, d)
    return embeddings.to(device, dtype), labels.to(device)


def masks_of(shape, labels=None, indices_tuple=None, ref_labels=None):
    """Positives and negatives, (N, M) each; without references the query is in neither."""
    if indices_tuple is None:
        same = labels.unsqueeze(1) == (labels if ref_labels is None else ref_labels)
        return (same.clone().fill_diagonal_(False) if ref_labels is None else same), ~same
    a, p, *rest = indices_tuple
    positive, negative = torch.zeros(2, *shape, dtype=torch.bool)
    positive[a, p] = True
    negative[rest[0] if len(rest) == 2 else a, rest[-1]] = True
    return positive, negative


def distance_matrix(distance, x, ref=None):
    """(N, M) in float64 by the user's distance; of a BatchedDistance, by the one inside."""
    distance = getattr(distance, "distance", distance)
    return distance(x.double(), x.double() if ref is None else ref.double())


def expected_losses(
    x, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None, distance=None, **kwargs
):
    """{query: loss} by the reference, for cosine similarity or another distance."""
    distance = distances.CosineSimilarity() if distance is None else distance
    s = distance_matrix(distance, x, ref_emb)
    masks = masks_of(s.shape, labels, indices_tuple, ref_labels)
    sets = ([set(row.nonzero().flatten().tolist()) for row in mask] for mask in masks)
    own = distance_matrix(distance, x).diagonal()
    k = 1 if distance.is_inverted else -1
    return reference.pnp_losses(s.tolist(), *sets, own.tolist(), k=k, **kwargs)


def expected_mean(*args, **kwargs):
    losses = expected_losses(*args, **kwargs)
    return sum(losses.values()) / len(losses)


def value_and_grad(loss_func, embeddings, *args, **kwargs):
    x = embeddings.detach().clone().requires_grad_()
    value = loss_func(x, *args, **kwargs)
    value.backward()
    return value.detach(), x.grad


def recorded(loss_func, kind):
    """What a record-keeper finds: `kind` is "_record_these" or "_record_these_stats"."""
    return {name: getattr(loss_func, name) for name in getattr(loss_func, kind, [])}


def raised(function):
    """Type and text of the error, or None."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def through_file(x, weights_only=False):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def sql_rows(path, table):
    """The rows of a table of an SQLite database, a dictionary each."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table}")]


def csv_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def change_json(path, **values):
    """Give a file of a run other values, and no checksum."""
    content = {**json.loads(path.read_text()), **values}
    content.pop("crc32", None)
    path.write_text(json.dumps(content))


def change_weights(run, change):
    """Change the embedder of a run's best epoch in place."""
    path = run / "checkpoints" / "best.pt"
    best = torch.load(path, weights_only=True)
    change(best["models"]["embedder"]["weight"])
    torch.save(best, path)


def average_precision_at_r(right):
    """Of a query, from which of all others are right, the nearest first."""
    r = sum(right)
    return sum(sum(right[: k + 1]) / (k + 1) for k in range(r) if right[k]) / r


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
