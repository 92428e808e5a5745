"""LE-SAM in a script on timm (pip install timm beside lesam-dist), on one GPU or on the CPU:

    python examples/timm_script.py

timm's model, mixup and CutMix, optimizer and learning rate schedule. The images are mixed before the step, so that both
passes see the same ones; `BatchPasses` draws stochastic depth alike in both.
"""

from __future__ import annotations

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from lesam_dist import LESAM, BatchPasses

EPOCHS, BATCH, CLASSES, SEED = 4, 32, 4, 0


def make_data() -> tuple[Tensor, Tensor]:
    """256 noisy images, (256, 3, 32, 32), each with the pattern of its class."""
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.randint(CLASSES, (256,), generator=generator)
    patterns = torch.randn(CLASSES, 3, 32, 32, generator=generator)
    return patterns[labels] + 2 * torch.randn(256, 3, 32, 32, generator=generator), labels


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    base = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)  # no decay of biases and norms
    optimizer = LESAM(base.param_groups, base, sigma=0.1, rho_max=0.3)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=2e-4)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    criterion = SoftTargetCrossEntropy()
    for epoch in range(EPOCHS):
        model.train()
        losses = []
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order.to(images.device).split(BATCH):
            mixed, targets = mixup(images[batch], labels[batch])
            losses.append(optimizer.step(BatchPasses(model, criterion, mixed, targets)))
        scheduler.step(epoch + 1)
        loss, rho = torch.stack(losses).mean(), optimizer.telemetry["rho"]
        print(f"epoch {epoch + 1}  loss {float(loss):.6f}  rho {float(rho):.6f}")


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = (tensor.to(device) for tensor in make_data())
    torch.manual_seed(SEED)
    model = timm.create_model("test_resnet", num_classes=CLASSES, drop_path_rate=0.1).to(device)
    train(model, images, labels)


if __name__ == "__main__":
    main()
