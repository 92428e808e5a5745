"""What the passes of one step share: random numbers, and BatchNorm statistics that only the first one moves."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lesam_dist import LESAM, optim
from lesam_dist.optim.engine import capturing
from lesam_dist.optim.engine.products import COST, NotTwiceDifferentiableError
from lesam_dist.parallel.blocks import compile_in_place
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train import alike
from lesam_dist.train.batchnorm import average_batchnorm, frozen_batchnorm
from lesam_dist.train.passes import BatchPasses
from tests.parallel.hooks import counting_hook
from tests.parallel.processes import run

ALONE = Distributed(0, 0, 1, torch.device("cpu"))


def make_net(dropout: float = 0.0, momentum: float | None = 0.1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def make_passes(net: nn.Module) -> BatchPasses:
    return BatchPasses(net, nn.CrossEntropyLoss(), torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6,)))


def test_both_passes_draw_the_same_dropout_mask(seed: int) -> None:
    passes = make_passes(make_net(dropout=0.5))
    losses = [passes().item() for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]
    assert make_passes(make_net(dropout=0.5))().item() != losses[0]


def test_a_capture_leaves_the_devices_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the host are put back as ever; there is no device here that could be asked."""
    monkeypatch.setattr(capturing, "is_capturing", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: pytest.fail("read in a capture"))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: pytest.fail("set in a capture"))
    states = alike._rng_state(torch.device("cuda"))
    drawn = torch.rand(3)
    alike._set_rng_state(states, torch.device("cuda"))
    assert torch.equal(torch.rand(3), drawn)


def test_random_numbers_go_on_after_the_step(seed: int) -> None:
    """Replaying must not make the next batch draw the same mask again."""
    net = make_net(dropout=0.5)
    passes = make_passes(net)
    again = BatchPasses(net, passes.criterion, passes.images, passes.labels)
    passes()
    passes()
    with frozen_batchnorm(net):
        assert again().item() != passes().item()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_only_the_first_pass_moves_batchnorm_statistics(seed: int, momentum: float | None) -> None:
    net = make_net(momentum=momentum)
    passes = make_passes(net)
    passes()
    after_first = copy.deepcopy(dict(net.named_buffers()))
    plain = make_net(momentum=momentum)
    plain(passes.images)
    plain[0].load_state_dict(net[0].state_dict())
    plain[1] = nn.BatchNorm2d(4, momentum=momentum)
    plain(passes.images)
    torch.testing.assert_close(dict(plain.named_buffers()), after_first)
    passes()
    torch.testing.assert_close(dict(net.named_buffers()), after_first, rtol=0, atol=0)


STEPPING: dict[str, tuple[Any, dict[str, Any]]] = {
    "lesam": (LESAM, {}),
    "esam": (optim.ESAM, {}),
    "eigen": (optim.EigenSAM, {"interval": 1, "power_steps": 2}),
    "looksam": (optim.LookSAM, {"interval": 2}),
    "s2sam": (optim.S2SAM, {}),
    "reuse": (LESAM, {"ascent_interval": 2, "ascent_between": "reuse"}),
}


@pytest.mark.parametrize("name", STEPPING)
@pytest.mark.parametrize("own", [False, True], ids=["BatchPasses", "own closure"])
def test_a_step_moves_batchnorm_statistics_once(seed: int, name: str, own: bool) -> None:
    """Whatever passes it makes: as one forward of a plain loop, at the weights of the step's first pass."""
    method, options = STEPPING[name]
    if own and method is optim.ESAM:
        options = {"gamma": 1.0}  # others need the arguments of BatchPasses
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    optimizer = method(net.parameters(), torch.optim.SGD, lr=0.1, **options)
    called = []
    for t in range(4):
        passes = make_passes(net)
        calls, twins = itertools.count(), list[nn.Module]()

        def closure(
            passes: BatchPasses = passes,
            calls: Iterator[int] = calls,
            twins: list[nn.Module] = twins,
            **arguments: Any,
        ) -> torch.Tensor:
            index = next(calls)
            if index == 0:
                twins.append(copy.deepcopy(net))
            if not own:
                return passes(**arguments)
            with frozen_batchnorm(net) if index else nullcontext():
                loss = nn.functional.cross_entropy(net(passes.images), passes.labels)
            loss.backward()
            return loss

        optimizer.step(closure)
        called.append(next(calls))
        twins[0](passes.images)
        torch.testing.assert_close(dict(net.named_buffers()), dict(twins[0].named_buffers()), rtol=0, atol=0)
        assert int(net[1].num_batches_tracked) == t + 1
    assert name != "eigen" or called == [2, 6, 6, 6]  # this closure makes no exact products


