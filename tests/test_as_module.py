"""PNPLoss is a loss of PML and a torch module: copies, subclasses, schedules, no_grad."""

import io

import torch
from helpers import Scale, batch
from pytorch_metric_learning import distances, reducers, regularizers
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_pnp import PNPLoss, losses


def test_it_is_a_pml_loss_with_pmls_defaults():
    loss_func = PNPLoss()
    assert isinstance(loss_func, pml_losses.BaseMetricLossFunction)
    assert type(loss_func.distance) is distances.CosineSimilarity
    assert type(loss_func.reducer) is reducers.MeanReducer


def test_embedding_regularizer_is_added(device):
    x, y = batch(device=device)
    plain = PNPLoss()(x, y)
    loss_func = PNPLoss(
        embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.5
    )
    regularizer = regularizers.LpRegularizer()(x) * 0.5
    torch.testing.assert_close(loss_func(x, y), plain + regularizer)


def test_state_dict_round_trip():
    assert PNPLoss().state_dict() == {}
    source, target = PNPLoss(variant=Scale()), PNPLoss(variant=Scale())
    with torch.no_grad():
        source.variant.weight.fill_(5)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert target.variant.weight.item() == 5


def test_a_subclass_may_change_the_distance():
    class Euclidean(PNPLoss):
        def get_default_distance(self):
            return distances.LpDistance()

    x, y = batch()
    assert torch.equal(Euclidean()(x, y), PNPLoss(distance=distances.LpDistance())(x, y))


def test_a_subclass_with_its_own_compute_loss_gets_pmls_arguments_and_elements():
    class Own(PNPLoss):
        def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
            if indices_tuple is not None:
                lmu.convert_to_pairs(indices_tuple, labels, ref_labels)
            parts = super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            assert parts["loss"]["reduction_type"] == "element"
            return parts

    x, y = batch()
    torch.testing.assert_close(Own()(x, y), PNPLoss()(x, y))
    assert losses.CrossBatchMemory(Own(), 8, memory_size=40)(x, y).isfinite()


def test_a_module_as_variant_is_part_of_the_loss():
    loss_func = PNPLoss(variant=Scale())
    assert [name for name, _ in loss_func.named_parameters()] == ["variant.weight"]
    x, y = batch()
    loss_func(x, y).backward()
    expected = PNPLoss()(x, y)
    torch.testing.assert_close(loss_func.variant.weight.grad, expected)
