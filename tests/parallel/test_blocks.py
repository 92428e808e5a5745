"""Compiling and recomputing blocks change speed and memory, not numbers, names or the order of passes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor
from torchvision.models import VisionTransformer

from lesam_dist import LESAM
from lesam_dist.errors import UserError
from lesam_dist.models import build_model
from lesam_dist.parallel.blocks import compile_in_place, find_blocks, recompute_in_backward
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import Strategy, wrap
from lesam_dist.train.evaluate import evaluate
from lesam_dist.train.passes import BatchPasses
from tests.parallel.processes import run

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
STEPS, BATCH, CLASSES = 3, 12, 5
# "aot_eager" is all of the compiler but its code generation, and much quicker.
NEEDS_INDUCTOR = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler of C++")

# Compiled sums run in another order. In float64, since BatchNorm and ReLU make more of float32's rounding now and then.
COMPILED = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No graphs of another test, which share a cache by code."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Two sizes of torchvision's residual block between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        thin = build_model("cifar_resnet8", CLASSES)
        self.stem, self.first, self.second = thin.stem, thin.stage1, thin.stage2
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.second(self.first(self.stem(x))).mean(dim=(2, 3)))
        return logits


def make_vit(dropout: float) -> nn.Module:
    rates = {"dropout": dropout, "attention_dropout": dropout}
    net = VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES, **rates)
    nn.init.normal_(net.heads.head.weight, std=0.1)  # torchvision's zeros would hide the blocks from the first loss
    return net


def fit(world: Distributed, net: nn.Module, seed: int, strategy: Strategy, **options: Any) -> dict[str, Any]:
    """A few LE-SAM steps on this rank's part of each batch, then an evaluation with uneven shares."""
    model = wrap(net, world, strategy, **options)
    optimizer = LESAM(net.parameters(), torch.optim.SGD, sigma=0.05, rho_max=0.1, lr=0.05, momentum=0.9)
    torch.manual_seed(seed + 1)
    dtype = next(net.parameters()).dtype
    batches = [(torch.randn(BATCH, 3, 8, 8, dtype=dtype), torch.randint(0, CLASSES, (BATCH,))) for _ in range(STEPS)]
    torch.manual_seed(seed + 2 + world.rank)
    losses = []
    for batch in batches:
        x, y = (v.chunk(world.world_size)[world.rank] for v in batch)
        optimizer.step(BatchPasses(model, nn.CrossEntropyLoss(), x, y))
        losses += [optimizer.telemetry["loss"], optimizer.telemetry["perturbed_loss"]]
    count = 2 if world.rank == 0 else 1  # another rank goes on with an empty batch
    evaluation = evaluate(net, batches[:count], world, count=count)
    state = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in net.state_dict().items()}
    return {"losses": torch.stack(losses), "state": state, "evaluation": evaluation}


# ---- recomputing -----------------------------------------------------------------------------------------------------


def recomputed(world: Distributed, seed: int, strategy: Strategy) -> list[dict[str, Any]]:
    results = []
    for recompute in (False, True):
        torch.manual_seed(seed)
        net = make_vit(dropout=0.3)
        if recompute:
            names = list(net.state_dict())
            recompute_in_backward(net)
            assert list(net.state_dict()) == names
        results.append(fit(world, net, seed, strategy))
    return results


@pytest.mark.parametrize("strategy", ["none", "ddp", "fsdp"])
def test_recomputing_changes_no_bit(seed: int, strategy: Strategy) -> None:
    """With dropout: the masks of both passes, and of the steps after, are those of the plain run."""
    ranks = [recomputed(ALONE, seed, strategy)] if strategy == "none" else run(recomputed, 2, seed, strategy)
    for plain, again in ranks:
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_recomputing_keeps_only_the_inputs_of_blocks(seed: int) -> None:
    x, kept = torch.randn(4, 3, 8, 8), []
    for recompute in (False, True):
        net = make_vit(dropout=0.3)
        if recompute:
            recompute_in_backward(net)
        runs: list[int] = []
        find_blocks(net)[0].ln_2.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = net(x).sum()
        loss.backward()
        kept.append(sum(saved))
        assert len(runs) == (2 if recompute else 1)
    assert kept[1] < kept[0] / 3


