"""The network of a task on images, from the config."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lesam_dist.config.methods import complete, method_of
from lesam_dist.config.schema import Config
from lesam_dist.models import build_model, fetch_weights, require_input
from lesam_dist.parallel.processes import Distributed


def new_network(config: Config, num_classes: int, world: Distributed) -> nn.Module:
    """The model that a config names, on the host.

    Raises:
        UserError: images of some size, or too few of them, cannot go through it; its weights cannot be had.
    """
    pretrained = config.model.pretrained and not config.dry_run
    if pretrained:
        if world.local_rank == 0:
            fetch_weights(config.model.name)
        world.barrier()
    model = build_model(
        config.model.name,
        num_classes,
        image_size=config.data.image_size,
        zero_init_residual=config.model.zero_init_residual,
        pretrained=pretrained,
        drop_path=config.model.drop_path,
    )
    for field, side in _sides(config):
        require_input(model, config.model.name, _smallest_part(config, world), side, field)
    return model


def _sides(config: Config) -> Iterator[tuple[str, int]]:
    """The sides of images that the model meets, in pixels, each with the field that says so."""
    by_epoch = config.schedule.image_size
    if by_epoch is None or config.data.val_crop is None:
        yield "data.image_size", config.data.image_size
    if config.data.val_crop is not None:
        yield "data.val_crop", config.data.val_crop
    for _, side in by_epoch or ():
        yield "schedule.image_size", side


def _smallest_part(config: Config, world: Distributed) -> int:
    """Images of the smallest forward in training on a process."""
    optimizer = config.optimizer
    method = method_of(optimizer.name)
    fraction = optimizer.ascent_fraction
    if method is not None and method.name == "esam":
        fraction = complete(optimizer).get("gamma", 1.0)
    share = config.data.batch_size // world.world_size
    return max(1, int(fraction * share) // config.data.micro_batches)
