"""The Hessian's spectrum against closed forms, dense Hessians, and another number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.func import hessian as dense_hessian
from torch.nn import functional as F

from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.analysis.engine.lanczos import Quadrature, quadrature
from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.measures.hessian import hessian, smoothed
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from tests.parallel import processes

F64 = torch.float64


def squared(out: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * ((out[:, 0] - targets) ** 2).sum()


def quadratic(n: int, d: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Tensor]:
    """A linear model with squared loss, in uneven batches, and its Hessian X'X / n."""
    x, y = torch.randn(n, d, dtype=F64), torch.randn(n, dtype=F64)
    cut = n // 3
    batches = [(x[:cut], y[:cut]), (x[cut:], y[cut:])]
    return nn.Linear(d, 1, bias=False).double(), batches, x.T @ x / n


def small_net() -> nn.Sequential:
    """With BatchNorm and dropout, which are in eval mode, and ReLU."""
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    nn.init.uniform_(net[1].running_mean)  # type: ignore[arg-type]
    nn.init.uniform_(net[1].running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return net


def dense(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """All second derivatives, by another way through autograd."""
    names = [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])

    def loss(w: Tensor) -> Tensor:
        parts = w.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(net.eval(), weights, (x,)), y)

    found: Tensor = dense_hessian(loss)(flat)
    return found


def test_everything_is_exact_on_a_quadratic(seed: int) -> None:
    model, batches, matrix = quadratic(40, 12)
    found = hessian(Objective(model, batches, criterion=squared), top=5, trace_vectors=400, lanczos_steps=12, seed=seed)
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    torch.testing.assert_close(torch.tensor(found.eigenvalues, dtype=F64), expected[:5])
    assert found.trace is not None
    assert found.trace.standard_error is not None
    # Of signs, var(v' A v) = 2 sum of the squares beside the diagonal (Hutchinson); six errors are once in 10^9.
    error = (2 * (matrix.square().sum() - matrix.diagonal().square().sum()) / 400).sqrt()
    assert abs(found.trace.mean - float(matrix.trace())) < 6 * error
    assert found.trace.standard_error == pytest.approx(float(error), rel=0.5)
    for seen in found.density:  # after as many steps as there are eigenvalues the nodes are these
        torch.testing.assert_close(torch.tensor(seen.nodes, dtype=F64), expected.flip(0))
        assert sum(seen.weights) == pytest.approx(1)


def test_products_and_eigenvalues_are_those_of_the_dense_hessian(seed: int) -> None:
    net, x, y = small_net(), torch.randn(31, 5, dtype=F64), torch.randint(3, (31,))
    objective = Objective(net.train(), [(x[:7], y[:7]), (x[7:], y[7:])])
    matrix = dense(net, x, y)
    net.train()
    buffers = [buffer.clone() for buffer in net.buffers()]
    for _ in range(3):
        v = torch.randn(objective.size, dtype=F64)
        torch.testing.assert_close(objective.hessian_product(v), matrix @ v)
    found = hessian(objective, top=6, trace_vectors=0, density_vectors=0, tolerance=1e-10, seed=seed)
    torch.testing.assert_close(torch.tensor(found.eigenvalues, dtype=F64), torch.linalg.eigvalsh(matrix).flip(0)[:6])
    assert found.trace is None
    assert net.training, "its mode is as before"
    torch.testing.assert_close([*net.buffers()], buffers, rtol=0, atol=0)
    loss, gradient = objective.gradient()
    expected = F.cross_entropy(net.eval()(x), y)
    assert loss == pytest.approx(float(expected.detach()))
    assert objective.loss() == pytest.approx(loss)
    expected.backward()
    torch.testing.assert_close(gradient, torch.cat([p.grad.flatten() for p in net.parameters()]))  # type: ignore[union-attr]


def test_quadrature_is_exact_for_polynomials(seed: int) -> None:
    """Of degree 2m - 1 after m steps, also where the vector reaches fewer dimensions than steps."""
    n, m = 30, 4
    root = torch.randn(n, n, dtype=F64)
    matrix, v = root + root.T, torch.randn(n, dtype=F64)
    seen = quadrature(lambda u: matrix @ u, v, m)
    u = v / v.norm()
    for degree in range(2 * m):
        moment = sum(w * node**degree for w, node in zip(seen.weights, seen.nodes, strict=True))
        expected = u @ torch.linalg.matrix_power(matrix, degree) @ u
        assert moment == pytest.approx(float(expected), rel=1e-9, abs=1e-9 * float(matrix.norm()) ** degree)
    values = torch.zeros(n, dtype=F64)
    values[:3] = torch.tensor([1.0, 2.0, 5.0])
    basis = torch.linalg.qr(root).Q
    inside = basis[:, :3].sum(dim=1)
    few = quadrature(lambda u: basis @ (values * (basis.T @ u)), inside, 10)
    np.testing.assert_allclose(few.nodes, [1, 2, 5], atol=1e-9)
    np.testing.assert_allclose(few.weights, [1 / 3] * 3, atol=1e-9)


