"""Runs on long tails: MNIST from end to end, interruptions, class folders, dry runs, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lesam_dist.config.command_line import parse
from lesam_dist.data.folder import scan_split
from lesam_dist.data.in_memory import in_memory
from lesam_dist.data.long_tail import class_counts, long_tailed
from lesam_dist.data.pairs import PairLoader
from lesam_dist.data.torchvision_loader import TorchvisionLoader
from lesam_dist.models import build_model
from lesam_dist.models.heads import TwoViews, without_last_layer
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.long_tail.task import METHODS, LongTail
from lesam_dist.train.telemetry import read_metrics
from tests.cifar_files import write_cifar
from tests.conftest import Command
from tests.train.test_trainer import assert_same_state, final_state, timeless

CIFAR = """
task: long_tail
long_tail: {method: glmc, imbalance_factor: 4, resample: 0.5}
model: {name: cifar_resnet8}
data: {batch_size: 20, image_size: 32, builtin: cifar10}
optimizer: {name: lesam, sigma: 0.1, lr: 0.02}
logging: {every_steps: 1, tensorboard: false}
epochs: 2
"""


@pytest.fixture
def cifar(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Flags of a run of 2 epochs of 3 steps on 62 of 120 random images."""
    write_cifar(tmp_path / "data", "cifar10", (120, 40), np.random.default_rng(seed), monkeypatch, balanced=True)
    (tmp_path / "cifar.yaml").write_text(CIFAR)
    return "--config", str(tmp_path / "cifar.yaml"), "--data.root", str(tmp_path / "data")


def test_glmc_on_mnist(command: Command, tmp_path: Path) -> None:
    """The accuracies in the log are those of the last weights, counted class by class, of the second classifier."""
    root, run_dir = tmp_path / "mnist5k", tmp_path / "run"
    flags = (
        "--data.batch_size",
        "240",
        "--epochs",
        "1",
        "--logging.every_steps",
        "1",
        "--logging.tensorboard",
        "false",
    )
    flags += ("--schedule.anneal_start_epoch", "null", "--data.root", str(root), "--run_dir", str(run_dir))
    flags += ("--data.image_size", "16")
    status, out, err = command("--config", "mnist5k_lt100_resnet8_glmc_lesam", *flags)
    assert (status, err) == (0, "")
    described = "long_tail: 988 training images, 400 to 4 of a class; classes: 3 many, 3 medium, 4 few\n"
    assert described in out
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4]
    assert all(line["rho"] > 0 and line["perturbed_loss"] > line["loss"] for line in lines[:4])
    counts = class_counts(long_tailed(scan_split(root, "train"), 100, "ldam").labels, 10)
    assert counts.tolist() == [400, 239, 143, 86, 51, 30, 18, 11, 6, 4]
    features, size = without_last_layer(build_model("cifar_resnet8", 10), "cifar_resnet8")
    net = TwoViews(features, size, 10).eval()
    net.load_state_dict(final_state(run_dir)["model"])
    val = in_memory(scan_split(root, "val"))
    with torch.no_grad():
        images = (torch.from_numpy(val.images).float() / 255 - 0.13) / 0.31
        images = F.interpolate(images, size=16, mode="bilinear", antialias=True)
        predicted = net.fc_cb(net.features(images)).argmax(dim=1).numpy()
    of_class = np.array([100 * np.mean(predicted[val.labels == label] == label) for label in range(10)])
    last = lines[-1]
    assert last["samples"] == 1000
    assert last["acc1"] == pytest.approx(100 * np.mean(predicted == val.labels), abs=0.21)  # two images
    for name, group in (("many", slice(0, 3)), ("medium", slice(3, 6)), ("few", slice(6, 10))):
        assert last[name] == pytest.approx(of_class[group].mean(), abs=0.7)


