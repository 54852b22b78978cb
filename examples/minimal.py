"""Train an embedding with PNPLoss in a plain loop, and test retrieval among images held out."""

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.datasets import load_digits

from pml_pnp import losses

torch.manual_seed(0)
np.random.seed(0)  # of the sampler
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels, train, test = torch.tensor(digits.target), slice(0, 1000), slice(1000, None)
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 32, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32 * 36, 32)
)
loss_func = losses.PNPLoss(variant="Ds", anneal=0.03)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
dataset = torch.utils.data.TensorDataset(images[train], labels[train])
sampler = MPerClassSampler(labels[train], m=8, batch_size=80, length_before_new_iter=8000)
loader = torch.utils.data.DataLoader(dataset, batch_size=80, sampler=sampler)


def evaluate(name):
    with torch.no_grad():
        embeddings = torch.nn.functional.normalize(model(images[test]))
    names = ("mean_average_precision_at_r", "precision_at_1")
    accuracies = AccuracyCalculator(include=names).get_accuracy(embeddings, labels[test])
    print(f"{name}: MAP@R {accuracies[names[0]]:.3f}, precision@1 {accuracies[names[1]]:.3f}")


evaluate("untrained")
for batch, batch_labels in loader:
    loss = loss_func(model(batch), batch_labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
evaluate("trained")
