"""A run of benchmarks/ranks.py at a size that takes a moment, and what it calculates."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pml_pnp import PNPLoss


@pytest.fixture
def rows(report, folder_of_ranks):
    """Rows of two ranks with eight embeddings each."""
    return report.read([folder_of_ranks / "benchmark.csv"])


def test_every_mode_has_a_full_row(rows):
    import ranks

    assert rows.efficient.tolist() == list(ranks.MODES)
    assert rows[[*ranks.COLUMNS]].notna().all(axis=None)
    assert (rows.median_ms > 0).all()


def test_what_is_calculated_is_what_is_sent(report, rows):
    """Embeddings and their gradient; labels, and what the ranks say of each other, are less."""
    expected = report.calculated(2, 8, 4)
    assert expected.references == 16 and expected.gathered == 8 * 4 * 4
    labels, said = 8 * 8, 9 * 8
    exact = rows.set_index("efficient").loc['"exact"']
    assert exact.gathered_bytes == expected.gathered + labels + said
    # On a CPU the gradient is summed everywhere; the value and the number of queries as well.
    assert exact.reduced_bytes == 2 * expected.gathered + 16


class Products(TorchDispatchMode):
    """Counts the operations of matrix products, also of those in place."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith(("aten::mm", "aten::addmm")):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def test_the_products_are_counted_as_they_are_made(report):
    x, references = torch.randn(6, 5, requires_grad=True), torch.randn(18, 5, requires_grad=True)
    y, y_ref = torch.arange(6) % 3, torch.arange(18) % 3
    with Products() as products:
        PNPLoss(variant="Dq")(x, y, ref_emb=references, ref_labels=y_ref).backward()
    assert products.flops == report.calculated(3, 6, 5).flops
