"""Evaluation against numpy over all samples at once, however they are spread over processes."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train.evaluate import evaluate
from tests.parallel.processes import run

SAMPLES = 11


def make(seed: int, classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, classes))
    return net, torch.randn(SAMPLES, 4), torch.randint(0, classes, (SAMPLES,))


RUNS = [("ddp", 5), ("ddp", 12), ("fsdp", 12)]  # strategies and numbers of classes
Counted = tuple[dict[str, float], int, int]  # the evaluation, this rank's forwards, and its gathers of objects


def share(world: Distributed, seed: int, owners: list[int]) -> list[Counted]:
    """Sample i belongs to rank owners[i]; batches of 3, the last one partial. Replicated, then sharded."""
    results = []
    for strategy, classes in RUNS:
        net, x, y = make(seed, classes)
        wrap(net, world, strategy, wrap_classes=["Linear"])  # type: ignore[arg-type]
        mine = torch.tensor([i for i, owner in enumerate(owners) if owner == world.rank], dtype=torch.long)
        batches = [(x[part], y[part]) for part in mine.split(3) if len(part)]
        forwards: list[int] = []
        net.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(1))
        with patch.object(dist, "all_gather_object", wraps=dist.all_gather_object) as gather:
            result = evaluate(net, iter(batches), world, count=len(batches))
        assert net.training
        results.append((result, len(forwards), gather.call_count))
    return results


def expected(seed: int, classes: int) -> dict[str, float]:
    net, x, y = make(seed, classes)
    logits = net.eval()(x).detach().double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    of_label = logits[np.arange(SAMPLES), y.numpy()]
    better = (logits > of_label[:, None]).sum(axis=1)  # classes before the right one
    top5 = {"acc5": 100 * float((better < 5).mean())} if classes > 5 else {}
    loss = -float(log_p[np.arange(SAMPLES), y.numpy()].mean())
    confidence = np.exp(log_p.max(axis=1))
    bins = np.floor(15 * confidence)
    gaps = [abs(float(((better == 0) - confidence)[bins == k].sum())) for k in range(16)]
    found = {"acc1": 100 * float((better == 0).mean()), **top5, "loss": loss, "ece": sum(gaps) / SAMPLES}
    return found | {"samples": SAMPLES}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_counts_once(seed: int, world_size: int) -> None:
    # Uneven on purpose, and with three processes the last one has nothing.
    owners = [0] * 7 + [min(1, world_size - 1)] * 4
    if world_size == 1:
        results = [share(Distributed(0, 0, 1, torch.device("cpu")), seed, owners)]
    else:
        results = run(share, world_size, seed, owners)
    for rank, runs in enumerate(results):
        mine = -(-owners.count(rank) // 3)
        for (strategy, classes), (evaluation, forwards, gathers) in zip(RUNS, runs, strict=True):
            assert evaluation == pytest.approx(expected(seed, classes), rel=1e-5, abs=1e-6)
            # What a batch and its sums look like is agreed on once, not in every batch. Sharded, all ranks run as often
            # as the one with the most.
            several = world_size > 1
            together = strategy == "fsdp" and several
            assert (forwards, gathers) == ((3, 2) if together else (mine, int(several)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_batch_waits_for_the_device(seed: int) -> None:
    net, x, y = (part.cuda() for part in make(seed, 12))
    world = Distributed(0, 0, 1, torch.device("cuda", 0))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        torch.cuda.set_sync_debug_mode("error")
        yield from zip(x.split(3), y.split(3), strict=True)
        torch.cuda.set_sync_debug_mode("default")  # the sums are read now

    try:
        assert evaluate(net, batches(), world) == pytest.approx(expected(seed, 12), rel=1e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def without_count(world: Distributed) -> str:
    net = nn.Sequential(nn.Linear(4, 3))
    wrap(net, world, "fsdp")
    with pytest.raises(ValueError, match="collective") as error:
        evaluate(net, [], world)
    return str(error.value)


def test_sharded_evaluation_wants_the_number_of_batches() -> None:
    for message in run(without_count, 2):
        assert "pass count" in message


def leaves(world: Distributed, seed: int, strategy: str) -> tuple[bool, int]:
    """Whether there is a result where rank 1 leaves before its second batch of four; and this rank's batches."""
    net, x, y = make(seed, 5)
    wrap(net, world, strategy, wrap_classes=["Linear"])  # type: ignore[arg-type]
    used: list[int] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.arange(SAMPLES).split(3):
            used.append(1)
            yield x[part], y[part]

    result = evaluate(net, batches(), world, count=4, leave=lambda: world.rank == 1 and len(used) == 2)
    assert net.training
    return result is not None, len(used)


def test_all_leave_where_one_does(seed: int) -> None:
    """Without a result; and nobody does where the forwards are collective."""
    assert run(leaves, 2, seed, "ddp") == [(False, 4), (False, 2)]
    assert run(leaves, 2, seed, "fsdp") == [(True, 4), (True, 4)]
