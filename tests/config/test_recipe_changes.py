"""What flags, files and the machine change in a recipe, and that what comes of it is printed as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lesam_dist.config import checks
from lesam_dist.config.command_line import dump, parse, read_command_line
from lesam_dist.config.flags import flags_for
from lesam_dist.config.learning_rate import peak_lr
from lesam_dist.config.recipes import base_optimizer, bases
from lesam_dist.config.schema import Config
from tests.conftest import Command


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


def test_a_flag_of_the_base_is_for_all_methods_of_a_comparison() -> None:
    """Of AdamW with a recipe on AdamW: the baseline and SAM are compared on the same terms."""
    words = ["--optimizer.betas=[0.9,0.95]", "--optimizer.rho=0.1"]
    base = base_optimizer("imagenet_vit_b16")
    assert flags_for("adamw", ["adamw", "sam"], words, base) == words[:1]
    assert flags_for("sam", ["adamw", "sam"], words, base) == words


def test_flags_win_wherever_they_stand_between_recipes_and_files(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("optimizer: {sigma: 0.7}\nepochs: 180\n")
    config = parse(["--config", "cifar100_resnet18_lesam", "--config", str(tmp_path / "mine.yaml"), "--epochs", "190"])
    assert (config.optimizer.args["sigma"], config.epochs, config.optimizer.args["rho_max"]) == (0.7, 190, 0.4)
    late = ("--optimizer.start_epoch", "160", "--optimizer.rho_max", "null", "--schedule.anneal_start_epoch", "null")
    figure_6 = parse(["--config=cifar100_resnet18_lesam", *late])
    assert (figure_6.optimizer.start_epoch, figure_6.optimizer.args["rho_max"]) == (160, None)


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
