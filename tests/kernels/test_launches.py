"""A whole step: how many launches it takes, that it never waits, that a CUDA graph replays it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lesam_kernels import TensorTable, perturb, restore_adamw, restore_sgd, sum_sq
from lesam_kernels.launch import Launcher
from lesam_kernels.launch_config import CHUNK
from tests.kernels.cases import DTYPES, Make, clones, nan_like, same_bits, table_of

SGD_ROW = [0.1, 0.9, 0.0, 0.01, 1.0, 1.0, 0.0]
ADAMW_ROW = [0.1, 0.9, 0.999, 1e-8, 0.01, 1.0, 0.0]


class Step:
    """Everything that a step of the optimizer needs, on one device."""

    def __init__(self, w: list[Tensor], g: list[Tensor], g_hat: list[Tensor], chunk: int = CHUNK) -> None:
        device = w[0].device
        self.w, self.g, self.g_hat = w, g, g_hat
        self.copies, self.first = nan_like(w), clones(w)
        self.state = {name: [torch.zeros_like(t) for t in w] for name in ("momentum_buffer", "exp_avg", "exp_avg_sq")}
        self.steps = [torch.zeros((), device=device) for _ in w]
        self.table: TensorTable = table_of(w, chunk=chunk, copy=self.copies, step=self.steps, **self.state)
        self.radius = torch.tensor([[0.3, 0.2, 1e-12]], dtype=torch.float64, device=device)
        self.sgd = torch.tensor([SGD_ROW], device=device)
        self.adamw = torch.tensor([ADAMW_ROW], dtype=torch.float64, device=device)
        self.found_inf = torch.zeros((), device=device)

    def run(self, update: str = "sgd") -> Tensor:
        self.table.set("g", self.g)
        stats = perturb(self.table, sum_sq(self.table, "g"), self.radius, found_inf=self.found_inf)
        self.table.set("g_hat", self.g_hat)
        squared = sum_sq(self.table, "g_hat")
        if update == "sgd":
            restore_sgd(self.table, self.sgd, self.found_inf, sum_sq=squared)
        else:
            restore_adamw(self.table, self.adamw, self.found_inf, sum_sq=squared)
        return stats


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[str]:
    """Names of the kernels launched so far; on the CPU they are not run, the interpreter would take its time."""
    names: list[str] = []
    real: Callable[..., None] = Launcher.__call__  # plain or direct: on a GPU a kernel's second launch is direct

    def counting(self: Launcher, kernel: Any, *args: Any, **constants: Any) -> None:
        names.append(kernel.__name__)
        if device.type == "cuda":
            real(self, kernel, *args, **constants)

    monkeypatch.setattr(Launcher, "__call__", counting)
    return names


class Operations(TorchDispatchMode):
    """Names of the torch operations that ran: each could be a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("update", ["sgd", "adamw"])
@pytest.mark.parametrize("num_dtypes", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 60, 300])
def test_launches_do_not_grow_with_the_list(
    count: int, num_dtypes: int, update: str, launches: list[str], device: torch.device
) -> None:
    """A step is two norms, and a perturbation and an update per dtype."""
    dtypes = [DTYPES[i % num_dtypes] for i in range(count)]
    w = [torch.ones(3, dtype=dtype, device=device) for dtype in dtypes]
    step = Step(w, clones(w), clones(w), chunk=2048)
    step.run(update)
    launches.clear()
    with Operations() as operations:
        step.run(update)
    present = len(set(dtypes))
    expected = ["_sum_sq_kernel", *["_perturb_kernel"] * present, "_sum_sq_kernel"]
    assert launches == [*expected, *[f"_restore_{update}_kernel"] * present]
    assert operations.names <= {"empty"}  # no memory is filled or copied


