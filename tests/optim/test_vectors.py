"""Vectors over all parameters, against numpy: their algebra, when it is computed, and what the engine makes of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lesam_dist import SAM
from lesam_dist.optim.engine.coefficients import Coefficient, lower
from lesam_dist.optim.engine.vectors import Update, Vector, ratio

SHAPES = ((3, 2), (5,), (4,))


def gradients(seed: int) -> tuple[SAM, list[Tensor]]:
    """An optimizer of two param groups, the second not perturbed, whose last parameter has no gradient."""
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in SHAPES]
    groups: Any = [{"params": params[:1]}, {"params": params[1:], "perturb": False, "rho": 0.4}]
    optimizer = SAM(groups, SGD, rho=0.2, lr=0.1)
    for p in params[:2]:
        p.grad = torch.randn_like(p)
    return optimizer, [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in params]


def flat(v: Vector) -> np.ndarray[Any, Any]:
    tensors = [t for row in v.column().tensors for t in row]
    whole = [torch.zeros(shape) if t is None else t for t, shape in zip(tensors, SHAPES, strict=True)]
    return np.concatenate([t.double().numpy().ravel() for t in whole])


def test_algebra(seed: int) -> None:
    optimizer, grads = gradients(seed)
    g = optimizer.gradient()
    v = g.map(lambda t: t * t + 1)
    a = np.concatenate([t.numpy().ravel() for t in grads])
    b = np.where(np.arange(15) < 11, a * a + 1, 0.0)  # what has no gradient stays without
    rho = np.repeat([0.2, 0.4, 0.4], [6, 5, 4])
    s = g.dot(v)
    assert s.item() == pytest.approx(a @ b)
    # s is a sum of 11 products, in another order, and its multiples are subtracted.
    atol = 16 * np.finfo(float).eps * (np.abs(a * b).sum() * np.abs(b).max() + np.abs(a).max())
    close = partial(np.testing.assert_allclose, rtol=1e-14, atol=atol)
    close(flat(2 * g - v / 4 + s * g), 2 * a - b / 4 + (a @ b) * a)
    close(flat(optimizer.per_group("rho") * (g - s * v)), rho * (a - (a @ b) * b))
    np.testing.assert_allclose(flat((1 - optimizer.per_group("rho")) * v), (1 - rho) * b, rtol=1e-14)
    np.testing.assert_allclose(flat(v.perturbed), np.where(np.arange(15) < 6, b, 0), rtol=0)
    np.testing.assert_allclose(flat(g.only([False, True, True])), np.where(np.arange(15) < 6, 0, a), rtol=0)
    assert (g - v).norm().item() == pytest.approx(np.linalg.norm(a - b))
    assert flat(g - g) == pytest.approx(np.zeros(15), abs=0)


def test_nothing_is_computed_before_it_is_needed(seed: int) -> None:
    optimizer, _ = gradients(seed)
    g = optimizer.gradient()
    s = torch.rand((), dtype=torch.float64)
    terms = (3 * g - (g - s * g) * 0.5).terms
    assert len(terms) == 1
    assert terms[0][0].of(0).item() == pytest.approx(2.5 + 0.5 * s.item())  # type: ignore[union-attr]
    assert (g * 1.0).column() is g.column()


def test_coefficients_of_the_update(seed: int) -> None:
    """Numbers stay numbers of each group; what is known on the device alone becomes a factor of all or of each."""
    s, t = torch.rand(2, dtype=torch.float64)
    each = Coefficient((0.25, 0.5))
    assert lower(Coefficient.make(2.0), each, 2) == ([(2.0, 0.25), (2.0, 0.5)], (None, None))
    cases = (
        (1.0 + 0.4 * Coefficient.make(s), Coefficient.make(-0.4), [[1 + 0.4 * s, -0.4]] * 2),
        (each * s, Coefficient.make(t), [[0.25 * s, t], [0.5 * s, t]]),
        (each * s + 1.0, Coefficient.make(0.0), [[1 + 0.25 * s, 0], [1 + 0.5 * s, 0]]),
        ((each + s) * (1.0 - Coefficient.make(t)), each, [[(0.25 + s) * (1 - t), 0.25], [(0.5 + s) * (1 - t), 0.5]]),
    )
    for a, b, expected in cases:
        mixtures, factors = lower(a, b, 2)
        assert any(f is not None for f in factors)
        columns = [torch.ones(2, dtype=torch.float64) if f is None else f.expand(2) for f in factors]
        product = torch.tensor(mixtures, dtype=torch.float64) * torch.stack(columns, dim=1)
        torch.testing.assert_close(product, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


def test_ratio() -> None:
    x = torch.tensor([4.0, 0.0], dtype=torch.float64)
    assert ratio(2.0, x).tolist() == [0.5, 0.0]
    assert ratio(x, x, otherwise=7.0).tolist() == [1.0, 7.0]


class Apart(SAM):
    """Descends along g_hat alone, and takes g itself off the weights."""

    forgets = False

    def needs_first(self, group: dict[str, Any]) -> bool:
        return not self.forgets

    def descend(self, g: Vector, g_hat: Vector) -> Update:
        return Update(along=g_hat, beside=2 * g)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("base", [SGD, torch.optim.RMSprop])
def test_what_goes_beside_the_base_optimizer(seed: int, base: Any, maximize: bool) -> None:
    net, twin = (nn.Linear(3, 1, bias=False, dtype=torch.float64) for _ in range(2))
    twin.load_state_dict(net.state_dict())
    optimizer = Apart(net.parameters(), base, rho=0.0, lr=0.1, maximize=maximize)
    plain = base(twin.parameters(), lr=0.1, maximize=maximize)
    for _ in range(3):
        x = torch.randn(1, 3, dtype=torch.float64)

        def closure(x: Tensor = x) -> Tensor:
            loss = net(x).sum() ** 2
            loss.backward()
            return loss

        plain.zero_grad()
        (twin(x).sum() ** 2).backward()
        g = twin.weight.grad
        assert g is not None
        optimizer.step(closure)
        plain.step()
        twin.weight.data -= 0.1 * 2 * (-g if maximize else g)
    torch.testing.assert_close(net.weight, twin.weight, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_was_not_kept() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = Apart([p], SGD, lr=0.1)
    optimizer.forgets = True

    def closure() -> Tensor:
        loss = (p**2).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="let `needs_first` return True"):
        optimizer.step(closure)
    assert p.tolist() == [1.0, 1.0]
