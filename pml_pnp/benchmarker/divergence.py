"""Trials that diverge count as 0, as powerful-benchmarker (pb) means them to.

pb ends an experiment with an accuracy of 0 where a ValueError says "NaN" (base_api_parser.py:29),
and a hyperparameter search goes on to the next trial. That text was scikit-learn's, which
normalized the embeddings for pytorch-metric-learning (PML) 0.9.92. PML 2 normalizes them itself and
fails later, in other words or not at all: ranked against another set, embeddings that are NaN have
an accuracy like any other. PML 0.9.92 does the same where embeddings are not normalized, and for
infinite ones scikit-learn does not say "NaN".
"""

import logging


class Diverged(ValueError):
    """A model diverged; the message says NaN, which pb looks for."""


def tester(base: type) -> type:
    """A tester that raises Diverged instead of ranking embeddings that are NaN or infinite."""
    import torch

    class Tester(base):
        def compute_all_embeddings(self, *args, **kwargs):
            embeddings, labels = super().compute_all_embeddings(*args, **kwargs)
            if not torch.as_tensor(embeddings).isfinite().all():
                raise Diverged("the model diverged: its embeddings are NaN or infinite")
            return embeddings, labels

    Tester.__name__ = Tester.__qualname__ = base.__name__
    return Tester


def api_parser(base: type) -> type:
    """An API parser that tells errors of diverged models from others.

    Some losses and miners fail on NaN, each in its own way. Of another ValueError pb raises an
    empty one (base_api_parser.py:37); here it is the original again.
    """

    class Parser(base):
        def train(self, num_epochs):
            outputs = {}
            for name, model in self.models.items():
                model.register_forward_hook(
                    lambda module, args, output, name=name: outputs.update({name: output.detach()})
                )
            try:
                super().train(num_epochs)
            except Diverged:
                raise
            except Exception as error:
                weights = [p for model in self.models.values() for p in model.parameters()]
                if all(x.isfinite().all() for x in (*outputs.values(), *weights)):
                    raise
                raise Diverged(
                    f"the model diverged: its weights or outputs are NaN or infinite, and "
                    f"{type(error).__name__}: {error}"
                ) from error

        def run_train_or_eval(self):
            try:
                return super().run_train_or_eval()
            except ValueError as error:
                if error.args or error.__context__ is None:
                    raise
                raise error.__context__ from None

    return Parser


def aggregator(base: type) -> type:
    """An aggregator that averages over all folds or not at all.

    A fold that diverged before its first evaluation has no trained model. When such an experiment
    is evaluated, pb averages over the other folds, without a standard error if there is only one
    (base_aggregator.py:34); record-keeper 0.9.29 wants one in every row, and the search ends.
    """

    class Aggregator(base):
        def record_accuracies(self, *args, **kwargs):
            for split, accuracies in self.meta_accuracies.items():
                folds = {
                    status: max((len(values) for values in metrics.values()), default=0)
                    for status, metrics in accuracies.items()
                }
                for status in [x for x in folds if folds[x] < max(folds.values())]:
                    logging.warning(
                        "%s of %s folds have accuracies of the %s model on %s: no average",
                        folds[status],
                        max(folds.values()),
                        status,
                        split,
                    )
                    del accuracies[status]
            super().record_accuracies(*args, **kwargs)

    return Aggregator