def test_an_interrupted_run_goes_on_with_the_same_bits(
    command: Command, cifar: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command(*cifar, "--run_dir", whole)[0] == 0
    with monkeypatch.context() as patch:
        real = PairLoader.epoch

        def interrupted(self: PairLoader, index: int, start: int = 0) -> object:
            if index == 1:
                raise KeyboardInterrupt
            return real(self, index, start)

        patch.setattr(PairLoader, "epoch", interrupted)
        assert command(*cifar, "--run_dir", broken)[0] == 130
    status, _, err = command(*cifar, "--run_dir", broken, "--resume", "auto")
    assert (status, err) == (0, "")
    assert timeless(broken) == timeless(whole)
    assert_same_state(final_state(broken), final_state(whole))
    status, _, err = command(*cifar, "--run_dir", broken, "--resume", "auto", "--long_tail.subset", "glmc")
    assert status == 2
    assert "long_tail.subset: 'ldam' then, 'glmc' now" in err


def test_class_folders_of_your_own(small: tuple[str, ...], capsys: pytest.CaptureFixture[str], seed: int) -> None:
    """They are read as ever, with fewer of them to train on; groups that there are not are not reported."""
    flags = ("--task", "long_tail", "--long_tail.imbalance_factor", "4", "--data.backend", "torchvision")
    task = LongTail(parse([*small, *flags, "--data.batch_size", "10"]), Distributed(0, 0, 1, torch.device("cpu")))
    train, val = task.loaders()
    assert isinstance(train, TorchvisionLoader)
    assert isinstance(val, TorchvisionLoader)
    assert (len(train), len(val)) == (3, 1)
    assert (
        "long_tail: 35 training images, 20 to 5 of a class; classes: 0 many, 0 medium, 3 few\n"
        in capsys.readouterr().out
    )
    assert task.counts.tolist() == [20, 10, 5]
    labels = torch.arange(21)[torch.randperm(21)] % 3
    guesses = torch.randint(0, 3, (21,))
    sums: dict[str, torch.Tensor] = {}
    for part in torch.arange(21).split(8):
        logits = F.one_hot(guesses[part], 3).float()
        for name, value in task.measure(lambda _, logits=logits: logits, (part, labels[part])).items():
            sums[name] = sums.get(name, torch.zeros(())) + torch.as_tensor(value, dtype=torch.float64)
    report = task.report(sums)
    assert report["acc1"] == pytest.approx(100 * float((guesses == labels).double().mean()))
    assert report["few"] == pytest.approx(report["acc1"]), "of classes of one size"
    assert set(report) == {"acc1", "loss", "ece", "few"}


@pytest.mark.parametrize("method", METHODS)
def test_dry_runs_need_no_data(command: Command, method: str) -> None:
    name = {"cross_entropy": "ce", "ldam_drw": "ldam", "logit_adjustment": "la"}.get(method, method)
    flags = ("--config", f"mnist5k_lt100_resnet8_{name}_sam", "--data.root", "null", "--data.batch_size", "8")
    status, _, err = command(*flags, "--dry_run")
    assert (status, err) == (0, "")


REFUSED = [
    (["--task", "classification"], "long_tail.imbalance_factor is 4.0 but task is classification, which has no long"),
    (["--long_tail.imbalance_factor", "0.9"], "long_tail.imbalance_factor is 0.9: .* at least 1"),
    (["--long_tail.imbalance_factor", "1000"], "which leaves class '.*' without images, since the smallest class of"),
    (["--long_tail.tau", "2"], "tau is 2.0 but long_tail.method is glmc: only logit_adjustment has it"),
    (["--long_tail.reweight_epoch", "1"], "only ldam_drw has it. Choose ldam_drw, or leave it at null"),
    (["--long_tail.method", "cross_entropy"], "resample is 0.5 but long_tail.method is cross_entropy: only glmc"),
    (["--long_tail.contrast", "-1"], "long_tail.contrast is -1.0: it must be at least 0"),
    (["--long_tail.mix_alpha", "0"], "long_tail.mix_alpha is 0.0: it must be above 0"),
    (["--long_tail.reweight_beta", "1"], r"reweight_beta is 1.0: it must be in \[0, 1\)"),
    (["--data.cutmix", "1"], "data.cutmix is 1.0 but task is long_tail with long_tail.method glmc"),
    (["--data.repeats", "2"], "data.repeats is 2 but task is long_tail with long_tail.method glmc"),
    (["--loss.name", "binary"], "loss.name is binary but task is long_tail"),
    (["--data.builtin", "null"], "long_tail.method is glmc but data.builtin is null"),
    (["--data.builtin", "digits", "--data.random_erasing", "0.1"], "only class folders of your own are augmented that"),
    (["--model.num_classes", "11"], "model.num_classes is 11 but the data have 10 classes"),
    (["--model.name", "squeezenet1_0"], "model 'squeezenet1_0' ends in a Conv2d and not in a linear layer"),
    (["--data.batch_size", "100"], "has 62 training images, fewer than one global batch of 100"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_refusals(command: Command, cifar: tuple[str, ...], tmp_path: Path, flags: list[str], message: str) -> None:
    status, _, err = command(*cifar, "--run_dir", tmp_path / "run", *flags)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert re.search(message, err)
    assert not (tmp_path / "run").exists()
