"""LE-SAM in Lightning 2 (pip install lesam-dist lightning), on one process or several:

    python examples/lightning_module.py
    python examples/lightning_module.py --devices 2

The module is an ordinary one; LE-SAM is in `configure_optimizers`, and the callback makes the passes alike, logs the
radius and sets sigma.
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lesam_dist import LESAM, CosineBudget
from lesam_dist.lightning import SharpnessAwareCallback

EPOCHS, BATCH, SEED = 8, 64, 0  # BATCH: of each process


def make_data() -> TensorDataset:
    """512 points with the class that a random linear map gives them."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(512, 20, generator=generator)
    return TensorDataset(x, (x @ torch.randn(20, 5, generator=generator)).argmax(1))


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 5))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.print(
            f"epoch {self.current_epoch + 1}  loss {metrics['loss']:.6f}  rho {metrics['sharpness/rho']:.6f}  "
            f"sigma {metrics['sharpness/sigma']:.6f}"
        )

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = LESAM(self.parameters(), torch.optim.SGD, sigma=0.1, rho_max=0.3, lr=0.1, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    devices = parser.parse_args().devices
    pl.seed_everything(SEED, verbose=False)
    sharpness = SharpnessAwareCallback(
        budget=lambda optimizer, steps: CosineBudget(optimizer, steps, anneal_steps=steps // 4)
    )
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        devices=devices,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        callbacks=[sharpness],
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(make_data(), BATCH, shuffle=True))


if __name__ == "__main__":
    main()
