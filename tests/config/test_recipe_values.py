"""Every recipe is a valid config, those of the paper hold the paper's numbers, and those beyond it their sources'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lesam_dist.config.command_line import parse
from lesam_dist.config.learning_rate import peak_lr
from lesam_dist.config.recipes import base_optimizer, bases, methods, recipes
from lesam_dist.config.schema import Config, OptimizerConfig
from lesam_dist.config.values import flatten
from lesam_dist.optim.engine.registry import methods as registered
from lesam_dist.train.build import build_optimizer

TABLE_1 = ("sgd", "eigensam", "asam", "esam", "fsam", "sam", "lesam")


CIFAR_MODELS = ("resnet18", "wrn28_10", "pyramidnet110")


# The paper's Tables 8 and 9: epochs, batch size, peak learning rate, weight decay, rho_max, sigma, budget annealing.
# Its "/" is None.
LESAM: dict[str, tuple[float | None, ...]] = {
    "cifar10_resnet18": (200, 128, 0.05, 1e-3, 0.4, 0.35, 160),
    "cifar100_resnet18": (200, 128, 0.05, 1e-3, 0.4, 0.35, 160),
    "cifar10_wrn28_10": (200, 256, 0.05, 1e-3, None, 0.3, None),
    "cifar100_wrn28_10": (200, 256, 0.05, 1e-3, None, 0.3, None),
    "cifar10_pyramidnet110": (300, 256, 0.10, 5e-4, None, 0.3, None),
    "cifar100_pyramidnet110": (300, 256, 0.10, 5e-4, None, 0.3, None),
    "imagenet_resnet50": (90, 512, 0.2, 1e-4, 0.2, 0.3, 60),
    "imagenet_resnet101": (90, 512, 0.2, 1e-4, 0.2, 0.3, 60),
}


# GLMC's README: imbalance factor, resample and contrast. The paper gives none of its values for Table 7.
TABLE_7 = {"cifar100_lt100_resnet32x4_glmc": (100, 0.0, 4), "cifar100_lt50_resnet32x4_glmc": (50, 0.2, 6)}


# Beyond the paper, on ImageNet's 1,281,167 images: base, epochs, batch size, the peak learning rate that the run has,
# weight decay, steps of warm-up. Each as its source has it: see the parts.
BEYOND: dict[str, tuple[Any, ...]] = {
    "resnet50_a2": ("lamb", 300, 2016, 5e-3, 0.02, 5 * 635),
    "vit_s16": ("adamw", 300, 4096, 3e-3, 0.3, 10_000),
    "vit_b16": ("adamw", 300, 4096, 3e-3, 0.3, 10_000),
    "vit_l16": ("adamw", 300, 4096, 1e-3, 0.3, 10_000),
    "resnet50_b4k": ("sgd", 90, 4096, 1.6, 1e-4, 5 * 312),
    "resnet50_b16k": ("sgd", 90, 16384, 6.4, 1e-4, 10 * 78),
    "resnet50_b32k": ("sgd", 64, 32768, 7.05, 5.8e-5, 638),
    "resnet50_b32k_adamw": ("adamw", 90, 32768, 1e-3 * 32**0.5, 0.1, 10 * 39),
    "resnet50_b32k_lars": ("lars", 64, 32768, 29.0, 1e-4, 18 * 39),
    "resnet50_b32k_lamb": ("lamb", 90, 32768, 0.04, 0.01, 20 * 39),
}


# Label noise: kind, rate, and SAM's rho of Foret et al. (2021) where they have one.
LABEL_NOISE = {
    "cifar10_sym20_resnet32": ("symmetric", 0.2, 0.1),
    "cifar10_sym40_resnet32": ("symmetric", 0.4, 0.1),
    "cifar10_sym60_resnet32": ("symmetric", 0.6, 0.1),
    "cifar10_sym80_resnet32": ("symmetric", 0.8, 0.05),
    "cifar10_asym40_resnet32": ("asymmetric", 0.4, 0.1),
}


def test_every_row_of_the_paper_has_a_name() -> None:
    expected = {f"{data}_{model}_{m}" for data in ("cifar10", "cifar100") for model in CIFAR_MODELS for m in TABLE_1}
    expected |= {f"imagenet_{model}_{m}" for model in ("resnet50", "resnet101") for m in TABLE_1}
    expected |= {f"{d}_vit_b16_finetune_{m}" for d in ("cifar10", "cifar100") for m in ("sgd", "sam", "lesam")}
    expected |= {f"cifar100_{model}_{m}" for model in CIFAR_MODELS for m in ("sam", "lesam", "lesam_plus")}
    expected |= {f"{data}_preactresnet18_{m}" for data in ("cifar10", "cifar100") for m in ("sgd", "sam", "lesam")}
    expected |= {f"{base}_{m}" for base in LABEL_NOISE for m in ("sgd", "sam", "lesam")}
    for model, (own, *_) in BEYOND.items():
        expected |= {f"imagenet_{model}_{m}" for m in ("sgd", "sam", "lesam", "looksam", own)}
    assert expected | {"digits", "digits_noisy", "mnist5k", "mnist5k_noisy"} <= set(recipes())
    assert len(recipes()) == len(set(recipes())), "no name can be read in two ways"
    own = {name for name, method in registered().items() if method.module.startswith("lesam_dist.")}
    from_elsewhere = set(registered()) - own  # imported by another test
    assert own | {"sgd", "lesam_plus"} == set(methods()) - from_elsewhere


def test_a_method_without_a_file_has_its_own_defaults() -> None:
    args = parse(["--config", "imagenet_resnet50_gsam"]).optimizer.args
    assert args == {name: own.default for name, own in registered()["gsam"].arguments.items()}


def usually(base: str) -> Any:
    """Of the recipes beyond the paper tests of their own take a few methods."""
    is_beyond = base.removeprefix("imagenet_") in BEYOND or base in LABEL_NOISE
    is_beyond |= "_lt" in base and base not in TABLE_7
    return pytest.param(base, marks=pytest.mark.full if is_beyond else ())


@pytest.mark.parametrize("base", [usually(base) for base in bases()])
def test_every_recipe_is_a_valid_config(base: str) -> None:
    configs = {method: parse(["--config", f"{base}_{method}"]) for method in methods()}
    trained: list[dict[str, Any]] = []
    for method, config in configs.items():
        assert config.optimizer.name == (base_optimizer(base) if method == "sgd" else method.removesuffix("_plus"))
        assert config.run_dir == f"runs/{base}_{method}"
        build_optimizer(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)), config.optimizer)
        leaves = flatten(config)
        own = {f"optimizer.{name}" for name in vars(OptimizerConfig())} - {"optimizer.lr", "optimizer.weight_decay"}
        if (base, method) == ("digits_noisy_resnet8", "sgd"):
            assert leaves["optimizer.lr"] == 0.05  # what SGD has to tune where the others have their radius
            leaves["optimizer.lr"] = configs["sam"].optimizer.lr
        skipped = own | {"run_dir", "schedule.anneal_start_epoch"}
        trained.append({k: v for k, v in leaves.items() if k not in skipped and not k.startswith("optimizer.args.")})
    assert all(leaves == trained[0] for leaves in trained), "methods are compared on the same terms"


@pytest.mark.parametrize("model", BEYOND)
def test_recipes_beyond_the_paper(model: str) -> None:
    configs = {m: parse(["--config", f"imagenet_{model}_{m}"]) for m in ("sgd", "sam", "lesam", "looksam")}
    base, *expected, warmup = BEYOND[model]
    for method, config in configs.items():
        optimizer = config.optimizer
        assert (optimizer.name, optimizer.base) == ((base, "sgd") if method == "sgd" else (method, base))
        found = (config.epochs, config.data.batch_size, peak_lr(config), optimizer.weight_decay)
        assert found == pytest.approx(tuple(expected))
        steps = config.schedule.lr_warmup_epochs * (1_281_167 // config.data.batch_size)
        assert steps == pytest.approx(warmup, rel=5e-3)
        assert not optimizer.decay_norm_and_bias
        build_optimizer(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)), optimizer)
    assert configs["lesam"].schedule.anneal_start_epoch == pytest.approx(configs["lesam"].epochs * 2 / 3, abs=0.5)
    named = parse(["--config", f"imagenet_{model}_{base}"])
    assert replace(named, run_dir="") == replace(configs["sgd"], run_dir=""), "one baseline under both names"


@pytest.mark.parametrize("base", LABEL_NOISE)
def test_label_noise(base: str) -> None:
    config = parse(["--config", f"{base}_sam"])
    noise = config.data.label_noise
    assert (noise.kind, noise.rate, config.optimizer.args["rho"]) == LABEL_NOISE[base]
    assert (config.model.name, config.epochs, config.data.builtin) == ("cifar_resnet32", 200, "cifar10")


def test_table_5() -> None:
    """Section 6.3 of the paper, and the authors' code that it follows."""
    for data, sigma in (("cifar10", 0.2), ("cifar100", 0.4)):
        sam, lesam = (parse(["--config", f"{data}_preactresnet18_{m}"]) for m in ("sam", "lesam"))
        assert (sam.optimizer.args["rho"], lesam.optimizer.args["sigma"]) == (0.4, sigma)
        found = (sam.epochs, sam.data.batch_size, sam.optimizer.lr, sam.optimizer.weight_decay, sam.model.name)
        assert found == (100, 128, 0.1, 5e-4, "preact_resnet18")


