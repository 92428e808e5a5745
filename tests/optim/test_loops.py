"""Other people's loops: what would train on a part of the data without a word is refused before anything moves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import lesam_dist
from lesam_dist import SAM, BatchPasses, frozen_batchnorm
from tests.optim.nets import DEVICE, make_closure, make_net, same, snapshot


@pytest.fixture
def accumulating() -> Iterator[object]:
    """accelerate keeps its state globally."""
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=DEVICE == "cpu", gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_accelerates_accumulation_is_refused(seed: int, accumulating: object) -> None:
    """It would call step for every second batch, with that batch's closure."""
    accelerator = accumulating
    net = make_net()
    net, optimizer = accelerator.prepare(net, SAM(net.parameters(), torch.optim.SGD, lr=0.1))  # type: ignore[attr-defined]
    before, seen = snapshot(net), []

    def loop() -> None:
        for batch in range(2):
            closure = make_closure(net)

            def run(closure: Callable[[], Tensor] = closure, batch: int = batch) -> Tensor:
                seen.append(batch)
                return closure()

            with accelerator.accumulate(net):  # type: ignore[attr-defined]
                optimizer.step(run)
                optimizer.zero_grad()

    with pytest.raises(RuntimeError, match=r"gradient_accumulation_steps=2\) calls step for one batch in 2"):
        loop()
    assert same(net, before)
    assert not seen


def lightnings_accumulation(optimizer: SAM, batches: list[Callable[[], Tensor]]) -> None:
    for batch in batches[:-1]:
        batch()
    optimizer.step(batches[-1])


def closure_is_the_second_pass(optimizer: SAM, batches: list[Callable[[], Tensor]]) -> None:
    for batch in batches:
        batch()
        optimizer.step(batch)
        optimizer.zero_grad()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("loop", [lightnings_accumulation, closure_is_the_second_pass])
def test_gradients_that_would_be_dropped_are_an_error(seed: int, loop: Callable[..., None], enabled: bool) -> None:
    net = make_net()
    optimizer = SAM(net.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.enabled = enabled
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="would drop the gradients that are there"):
        loop(optimizer, [make_closure(net) for _ in range(3)])
    assert same(net, before)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step(make_closure(net))  # zeros are no gradients
    assert not same(net, before)


def test_a_batch_that_fails_leaves_no_gradients_to_the_next_one(seed: int) -> None:
    """As loops that leave out a batch which does not fit into memory have it."""
    net = make_net()
    twin = copy.deepcopy(net)
    optimizer, plain = (SAM(n.parameters(), torch.optim.SGD, lr=0.1) for n in (net, twin))
    rng = torch.get_rng_state()
    closure = make_closure(net)
    calls = iter(range(4))

    def out_of_memory() -> Tensor:
        loss = closure()
        if next(calls) == 1:
            raise MemoryError
        return loss

    with pytest.raises(MemoryError):
        optimizer.step(out_of_memory)
    optimizer.step(out_of_memory)
    torch.set_rng_state(rng)
    plain.step(make_closure(twin))
    assert same(net, snapshot(twin))


class Noisy(nn.Module):
    """Dropout and BatchNorm; remembers what it dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop, self.last = (
            nn.Linear(5, 16),
            nn.BatchNorm1d(16),
            nn.Dropout(),
            nn.Linear(16, 3),
        )
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        kept = self.drop(torch.ones(len(x), 16, device=x.device))
        self.masks.append(kept)
        out: Tensor = self.last(self.norm(self.linear(x)).relu() * kept)
        return out


def test_the_public_helpers_make_both_passes_alike(seed: int) -> None:
    """README: what differs between the passes in a loop of one's own, and what solves it."""
    assert {"BatchPasses", "frozen_batchnorm"} <= set(lesam_dist.__all__)
    net = Noisy().to(DEVICE)
    twin = copy.deepcopy(net)
    x, y = torch.randn(8, 5, device=DEVICE), torch.randint(0, 3, (8,), device=DEVICE)
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    optimizer.step(BatchPasses(net, nn.CrossEntropyLoss(), x, y))
    first, second = net.masks
    assert torch.equal(first, second)
    twin(x)
    torch.testing.assert_close(net.norm.running_mean, twin.norm.running_mean)
    assert net.norm.num_batches_tracked == 1
    with frozen_batchnorm(twin):
        twin(x)
    torch.testing.assert_close(net.norm.running_mean, twin.norm.running_mean)
    assert not torch.equal(*twin.masks), "the masks differ where nothing replays them"
