"""What tasks on images have in common: class folders or CIFAR, and a network of the config's."""

from __future__ import annotations

from functools import cached_property

from torch import nn

from lesam_dist.data import Loader
from lesam_dist.models import require_model
from lesam_dist.tasks.images.data import (
    Images,
    build_bad_files,
    build_folders,
    build_loaders,
    build_synthetic_loaders,
    resolve_num_classes,
)
from lesam_dist.tasks.images.network import new_network
from lesam_dist.tasks.task import Task


class ImageTask(Task):
    """A task on the images of ``config.data``, with the network of ``config.model``: ``model(images)`` gives logits."""

    def check(self) -> None:
        require_model(self.config.model.name)

    def open_data(self) -> tuple[Images, Images]:
        return build_folders(self.config, self.world)

    @cached_property
    def splits(self) -> tuple[Images, Images]:
        return self.open_data()

    @cached_property
    def num_classes(self) -> int:
        """Outputs of the network."""
        return resolve_num_classes(self.config, None if self.config.dry_run else self.splits[0].classes)

    def loaders(self) -> tuple[Loader, Loader]:
        self.bad_files = build_bad_files(self.config, self.splits, self.world)
        return build_loaders(self.config, self.splits, self.world, self.bad_files)

    def dry_loaders(self) -> tuple[Loader, Loader]:
        return build_synthetic_loaders(self.config, self.num_classes, self.world)

    def build_model(self) -> nn.Module:
        return new_network(self.config, self.num_classes, self.world)
