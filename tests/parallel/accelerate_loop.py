"""A user's own accelerate loop, started by test_accelerate.py under `accelerate launch`: SEED FOLDER."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from lesam_dist import LESAM
from tests.parallel.test_optimizers import BATCH, CASES, RHO_MAX, SIGMA, STEPS, make_net, make_problem


def train(seed: int, folder: Path) -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.cuda.is_available():
        # accelerate forgets the launcher's FSDP settings on CPU hosts; what prepare() does with them is the same.
        accelerator.state.distributed_type = DistributedType.FSDP
        policy = None
        if accelerator.mixed_precision == "bf16":
            # accelerate's own policy also reduces in bfloat16, and the perturbation's norm comes from these gradients.
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, mixed_precision_policy=policy, cpu_ram_efficient_loading=False
        )
    state, x, y = make_problem(seed)
    net = make_net()
    net.load_state_dict(state)
    case = CASES["lesam-sgd"]
    optimizer = LESAM(net.parameters(), case["cls"], sigma=SIGMA, rho_max=RHO_MAX, **case["kwargs"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    model, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
    rank, world = accelerator.process_index, accelerator.num_processes
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for t in range(STEPS):

        def closure(t: int = t) -> Tensor:
            loss = nn.functional.cross_entropy(model(x[t][part]).float(), y[t][part])
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
    scheduler.step()
    inner = optimizer.optimizer
    assert inner.base_optimizer.param_groups[0]["lr"] == inner.param_groups[0]["lr"] < case["kwargs"]["lr"]
    assert all(p in inner.state for p in model.parameters()), "the state must be that of the prepared parameters"
    unwrapped = accelerator.unwrap_model(model)
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in unwrapped.named_parameters()}
    weights = {n: p.detach().numpy() for n, p in whole.items()}
    result = {"weights": weights, "kind": type(next(model.parameters())).__name__, "world": world}
    result["precision"] = accelerator.mixed_precision
    (folder / f"{accelerator.mixed_precision}_rank{rank}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    train(int(sys.argv[1]), Path(sys.argv[2]))
    AcceleratorState._reset_state()  # the processes' group stays
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # what the launcher makes of `mixed_precision` in its file
    train(int(sys.argv[1]), Path(sys.argv[2]))
