"""What a resumed run may change, and what would make it another run."""

from __future__ import annotations

import pytest

from lesam_dist.config.command_line import parse
from lesam_dist.config.same_run import check_same_run
from lesam_dist.config.values import flatten
from lesam_dist.errors import UserError

HSDP = ("--config", "digits", "--parallel.strategy", "hsdp")
MICRO = ("--data.accumulation_mode", "micro", "--data.micro_batches", "2")

FREE = {
    "shards": (HSDP, ("--parallel.shard_size", "2"), ("--parallel.shard_size", "4")),
    "replicas": (HSDP, ("--parallel.replicate_size", "2"), ()),
    "parts of a batch": (HSDP, ("--data.micro_batches", "4"), ("--data.micro_batches", "2")),
    "checkpoints": (HSDP, ("--checkpoint.every_steps", "7", "--checkpoint.asynchronous", "always"), ()),
    "checks": (HSDP, (), ("--checks.every_steps", "5")),
    "bad files": (HSDP, ("--data.max_bad_files", "0"), ()),
}
OTHER = {
    "perturbations of a batch": (HSDP, MICRO, (*MICRO[:3], "4"), "data.micro_batches: 2 then, 4 now"),
    "guard": (HSDP, (), ("--guard.max_loss_increase", "2"), "guard.max_loss_increase: None then, 2.0 now"),
    "batch": (HSDP, (), ("--data.batch_size", "64"), "data.batch_size: 32 then, 64 now"),
}


@pytest.mark.parametrize("name", FREE)
def test_what_may_change(name: str) -> None:
    common, then, now = FREE[name]
    check_same_run(parse([*common, *now]), flatten(parse([*common, *then])))


@pytest.mark.parametrize("name", OTHER)
def test_what_makes_another_run(name: str) -> None:
    common, then, now, message = OTHER[name]
    with pytest.raises(UserError, match=message):
        check_same_run(parse([*common, *now]), flatten(parse([*common, *then])))
