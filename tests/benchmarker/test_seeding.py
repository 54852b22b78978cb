"""The same seed gives the same run, also to one that was interrupted."""

import random
import types

import numpy as np
import torch
from damage import same
from pytorch_metric_learning.utils import common_functions

from pml_pnp.benchmarker.seeding import seed_everything, seed_runs

from .test_checkpoints import trainer_of


def draws():
    of_pml = common_functions.NUMPY_RANDOM.rand()
    return random.random(), float(np.random.rand()), torch.rand(()).item(), float(of_pml)


def test_seeds_are_of_everything_and_differ_in_each_part():
    seen = set()
    for seeds in ((0,), (1,), (0, 1), (1, 0), (0, 1, 2)):
        seed_everything(*seeds)
        first = draws()
        seed_everything(*seeds)
        assert draws() == first
        seen.add(first)
    assert len(seen) == 5


class Parser:
    """Of powerful-benchmarker's API parsers, what is seeded."""

    curr_split_count = 0

    def __init__(self, name="trial"):
        self.args = types.SimpleNamespace(experiment_name=name)

    def run(self, epochs, state=None):
        """Train the first fold from epoch `epochs[0]` to `epochs[1]`; the state to go on from."""
        self.set_models_optimizers_losses()
        trainer = self.get_trainer()
        if state is not None:
            self.model.load_state_dict(state)
        trainer.train(*epochs)
        return {k: v.clone() for k, v in self.model.state_dict().items()}

    def set_models_optimizers_losses(self):
        self.model = torch.nn.Linear(4, 2)

    def eval_model(self, epoch, name):
        return draws()

    def get_trainer(self):
        x = torch.arange(160.0).view(40, 4).sin()
        return trainer_of(self.model, torch.optim.SGD, x, torch.arange(40) // 5)


def test_an_evaluation_draws_the_same_model_whatever_came_before():
    parser = Parser()
    seed_runs(parser, 0)
    whole = [parser.eval_model(epoch, "untrained") for epoch in (-1, 0)]
    torch.rand(17)
    assert parser.eval_model(0, "untrained") == whole[1] != whole[0]
    parser.eval_model("trained", "trained")  # of the ensemble


def run(*args, seed=0, name="trial"):
    parser = Parser(name)
    seed_runs(parser, seed)
    assert type(parser).__name__ == "Parser" and isinstance(parser, Parser)
    return parser.run(*args)


def test_a_run_that_goes_on_ends_as_one_that_was_never_stopped():
    whole = run((1, 4))
    assert same(whole, run((1, 4)))
    torch.rand(17), np.random.rand(3)
    assert same(whole, run((3, 4), run((1, 2))))


def test_seeds_and_reproductions_differ():
    names = ("trial", "search3_reproduction0", "search3_reproduction1")
    ends = [run((1, 1), name=name)["weight"] for name in names]
    ends.append(run((1, 1), seed=1)["weight"])
    assert len({float(weight[0, 0]) for weight in ends}) == 4
    again = run((1, 1), name="search3")["weight"]
    assert torch.equal(again, ends[0])  # trials of a search are compared on one seed
