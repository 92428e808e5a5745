"""What one method alone does: a schedule, a choice of tensors and samples, param groups, and its bad input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD

from lesam_dist import optim
from tests.optim.test_methods import DEVICE, Quadratic


def test_gsam_radius_follows_the_learning_rate() -> None:
    optimizer = optim.GSAM([nn.Parameter(torch.ones(2))], SGD, rho=0.6, rho_min=0.1, lr_min=0.1, lr=1.0)
    for lr, rho in ((1.0, 0.6), (0.1, 0.1), (0.55, 0.35), (0.0, 0.1 - 0.5 / 9)):
        optimizer.param_groups[0]["lr"] = lr
        assert optimizer.radius(optimizer.param_groups[0]).rho_max == pytest.approx(rho)


def test_eigensam_finds_the_largest_curvature(seed: int) -> None:
    net = Quadratic(torch.float64)
    optimizer = optim.EigenSAM(net.parameters(), SGD, interval=1, power_steps=60, lr=1e-3)
    for t in range(3):
        optimizer.step(net.closure(t))
    state = optimizer.state_dict()["state"]
    v = torch.cat([state[i]["eigenvector"].flatten() for i in range(3)]).cpu().numpy()
    a = net.a.cpu().numpy()
    np.testing.assert_allclose(v @ a @ v, np.linalg.eigvalsh(a)[-1], rtol=1e-2)
    assert np.linalg.norm(v) == pytest.approx(1.0)


class Twice:
    """A closure of a user's own that makes products with the Hessian."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor) -> None:
        self.net, self.x, self.y = net, x, y

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.x), self.y)

    def __call__(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        return loss

    def hessian_product(self, along: Mapping[Tensor, Tensor]) -> None:
        optim.hessian_backward(self.loss(), along)


def test_eigensam_multiplies_by_the_hessian_where_there_are_kinks(seed: int) -> None:
    """ReLU, where differences of gradients see kinks between the two points; by the block of what is perturbed."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    closure = Twice(net, 2 * torch.randn(30, 4).double(), torch.randint(0, 3, (30,)))
    block = slice(0, 6 * 4 + 6 + 5 * 6 + 5)
    hessian = hessian_of(net, closure)[block, block]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(closure.loss(), net.parameters())]).numpy()[block]
    for _ in range(6):
        expected = hessian @ expected
        expected /= np.linalg.norm(expected)
    groups = [{"params": list(net[:4].parameters())}, {"params": list(net[4].parameters()), "perturb": False}]
    optimizer = optim.EigenSAM(groups, SGD, interval=1, power_steps=6, lr=0.0)
    for _ in range(2):
        optimizer.step(closure)
    state = optimizer.state_dict()["state"]
    v = torch.cat([state[i]["eigenvector"].flatten() for i in range(4)]).numpy()
    np.testing.assert_allclose(v, expected, rtol=0, atol=1e-9)
    assert "eigenvector" not in state.get(4, {})


def hessian_of(net: nn.Module, closure: Twice) -> NDArray[np.float64]:
    """Dense, by torch.func, of the flat parameters."""
    names, sizes = zip(*((n, p.numel()) for n, p in net.named_parameters()), strict=True)
    shapes = [p.shape for p in net.parameters()]

    def loss(w: Tensor) -> Tensor:
        parts = {n: part.view(shape) for n, part, shape in zip(names, w.split(sizes), shapes, strict=True)}
        out = torch.func.functional_call(net, parts, (closure.x,))
        return nn.functional.cross_entropy(out, closure.y)

    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    return np.asarray(torch.func.hessian(loss)(flat).numpy())


def test_eigensam_says_what_exact_products_need(seed: int) -> None:
    net = Quadratic(torch.float64)
    optimizer = optim.EigenSAM(net.parameters(), SGD, interval=1, products="exact", lr=0.1)
    optimizer.step(net.closure(0))  # there is no eigenvector in the first
    before = net.flat()
    with pytest.raises(RuntimeError, match="the closure has no method hessian_product"):
        optimizer.step(net.closure(1))
    assert np.array_equal(net.flat(), before)


class Samples(nn.Module):
    """A loss per sample, (w - c_i)' A_i (w - c_i), and the passes that ESAM asks for."""

    def __init__(self, sign: int) -> None:
        super().__init__()
        self.sign = sign
        self.w = nn.ParameterList([torch.randn(3, dtype=torch.float64) for _ in range(4)])
        self.a, self.c = torch.rand(10, 12, dtype=torch.float64), torch.randn(10, 12, dtype=torch.float64)
        self.asked: list[dict[str, Any]] = []

    def losses(self, w: Tensor) -> Tensor:
        return (self.a * (w - self.c) ** 2).sum(dim=1)

    def closure(self, **arguments: Any) -> Tensor:
        self.asked.append(arguments)
        losses = self.sign * self.losses(torch.cat(list(self.w)))
        if arguments.get("subset") is not None:
            losses = losses[arguments["subset"]]
        if arguments.get("backward", True):
            losses.mean().backward()
        return losses.detach() if arguments.get("per_sample") else losses.mean().detach()


@pytest.mark.parametrize("sign", [1, -1], ids=["minimize", "maximize"])
@pytest.mark.parametrize(("beta", "gamma"), [(0.5, 1.0), (1.0, 0.35), (0.5, 0.35)])
def test_esam_perturbs_some_tensors_and_keeps_the_samples_that_rose_most(
    seed: int, beta: float, gamma: float, sign: int
) -> None:
    net = Samples(sign)
    own = {"rho": 0.3, "beta": beta, "gamma": gamma, "seed": seed}
    optimizer = optim.ESAM(net.w.parameters(), SGD, lr=0.1, maximize=sign < 0, **own)  # type: ignore[arg-type]
    chosen = set()
    for t in range(6):
        w = torch.cat([p.detach() for p in net.w])
        drawn = torch.rand(4, generator=torch.Generator().manual_seed(seed + 1_000_003 * t)) < beta
        mask = drawn.repeat_interleave(3)
        g = (2 * net.a * (w - net.c)).mean(dim=0) * mask
        moved = w + (0.3 / beta * g / g.norm() if mask.any() else 0.0)
        rise = net.losses(moved) - net.losses(w)
        kept = rise.argsort(descending=True)[: int(gamma * 10)]
        expected = w - 0.1 * (2 * net.a * (moved - net.c))[kept].mean(dim=0)
        net.asked.clear()
        loss = optimizer.step(net.closure)
        if mask.any():  # else no loss rose, and any samples will do
            torch.testing.assert_close(torch.cat([p.detach() for p in net.w]), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(loss, sign * net.losses(w).mean())
        assert len(net.asked) == (2 if gamma == 1 else 3)
        chosen.add(tuple(drawn.tolist()))
    assert beta == 1 or len(chosen) > 1, "every step draws anew"


def test_samon_perturbs_normalisation_layers_alone(seed: int) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)).to(DEVICE)
    optimizer = optim.SAMON(optim.norm_groups(net), SGD, rho=0.3, lr=0.1)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    net(torch.randn(5, 4, device=DEVICE)).square().sum().backward()
    norm = torch.cat([net[1].weight.grad, net[1].bias.grad]).norm()
    optimizer.first_step()
    for n, p in net.named_parameters():
        moved = 0.3 * p.grad / norm if n.startswith("1.") else torch.zeros_like(p)  # type: ignore[operator]
        torch.testing.assert_close(p.detach(), before[n] + moved)
    optimizer.restore()
    with pytest.raises(ValueError, match="1 of 1 param groups are perturbed"):
        optim.SAMON(net.parameters(), SGD, lr=0.1)
    with pytest.raises(ValueError, match="has no normalisation layer"):
        optim.norm_groups(nn.Linear(2, 2))


