"""Every recipe is a valid config, those of the paper hold the paper's numbers, and the small ones step."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lesam_dist.config import checks
from lesam_dist.config.command_line import dump, parse, read_command_line
from lesam_dist.config.flags import flags_for
from lesam_dist.config.learning_rate import peak_lr
from lesam_dist.config.methods import PLAIN
from lesam_dist.config.recipes import (
    ALIASES,
    base_optimizer,
    bases,
    compose,
    compose_parts,
    merge,
    methods,
    recipes,
    split,
)
from lesam_dist.config.schema import Config, OptimizerConfig
from lesam_dist.config.values import flatten
from lesam_dist.models import build_model
from lesam_dist.optim.engine.registry import methods as registered
from lesam_dist.train.build import build_optimizer
from tests.conftest import Command

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


def test_every_row_of_the_paper_has_a_name() -> None:
    expected = {f"{data}_{model}_{m}" for data in ("cifar10", "cifar100") for model in CIFAR_MODELS for m in TABLE_1}
    expected |= {f"imagenet_{model}_{m}" for model in ("resnet50", "resnet101") for m in TABLE_1}
    expected |= {f"{d}_vit_b16_finetune_{m}" for d in ("cifar10", "cifar100") for m in ("sgd", "sam", "lesam")}
    expected |= {f"cifar100_{model}_{m}" for model in CIFAR_MODELS for m in ("sam", "lesam", "lesam_plus")}
    for model, (own, *_) in BEYOND.items():
        expected |= {f"imagenet_{model}_{m}" for m in ("sgd", "sam", "lesam", "looksam", own)}
    assert expected | {"digits", "digits_noisy"} <= set(recipes())
    assert len(recipes()) == len(set(recipes())), "no name can be read in two ways"
    own = {name for name, method in registered().items() if method.module.startswith("lesam_dist.")}
    from_elsewhere = set(registered()) - own  # imported by another test
    assert own | {"sgd", "lesam_plus"} == set(methods()) - from_elsewhere


def test_the_readme_names_recipes_that_exist() -> None:
    """By their ends, `_sam`, and their beginnings, `cifar10_`."""
    text = files("lesam_dist.recipes").joinpath("README.md").read_text()
    ends, beginnings = (set(re.findall(pattern, text)) for pattern in ("`_([a-z0-9_]+)`", "`([a-z0-9]+)_`"))
    assert {"sam", "lesam_plus", "lars"} < ends <= {*methods(), *PLAIN}
    assert {"cifar10", "imagenet"} < beginnings <= {base.split("_")[0] for base in bases()}


def test_a_method_without_a_file_has_its_own_defaults() -> None:
    args = parse(["--config", "imagenet_resnet50_gsam"]).optimizer.args
    assert args == {name: own.default for name, own in registered()["gsam"].arguments.items()}


def usually(base: str) -> Any:
    """Of the recipes beyond the paper a test of their own takes four methods."""
    return pytest.param(base, marks=pytest.mark.full if base.removeprefix("imagenet_") in BEYOND else ())


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


@pytest.mark.parametrize(
    ("name", "batch", "rate"),
    [
        ("resnet50_b4k", 8192, 3.2),  # linear: Goyal et al.'s largest
        ("resnet50_b32k_lamb", 16384, 0.04 / 2**0.5),  # square root: You et al.'s Table 3, 4 / (2^0.5 * 100)
        ("resnet50_b32k_lamb", 4096, 0.04 / 2**1.5),
        ("resnet50_b32k_lars", 16384, 29.0),  # no rule: MLPerf's values are tuned for each size
    ],
)
def test_other_batches_by_a_flag(name: str, batch: int, rate: float) -> None:
    config = parse(["--config", f"imagenet_{name}_sam", "--data.batch_size", str(batch)])
    assert peak_lr(config) == pytest.approx(rate)


def test_another_plain_optimizer_with_a_recipe() -> None:
    """`compare --methods adamw` with a recipe on SGD; `sgd` alone stands for the recipe's own."""
    assert compose_parts("cifar10_resnet18", "adamw")["optimizer"]["name"] == "adamw"
    assert compose_parts("imagenet_vit_b16", "sgd")["optimizer"]["name"] == "adamw"
    assert split("imagenet_vit_b16_adamw") == ("imagenet_vit_b16", "adamw")
    assert split("imagenet_resnet50_adamw") is None


def test_a_flag_of_the_base_is_for_all_methods_of_a_comparison() -> None:
    """Of AdamW with a recipe on AdamW: the baseline and SAM are compared on the same terms."""
    words = ["--optimizer.betas=[0.9,0.95]", "--optimizer.rho=0.1"]
    base = base_optimizer("imagenet_vit_b16")
    assert flags_for("adamw", ["adamw", "sam"], words, base) == words[:1]
    assert flags_for("sam", ["adamw", "sam"], words, base) == words


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


