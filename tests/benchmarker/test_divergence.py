"""Models that diverge are told from other errors, by the text that powerful-benchmarker reads."""

import pytest
import torch
from pytorch_metric_learning import testers

from pml_pnp.benchmarker import divergence

TESTER = divergence.tester(testers.GlobalEmbeddingSpaceTester)


def embed(value, **kwargs):
    """Embeddings of a model with one weight that is `value`."""
    model = torch.nn.Linear(4, 3)
    with torch.no_grad():
        model.weight[1, 2] = value
    data = torch.utils.data.TensorDataset(torch.randn(6, 4), torch.arange(6) // 2)
    tester = TESTER(data_device=torch.device("cpu"), dataloader_num_workers=0, **kwargs)
    return tester.get_all_embeddings(data, model, torch.nn.Identity())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normalize_embeddings", [False, True])
def test_embeddings_that_are_not_finite_are_not_ranked(value, normalize_embeddings):
    with pytest.raises(ValueError, match="NaN"):
        embed(value, normalize_embeddings=normalize_embeddings)


def test_a_large_embedding_is_ranked_and_the_name_is_kept():
    embeddings, labels = embed(1e18, normalize_embeddings=False)
    assert abs(torch.as_tensor(embeddings)).max() > 1e15 and len(labels) == 6
    assert TESTER.__name__ == "GlobalEmbeddingSpaceTester"


class Parser:
    """As much of an API parser as trains; an error is handled as by powerful-benchmarker's."""

    def __init__(self, scale, error):
        self.models = {"trunk": torch.nn.Linear(2, 2), "embedder": torch.nn.Identity()}
        torch.nn.init.constant_(self.models["trunk"].weight, 2.0)
        self.scale, self.error = scale, error

    def train(self, num_epochs):
        x = torch.full((3, 2), self.scale)
        self.models["embedder"](self.models["trunk"](x))
        raise self.error

    def run_train_or_eval(self):
        try:
            self.train(1)
        except ValueError as error:
            if "NaN" in str(error):
                return 0, 0
            raise ValueError  # noqa: B904


def run(scale, error, parser=Parser):
    return divergence.api_parser(parser)(scale, error).run_train_or_eval()


@pytest.mark.parametrize(
    "error", [RuntimeError("index -9223372036854775808 is out of bounds"), ValueError("empty")]
)
def test_an_error_of_a_diverged_model_counts_as_0(error):
    assert run(float("inf"), error) == (0, 0)
    assert run(3e38, error) == (0, 0)  # weights are finite, outputs are not


class FailingBesideTraining(Parser):
    def run_train_or_eval(self):
        raise self.error


@pytest.mark.parametrize(
    ("parser", "error"),
    [
        (Parser, RuntimeError("out of memory")),
        (Parser, ValueError("k must be larger")),
        (FailingBesideTraining, ValueError("no such split")),
    ],
)
def test_another_error_is_raised_as_it_is(parser, error):
    with pytest.raises(type(error)) as raised:
        run(1.0, error, parser)
    assert raised.value is error


class Aggregator:
    def __init__(self):
        self.meta_accuracies = {
            "test": {
                "untrained_trunk": {"r_precision": {"fold0": 0.1, "fold1": 0.2}},
                "trained": {"r_precision": {"fold1": 0.3}},
            },
            "val": {"trained": {"r_precision": {"fold0": 0.1, "fold1": 0.3}}, "untrained": {}},
        }

    def record_accuracies(self, *splits):
        self.recorded = {split: list(self.meta_accuracies[split]) for split in splits}


def test_folds_are_averaged_all_or_not_at_all(caplog):
    aggregator = divergence.aggregator(Aggregator)()
    aggregator.record_accuracies("test", "val")
    assert aggregator.recorded == {"test": ["untrained_trunk"], "val": ["trained"]}
    assert "1 of 2 folds have accuracies of the trained model on test" in caplog.text