def test_what_cannot_be_recomputed() -> None:
    with pytest.raises(UserError, match=r"BasicBlock has BatchNorm.*data.micro_batches"):
        recompute_in_backward(Net())
    with pytest.raises(UserError, match=r"Linear has none of the known blocks.*parallel.wrap_classes"):
        recompute_in_backward(nn.Linear(2, 2))
    with pytest.raises(UserError, match="did you mean 'EncoderBlock'"):
        recompute_in_backward(make_vit(0), ["EncodrBlock"])


# ---- compiling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("whole", "backend"),
    [
        (True, "aot_eager"),
        (False, "aot_eager"),
        pytest.param(True, "inductor", marks=[NEEDS_INDUCTOR, pytest.mark.full]),
    ],
)
def test_compiled_steps_equal_eager_ones(seed: int, fresh_compiler: None, whole: bool, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    torch.manual_seed(seed)
    plain, net = Net().double(), Net().double()
    net.load_state_dict(plain.state_dict())
    names = list(net.state_dict())
    compile_in_place(net, whole, backend=counter)
    assert list(net.state_dict()) == names
    expected, actual = fit(ALONE, plain, seed, "none"), fit(ALONE, net, seed, "none")
    torch.testing.assert_close(actual, expected, **COMPILED)
    # Of the model, or of each of the two sizes of block: one graph that moves BatchNorm's statistics, one that does
    # not, one for evaluation.
    assert counter.frame_count == (3 if whole else 6)
    fit(ALONE, net, seed, "none")
    assert counter.frame_count == (3 if whole else 6), "more steps need no more graphs"


def compiled(world: Distributed, seed: int, strategy: Strategy, gather_dtype: torch.dtype | None) -> list[Any]:
    counter = CompileCounterWithBackend("aot_eager")
    torch.manual_seed(seed)
    dtype = torch.float64 if gather_dtype is None else torch.float32  # bfloat16 mixes with float32 alone
    plain, net = Net().to(dtype), Net().to(dtype)
    net.load_state_dict(plain.state_dict())
    compile_in_place(net, whole=strategy == "ddp", backend=counter)
    results = [fit(world, model, seed, strategy, gather_dtype=gather_dtype) for model in (plain, net)]
    return [*results, counter.frame_count]


@pytest.mark.parametrize(
    ("strategy", "gather_dtype"),
    [("ddp", None), ("fsdp", None), pytest.param("fsdp", torch.bfloat16, marks=pytest.mark.full)],
    ids=str,
)
def test_compiled_on_two_processes(seed: int, strategy: Strategy, gather_dtype: torch.dtype | None) -> None:
    for rank, (expected, actual, graphs) in enumerate(run(compiled, 2, seed, strategy, gather_dtype)):
        torch.testing.assert_close(actual, expected, **COMPILED)
        if gather_dtype is None:  # else the graphs end at each BatchNorm, which is gathered by itself
            sizes = 1 if strategy == "ddp" else 2
            # Under FSDP2 rank 1 joins the evaluation of rank 0's second batch with an empty one: other graphs.
            empty = sizes if strategy == "fsdp" and rank == 1 else 0
            assert graphs == 3 * sizes + empty


@NEEDS_INDUCTOR  # torch's aot_eager cannot differentiate attention on the CPU
def test_compiled_and_recomputed_passes_draw_the_same_masks(seed: int, fresh_compiler: None) -> None:
    """Both passes of a step, and forward and recomputation: else the gradient is not the derivative of the loss."""
    torch.manual_seed(seed)
    net = make_vit(dropout=0.3).double()
    recompute_in_backward(net)
    counter = CompileCounterWithBackend("inductor")
    compile_in_place(net, whole=False, backend=counter)
    passes = BatchPasses(net, nn.CrossEntropyLoss(), torch.randn(4, 3, 8, 8).double(), torch.randint(0, CLASSES, (4,)))
    loss = passes()
    grads = [p.grad for p in net.parameters()]
    net.zero_grad()
    assert passes() == loss
    assert counter.frame_count == 2, "one for the first block, whose input has other strides, one for all others"
    norm = torch.stack([g.norm() for g in grads]).norm()
    losses, h = [], 1e-6
    for shift in (h, -2 * h):  # along the gradient, where the slope is its norm
        with torch.no_grad():
            torch._foreach_add_(list(net.parameters()), grads, alpha=shift / norm.item())
        losses.append(passes())
    # A central difference is off by h**2 times a third derivative, and by the rounding of the losses over 2 h.
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * h), norm, rtol=1e-5, atol=1e-8)
