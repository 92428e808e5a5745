"""LE-SAM in a plain training loop, on one GPU or on the CPU:

    python examples/plain_loop.py

What differs from a loop with SGD is the optimizer, its `step`, and the schedule of the loss budget.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lesam_dist import LESAM, BatchPasses, CosineBudget

EPOCHS, BATCH, SEED = 8, 64, 0


def make_data() -> tuple[Tensor, Tensor]:
    """512 points with the class that a random linear map gives them."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(512, 20, generator=generator)
    return x, (x @ torch.randn(20, 5, generator=generator)).argmax(1)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = (tensor.to(device) for tensor in make_data())
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 5)).to(device)
    criterion = nn.CrossEntropyLoss()

    steps = EPOCHS * len(x) // BATCH
    optimizer = LESAM(model.parameters(), torch.optim.SGD, sigma=0.1, rho_max=0.3, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    budget = CosineBudget(optimizer, total_steps=steps, anneal_steps=steps // 4)

    for epoch in range(EPOCHS):
        losses = []
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.to(device).split(BATCH):
            # Both passes: the second with the same dropout masks, and with BatchNorm's statistics standing still.
            losses.append(optimizer.step(BatchPasses(model, criterion, x[batch], y[batch])))
            scheduler.step()
            budget.step()
        loss, rho = torch.stack(losses).mean(), optimizer.telemetry["rho"]
        print(f"epoch {epoch + 1}  loss {float(loss):.6f}  rho {float(rho):.6f}")


if __name__ == "__main__":
    main()
