"""What a step asks of host and device beside its large passes: launches, small operations, allocations, waits.

Counted on the code that a GPU would run, not in Triton's interpreter: Triton compiles and launches the kernels as for
an H100, on a stubbed driver (benchmarks/lib/stub_driver.py), so nothing is computed. `step_counts.json` has the numbers
of every method and option in a plain loop, under DDP and under FSDP2; it is written anew by

    python -m tests.optim.step_counts

- launches: of Triton kernels, as CUDA's driver is asked for them.
- operations: those of torch that are kernels on a GPU, on tensors of any size; views and empty tensors are none.
- allocations: tensors that are given new memory.
- waits: reads of a number by the host, which would wait for the device.
- collectives: of the optimizer, in a process group of one.

Left out is what the closure does, and what depends on the allocator: the copy of a list of addresses, int64, where
gradients came to lie elsewhere than in the step before (two small copies then).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.lib.stub_driver import StubDriver, install
from lesam_dist import optim
from lesam_dist.optim.engine import backend
from tests.cost_meter import Meter, Waits
from tests.methods import CASES, RHO
from tests.optim.step_costs import MEASURED, Bowl, Setting, build

JSON = Path(__file__).with_suffix(".json")
COMMAND = "python -m tests.optim.step_counts"

Counts = dict[str, Any]

WRAPPINGS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": DistributedDataParallel, "fsdp2": fully_shard}


def settings() -> dict[str, Setting]:
    """By name: LE-SAM with each option that adds something to a step, and the other methods."""
    lesam: dict[str, Any] = {"sigma": RHO, "rho_max": 0.05}
    default = Setting(optim.LESAM, lesam)
    options = {
        "default": default,
        "AdamW": replace(default, base=torch.optim.AdamW),
        "check_second=False": Setting(optim.LESAM, {**lesam, "check_second": False}),
        "max_grad_norm": Setting(optim.LESAM, {**lesam, "max_grad_norm": 0.1}),
        "GradScaler": default,
        "two groups": replace(default, groups=True),
        "scope=local": Setting(optim.LESAM, {**lesam, "scope": "local"}),
        "lesam+": Setting(optim.LESAM, {**lesam, "alpha": 0.5}),
    }
    methods = {
        name: Setting(case.method, case.kwargs, warm_up=4 if name == "eigen" else 2)
        for name, case in CASES.items()
        if name not in ("own", "lesam")
    }
    return options | methods


def count(stub: StubDriver, name: str, setting: Setting, wrap: Callable[[nn.Module], nn.Module]) -> list[Counts]:
    """What each kind of step of a setting asks for, beside its closure."""
    net = wrap(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)))
    scaler = torch.amp.GradScaler("cpu") if name == "GradScaler" else None
    meter, waits = Meter(), Waits()
    bowl = Bowl(meter, list(net.parameters()))
    optimizer = build(setting, bowl.params, "triton")
    optimizer.grad_scaler = scaler

    def closure(**kwargs: Any) -> torch.Tensor:
        with meter.pause():
            loss = bowl(**kwargs)
            if scaler is not None:
                scaler.scale(loss)
            return loss

    steps = []
    with meter, waits:
        for number in range(setting.warm_up + MEASURED):
            meter.clear()
            waits.clear()
            before = stub.launches
            optimizer.step(closure)
            if scaler is not None:
                with meter.pause():
                    scaler.update()
            if number >= setting.warm_up:
                steps.append(
                    {
                        "launches": stub.launches - before,
                        "operations": dict(sorted((meter.passes + meter.tiny).items())),
                        "allocations": meter.allocations,
                        "waits": meter.reads + waits.total(),
                        "collectives": meter.reductions,
                    }
                )
    return steps[:1] if all(step == steps[0] for step in steps) else steps


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """A process group of one: the same calls as of many."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count_all() -> dict[str, dict[str, list[Counts]]]:
    """The whole table, by setting and wrapping."""
    torch.set_num_threads(1)
    stub = install()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(backend, "require_interpreter"):
        table = {"single": {name: count(stub, name, setting, lambda net: net) for name, setting in settings().items()}}
        with one_process(Path(folder)):
            for wrapping, wrap in WRAPPINGS.items():
                table[wrapping] = {
                    name: count(stub, name, setting, wrap)
                    for name, setting in settings().items()
                    if wrapping == "ddp" or name != "scope=local"  # which FSDP2 has not
                }
    return table


def as_json(table: dict[str, dict[str, list[Counts]]]) -> str:
    """A line for each kind of step, so that a change of one shows as a line of a diff."""
    parts = []
    for wrapping, rows in table.items():
        lines = [f"  {json.dumps(name)}: [\n   " + ",\n   ".join(map(json.dumps, rows[name])) + "]" for name in rows]
        parts.append(f" {json.dumps(wrapping)}: {{\n" + ",\n".join(lines) + "\n }")
    return f'{{"torch": "{torch.__version__.split("+")[0]}", "steps": {{\n' + ",\n".join(parts) + "\n}}\n"


if __name__ == "__main__":
    text = as_json(count_all())
    if sys.argv[1:] == ["--print"]:
        sys.stdout.write(text)
    else:
        JSON.write_text(text)