def test_a_step_decreases_and_returns(make: Make) -> None:
    """Two passes and an update in the interpreter, as an optimizer makes them: the copies are the old weights."""
    sizes = (5, 2100, 0, 40)
    w, g, g_hat = ([make(n, torch.float32) for n in sizes] for _ in range(3))
    step = Step(w, g, g_hat)
    norm, rho, non_finite = step.run().tolist()
    assert norm == pytest.approx(sum(float(t.double().square().sum()) for t in g) ** 0.5, rel=1e-6)
    assert rho == pytest.approx(min(0.3 / norm, 0.2))
    assert non_finite == 0.0
    assert same_bits(step.copies, step.first)
    for after, before, grad, buf in zip(w, step.first, g_hat, step.state["momentum_buffer"], strict=True):
        d = grad.double() + 0.01 * before.double()
        torch.testing.assert_close(buf.double(), d, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(after.double(), before.double() - 0.19 * d, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", ["g", "g_hat"])
def test_a_gradient_that_is_not_finite_skips_the_update(bad: str, make: Make) -> None:
    """In either pass: seen in its norm on the device, and the weights come back exactly."""
    w, g, g_hat = ([make(n, torch.float32) for n in (5, 2100)] for _ in range(3))
    {"g": g, "g_hat": g_hat}[bad][1][-1] = float("inf")
    step = Step(w, g, g_hat)
    stats = step.run()
    assert stats[2].item() == float(bad == "g")
    assert step.found_inf.item() == 1.0
    assert same_bits(w, step.first)
    assert not any(t.any() for t in step.state["momentum_buffer"])


# ---- on a GPU ----------------------------------------------------------------------------------------------------


def gpu_step(cuda: torch.device) -> Step:
    sizes = (5, CHUNK + 1, 3 * CHUNK)
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(n, generator=generator).to(cuda) for n in sizes] for _ in range(3)]
    return Step(*lists)


@pytest.fixture
def sync_is_an_error(cuda: torch.device) -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.usefixtures("sync_is_an_error")
@pytest.mark.parametrize("update", ["sgd", "adamw"])
def test_a_step_never_waits_for_the_device(update: str, cuda: torch.device) -> None:
    """Also where every gradient has a new address."""
    step, kept = gpu_step(cuda), []
    for number in range(4):
        if number == 1:  # the first step compiles
            torch.cuda.set_sync_debug_mode("error")
        step.g, step.g_hat = clones(step.g), clones(step.g_hat)
        kept.append((step.g, step.g_hat))  # so that no address comes again
        step.run(update)
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("update", ["sgd", "adamw"])
def test_a_graph_replays_the_step(update: str, cuda: torch.device) -> None:
    """With the gradients, the radius and the scalars of each replay."""
    captured, eager = gpu_step(cuda), gpu_step(cuda)
    captured.run(update)  # compiles and uploads, which cannot happen during capture
    eager.run(update)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = captured.run(update)
    for number in range(1, 4):
        for step in (captured, eager):
            for t in (*step.g, *step.g_hat):
                t.mul_(1.5)
            step.radius.copy_(torch.tensor([[0.3 / number, 0.1 * number, 1e-12]]))
            step.sgd[0, 0] = step.adamw[0, 0] = 0.1 / number
            step.sgd[0, 1] = 0.9 - 0.1 * number
        graph.replay()
        expected = eager.run(update)
        assert torch.equal(stats, expected)
        assert same_bits(captured.w, eager.w)
        for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            assert same_bits(captured.state[name], eager.state[name])
        assert torch.equal(torch.stack(captured.steps), torch.stack(eager.steps))


@pytest.mark.gpu
def test_same_bits_on_every_run(cuda: torch.device) -> None:
    """Blocks finish in any order; the sums do not depend on it."""
    g = [torch.randn(1 << 20, device=cuda) for _ in range(16)]
    table = table_of(g, g=g, chunk=CHUNK)
    first = sum_sq(table, "g")
    assert all(torch.equal(sum_sq(table, "g"), first) for _ in range(50))
