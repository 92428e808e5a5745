"""A task of one's own: which of 569 tumours are malignant, by 30 measurements of each (a table of scikit-learn's).

PYTHONPATH=examples lesam-dist train --task own_task.Tumours --data.batch_size 64 --epochs 20 --run_dir runs/tumours
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F

from lesam_dist.tasks import At, Metric, Table, Task

Batch = dict[str, Tensor]


class Tumours(Task):
    """A network with one hidden layer, as wide as ``--task_args.hidden`` says."""

    metric = Metric("accuracy", "accuracy", "%")  # what runs are compared by: a key of what `measure` gives

    def __init__(self, *run: object, hidden: int = 32, noise: float = 0.1) -> None:
        super().__init__(*run)  # config and processes
        self.hidden, self.noise = hidden, noise

    def open_data(self) -> tuple[Table, Table]:
        x, y = load_breast_cancer(return_X_y=True)
        x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
        train, val = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).split(455)
        x = (x - x[train].mean(dim=0)) / x[train].std(dim=0)
        return Table({"x": x[train], "y": y[train]}), Table({"x": x[val], "y": y[val]})

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(30, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 2))

    def draw(self, batch: Batch, at: At) -> Batch:
        """What is random is drawn here, once in a step: both passes see the same."""
        return {**batch, "x": batch["x"] + self.noise * torch.randn_like(batch["x"])}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"])

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor | float]:
        """Sums over the batch; the trainer adds them up over batches and processes, and reports their means."""
        logits, y = model(batch["x"]), batch["y"]
        return {
            "accuracy": 100 * (logits.argmax(dim=1) == y).sum(),
            "loss": F.cross_entropy(logits, y, reduction="sum"),
            "samples": len(y),
        }