@pytest.mark.parametrize("base", TABLE_7)
def test_table_7_is_glmcs(base: str) -> None:
    for method in ("sgd", "sam", "lesam"):
        config = parse(["--config", f"{base}_{method}"])
        section, optimizer = config.long_tail, config.optimizer
        assert (config.task, section.method, section.subset) == ("long_tail", "glmc", "ldam")
        assert (section.imbalance_factor, section.resample, section.contrast) == TABLE_7[base]
        assert (section.label_weight, section.mix_alpha) == (1.2, 1.0)
        found = (config.epochs, config.data.batch_size, optimizer.lr, optimizer.momentum, optimizer.weight_decay)
        assert found == (200, 64, 0.01, 0.9, 5e-3)
        assert (config.model.name, config.data.builtin) == ("cifar_resnet32x4_pad", "cifar100")


def test_other_long_tails() -> None:
    """LDAM-DRW's released values; its reweighting keeps its place in a run of another length."""
    config = parse(["--config", "cifar100_lt100_resnet32_ldam_sam"])
    section, optimizer = config.long_tail, config.optimizer
    assert (section.method, section.max_margin, section.scale) == ("ldam_drw", 0.5, 30)
    assert (section.reweight_epoch, section.reweight_beta, config.epochs) == (160, 0.9999, 200)
    found = (config.data.batch_size, optimizer.lr, optimizer.weight_decay, config.schedule.lr_warmup_epochs)
    assert found == (128, 0.1, 2e-4, 5)
    assert parse(["--config", "cifar100_lt100_resnet32_ldam_sam", "--epochs", "20"]).long_tail.reweight_epoch == 16
    for base in (base for base in bases() if "_lt" in base):
        assert parse(["--config", f"{base}_lesam"]).task == "long_tail"