def test_frozen_batchnorm_normalises_as_in_training_and_nests(seed: int) -> None:
    net, x = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    expected = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + net.eps).sqrt()
    with frozen_batchnorm(net):
        with frozen_batchnorm(net):
            torch.testing.assert_close(net(x), expected)
        torch.testing.assert_close(net(x), expected)
    assert net.num_batches_tracked is not None
    assert net.num_batches_tracked.item() == 0
    with pytest.raises(ZeroDivisionError), frozen_batchnorm(net):
        raise ZeroDivisionError
    net(x)
    assert net.num_batches_tracked.item() == 1


def test_subset_and_evaluation_only(seed: int) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    passes = make_passes(net)
    subset = torch.tensor([0, 3])
    loss = passes(subset=subset, backward=False)
    expected = nn.functional.cross_entropy(net(passes.images[subset]), passes.labels[subset])
    torch.testing.assert_close(loss, expected.detach())
    assert net[1].weight.grad is None


def test_optimizer_step_on_a_batch_equals_two_hand_made_passes(seed: int) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    passes, twin = make_passes(net), copy.deepcopy(net)
    LESAM(net.parameters(), torch.optim.SGD, sigma=0.1, rho_max=None, lr=0.1).step(passes)
    w = twin[1].weight

    def gradients() -> list[torch.Tensor]:
        loss = nn.functional.cross_entropy(twin(passes.images), passes.labels)
        return list(torch.autograd.grad(loss, list(twin.parameters())))

    g = gradients()
    norm = torch.stack([x.norm() for x in g]).norm()
    before = [p.detach().clone() for p in twin.parameters()]
    with torch.no_grad():
        for p, x in zip(twin.parameters(), g, strict=True):
            p += 0.1 / norm * x / norm
    g_hat = gradients()
    torch.testing.assert_close(net[1].weight.detach(), before[0] - 0.1 * g_hat[0])
    assert w.shape == net[1].weight.shape


def smooth_net() -> nn.Sequential:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("how", ["plain", "micro-batches", "compiled", "recomputed", "scaled"])
def test_products_are_those_of_differences_of_gradients(seed: int, how: str) -> None:
    """Which other passes take around w along v; only of the parameters that are asked for, added to .grad."""
    net = smooth_net()
    if how == "compiled":
        compile_in_place(net, whole=True, backend="aot_eager")
    if how == "recomputed":
        net[2].forward = partial(checkpoint, net[2].forward, use_reentrant=False)
    images, labels = torch.randn(6, 3, 8, 8).double(), torch.randint(0, 5, (6,))
    scaler = GradScaler("cpu", init_scale=8.0) if how == "scaled" else None
    parts = 2 if how == "micro-batches" else 1
    passes = BatchPasses(net, nn.CrossEntropyLoss(), images, labels, scaler=scaler, micro_batches=parts)
    passes()
    statistics, counted = copy.deepcopy(dict(net.named_buffers())), (passes.forwards, passes.backwards)
    along = {p: torch.randn_like(p) for p in net[0].parameters()}
    before = torch.randn_like(net[0].weight)
    net.zero_grad()
    net[0].weight.grad = before.clone()
    passes.hessian_product(along)
    found = [net[0].weight.grad - before, net[0].bias.grad]
    assert net[5].weight.grad is None
    assert (passes.forwards, passes.backwards) == (counted[0] + 6, counted[1] + 4 * 6)
    torch.testing.assert_close(dict(net.named_buffers()), statistics, rtol=0, atol=0)
    # Two central differences, extrapolated (Richardson): what is left is of h**4, under 1e-10 of the largest here.
    # One difference alone leaves up to 4e-8: the normalization of six small images bends much.
    h, ends = 1e-4, []
    for step in (h, h, -3 * h, -h):  # to w + h v, w + 2 h v, w - h v, w - 2 h v
        with torch.no_grad():
            for p, v in along.items():
                p += step * v
        net.zero_grad()
        passes()
        ends.append([p.grad.clone() for p in along])  # type: ignore[union-attr]
    expected = [(8 * (a - b) - (c - d)) / (12 * h) for a, c, b, d in zip(*ends, strict=True)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8 * max(e.abs().max().item() for e in expected))


def test_a_product_multiplies_three_times_as_often_as_a_pass(seed: int) -> None:
    """Large layers, so that the gradient of the images, which nobody needs, is little."""
    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))
    passes = BatchPasses(net, nn.CrossEntropyLoss(), torch.randn(4, 32), torch.randint(0, 32, (4,)))
    with FlopCounterMode(display=False) as once:
        passes()
    with FlopCounterMode(display=False) as product:
        passes.hessian_product({p: torch.randn_like(p) for p in net.parameters()})
    assert product.get_total_flops() / once.get_total_flops() == pytest.approx(COST, rel=0.1)


