"""LE-SAM's whole step, both passes and the update, as one CUDA graph: for models that the host cannot keep up with.

    python examples/cuda_graph.py

What differs from `plain_loop.py`: the batch is copied to where the graph reads it, the first steps are taken as usual,
one is captured, and before each replay the optimizer brings lr, sigma and rho_max to the device.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from lesam_dist import LESAM, BatchPasses, CosineBudget

EPOCHS, BATCH, SEED, WARM_UP = 8, 64, 0, 3


def make_data() -> tuple[Tensor, Tensor]:
    """512 points with the class that a random linear map gives them."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(512, 20, generator=generator)
    return x, (x @ torch.randn(20, 5, generator=generator)).argmax(1)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("cuda_graph.py captures a CUDA graph, and there is no CUDA device. plain_loop.py runs on a CPU.")
    x, y = (tensor.cuda() for tensor in make_data())
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 5)).to(x.device)
    criterion = nn.CrossEntropyLoss()

    steps = EPOCHS * len(x) // BATCH
    optimizer = LESAM(model.parameters(), torch.optim.SGD, sigma=0.1, rho_max=0.3, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    budget = CosineBudget(optimizer, total_steps=steps, anneal_steps=steps // 4)

    points, classes = x[:BATCH].clone(), y[:BATCH].clone()  # where the graph reads its batch
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    number = 0
    for epoch in range(EPOCHS):
        losses = []
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.to(x.device).split(BATCH):
            points.copy_(x[batch])
            classes.copy_(y[batch])
            passes = BatchPasses(model, criterion, points, classes)
            if number < WARM_UP:  # makes state and tables and compiles kernels, none of which may be in a graph
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    loss = optimizer.step(passes)
                torch.cuda.current_stream().wait_stream(stream)
            else:
                if number == WARM_UP:
                    with torch.cuda.graph(graph):
                        loss = optimizer.step(passes)  # runs nothing; every replay writes its loss here
                optimizer.push_scalars()
                graph.replay()
            losses.append(loss.clone())
            scheduler.step()
            budget.step()
            number += 1
        loss_of_epoch, rho = torch.stack(losses).mean(), optimizer.telemetry["rho"]
        print(f"epoch {epoch + 1}  loss {float(loss_of_epoch):.6f}  rho {float(rho):.6f}")


if __name__ == "__main__":
    main()
