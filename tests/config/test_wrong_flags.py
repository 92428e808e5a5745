"""A wrong flag ends with status 2 and one line that names the value and the remedy, before anything is begun.

And what looks wrong and is not: the largest seed, `+=` for a list, numbers below zero.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lesam_dist.config.command_line import parse
from lesam_dist.errors import UserError
from tests.conftest import Command

FLAGS = [
    (["--config", "digit"], "unknown recipe 'digit': did you mean 'digits'?"),
    (["--config", "nowhere.yaml"], "config file 'nowhere.yaml' does not exist"),
    (["--optimizer.sigm", "1"], "unknown key 'optimizer.sigm': did you mean 'optimizer.sigma'?"),
    (["--sigma", "1"], "did you mean 'optimizer.sigma'?"),
    (["--epoch", "1"], "did you mean 'epochs'?"),
    (["--optimizer.name", "lesan"], "unknown optimizer 'lesan': did you mean 'lesam'?"),
    (["--optimizer.sigma", "-0.1"], "optimizer.args.sigma is -0.1: it must be a finite number >= 0."),
    (
        ["--optimizer.name", "sam", "--optimizer.rho", "-1"],
        "optimizer.args.rho is -1: it must be a finite number >= 0.",
    ),
    (["--optimizer.sigma", "nan"], "optimizer.args.sigma is nan: it must be a finite number >= 0."),
    (["--epochs", "-3"], "epochs is -3: it must be at least 1"),
    (["--epochs", "many"], "epochs is many: it must be a whole number"),
    (
        ["--data.backend", "dalli"],
        "data.backend is dalli: it must be one of auto, dali, torchvision. Did you mean 'dali'?",
    ),
    (["--data.order", "sequential"], "holds files, which have no order to be read in: pack them with"),
    (["--data.shuffle_window", "5"], "data.shuffle_window is 5 but data.order is random, which shuffles all images"),
    (
        ["--data.backend", "torchvision", "--data.dali_prefetch", "3"],
        "data.dali_prefetch is 3 but data.backend is t",
    ),
    (["--data.backend", "dali", "--data.dali_hardware_load", "2"], "data.dali_hardware_load is 2.0: it must be in"),
    (
        ["--data.backend", "dali", "--data.dali_preallocate", "[0, 9]"],
        "data.dali_preallocate is [0, 9]: give width",
    ),
    (
        ["--data.backend", "dali", "--data.dali_decoder", "cpu", "--data.dali_hardware_load", "1"],
        "is set but data.dali_decoder is cpu",
    ),
    (["--data.root", "s4://bucket/x"], "data.root 's4://bucket/x/index.safetensors': the scheme 's4' is not known"),
    (["--logging.peak_tflops", "0"], "logging.peak_tflops is 0.0: it must be above 0."),
    (["--profile", "0"], "profile is 0: it must be at least 1"),
    (["--profile", "5", "--dry_run"], "profile is 5 but dry_run is true, which makes two steps and writes nothing"),
    (
        ["--precision.cudnn_benchmark", "true", "--precision.deterministic", "true"],
        "precision.cudnn_benchmark and precision.deterministic are both true",
    ),
    (
        ["--parallel.sync_batchnorm", "true", "--parallel.strategy", "none"],
        "parallel.sync_batchnorm is true but parallel.strategy is none, which is one process",
    ),
    (["--resume", "yes"], "resume is 'yes': it is 'auto' or null"),
    (["--schedule.anneal_start_epoch", "15"], "anneal_start_epoch is 15.0 but the run has 15 epochs"),
    (["--loss.label_smoothing", "1.5"], "loss.label_smoothing is 1.5"),
    (["--data.random_area", "[0.9,0.5]"], "random_area"),
    (["--data.val_resize", "16"], "val_resize (16) is smaller than image_size (32)"),
    (["--model.name", "cifar_resnet9"], "unknown model 'cifar_resnet9': did you mean 'cifar_resnet"),
    (
        ["--model.name", "vgg11", "--model.zero_init_residual", "true"],
        "'vgg11' has no option zero_init_residual",
    ),
    (["--model.num_classes", "2"], "has 3 classes but model.num_classes is 2"),
    (["--model.num_classes", "1"], "model.num_classes is 1: it must be at least 2"),
    (["--model.num_classes", "1000000000"], "model.num_classes is 1000000000: it must be at most 1000000"),
    (["--model.name", "alexnet"], "model 'alexnet' cannot be trained on 20 images of 32 x 32 pixels at once"),
    (["--model.name", "inception_v3"], "set a larger data.image_size, or choose a model for small images"),
    (["--model.name", "resnet18", "--data.batch_size", "1"], "BatchNorm needs more than one image"),
    (["--model.name", "resnet18", "--data.micro_batches", "20"], "cannot be trained on 1 image of 32 x 32 pixels"),
    (["--model.name", "resnet18", "--optimizer.ascent_fraction", "0.05"], "cannot be trained on 1 image of"),
    (
        ["--model.name", "resnet18", "--optimizer.name", "esam", "--data.batch_size", "3"],
        "cannot be trained on 1 image of",
    ),
    (["--seed", "4294967296"], "seed is 4294967296: it must be at most 4294967295"),
    (["--data.batch_size", "1000"], "fewer than one global batch of 1000"),
    (["--data.micro_batches", "3"], "data.micro_batches 3 does not divide the 20 images"),
    (["--optimizer.scope", "local", "--parallel.strategy", "fsdp"], "scope is local but parallel.strategy is fsdp"),
    (["--optimizer.scope", "replica"], "scope is replica but parallel.strategy is ddp"),
    (["--optimizer.ascent_interval", "0"], "optimizer: ascent_interval is 0; it must be a whole number >= 1"),
    (["--optimizer.max_grad_norm", "0"], "optimizer: max_grad_norm is 0.0"),
    (
        ["--data.accumulation_mode", "micro", "--optimizer.name", "sgd"],
        "accumulation_mode is micro but optimizer.name is sgd",
    ),
    (["--precision.weights", "bf16"], "precision.weights is bf16 but precision.compute is fp32"),
    (["--precision.gather_dtype", "bf16"], "gather_dtype is bf16 but parallel.strategy is ddp"),
    (["--precision.gather_dtype", "bf16", "--parallel.strategy", "none"], "choose fsdp or hsdp, or fp32"),
    (
        ["--precision.gather_dtype", "bf16", "--parallel.strategy", "fsdp", "--precision.compute", "fp16"],
        "gather_dtype is bf16 but precision.compute is fp16",
    ),
    (["--ema.decay", "1"], "ema.decay is 1.0: it must be in [0, 1)"),
    (["--model.activation_checkpointing", "true"], "BasicBlock has BatchNorm"),
    (
        ["--model.name", "vgg11", "--model.activation_checkpointing", "true"],
        "VGG has none of the known blocks",
    ),
    (["--parallel.strategy", "zero"], "parallel.strategy is zero: it must be one of none, ddp, fsdp, hsdp."),
    (["--data.root", "/nowhere"], "'/nowhere'"),
    # Obscure once.
    (["--optimizer.rho_max", "nan"], "optimizer.args.rho_max is nan: it must be a finite number >= 0, or null."),
    (["--optimizer.lr", "1e400"], "optimizer.lr is inf: it must be a number, and finite."),
    (["--data", "PATH"], "--data is a section: set its fields, e.g. --data.root PATH."),
    (["digits"], "'digits' has no flag before it: did you mean --config digits?"),
    (["--epochs", "3", "4"], "'4' has no flag before it"),
    (["--dry-run"], "unknown key 'dry-run': did you mean 'dry_run'?"),
    (["--optimizer.help"], "--help.optimizer shows its fields"),
    (["--optim.help"], "--help.all shows every field"),
    (["--help.optimzer"], "unknown section 'optimzer': did you mean 'optimizer'?"),
    (["--help.ema=1"], "--help.ema takes no value: it stands alone."),
    (["--data.mean", "0.5,0.5,0.5"], "data.mean is 0.5,0.5,0.5: it must be 3 numbers in brackets, e.g. [0.485,"),
    (["--data.builtin", "DIGITS"], "or null. Did you mean 'digits'?"),
    (["--config", "DIGITS"], "unknown recipe 'DIGITS': did you mean 'digits'?"),
    (["--config"], "--config has no value: give it a recipe's name or a YAML file."),
    (["--config", "."], "--config is '.', a folder"),
    (["--epochs"], "--epochs has no value: give it a whole number."),
    (["--optimizer.name", "a\nb"], "optimizer.name is 'a\\nb': it must be one line of text"),
    (["--run_dir", "\udcff"], "run_dir is '\\udcff': it must be one line of text in UTF-8."),
    (["--seed", "-1"], "seed is -1: it must be at least 0."),
    (["--epochs", "1000000000"], "epochs is 1000000000: it must be at most 1000000."),
    (["--parallel.wrap_classes", "[&a [x], *a]"], "--parallel.wrap_classes has YAML aliases"),
    # Without effect, or out of range.
    (["--optimizer.rho", "0.1"], "optimizer.args.rho is 0.1 but lesam has no rho, so it would have no effect"),
    (
        ["--optimizer.name", "sam", "--optimizer.sigma", "0.5"],
        "sam has no sigma, so it would have no effect: leave it out. sam has rho.",
    ),
    (["--optimizer.name", "sam", "--schedule.anneal_start_epoch", "1"], "sam on sgd has no anneal_start_epoch"),
    (["--optimizer.name", "sgd", "--optimizer.scope", "local"], "optimizer.scope is local but sgd has no scope"),
    (["--optimizer.name", "sgd", "--optimizer.base", "adamw"], "optimizer.base is adamw but sgd has no base"),
    (["--optimizer.name", "adamw", "--optimizer.momentum", "0.5"], "adamw has no momentum"),
    (["--optimizer.base", "adamw", "--optimizer.nesterov", "true"], "lesam on adamw has no nesterov"),
    (["--optimizer.name", "looksam", "--optimizer.ascent_interval", "2"], "looksam on sgd has no ascent_interval"),
    (["--optimizer.ascent_between", "reuse"], "optimizer.ascent_interval is 1: there is no step between"),
    (["--optimizer.plus_form", "released"], "optimizer.args.alpha is 0: it is a form of LE-SAM+"),
    (["--optimizer.eta", "0.1"], "optimizer.args.adaptive is false"),
    (["--optimizer.name", "gsam", "--optimizer.rho_min", "9"], "GSAM: rho_min is 9.0, above rho, 0.05"),
    (["--optimizer.momentum", "2"], "optimizer.momentum is 2.0: it must be below 1."),
    (
        ["--optimizer.base", "adamw", "--optimizer.betas", "[2,3]"],
        "optimizer.betas is [2.0, 3.0]: both must be in [0, 1)",
    ),
    (
        ["--optimizer.name", "sgd", "--optimizer.nesterov", "true", "--optimizer.momentum", "0"],
        "optimizer.nesterov is true but optimizer.momentum is 0",
    ),
    (["--parallel.wrap_classes", "[BasicBlock]"], "wrap_classes is ['BasicBlock'] but parallel.strategy is ddp"),
    (
        ["--parallel.wrap_classes", "[Foo]", "--parallel.strategy", "fsdp"],
        "unknown class in parallel.wrap_classes 'Foo'",
    ),
    (["--optimizer.name", "lars", "--optimizer.betas", "[0.9,0.9]"], "lars has no betas, so it would have no effect"),
    (["--optimizer.base", "lamb", "--optimizer.momentum", "0.5"], "lesam on lamb has no momentum"),
    (["--optimizer.trust_coefficient", "0.1"], "lesam on sgd has no trust_coefficient"),
    (
        ["--optimizer.base", "lars", "--optimizer.trust_coefficient", "0"],
        "trust_coefficient is 0.0: it must be above 0",
    ),
    (["--optimizer.lr_reference_batch", "512"], "lr_reference_batch is 512 but optimizer.lr_scaling is none"),
    (["--parallel.reduce_dtype", "bf16", "--parallel.strategy", "fsdp"], "parallel.strategy is fsdp, which reduces in"),
    (["--parallel.reduce_dtype", "bf16", "--parallel.strategy", "none"], "strategy is none, where nothing is reduced"),
    (["--parallel.reduce_dtype", "bf16"], "reduce_dtype is bf16 but this is a single process, which reduces nothing"),
    (
        [*("--parallel.reduce_dtype", "bf16", "--precision.weights", "bf16"), "--precision.compute", "bf16"],
        "whose gradients are reduced in that already",
    ),
    # Augmentation and loss.
    (["--data.randaugment_ops", "1"], "data.auto_augment is none: only randaugment has it"),
    (["--data.auto_augment", "randaugment", "--data.randaugment_magnitude", "31"], "it must be at most 30"),
    (["--data.mixup", "-0.1"], "data.mixup is -0.1: it must be at least 0."),
    (["--data.mix_probability", "0.5"], "data.mixup and data.cutmix are 0: nothing is mixed"),
    (["--data.mix_probability", "0"], "data.mix_probability is 0.0: it must be above 0"),
    (["--data.random_erasing", "1.5"], "data.random_erasing is 1.5: it must be at most 1."),
    (["--data.repeats", "3"], "data.repeats 3 does not divide data.batch_size 20"),
    (["--data.repeats", "20", "--data.cutmix", "1"], "each image would be mixed with itself"),
    (["--data.mixup", "0.2", "--data.batch_size", "15"], "each process takes 15 of a batch of 15"),
    (["--data.cutmix", "1", "--data.batch_size", "15", "--dry_run"], "a multiple of 2."),
    (
        [
            "--model.name",
            "alexnet",
            "--data.image_size",
            "64",
            "--data.val_resize",
            "64",
            "--schedule.image_size",
            "[[0,16]]",
        ],
        "change schedule.image_size, which asks for that size",
    ),
    (["--data.val_crop", "40"], "val_resize (32) is smaller than val_crop (40)"),
    (["--data.builtin", "cifar10", "--data.val_crop", "32"], "data.val_crop is 32 but data.builtin is cifar10"),
    (["--loss.binary_threshold", "0.2"], "loss.name is cross_entropy: only binary has it"),
    (["--loss.name", "binary", "--loss.binary_threshold", "1"], "loss.binary_threshold is 1.0: it must be in [0, 1)"),
    (["--schedule.image_size", "[]"], "schedule.image_size is []: it needs [epoch, pixels] pairs"),
    (["--schedule.image_size", "[[1,32]]"], "with rising epochs, the first of them 0"),
    (["--schedule.image_size", "[[0,32],[15,40]]"], "has epoch 15 but the run has 15 epochs"),
    (["--schedule.image_size", "[[0,0]]"], "schedule.image_size has 0 pixels"),
    (["--schedule.image_size", "[0,32]"], "it must be pairs in brackets, e.g. [[0,128],[30,224]], or null."),
    (
        ["--data.builtin", "cifar10", "--data.random_area", "[0.08,1]", "--schedule.image_size", "[[0,32]]"],
        "only class folders are read in several sizes",
    ),
    (["--parallel.shard_size", "2"], "parallel.shard_size is 2 but parallel.strategy is ddp"),
    (["--parallel.reshard_after_forward", "false"], "which gathers no parameters: choose fsdp or hsdp"),
]


@pytest.mark.parametrize(("flags", "message"), FLAGS, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_wrong_flag(command: Command, images: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    run_dir = tmp_path / "run"
    base = ("--config", "digits", "--data.root", images, "--data.builtin", "null", "--data.batch_size", "20")
    status, _, err = command(*base, "--run_dir", run_dir, *flags)
    assert status == 2
    assert message in err
    assert err.startswith("lesam-dist: error: ")
    assert err.count("\n") == 1
    assert not run_dir.exists(), "nothing was begun"


def test_the_largest_seed(command: Command) -> None:
    flags = ("--config", "digits", "--data.batch_size", "2", "--dry_run")
    lines = [command(*flags, "--seed", seed) for seed in ("4294967295", "0")]
    assert [(status, err) for status, _, err in lines] == [(0, "")] * 2
    assert lines[0][1] != lines[1][1]


@pytest.mark.parametrize("value", ["-1e-3", "-.5", "-inf"])
def test_negative_numbers_are_values(value: str) -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr is -.*: it must be "):
        parse(["--optimizer.lr", value])


def test_flags_that_add_to_a_list() -> None:
    flags = ["--parallel.strategy", "fsdp", "--parallel.wrap_classes+", "A", "--parallel.wrap_classes+=B"]
    assert parse(flags).parallel.wrap_classes == ["A", "B"]