class LlamaRMSNorm(nn.Module):
    """As transformers has it; timm's RmsNorm is alike."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))


class ActNorm2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.ones(1, channels, 1, 1)) for _ in range(2))


class NormedLinear(nn.Linear):
    pass


class PreNormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.linear = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)


def test_samon_knows_normalisation_layers_of_other_libraries() -> None:
    net = nn.Sequential(LlamaRMSNorm(4), NormedLinear(4, 4), ActNorm2d(4), PreNormBlock(), nn.LayerNorm(4))
    norms, others = optim.norm_groups(net)
    names = {p: name for name, p in net.named_parameters()}
    assert [names[p] for p in norms["params"]] == ["0.weight", "2.scale", "2.shift", "4.weight", "4.bias"]
    assert len(others["params"]) == 5


def test_asam_by_the_released_rule(seed: int) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).to(DEVICE)
    optimizer = optim.ASAM(optim.adaptive_groups(net), SGD, rho=0.3, eta=0.0, lr=0.1)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    grads = {n: p.grad for n, p in net.named_parameters()}
    metric = {n: w.abs() if "weight" in n else torch.ones_like(w) for n, w in before.items()}
    norm = torch.stack([(metric[n] * grads[n]).square().sum() for n in before]).sum().sqrt()  # type: ignore[operator]
    optimizer.first_step()
    for n, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] + 0.3 * metric[n] ** 2 * grads[n] / norm)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("method", "kwargs", "message"),
    [
        (optim.ASAM, {"eta": -1.0}, "eta is -1.0"),
        (optim.FisherSAM, {"eta": -1.0}, "eta is -1.0"),
        (optim.FriendlySAM, {"lam": 1.5}, "lam is 1.5"),
        (optim.WSAM, {"gamma": 1.0}, "gamma is 1.0"),
        (optim.ESAM, {"beta": 0.0}, "beta is 0.0"),
        (optim.ESAM, {"ascent_fraction": 0.5}, "needs ascent_fraction=1"),
        (optim.EigenSAM, {"interval": 0}, "interval is 0"),
        (optim.EigenSAM, {"scope": "local"}, "a checkpoint saves one"),
        (optim.MSAM, {}, "SGD has none here: set momentum above 0"),
        (optim.S2SAM, {"scope": "local"}, "it has no first pass to change"),
        (optim.S2SAM, {"check_second": False}, "its only gradient must be checked"),
        (optim.GSAM, {"ascent_interval": 2, "ascent_between": "reuse"}, "needs the first gradient of every step"),
    ],
    ids=str,
)
def test_bad_hyper_parameters(method: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method([nn.Parameter(torch.ones(2))], SGD, lr=0.1, **kwargs)