def test_what_cannot_be_differentiated_twice_says_so(seed: int) -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(make_net())
    with pytest.raises(NotTwiceDifferentiableError, match="SyncBatchNorm"):
        make_passes(net).hessian_product({})


def unsynced_and_averaged(world: Distributed, seed: int) -> tuple[bool, bool, torch.Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    model = wrap(net, world, "ddp")
    torch.manual_seed(seed + world.rank)
    passes = make_passes(model)
    passes(sync=False)
    local = net[0].weight.grad.clone()  # type: ignore[union-attr]
    statistics = net[1].running_mean.clone()
    net.zero_grad()
    again = BatchPasses(model, passes.criterion, passes.images, passes.labels)
    again()
    mean = net[0].weight.grad.clone()  # type: ignore[union-attr]
    both = [torch.empty_like(local) for _ in range(2)]
    torch.distributed.all_gather(both, local)
    gathered = [torch.empty_like(statistics) for _ in range(2)]
    torch.distributed.all_gather(gathered, net[1].running_mean)
    average_batchnorm(net, world)
    averaged = torch.allclose(net[1].running_mean, (gathered[0] + gathered[1]) / 2)
    return torch.allclose(mean, (both[0] + both[1]) / 2, atol=1e-7) and not torch.equal(*both), averaged, mean


def test_unsynced_pass_and_averaged_statistics_on_two_ranks(seed: int) -> None:
    first, second = run(unsynced_and_averaged, 2, seed)
    assert first[0], "sync=False must leave the local gradient, sync=True the mean"
    assert second[0]
    assert first[1]
    assert second[1]
    assert torch.equal(first[2], second[2])


@pytest.mark.parametrize("micro_batches", [2, 3, 6])
def test_micro_batches_equal_the_whole_batch(seed: int, micro_batches: int) -> None:
    """Without BatchNorm: the same loss and, but for the order of a sum, the same step."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 7), nn.Tanh(), nn.Linear(7, 5))
    whole, twin = make_passes(net), copy.deepcopy(net)
    parts = BatchPasses(twin, whole.criterion, whole.images, whole.labels, micro_batches=micro_batches)
    optimizers = [LESAM(m.parameters(), torch.optim.SGD, sigma=0.1, rho_max=None, lr=0.1) for m in (net, twin)]
    losses = [optimizer.step(passes) for optimizer, passes in zip(optimizers, (whole, parts), strict=True)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


def test_micro_batches_replay_their_random_numbers(seed: int) -> None:
    passes = make_passes(make_net(dropout=0.5))
    parts = BatchPasses(passes.model, passes.criterion, passes.images, passes.labels, micro_batches=3)
    assert parts().item() != parts.criterion(parts.model(parts.images), parts.labels).item()
    with frozen_batchnorm(parts.model):
        assert parts().item() == parts().item()


def accumulate(world: Distributed, seed: int) -> dict[str, tuple[dict[str, torch.Tensor], int]]:
    """The final weights under each strategy in 1 and 3 parts, and the bytes-carrying collectives of a DDP step."""
    results = {}
    for strategy, micro_batches in ((s, n) for s in ("ddp", "fsdp") for n in (1, 3)):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 7), nn.Tanh(), nn.Linear(7, 5))
        model = wrap(net, world, strategy)  # type: ignore[arg-type]
        reductions: list[int] = []
        if strategy == "ddp":
            model.register_comm_hook(reductions, counting_hook)  # type: ignore[operator]
        optimizer = LESAM(net.parameters(), torch.optim.SGD, sigma=0.1, rho_max=None, lr=0.1)
        torch.manual_seed(seed + 1 + world.rank)
        x, y = torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6,))
        optimizer.step(BatchPasses(model, nn.CrossEntropyLoss(), x, y, micro_batches=micro_batches))
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in net.state_dict().items()}
        results[f"{strategy}{micro_batches}"] = whole, len(reductions)
    return results


def test_micro_batches_across_processes_reduce_once_a_pass(seed: int) -> None:
    for rank in run(accumulate, 2, seed):
        expected, reductions = rank["ddp1"]
        assert reductions == 2, "one bucket, reduced in each of the two passes"
        assert rank["ddp3"][1] == reductions
        for name in ("ddp3", "fsdp1", "fsdp3"):
            torch.testing.assert_close(rank[name][0], expected, rtol=1e-5, atol=1e-6, msg=name)