def test_a2_is_ross_wightmans() -> None:
    """Table 2 of "ResNet strikes back", and the differences that the part names."""
    config = parse(["--config", "imagenet_resnet50_a2_lesam"])
    data = config.data
    assert (data.auto_augment, data.randaugment_ops, data.randaugment_magnitude / 30) == ("randaugment", 2, 7 / 10)
    assert (data.mixup, data.cutmix, data.repeats, data.batch_size % data.repeats) == (0.1, 1.0, 3, 0)
    assert data.image_size / data.val_resize == pytest.approx(0.95, abs=1 / data.val_resize)
    assert (config.loss.name, config.loss.binary_threshold, config.loss.label_smoothing) == ("binary", 0.2, 0.0)
    assert (config.model.drop_path, config.optimizer.max_grad_norm) == (0.05, 1.0)


def test_the_large_vit_is_sharded() -> None:
    config = parse(["--config", "imagenet_vit_l16_lesam"])
    assert (config.parallel.strategy, config.model.activation_checkpointing) == ("fsdp", True)
    assert (config.precision.compute, config.precision.gather_dtype) == ("bf16", "bf16")


@pytest.mark.parametrize("base", LESAM)
def test_lesam_has_the_values_of_tables_8_and_9(base: str) -> None:
    config = parse(["--config", f"{base}_lesam"])
    optimizer, anneal = config.optimizer, config.schedule.anneal_start_epoch
    found = (config.epochs, config.data.batch_size, optimizer.lr, optimizer.weight_decay)
    assert (*found, optimizer.args["rho_max"], optimizer.args["sigma"], anneal) == LESAM[base]
    assert (optimizer.base, optimizer.momentum, optimizer.args["alpha"]) == ("sgd", 0.9, 0)
    assert config.data.cutout == 0, "Table 8: basic augmentation"
    assert config.schedule.lr_warmup_epochs == config.schedule.sigma_warmup_epochs == 0
    assert config.data.image_size == (224 if base.startswith("imagenet") else 32)


