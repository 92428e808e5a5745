"""BatchNorm's statistics estimated anew, against torch's own averages."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.errors import UserError
from tests.analysis.nets import conv_net, images, state


def test_estimated_statistics_are_torchs_cumulative_average(seed: int) -> None:
    net, batches = conv_net(), images(6, 6, 6)
    other = deepcopy(net).eval()
    for module in other:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for x, _ in batches:
            other(x)
    net[1].running_var.fill_(torch.nan)  # type: ignore[operator,union-attr]
    objective = Objective(net.train(), batches)
    objective.estimate_batchnorm()
    torch.testing.assert_close(state(net), state(other), rtol=1e-12, atol=1e-14)
    assert all(module.training for module in net.modules())
    assert (net[1].momentum, net[6].momentum) == (0.1, 0.3)
    assert objective.passes == {"forward": 1, "backward": 0}


def test_uneven_batches_count_by_their_images(seed: int) -> None:
    """So the mean of a layer's inputs is that of all images; one of a single image is left out."""
    net, batches = conv_net(), images(9, 1, 4, 2)
    Objective(net, batches).estimate_batchnorm()
    with torch.no_grad():
        inputs = torch.cat([net[0](x) for x, _ in batches if len(x) > 1])
    torch.testing.assert_close(net[1].running_mean, inputs.mean(dim=(0, 2, 3)), rtol=1e-12, atol=1e-14)
    with pytest.raises(UserError, match="batches of one image"):
        Objective(net, images(1, 1)).estimate_batchnorm()
