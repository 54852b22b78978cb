"""What a script can do after a plain `prepare`, on powerful-benchmarker's own configs."""

import sys

import pytest
import torch

from pml_pnp import PNPLoss, benchmarker
from pml_pnp.benchmarker import command_line, requirements

benchmarker.prepare()
runner = command_line.build_runner(*command_line._parser().parse_known_args())
benchmarker.register(runner)
runner.set_YR()
read = runner.YR.load_yamls(runner.determine_where_to_get_yamls(runner.YR.args), max_merge_depth=9)
loss = runner.pytorch_getter.get("loss", yaml_dict=read[0].loss_funcs["metric_loss"])
assert type(loss) is PNPLoss and (loss.variant, loss.alpha, loss.anneal) == ("Dq", 4, 0.01)
assert list(read[0].dataset) == ["CUB200"]


def factory(name):
    return runner.pytorch_getter.get("factory", yaml_dict={name: {"getter": runner.pytorch_getter}})


# Losses and miners inside others, made for each of two folds.
size, pnp = {"embedding_size": 8}, {"PNPLoss": {"variant": "Ds"}}
mined = {"loss": {"PNPLoss": None}, "miner": {"MultiSimilarityMiner": {}}, **size}
weights = {"PNPLoss": 0.5, "NormalizedSoftmaxLoss": 0.0}
both = {"losses": {**pnp, "NormalizedSoftmaxLoss": size}, "weights": weights}
losses = {
    "memory": {"CrossBatchMemory": {"loss": pnp, **size}},
    "mined": {"CrossBatchMemory": mined},
    "sum": {"MultipleLosses": both},
}
makes = factory("LossFactory")
for _ in range(2):
    made = makes.create(named_specs=losses, kwargs={"num_classes": 5})
torch.manual_seed(0)
x, y = torch.randn(16, 8), torch.arange(16) // 4
alone = PNPLoss(variant="Ds")(x, y).item()
nested = {name: made[name](x, y).item() for name in losses}
assert nested["memory"] == pytest.approx(alone, rel=1e-5)  # of a memory that is the batch
assert nested["sum"] == pytest.approx(alone / 2, rel=1e-5) and nested["mined"] > 0
assert made["sum"].losses["NormalizedSoftmaxLoss"].W.shape[1] == 5
if requirements.is_pinned():  # PML 2 has none
    miner = {"MaximumLossMiner": {"loss": {"PNPLoss": {}}, "output_batch_size": 8}}
    assert len(factory("MinerFactory").create(miner)(x, y)) == 8

# Gradients are clipped, and a scheduler lowers the rate.
by_epoch = {"StepLR": {"step_size": 1, "gamma": 0.1}}
sgd = {"SGD": {"lr": 1.0}, "scheduler_by_epoch": by_epoch, "clip_grad_norm": 0.5}
trunk = torch.nn.Linear(8, 2)
for _ in range(2):
    optimizers, schedulers, clippers = factory("OptimizerFactory").create(
        named_specs={"trunk_optimizer": sgd}, kwargs={"param_sources": [{"trunk": trunk}]}
    )
trunk(x).square().sum().backward()
clippers["trunk_grad_clipper"]()
norm = torch.nn.utils.get_total_norm([p.grad for p in trunk.parameters()])
assert norm.item() == pytest.approx(0.5, rel=1e-4)
optimizers["trunk_optimizer"].step()
schedulers["trunk_scheduler_by_epoch"].step()
assert optimizers["trunk_optimizer"].param_groups[0]["lr"] == pytest.approx(0.1)

# A search.
from powerful_benchmarker.runners.bayes_opt_runner import BayesOptRunner  # noqa: E402

sys.argv[1:] = ["--experiment_name", "search", "--loss_funcs~OVERRIDE~"]
sys.argv += "{metric_loss: {PNPLoss: {alpha~BAYESIAN~: [1.0, 16.0]}}}".split()
search = BayesOptRunner(bayes_opt_iters=1, reproductions=0, root_experiment_folder="searches")
benchmarker.register(search)
client = search.get_ax_client()
client.get_next_trial()
search.save_new_log(client)
search.delete_sub_experiment_folder("search0")  # which there was no time to make
parameters = search.get_ax_client().get_trial_parameters(0)
assert list(parameters) == ["loss_funcs/metric_loss/PNPLoss/alpha"]
