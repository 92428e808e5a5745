"""What a step communicates: two plain passes, and with sharded parameters one scalar more."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from lesam_dist import LESAM
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train.passes import BatchPasses
from tests.parallel.hooks import counting_average
from tests.parallel.processes import run
from tests.parallel.test_optimizers import make_net


def collectives(world: Distributed, strategy: Any, options: dict[str, Any], lesam: dict[str, Any]) -> Counter[str]:
    """Collectives of one LE-SAM step less those of two plain passes, by name.

    A DDP's buckets are counted too.
    """
    net = make_net()
    buckets: list[int] = []
    with mock.patch("lesam_dist.parallel.wrapping.average_each", counting_average(buckets)):
        model = wrap(net, world, strategy, **options)
    passes = BatchPasses(model, nn.CrossEntropyLoss(), torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    optimizer = LESAM(net.parameters(), torch.optim.SGD, lr=0.1, **lesam)
    for _ in range(2):
        optimizer.step(passes)  # DDP arranges its buckets anew after its first reduction

    def count(call: Any) -> Counter[str]:
        buckets.clear()
        with CommDebugMode() as mode:
            call()
        counts = Counter({str(op): n for op, n in mode.get_comm_counts().items() if n})
        return counts + Counter({"gradients": len(buckets)})

    one = count(passes)
    assert one, "a plain pass communicates: if nothing is counted, nothing is measured"
    optimizer.zero_grad()
    step = count(lambda: optimizer.step(passes))
    step.subtract(one)
    step.subtract(one)
    return Counter({op.rsplit(".")[-1]: n for op, n in step.items() if n})


SHARDED = {"wrap_classes": ["Linear"]}
CHEAP = {"check_second": False}


def all_collectives(world: Distributed) -> dict[str, Counter[str]]:
    hsdp = {**SHARDED, "shard_size": 2}
    return {
        "ddp": collectives(world, "ddp", {}, {}),
        "ddp local": collectives(world, "ddp", {}, {"scope": "local"}),
        "fsdp": collectives(world, "fsdp", SHARDED, CHEAP),
        "fsdp kept": collectives(world, "fsdp", {**SHARDED, "reshard_after_forward": False}, CHEAP),
        "fsdp checked": collectives(world, "fsdp", SHARDED, {}),
        "hsdp": collectives(world, "hsdp", hsdp, CHEAP),
        "hsdp replica": collectives(world, "hsdp", {**hsdp, "scope": "replica"}, {**CHEAP, "scope": "replica"}),
    }


def test_collectives_beyond_two_plain_passes() -> None:
    units = 3  # of make_net under FSDP2
    expected = {
        "ddp": {},
        # One more for a flag, so that all skip together.
        "ddp local": {"gradients": -1, "allreduce_": 1 - len(list(make_net().parameters()))},
        "fsdp": {"allreduce_": 1},
        "fsdp kept": {"allreduce_": 1},
        "fsdp checked": {"allreduce_": 2},
        "hsdp": {"allreduce_": 1},
        "hsdp replica": {"allreduce_": 2 - units},  # the scalar and the flag, less the reductions between replicas
    }
    for counts in run(all_collectives, 4):
        assert counts == expected
