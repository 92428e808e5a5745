"""LE-SAM under DistributedDataParallel: one perturbation from the gradient averaged over all processes.

    torchrun --nproc-per-node 2 examples/ddp.py

The numbers are those of plain_loop.py: two processes with 32 points each make the step of one with 64.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lesam_dist import LESAM, BatchPasses, CosineBudget

EPOCHS, BATCH, SEED = 8, 64, 0  # BATCH: over all processes


def make_data() -> TensorDataset:
    """512 points with the class that a random linear map gives them."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(512, 20, generator=generator)
    return TensorDataset(x, (x @ torch.randn(20, 5, generator=generator)).argmax(1))


def main() -> None:
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_cuda else torch.device("cpu")
    dist.init_process_group("nccl" if use_cuda else "gloo", device_id=device if use_cuda else None)
    data = make_data()
    sampler: DistributedSampler[TensorDataset] = DistributedSampler(data)
    loader = DataLoader(data, BATCH // dist.get_world_size(), sampler=sampler)
    torch.manual_seed(SEED)
    net = nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 5)).to(device)
    model = DistributedDataParallel(net, device_ids=[device] if use_cuda else None)
    criterion = nn.CrossEntropyLoss()

    steps = EPOCHS * len(loader)
    # scope="local" would perturb each process by its own gradient, and save one of the two reductions.
    optimizer = LESAM(model.parameters(), torch.optim.SGD, sigma=0.1, rho_max=0.3, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    budget = CosineBudget(optimizer, total_steps=steps, anneal_steps=steps // 4)

    for epoch in range(EPOCHS):
        losses = []
        sampler.set_epoch(epoch)
        for x, y in loader:
            losses.append(optimizer.step(BatchPasses(model, criterion, x.to(device), y.to(device))))
            scheduler.step()
            budget.step()
        loss = torch.stack(losses).mean()
        dist.all_reduce(loss)
        if dist.get_rank() == 0:
            mean, rho = float(loss) / dist.get_world_size(), float(optimizer.telemetry["rho"])
            print(f"epoch {epoch + 1}  loss {mean:.6f}  rho {rho:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