def test_the_smoothed_density_has_mass_one_at_the_nodes(seed: int) -> None:
    nodes = torch.rand(2, 3).mul(50).tolist()
    x, y = smoothed([Quadrature(sorted(each), [0.2, 0.3, 0.5]) for each in nodes], points=200_000)
    assert np.trapezoid(y, x) == pytest.approx(1, abs=1e-6)
    assert np.trapezoid(np.array(x) * y, x) == pytest.approx(
        np.mean([np.dot(sorted(each), [0.2, 0.3, 0.5]) for each in nodes]), abs=1e-5
    )


def test_curvlinops_sees_the_same(seed: int) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    net, x, y = small_net().eval(), torch.randn(31, 5, dtype=F64), torch.randint(3, (31,))
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    other = curvlinops.HessianLinearOperator(net, nn.CrossEntropyLoss(), [*net.parameters()], batches)
    v = torch.randn(sum(p.numel() for p in net.parameters()), dtype=F64)
    torch.testing.assert_close(Objective(net, batches).hessian_product(v), other @ v)


def shares(world: Distributed, seed: int) -> dict[str, Any]:
    """Of 31 images the first rank has one, and the last all that are left."""
    torch.manual_seed(seed)
    net, x, y = small_net(), torch.randn(31, 5, dtype=F64), torch.randint(3, (31,))
    ends = [0, *range(1, world.world_size), 31]
    own = slice(ends[world.rank], ends[world.rank + 1])
    objective = Objective(net, [(x[own], y[own])], world)
    found = hessian(objective, top=4, trace_vectors=3, density_vectors=1, lanczos_steps=5, tolerance=1e-12)
    loss, gradient = objective.gradient()
    return found.numbers() | {"loss": loss, "gradient": gradient.numpy(), "samples": objective.samples}


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_finds_the_same(seed: int, count: int) -> None:
    alone = processes.run(shares, 1, seed)[0]
    together = processes.run(shares, count, seed)
    for rank, found in enumerate(together):
        assert found["samples"] == 31
        np.testing.assert_allclose(found["eigenvalues"], alone["eigenvalues"], rtol=1e-9)
        assert found["trace"]["mean"] == pytest.approx(alone["trace"]["mean"], rel=1e-9)
        for name in ("nodes", "weights"):
            np.testing.assert_allclose(found["density"][0][name], alone["density"][0][name], rtol=1e-6, atol=1e-9)
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-12)
        np.testing.assert_allclose(found["gradient"], alone["gradient"], rtol=1e-9, atol=1e-12)
        assert found["eigenvalues"] == together[0]["eigenvalues"], f"rank {rank} has rank 0's, to the bit"


def test_what_was_interrupted_makes_the_missing_products_alone(seed: int, tmp_path: Path) -> None:
    model, batches, _ = quadratic(20, 8)
    objective = Objective(model, batches, criterion=squared)
    settings: dict[str, Any] = {"top": 0, "density_vectors": 0, "seed": seed}
    hessian(objective, trace_vectors=2, journal=Journal(tmp_path / "journal", {}), **settings)
    found = hessian(objective, trace_vectors=5, journal=Journal(tmp_path / "journal", {}), **settings)
    assert found.products == 3
    assert found.trace == hessian(objective, trace_vectors=5, **settings).trace


def test_a_visit_of_other_weights_leaves_no_trace(seed: int) -> None:
    net = small_net()
    x, y = torch.randn(9, 5, dtype=F64), torch.randint(3, (9,))
    objective = Objective(net, [(x, y)])
    before, other = objective.weights(), torch.randn(objective.size, dtype=F64)
    with objective.at(other):
        torch.testing.assert_close(objective.weights(), other, rtol=0, atol=0)
    torch.testing.assert_close(objective.weights(), before, rtol=0, atol=0)


def test_a_killed_try_goes_on(seed: int, tmp_path: Path) -> None:
    model, batches, _ = quadratic(40, 12)
    objective = Objective(model, batches, criterion=squared)
    wanted: dict[str, Any] = {"top": 0, "trace_vectors": 6, "density_vectors": 0, "seed": seed}

    def killed_at_the_fourth(made: int) -> None:
        if made == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hessian(objective, **wanted, journal=Journal(tmp_path / "journal", {}), on_product=killed_at_the_fourth)
    found = hessian(objective, **wanted, journal=Journal(tmp_path / "journal", {}))
    assert found.products == 3
    assert found.trace == hessian(objective, **wanted).trace


def test_a_linear_loss_has_no_curvature() -> None:
    model = nn.Linear(3, 1).double()
    objective = Objective(model, [(torch.randn(4, 3, dtype=F64), torch.zeros(4))], criterion=lambda out, _: out.sum())
    assert not objective.hessian_product(torch.randn(4, dtype=F64)).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top": 12}, "top is 12, but the model has 12 weights"),
        ({"top": -1}, "top is -1: it must be at least 0"),
        ({"lanczos_steps": 0}, "lanczos_steps is 0"),
        ({"tolerance": 1.5}, r"tolerance is 1.5: it is a relative error"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    model, batches, _ = quadratic(20, 12)
    with pytest.raises(UserError, match=message):
        hessian(Objective(model, batches, criterion=squared), **wrong)


def test_no_images_and_nothing_to_vary_are_refused() -> None:
    with pytest.raises(UserError, match="0 images are too few for 1 processes"):
        Objective(nn.Linear(2, 2), [])
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match="no parameter that requires a gradient"):
        Objective(frozen, [(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))])
