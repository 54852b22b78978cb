"""Miners in a memory do not choose a query's own copy."""

import pytest
import torch
from helpers import value_and_grad
from pytorch_metric_learning import distances, miners
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_pnp import losses
from pml_pnp.mining import mine


class Nearest(miners.BaseMiner):
    """The nearest positive and the nearest negative of each query, as triplets."""

    def similarities(self, embeddings, ref_emb):
        mat = self.distance(embeddings, ref_emb)
        return mat if self.distance.is_inverted else -mat

    def mine(self, embeddings, labels, ref_emb, ref_labels):
        s = self.similarities(embeddings, ref_emb)
        same = labels.unsqueeze(1) == ref_labels
        a = torch.arange(len(s), device=s.device)
        p = s.masked_fill(~same, -torch.inf).argmax(dim=1)
        return a, p, s.masked_fill(same, -torch.inf).argmax(dim=1)


class NearestByProduct(Nearest):
    """The same, by a matrix product of its own."""

    def similarities(self, embeddings, ref_emb):
        return embeddings @ ref_emb.T


def easy_hard(pos, neg, **kwargs):
    return lambda: miners.BatchEasyHardMiner(pos_strategy=pos, neg_strategy=neg, **kwargs)


MINERS = {
    "easy, semihard": miners.BatchEasyHardMiner,
    "easy, hard": easy_hard("easy", "hard"),
    "easy, easy": easy_hard("easy", "easy"),
    "easy, all": easy_hard("easy", "all"),
    "easy in a range": easy_hard("easy", "hard", allowed_pos_range=(0.1, 2)),
    "easy cosine": easy_hard("easy", "semihard", distance=distances.CosineSimilarity()),
    "semihard, hard": easy_hard("semihard", "hard"),
    "hard, semihard": easy_hard("hard", "semihard"),
    "all, hard": easy_hard("all", "hard"),
    "hard": miners.BatchHardMiner,
    "multi-similarity": miners.MultiSimilarityMiner,
    "margins of pairs": lambda: miners.PairMarginMiner(0.1, 0.9),
    "margins of triplets": miners.TripletMarginMiner,
    "nearest": Nearest,
    "nearest by SNR": lambda: Nearest(distance=distances.SNRDistance()),
}


def data(device):
    """Queries with labels, references that hold them at the columns, and their labels."""
    y = torch.arange(30, device=device) % 5
    x = torch.randn(5, 8, dtype=torch.float64, device=device)[y]
    x = torch.nn.functional.normalize(x + 0.8 * torch.randn_like(x))
    columns = torch.randperm(30, device=device)[:12]
    return x[columns], y[columns], x, y, columns


def as_sets(indices_tuple):
    """Positive and negative pairs, or triplets."""
    groups = [indices_tuple] if len(indices_tuple) == 3 else [indices_tuple[:2], indices_tuple[2:]]
    return [sorted(zip(*(x.tolist() for x in group), strict=True)) for group in groups]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MINERS)
def test_a_query_is_mined_as_if_its_copy_were_no_reference(name, device):
    queries, labels, references, ref_labels, columns = data(device)
    found = mine(MINERS[name](), queries, labels, references, ref_labels, columns)
    expected = []
    for a, column in enumerate(columns):
        others = torch.cat([torch.arange(column), torch.arange(column + 1, 30)]).to(device)
        row = slice(a, a + 1)
        one = MINERS[name]()(queries[row], labels[row], references[others], ref_labels[others])
        anchors = (0,) if len(one) == 3 else (0, 2)
        expected.append([x + a if i in anchors else others[x] for i, x in enumerate(one)])
    expected = [torch.cat(x) for x in zip(*expected, strict=True)]
    assert as_sets(found) == as_sets(expected)
    assert len(found[0]) > 0


def test_a_memory_with_the_default_miner_of_the_easiest_trains(device):
    """It was zero: every query's easiest positive is its own copy."""
    x = torch.randn(24, 8, device=device)
    y = torch.arange(24, device=device) // 4
    memory = losses.CrossBatchMemory(losses.PNPLoss(), 8, miner=miners.BatchEasyHardMiner())
    expected = losses.PNPLoss()(x, y, miners.BatchEasyHardMiner()(x, y))
    value, grad = value_and_grad(memory, x, y)
    torch.testing.assert_close(value, expected)
    assert value > 0 and grad.any()
    assert not memory.miner.distance._forward_hooks


def test_no_query_counts_with_a_miner_that_cannot_be_kept_from_the_copies():
    memory = losses.CrossBatchMemory(losses.PNPLoss(), 8, miner=NearestByProduct())
    x, y = torch.nn.functional.normalize(torch.randn(24, 8)), torch.arange(24) // 4
    with pytest.warns(UserWarning, match="NearestByProduct chooses .* its own copy .* no query"):
        assert memory(x, y) == 0


@pytest.mark.filterwarnings("error")
def test_a_batch_in_which_no_query_has_a_positive_is_no_reason_for_a_warning():
    memory = losses.CrossBatchMemory(losses.PNPLoss(), 8, miner=miners.BatchEasyHardMiner())
    assert memory(torch.randn(24, 8), torch.arange(24)) == 0


def test_a_miner_is_called_once_unless_it_chooses_copies():
    queries, labels, references, ref_labels, columns = data("cpu")
    calls = []

    def pairs(x, y, ref_emb, ref_labels):
        calls.append(len(x))
        return lmu.get_all_pairs_indices(y, ref_labels)

    mine(pairs, queries, labels, references, ref_labels, columns)
    assert calls == [12]
