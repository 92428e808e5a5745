"""LE-SAM in an accelerate loop (pip install "lesam-dist[train]", or accelerate beside lesam-dist):

    accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 2 examples/accelerate_loop.py

`prepare` is accelerate's, but for what it returns: the optimizer itself, which knows accelerate's scaler.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lesam_dist import LESAM, BatchPasses, CosineBudget
from lesam_dist.accelerate import prepare

EPOCHS, BATCH, SEED = 8, 64, 0  # BATCH: over all processes


def make_data() -> TensorDataset:
    """512 points with the class that a random linear map gives them."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(512, 20, generator=generator)
    return TensorDataset(x, (x @ torch.randn(20, 5, generator=generator)).argmax(1))


def main() -> None:
    # split_batches: a batch is shared out, as in the other examples, where accelerate's default is one per process.
    # The sampler with a seed makes the order the same however many processes there are.
    config = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=SEED)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=config)
    loader = DataLoader(make_data(), BATCH, shuffle=True)
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 5))
    steps = EPOCHS * len(loader)
    optimizer = LESAM(model.parameters(), torch.optim.SGD, sigma=0.1, rho_max=0.3, lr=0.1, momentum=0.9)
    model, optimizer, loader = prepare(accelerator, model, optimizer, loader)
    criterion, scaler = nn.CrossEntropyLoss(), accelerator.scaler  # None but with fp16
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    budget = CosineBudget(optimizer, total_steps=steps, anneal_steps=steps // 4)

    for epoch in range(EPOCHS):
        losses = []
        for x, y in loader:
            losses.append(optimizer.step(BatchPasses(model, criterion, x, y, scaler=scaler)))
            scheduler.step()
            budget.step()
        loss = accelerator.reduce(torch.stack(losses).mean(), "mean")
        accelerator.print(f"epoch {epoch + 1}  loss {float(loss):.6f}  rho {float(optimizer.telemetry['rho']):.6f}")


if __name__ == "__main__":
    main()
