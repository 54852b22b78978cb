"""Factories of powerful-benchmarker (pb): losses and miners that hold others, and optimizers.

pb's LossFactory makes the inner losses of CrossBatchMemory and MultipleLosses without the number of
classes that its own method requires (loss_factory.py:21 and 26), and replaces its factory of miners
by an instance that it calls in the next fold (loss_factory.py:28). It hands MultipleLosses a list,
which pytorch-metric-learning (PML) 0.9.92 sums to 0, and none of its other arguments. Its
MinerFactory calls a method of a class (miner_factory.py:15).

Its OptimizerFactory hands learning rate schedulers on under keys that no trainer of PML takes
(optimizer_factory.py:32), fails where gradients are to be clipped (line 33), and takes both out of
the config in the first fold.
"""

import copy
import functools


def factories() -> list[type]:
    """LossFactory, MinerFactory and OptimizerFactory of pb, adapted, under their names."""
    import torch
    from powerful_benchmarker import factories as module
    from pytorch_metric_learning import losses

    class LossFactory(module.LossFactory):
        def _create_general(self, loss_type, num_classes=None):
            loss, params = self.getter.get("loss", yaml_dict=loss_type, return_uninitialized=True)
            if not issubclass(loss, (losses.CrossBatchMemory, losses.MultipleLosses)):
                return super()._create_general(loss_type, num_classes)
            params = dict(params)
            miners = MinerFactory(getter=self.getter)
            if "loss" in params:
                params["loss"] = self._create_general(params["loss"], num_classes)
            if "miner" in params:
                params["miner"] = miners.create(params["miner"])
            if "losses" in params:
                params["losses"] = {
                    name: self._create_general({name: arguments}, num_classes)
                    for name, arguments in _dictionary(params["losses"], "losses").items()
                }
            if "miners" in params:
                params["miners"] = {
                    name: miners.create(miner)
                    for name, miner in _dictionary(params["miners"], "miners").items()
                }
            return loss(**params)

    class MinerFactory(module.MinerFactory):
        def _create_general(self, miner_type):
            miner, params = self.getter.get(
                "miner", yaml_dict=miner_type, return_uninitialized=True
            )
            params = dict(params)
            if "loss" in params:
                params["loss"] = LossFactory(getter=self.getter).create(params["loss"])
            if "miner" in params:
                params["miner"] = self.create(params["miner"])
            return miner(**params)

    class OptimizerFactory(module.OptimizerFactory):
        def _create_general(self, optimizer_type, k, param_sources):
            optimizer_type = copy.deepcopy(optimizer_type)
            max_norm = optimizer_type.pop("clip_grad_norm", None)
            made = super()._create_general(optimizer_type, k, param_sources)
            if max_norm is not None:
                groups = made["optimizer"].param_groups
                made["gradient_clipper"] = functools.partial(
                    torch.nn.utils.clip_grad_norm_,
                    [p for group in groups for p in group["params"]],
                    max_norm,
                )
            return made

        def format_named_specs_output(self, named_specs_output):
            optimizers, schedulers, clippers = {}, {}, {}
            for name, made in named_specs_output.items():
                optimizers[name] = made["optimizer"]
                schedulers |= made.get("lr_scheduler", {})
                if "gradient_clipper" in made:
                    key = f"{name.removesuffix('_optimizer')}_grad_clipper"
                    clippers[key] = made["gradient_clipper"]
            return optimizers, schedulers, clippers

    return [LossFactory, MinerFactory, OptimizerFactory]


def _dictionary(value, name: str) -> dict:
    if not isinstance(value, dict):
        raise TypeError(
            f"{name} of MultipleLosses must be a dictionary by class name, as in "
            f"{{PNPLoss: {{variant: Dq}}, ContrastiveLoss: {{}}}}, got {value!r}"
        )
    return value
