"""A small network with what analyses must not disturb, and images for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lesam_dist.analysis.engine.objective import Batch

F64 = torch.float64


def conv_net() -> nn.Sequential:
    """Two BatchNorm layers, of which the second sees what the first gives, and dropout between them."""
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()),
        *(nn.Linear(16, 5), nn.BatchNorm1d(5, momentum=0.3), nn.ReLU(), nn.Linear(5, 3)),
    ).double()
    for i in (1, 6):
        nn.init.uniform_(net[i].running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(net[i].running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return net


def images(*sizes: int) -> list[Batch]:
    return [(torch.randn(n, 2, 4, 4, dtype=F64), torch.randint(3, (n,))) for n in sizes]


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}