@pytest.mark.parametrize(("installed", "backend"), [(True, "dali"), (False, "torchvision"), (None, "torchvision")])
def test_class_folders_are_read_by_dali_where_it_is_installed(
    installed: bool | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the config says by which; None: nothing of NVIDIA is there."""

    def find(name: str) -> object:
        assert name == "nvidia.dali"
        if installed is None:
            raise ModuleNotFoundError(name)
        return object() if installed else None

    monkeypatch.setattr(checks, "find_spec", find)
    assert parse(["--config", "digits"]).data.backend == backend
    assert parse(["--config", "digits", "--data.backend", "dali"]).data.backend == "dali"
    assert parse(["--config", "imagenet_resnet50_lesam"]).data.backend == "dali"
    assert parse(["--config", "cifar10_resnet18_lesam"]).data.backend == "auto"  # which reads no class folders


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


def test_flags_win_wherever_they_stand_between_recipes_and_files(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("optimizer: {sigma: 0.7}\nepochs: 180\n")
    config = parse(["--config", "cifar100_resnet18_lesam", "--config", str(tmp_path / "mine.yaml"), "--epochs", "190"])
    assert (config.optimizer.args["sigma"], config.epochs, config.optimizer.args["rho_max"]) == (0.7, 190, 0.4)
    late = ("--optimizer.start_epoch", "160", "--optimizer.rho_max", "null", "--schedule.anneal_start_epoch", "null")
    figure_6 = parse(["--config=cifar100_resnet18_lesam", *late])
    assert (figure_6.optimizer.start_epoch, figure_6.optimizer.args["rho_max"]) == (160, None)


@pytest.mark.parametrize(
    ("name", "unread"),
    [
        ("digits", {"rho", "betas", "interval"}),
        ("cifar10_resnet18_sgd", {"base", "scope", "sigma", "rho", "backend"}),
        ("cifar10_vit_b16_finetune_esam", {"sigma", "rho_max", "eps", "betas"}),
    ],
)
def test_composed_config_reads_back_from_a_file(name: str, unread: set[str], tmp_path: Path, command: Command) -> None:
    """What is printed and what is saved: all that the run reads, and nothing that it does not."""
    config = parse(["--config", name, "--optimizer.lr", "1e-5", "--seed", "5"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config
    assert config != Config()
    status, out, _ = command("--config", name, "--print_config", "--seed", "5")
    assert status == 0
    (tmp_path / "printed.yaml").write_text(out)
    assert parse(["--config", str(tmp_path / "printed.yaml")]) == parse(["--config", name, "--seed", "5"])
    section = yaml.safe_load(out)["optimizer"]
    assert not unread & {*section, *section.get("args", ())}
    assert command("--config", name, "--print_config", "--epochs", "0")[0] == 2


@pytest.mark.parametrize(
    ("name", "millions", "flags"),
    [
        ("digits", "0.08", ""),
        ("digits_noisy_resnet8_esam", "0.08", ""),
        ("cifar10_resnet18_sgd", "11.17", ""),
        ("cifar100_resnet18_lesam", "11.22", ""),
        ("imagenet_resnet50_lesam", "25.56", ""),
        ("imagenet_vit_s16_lesam", "21.98", ""),  # 22.05 less the embeddings of 192 positions
        # The others of these kinds in a smaller network. A batch of 6, since each image is in it three times.
        ("imagenet_resnet50_a2_lesam", "0.14", "--model.name cifar_resnet8 --data.batch_size 6"),
        ("imagenet_resnet50_b16k_sam", "0.14", "--model.name cifar_resnet8"),
        ("imagenet_resnet50_b32k_lars_looksam", "0.14", "--model.name cifar_resnet8"),
        ("imagenet_vit_l16_lesam", "0.37", "--model.name timm/test_vit"),  # blocks gathered in bf16 and recomputed
    ],
)
def test_dry_run(
    command: Command, name: str, millions: str, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reduced = ["--data.image_size", "32", "--data.batch_size", "2", *flags.split(), "--dry_run"]
    reduced += [] if name.startswith("cifar") else ["--data.val_resize", "32"]
    status, out, err = command("--config", name, *reduced)
    assert (status, err) == (0, "")
    assert f"({millions} M parameters)" in out, "the last layer is as large as with the data"
    assert out.count("[train]") == 2
    assert out.count("[val]") == 1
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


# One recipe of each network and size of images.
NETWORKS = {(str(c["model"]["name"]), c["data"]["image_size"]): b for b in bases() for c in [compose_parts(b, "sgd")]}


@pytest.mark.parametrize("base", NETWORKS.values())
def test_the_model_fits_the_data(base: str) -> None:
    """Shapes alone: nothing is computed."""
    config = parse(["--config", f"{base}_sgd"])
    with torch.device("meta"):
        model = build_model(config.model.name, 10, image_size=config.data.image_size).eval()
        side = config.data.image_size
        assert model(torch.empty(2, 3, side, side)).shape == (2, 10)


def test_schedules_keep_their_shape_when_the_number_of_epochs_changes(tmp_path: Path) -> None:
    """digits: 15 epochs, one of warm-up, annealing from the fourth on; what is set beside the epochs stays."""
    read = read_command_line(["--config", "digits", "--epochs", "30"])
    assert (read.config.schedule.anneal_start_epoch, read.config.schedule.lr_warmup_epochs) == (8, 2)
    assert len(read.notes) == 1
    assert "from 15 to 30 epochs: schedule.lr_warmup_epochs 1 -> 2, schedule.anneal_start_epoch 4 -> 8" in read.notes[0]
    assert read_command_line(["--config", "digits", "--epochs", "15"]).notes == ()
    own = parse(["--config", "digits", "--epochs", "30", "--schedule.anneal_start_epoch", "4"]).schedule
    assert (own.anneal_start_epoch, own.lr_warmup_epochs) == (4, 2)
    mine = tmp_path / "mine.yaml"
    mine.write_text("epochs: 30\nschedule: {anneal_start_epoch: 9}\n")
    both = ["--config", "digits", "--config", str(mine)]
    assert parse(both).schedule == replace(own, anneal_start_epoch=9)
    assert parse([*both, "--epochs", "10"]).schedule.anneal_start_epoch == 3
    mine.write_text("schedule: {anneal_start_epoch: 9}\n")
    assert parse([*both, "--epochs", "60"]).schedule.anneal_start_epoch == 9, "stated without a number of epochs"
    assert all(parse(["--config", f"{base}_lesam", "--epochs", "1"]).epochs == 1 for base in bases())


def test_another_method_leaves_the_recipes_values_behind(tmp_path: Path) -> None:
    """By one word, in a flag or a later file; what the user sets for the new method counts."""
    for more in (["--optimizer.name", "asam", "--optimizer.eta", "0.1"], ["--config", str(tmp_path / "mine.yaml")]):
        (tmp_path / "mine.yaml").write_text("optimizer: {name: asam, eta: 0.1}\n")
        config = parse(["--config", "digits_noisy", *more])
        assert (config.optimizer.name, config.optimizer.args) == ("asam", {"rho": 0.5, "eta": 0.1})
        assert config.schedule.anneal_start_epoch is None
        assert config.optimizer.weight_decay == 5e-4, "which every method has"
    assert parse(["--config", "cifar10_resnet18_sam", "--optimizer.name", "asam"]).optimizer.args["rho"] == 0.05


def test_a_dry_run_on_a_cpu_is_small_unless_told(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--data.image_size", "32", "--data.val_resize", "32", "--parallel.device", "cpu", "--dry_run"]
    flags += ["--model.name", "cifar_resnet8"]
    status, out, _ = command("--config", "imagenet_resnet50_lesam", *flags)
    assert status == 0
    assert "dry run on a CPU: batch 4 for 512, fp32 for bf16" in out
    assert "fp32, 1 x cpu, batch 4" in out
    status, out, _ = command(
        "--config", "imagenet_resnet50_lesam", *flags, "--data.batch_size", "6", "--precision.compute", "bf16"
    )
    assert status == 0
    assert "bf16, 1 x cpu, batch 6" in out


def test_names() -> None:
    assert split("digits_noisy_resnet8_lesam_plus") == ("digits_noisy_resnet8", "lesam_plus")
    for short, full in ALIASES.items():
        assert split(short) == split(full)
        assert full in recipes()
    assert split("cifar100_resnet18") is None
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": None}, "d": 3}) == {"a": {"b": None, "c": 2}, "d": 3}
    assert compose("digits")["run_dir"] == "runs/digits"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar100_resnet18_lesan", "did you mean 'cifar100_resnet18_lesam'?"),
        ("cifar100_resnet8_sam", "unknown recipe 'cifar100_resnet8_sam': did you mean"),
        ("cifar100_resnet18", "names no method: add one of _asam,"),
        (
            "xyz",
            "a recipe is DATA_MODEL_METHOD, e.g. cifar100_resnet18_lesam. DATA and MODEL: cifar10 or cifar100 with",
        ),
    ],
)
def test_unknown_names(command: Command, name: str, message: str) -> None:
    status, _, err = command("--config", name)
    assert status == 2
    assert message in err


def test_help_lists_recipes_by_parts(command: Command) -> None:
    status, out, _ = command("--help")
    text = " ".join(out.split())
    assert status == 0
    assert "cifar10 or cifar100 with resnet18, wrn28_10, pyramidnet110, vit_b16_finetune;" in text
    assert "cifar10_resnet18_sam" not in text
