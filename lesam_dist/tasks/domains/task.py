"""Domain generalisation: image classification, trained on some domains and tested on others.

What it reports of the weights, and of their average as ``ema_...``:

    acc1                 top-1 of the source domains' held-out images, mean over these domains; the best checkpoint is
                         the one where it is highest
    acc1_NAME            of each target domain
    target_acc1          the mean of these: each domain counts the same
    target_acc1_micro    of the target domains' images together: each image counts the same
    loss                 of the held-out images, likewise; of all that are evaluated where none are held out
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor, nn

from lesam_dist.data import ImageFolder, Loader
from lesam_dist.data.cycles import Cycles
from lesam_dist.data.domains import joined
from lesam_dist.models.pretrained import last_layer
from lesam_dist.parallel.batch import Batch
from lesam_dist.tasks.classification.task import Classification
from lesam_dist.tasks.domains.data import Parts, open_parts
from lesam_dist.tasks.images.data import build_bad_files, build_loaders
from lesam_dist.tasks.task import At, Metric


class DomainGeneralisation(Classification):
    """Images ``(B, 3, S, S)`` and labels ``(B,)``; of those that are evaluated, a label tells the domain too."""

    metric: ClassVar[Metric] = Metric("target_acc1", "top-1 on other domains", "%")
    chosen_by: ClassVar[Metric | None] = Metric("acc1", "top-1 on held-out images", "%")

    @cached_property
    def _parts(self) -> Parts:
        return open_parts(self.config, self.world)

    @cached_property
    def _evaluated(self) -> dict[str, ImageFolder]:
        return self._parts.held_out | self._parts.targets

    @cached_property
    def _names(self) -> tuple[list[str], list[str]]:
        """Domains with held-out images, and targets; in a dry run, which reads none, what the config says of them."""
        if self.config.dry_run:
            return self.config.domains.source, self.config.domains.target or ["others"]
        return list(self._parts.held_out), list(self._parts.targets)

    def open_data(self) -> tuple[ImageFolder, ImageFolder]:
        return joined(self._parts.train), joined(self._evaluated)

    def loaders(self) -> tuple[Loader, Loader]:
        self.bad_files = build_bad_files(self.config, self.splits, self.world)
        sizes = tuple(len(folder) for folder in self._parts.train.values())
        images = (self.splits[0], joined(self._evaluated, marked=True))
        cycles = Cycles(sizes, self.config.domains.steps_per_epoch)
        return build_loaders(self.config, images, self.world, self.bad_files, cycles)

    def build_model(self) -> nn.Module:
        model = super().build_model()
        self._head = last_layer(model) if self.config.domains.head_steps else ""
        return model

    def resting(self, names: Collection[str], at: At) -> Collection[str]:
        """All parameters but the last layer's, as long as that learns alone."""
        if at.step >= self.config.domains.head_steps:
            return ()
        return [name for name in names if not name.startswith(f"{self._head}.")]

    @cached_property
    def _classes(self) -> int:
        """Of the data: a model may have more outputs."""
        return self.num_classes if self.config.dry_run else len(self.splits[0].classes)

    def measure(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor | float]:
        images, marks = batch
        domains, labels = marks // self._classes, marks % self._classes
        logits = model(images).float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none").double()
        right = (logits.argmax(dim=1) == labels).double()
        count = sum(map(len, self._names))

        def by_domain(values: Tensor) -> Tensor:
            return torch.zeros(count, dtype=torch.float64, device=values.device).index_add_(0, domains, values)

        return {
            "right": by_domain(right),
            "losses": by_domain(losses),
            "images": by_domain(torch.ones_like(right)),
            "loss": losses.sum(),
            "samples": len(labels),
        }

    def report(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        held_out, targets = self._names
        images, middle = sums["images"], len(held_out)
        accuracy, losses = (100 * sums["right"] / images).tolist(), (sums["losses"] / images).tolist()
        result = {"loss": fmean(losses[:middle]) if held_out else float(sums["loss"] / sums["samples"])}
        if held_out:
            result["acc1"] = fmean(accuracy[:middle])
        result |= {f"acc1_{name}": value for name, value in zip(targets, accuracy[middle:], strict=True)}
        micro = 100 * sums["right"][middle:].sum() / images[middle:].sum()
        return result | {"target_acc1": fmean(accuracy[middle:]), "target_acc1_micro": float(micro)}