def test_lesam_plus_has_the_values_of_section_6_1() -> None:
    for model, alpha, sigma in zip(CIFAR_MODELS, (0.5, 0.55, 0.6), (0.15, 0.2, 0.25), strict=True):
        args = parse(["--config", f"cifar100_{model}_lesam_plus"]).optimizer.args
        assert (args["alpha"], args["sigma"], args["plus_form"]) == (alpha, sigma, "paper")


def test_fine_tuning_takes_8000_steps() -> None:
    config = parse(["--config", "cifar100_vit_b16_finetune_lesam"])
    assert config.epochs * (50_000 // config.data.batch_size) == 8000
    assert config.model.pretrained
    assert config.data.mean == Config().data.mean, "the weights' own normalisation wins over CIFAR's"


def test_other_methods_have_the_values_of_their_authors() -> None:
    def found(name: str, *names: str) -> tuple[Any, ...]:
        return tuple(parse(["--config", name]).optimizer.args[argument] for argument in names)

    esam = {"resnet18": (0.05, 0.6, 0.5), "wrn28_10": (0.1, 0.5, 0.5), "pyramidnet110": (0.2, 0.5, 0.5)}
    for model, values in esam.items():
        assert found(f"cifar100_{model}_esam", "rho", "beta", "gamma") == values
    for name, rho in {
        "cifar10_resnet18_asam": 0.5,
        "cifar100_wrn28_10_asam": 1.0,
        "imagenet_resnet50_sam": 0.05,
    }.items():
        assert found(name, "rho") == (rho,)
    assert found("cifar100_resnet18_fsam", "rho", "lam", "sigma") == (0.2, 0.6, 1.0)
    assert found("cifar100_resnet18_eigensam", "rho", "alpha", "interval") == (0.1, 0.2, 100)


@pytest.mark.parametrize("depth", [50, 101])
def test_imagenet_recipes_are_what_they_were_as_files(depth: int) -> None:
    name = f"imagenet_resnet{depth}_lesam"
    expected = {"model.name": f"resnet{depth}", "model.num_classes": 1000, "data.batch_size": 512, "data.workers": 8}
    expected |= {"optimizer.lr": 0.2, "schedule.anneal_start_epoch": 60, "run_dir": f"runs/{name}"}
    expected |= {"precision.compute": "bf16", "precision.channels_last": True, "data.backend": "dali"}
    assert flatten(parse(["--config", name])) == flatten(Config()) | expected


def test_digits_is_what_it_was_as_a_file() -> None:
    expected = {
        "model.name": "cifar_resnet8",
        "data.builtin": "digits",
        "data.backend": "torchvision",
        "data.root": "data/digits",
        "data.batch_size": 32,
        "data.image_size": 32,
        "data.val_resize": 32,
        "data.random_area": [0.7, 1.0],
        "data.horizontal_flip": False,
        "data.mean": [0.3, 0.3, 0.3],
        "data.std": [0.35, 0.35, 0.35],
        "data.workers": 1,
        "optimizer.weight_decay": 5e-4,
        "optimizer.decay_norm_and_bias": False,
        "optimizer.args.sigma": 0.1,
        "schedule.lr_warmup_epochs": 1.0,
        "schedule.anneal_start_epoch": 4.0,
        "logging.every_steps": 10,
        "epochs": 15,
        "run_dir": "runs/digits",
        "precision.channels_last": True,
    }
    assert flatten(parse(["--config", "digits", "--data.backend", "torchvision"])) == flatten(Config()) | expected
