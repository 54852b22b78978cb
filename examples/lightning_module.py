"""Train by PyTorch Lightning; the memory of the loss is saved in Lightning's checkpoints.

`pip install -c constraints.txt ".[lightning]"`; `python examples/lightning_module.py`
"""

import pytorch_lightning as lightning
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pml_pnp import losses


class Retrieval(lightning.LightningModule):
    def __init__(self, embedding_size=64, memory_size=1024):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, embedding_size)
        )
        loss = losses.PNPLoss(variant="Ds", anneal=0.03)
        self.loss_func = losses.CrossBatchMemory(loss, embedding_size, memory_size)
        self.calculator = AccuracyCalculator(include=("mean_average_precision_at_r",))
        self.validation = []

    def training_step(self, batch, _):
        return self.loss_func(self.network(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.validation.append((self.network(batch[0]), batch[1]))

    def on_validation_epoch_end(self):
        embeddings, labels = map(torch.cat, zip(*self.validation, strict=True))
        self.validation.clear()
        found = self.calculator.get_accuracy(nn.functional.normalize(embeddings), labels)
        self.log("MAP@R", found["mean_average_precision_at_r"], prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.network.parameters(), lr=1e-3)


def main(**kwargs):
    lightning.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    sampler = MPerClassSampler(labels[:1000], 8, 80, length_before_new_iter=4000)
    train = DataLoader(TensorDataset(images[:1000], labels[:1000]), 80, sampler=sampler)
    test = DataLoader(TensorDataset(images[1000:], labels[1000:]), 256)
    # On several devices, each would measure MAP@R among its own part of the test.
    settings = {"max_epochs": 2, "logger": False, "devices": 1, **kwargs}
    trainer, module = lightning.Trainer(**settings), Retrieval()
    before, _ = trainer.validate(module, test), trainer.fit(module, train, test)
    return before[0], trainer.validate(module, test)[0], trainer


if __name__ == "__main__":
    main(enable_checkpointing=False)
