"""LE-SAM under FSDP2: weights, gradients, optimizer state and LE-SAM's copy are split over the processes.

    torchrun --nproc-per-node 2 examples/fsdp2.py

`wrap` calls torch's `fully_shard` on each block and on the model; a model that you have sharded yourself works too.
`wrap(model, world, "hsdp", shard_size=8)` shards over 8 processes and keeps replicas of these.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lesam_dist import LESAM, BatchPasses, CosineBudget
from lesam_dist.parallel import process_group, wrap

EPOCHS, BATCH, SEED = 8, 64, 0  # BATCH: over all processes


def make_data() -> TensorDataset:
    """512 points with the class that a random linear map gives them."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(512, 20, generator=generator)
    return TensorDataset(x, (x @ torch.randn(20, 5, generator=generator)).argmax(1))


def main() -> None:
    with process_group() as world:  # torchrun's, srun's or mpirun's processes; without a launcher, this one alone
        data = make_data()
        sampler: DistributedSampler[TensorDataset] = DistributedSampler(data, world.world_size, world.rank)
        loader = DataLoader(data, BATCH // world.world_size, sampler=sampler)
        torch.manual_seed(SEED)
        net = nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 5)).to(world.device)
        model = wrap(net, world, "fsdp", wrap_classes=["Linear"])
        criterion = nn.CrossEntropyLoss()

        steps = EPOCHS * len(loader)
        # After wrapping, which replaces the parameters.
        optimizer = LESAM(model.parameters(), torch.optim.SGD, sigma=0.1, rho_max=0.3, lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        budget = CosineBudget(optimizer, total_steps=steps, anneal_steps=steps // 4)

        for epoch in range(EPOCHS):
            losses = []
            sampler.set_epoch(epoch)
            for x, y in loader:
                passes = BatchPasses(model, criterion, x.to(world.device), y.to(world.device))
                losses.append(optimizer.step(passes))
                scheduler.step()
                budget.step()
            loss, rho = world.mean([torch.stack(losses).mean(), optimizer.telemetry["rho"]])
            if world.is_main:
                print(f"epoch {epoch + 1}  loss {loss:.6f}  rho {rho:.6f}")


if __name__ == "__main__":
    main()
