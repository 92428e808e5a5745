"""What is known of a network without running it, against running it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lesam_dist.config.command_line import parse
from lesam_dist.config.schema import Config
from lesam_dist.experiments.cost import passes_per_step
from lesam_dist.models import build_model
from lesam_dist.planning.method import observe
from lesam_dist.planning.profile import profile


def config_of(kind: str) -> Config:
    return parse(["--config", "digits_resnet8_lesam", "--model.name", kind, "--data.image_size", "32"])


@pytest.mark.parametrize(("kind", "batch"), [("cifar_resnet8", 5), ("shufflenet_v2_x0_5", 3)])
def test_a_pass_on_real_tensors(kind: str, batch: int, seed: int) -> None:
    """At a batch that was not looked at: as many operations, the same activations kept, gradients in the same order."""
    config = config_of(kind)
    found = profile(config, 1)
    size = config.data.image_size
    model = build_model(config.model.name, 10, image_size=size).train()
    order: list[int] = []
    for i, p in enumerate(model.parameters()):
        p.register_post_accumulate_grad_hook(lambda _, i=i: order.append(i))
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return t

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = F.cross_entropy(model(torch.randn(batch, 3, size, size)), torch.randint(10, (batch,)))
        loss.backward()
    kernels = found.at(batch)
    assert kernels.flops.sum() == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert kernels.order == tuple(order)
    real = sum(storage.nbytes() for storage in kept.values())
    assert kernels.kept == pytest.approx(real, rel=0.01)  # what the label's loss keeps differs by a few bytes
    assert sum(p.numel() for p in found.model.parameters()) == sum(p.numel() for p in model.parameters())


def kept_by_images(config: Config) -> float:
    """Bytes for each image; half precision keeps copies of the weights as well, once."""
    found = profile(config, 1)
    return (found.at(8).kept - found.at(4).kept) / 4


def test_half_precision_and_checkpointing_keep_less() -> None:
    plain, half = config_of("cifar_resnet8"), config_of("cifar_resnet8")
    half.precision.compute = "bf16"
    assert 0.4 < kept_by_images(half) / kept_by_images(plain) < 0.7
    again = config_of("vit_b_16")
    again.model.activation_checkpointing = True
    tokens, blocks = (32 // 16) ** 2 + 1, 12
    inputs = blocks * tokens * 768 * 4  # of the blocks; a block itself keeps some ten times as much
    assert inputs <= kept_by_images(again) < 2 * inputs


def test_a_clock_is_the_slower_of_arithmetic_and_memory() -> None:
    kernels = profile(config_of("cifar_resnet8"), 1).at(8)
    assert kernels.clock(1.0, 1e30, 0.0)[-1] == pytest.approx(kernels.flops.sum())
    assert kernels.clock(1e30, 1.0, 0.0)[-1] == pytest.approx(kernels.nbytes.sum())
    assert kernels.clock(1e30, 1e30, 2.0)[-1] == 2.0 * len(kernels.flops)
    # A layer reads its input and weight and writes its output, at least once forward and twice backward.
    images = 8 * 3 * config_of("cifar_resnet8").data.image_size ** 2 * 4
    assert kernels.nbytes.sum() > images


@pytest.mark.parametrize(
    "words",
    [
        ["--optimizer.name", "sgd"],
        ["--optimizer.ascent_fraction", "0.5"],
        ["--optimizer.ascent_interval", "3"],
        ["--optimizer.name", "esam"],
        ["--optimizer.name", "looksam"],
        ["--optimizer.name", "eigensam", "--optimizer.interval", "3"],
    ],
)
def test_passes_are_those_that_compare_counts(words: list[str]) -> None:
    optimizer = parse(["--config", "digits_resnet8_sam", *words]).optimizer
    assert observe(optimizer).passes == pytest.approx(passes_per_step(optimizer))


def test_what_a_method_is_seen_to_do() -> None:
    sgd, sam, local, adamw = (
        observe(parse(["--config", "digits_resnet8_sam", *words]).optimizer)
        for words in (
            ["--optimizer.name", "sgd"],
            [],
            ["--optimizer.scope", "local"],
            ["--optimizer.base", "adamw"],
        )
    )
    assert [p.sync for p in sam.steps[0]] == [True, True]
    assert [p.sync for p in local.steps[0]] == [False, True]
    assert (sgd.copies, sam.copies) == (False, True)
    assert (sgd.state, sam.state, adamw.state) == (1.0, 1.0, 2.0)
    assert sgd.traffic < sam.traffic < adamw.traffic
