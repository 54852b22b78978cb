"""Seeds for powerful-benchmarker, which has none.

Every fold, epoch and evaluation begins with a seed of its own, so that a run that was killed and
resumed goes on as the one that was not.
"""

import copy
import random
import re


def seed_everything(*seeds: int) -> None:
    """Seed Python, numpy, torch, and what PML's samplers draw from, by a tuple of seeds."""
    import numpy as np
    import torch
    from pytorch_metric_learning.utils import common_functions

    # With their number, since to numpy (1,) and (1, 0) are one seed.
    seed = int(np.random.SeedSequence((len(seeds), *seeds)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    common_functions.NUMPY_RANDOM = np.random.RandomState(seed)


def seed_runs(api_parser, seed: int) -> None:
    """Seed what an API parser of pb goes on to do: each fold, and in it each epoch.

    The reproductions that follow a hyperparameter search get different seeds.
    """
    number = re.search(r"_reproduction(\d+)$", api_parser.args.experiment_name)
    seeds = (seed, 0 if number is None else 1 + int(number[1]))

    class Seeded(type(api_parser)):
        def set_models_optimizers_losses(self):
            seed_everything(*seeds, self.curr_split_count)
            super().set_models_optimizers_losses()

        def eval_model(self, epoch, *args, **kwargs):
            # An untrained model is drawn here; pb skips evaluations that came before a kill.
            if isinstance(epoch, int):  # not of the ensemble, where it is a name
                seed_everything(*seeds, self.curr_split_count, epoch + 1, 0)
            return super().eval_model(epoch, *args, **kwargs)

        def get_trainer(self, **kwargs):
            trainer = super().get_trainer(**kwargs)
            _seed_epochs(trainer, (*seeds, self.curr_split_count))
            return trainer

    _change_class(api_parser, Seeded)
    seed_everything(*seeds)


def _seed_epochs(trainer, seeds: tuple[int, ...]) -> None:
    """Seed each epoch of a trainer whose sampler has not been iterated yet."""

    class Seeded(type(trainer)):
        def get_batch(self):
            if self.iteration == 0:
                seed_everything(*seeds, self.epoch)
                # PML's samplers shuffle their labels in place, from epoch to epoch.
                self.sampler = copy.deepcopy(untouched)
                self.initialize_dataloader()
            return super().get_batch()

    untouched = copy.deepcopy(trainer.sampler)
    _change_class(trainer, Seeded)


def _change_class(instance, cls: type) -> None:
    cls.__name__, cls.__qualname__ = type(instance).__name__, type(instance).__qualname__
    instance.__class__ = cls
