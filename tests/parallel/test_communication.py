"""What DDP's reduction takes when a process has its own gradients is told apart from the pass."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lesam_dist import LESAM
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train.passes import BatchPasses
from tests.parallel.processes import run

AVERAGING, UPDATING, OWN, REDUCED = "averaging gradients", "updating the weights", "own gradients", "reduced"


class Seen(torch.autograd.Function):
    """Tells when the last gradient of a process is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, said: list[str]) -> Tensor:
        ctx.said = said
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.said.append(OWN)
        return gradient, None


class Net(nn.Module):
    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.first, self.last, self.said = nn.Linear(3, 3), nn.Linear(3, 3), said

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(Seen.apply(self.first(x), self.said))
        return logits


def told(world: Distributed, scope: str) -> list[str]:
    """What a step says, in order. Each reduction is done only after it was said that it is what is waited for."""
    torch.manual_seed(0)
    said: list[str] = []
    waited_for = threading.Event()

    def reduce(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        dist.all_reduce(bucket.buffer())
        future: torch.futures.Future[Tensor] = torch.futures.Future()

        def finish() -> None:
            waited_for.wait(20)
            said.append(REDUCED)
            future.set_result(bucket.buffer())

        threading.Thread(target=finish).start()
        return future

    def listen(what: str) -> None:
        said.append(what)
        waited_for.set() if what == AVERAGING else waited_for.clear()

    model = wrap(Net(said), world, "ddp")
    reduce.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # as DDP compares them
    model.register_comm_hook(None, reduce)  # type: ignore[operator]
    optimizer = LESAM(model.parameters(), torch.optim.SGD, lr=0.1, scope=scope)
    images, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    passes = BatchPasses(model, nn.CrossEntropyLoss(), images, labels, on_pass=listen, micro_batches=2)
    optimizer.step(passes)
    assert (passes.forwards, passes.backwards) == (8, 8)
    return said


def test_the_reduction_is_told_apart() -> None:
    """Under the scope "local" the first pass has none; of two micro-batches the second has it."""
    unreduced, reduced = [OWN, OWN, UPDATING], [OWN, OWN, AVERAGING, REDUCED, UPDATING]
    for scope, first in (("global", reduced), ("local", unreduced)):
        for said in run(told, 2, scope):
            assert said == ["pass 1", *first, "pass 2", *reduced]
