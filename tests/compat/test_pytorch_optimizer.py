"""`lesam_dist.compat.pytorch_optimizer` against that package itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_optimizer as theirs
import torch
from torch import Tensor, nn

from lesam_dist.compat import pytorch_optimizer as ours

CASES: dict[str, tuple[str, type, dict[str, Any]]] = {
    "sam": ("SAM", torch.optim.AdamW, {"rho": 0.3, "lr": 0.01}),
    "asam": ("SAM", torch.optim.SGD, {"rho": 0.8, "adaptive": True, "lr": 0.1, "momentum": 0.9, "foreach": False}),
    "friendly": ("FriendlySAM", torch.optim.SGD, {"lmbda": 0.7, "sigma": 0.8, "lr": 0.1, "momentum": 0.9}),
    "wsam": ("WSAM", torch.optim.AdamW, {"rho": 0.2, "gamma": 0.8, "lr": 0.01, "max_norm": 0.5}),
    "wsam-coupled": ("WSAM", torch.optim.SGD, {"rho": 0.2, "gamma": 0.7, "decouple": False, "lr": 0.1}),
}


def train(package: Any, case: str, net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    name, base, kwargs = CASES[case]
    cls, args = getattr(package, name), (net,) if name == "WSAM" else ()
    optimizer = cls(*args, net.parameters(), base, **kwargs)
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        if name != "WSAM":
            closure()
        optimizer.step(closure)


@pytest.mark.parametrize("case", CASES)
def test_the_same_script_gives_the_same_weights(seed: int, case: str) -> None:
    net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3)).double()
    twin = copy.deepcopy(net)
    batches = [(torch.randn(16, 6).double(), torch.randint(3, (16,))) for _ in range(5)]
    train(ours, case, net, batches)
    train(theirs, case, twin, batches)
    own, expected = net.state_dict(), twin.state_dict()
    if not case.startswith("wsam"):  # there BatchNorm's statistics are the user's own business
        own = {name: own[name] for name, _ in net.named_parameters()}
        expected = {name: expected[name] for name in own}
    assert own.pop("1.num_batches_tracked", 5) == 5, "theirs counts the second passes too"
    torch.testing.assert_close(own, {name: expected[name] for name in own})


def test_what_is_not_offered_says_so() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="use_gc is True, which is not offered"):
        ours.SAM(net.parameters(), torch.optim.SGD, use_gc=True, lr=0.1)
    with pytest.raises(ValueError, match="WSAM: adaptive is True, which is not offered"):
        ours.WSAM(net, net.parameters(), torch.optim.SGD, adaptive=True, lr=0.1)
    with pytest.raises(ValueError, match=r"0\.1 is to be added to the norm, and nothing is here"):
        ours.FriendlySAM(net.parameters(), torch.optim.SGD, perturb_eps=0.1, lr=0.1)
