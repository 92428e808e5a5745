"""`--init_from`: a new run from old weights; and a finished run that is trained for more epochs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lesam_dist.config.command_line import parse
from lesam_dist.config.same_run import is_longer, require_longer
from lesam_dist.config.values import flatten
from lesam_dist.errors import UserError
from lesam_dist.train.checkpoint.weights import checkpoint_in, weights_of
from lesam_dist.train.run import train
from lesam_dist.train.telemetry import read_metrics
from tests.conftest import Command

STEPS = 3  # of an epoch


def flags_of(images: Path) -> list[str]:
    flags = ["--config", "digits", "--data.root", str(images), "--data.builtin", "null", "--data.batch_size", "20"]
    flags += ["--data.image_size", "16", "--data.val_resize", "16", "--logging.every_steps", "1"]
    return [*flags, "--parallel.device", "cpu", "--logging.tensorboard", "false", "--data.workers", "1"]


@pytest.fixture(scope="module")
def old(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs, with an average."""
    run_dir = tmp_path_factory.mktemp("old") / "run"
    train(parse([*flags_of(images), "--epochs", "2", "--ema.decay", "0.5", "--run_dir", str(run_dir)]))
    return run_dir


@pytest.fixture
def new(images: Path, tmp_path: Path) -> list[str]:
    """Flags of a run that changes nothing: all rates are 0, so its weights are what it started from."""
    return [*flags_of(images), "--epochs", "1", "--optimizer.lr", "0", "--run_dir", str(tmp_path / "new")]


def weights(run_dir: Path, *, averaged: bool = False) -> dict[str, Tensor]:
    found, _ = weights_of(checkpoint_in(run_dir), averaged=averaged)
    return {name: tensor for name, tensor in found.items() if "running" not in name and "num_batches" not in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name in one if one[name].shape == other[name].shape and torch.equal(one[name], other[name])}


def test_it_starts_from_the_weights(command: Command, old: Path, new: list[str], tmp_path: Path) -> None:
    status, out, err = command(*new, "--init_from", old)
    assert (status, err) == (0, "")
    assert f"init_from: starts from step_00000006 in '{old}', with a fresh optimizer\n" in out
    wanted = weights(old)
    assert same(wanted, weights(tmp_path / "new")) == wanted.keys()
    assert next(line["step"] for line in read_metrics(tmp_path / "new")) == 1


def test_resuming_needs_them_no_more(command: Command, old: Path, new: list[str], tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(weights_of(checkpoint_in(old), averaged=True)[0], file)
    status, out, _ = command(*new, "--init_from", file)
    assert status == 0
    assert "init_from: starts from weights.safetensors in" in out
    assert same(weights(old, averaged=True), weights(tmp_path / "new")) == weights(old).keys()
    file.unlink()
    status, out, err = command(*new, "--init_from", file, "--resume", "auto")
    assert (status, err) == (0, "")
    assert "init_from: starts" not in out


def test_averaged_weights(command: Command, old: Path, new: list[str], tmp_path: Path) -> None:
    assert command(*new, "--init_from", checkpoint_in(old), "--init_from_ema", "true")[0] == 0
    wanted = weights(old, averaged=True)
    assert same(wanted, weights(tmp_path / "new")) == wanted.keys()
    assert same(wanted, weights(old)) != wanted.keys()


@pytest.mark.parametrize("why", ["number", "names"])
def test_a_last_layer_for_other_classes_is_fresh(
    command: Command, old: Path, new: list[str], tmp_path: Path, why: str
) -> None:
    """Told by the shape, or by the names that both runs have written."""
    flags = ["--model.num_classes", "7"] if why == "number" else []
    file = tmp_path / "other" / "model.safetensors"
    file.parent.mkdir()
    save_file(weights_of(checkpoint_in(old), averaged=False)[0], file)
    (file.parent / "classes.json").write_text(json.dumps(["0", "1", "2"] if why == "number" else ["a", "b", "c"]))
    status, out, err = command(*new, *flags, "--init_from", file)
    assert (status, err) == (0, "")
    said = "its fc.weight has the shape (3, 64) instead of (7, 64)" if why == "number" else "of other classes"
    assert f"the last layer 'fc' is fresh, as the one there is not this one's: {said}" in out
    wanted = weights(old)
    assert wanted.keys() - same(wanted, weights(tmp_path / "new")) >= {"fc.weight"}
    assert same(wanted, weights(tmp_path / "new")) >= wanted.keys() - {"fc.weight", "fc.bias"}


def test_what_does_not_fit_is_refused(command: Command, old: Path, new: list[str], tmp_path: Path) -> None:
    state = weights_of(checkpoint_in(old), averaged=False)[0]
    first = next(iter(state))
    torch.save({first: state[first]}, tmp_path / "part.pt")
    for flags, message in (
        (["--model.name", "cifar_resnet20", "--init_from", old], "are not of model.name cifar_resnet20: it has no "),
        (["--init_from", tmp_path / "part.pt"], "are not of model.name cifar_resnet8: it has no "),
        (["--init_from", tmp_path / "none"], "is no checkpoint"),
        (["--init_from", tmp_path / "part.pt", "--init_from_ema", "true"], "averaged ones are a checkpoint's"),
        (["--init_from_ema", "true"], "init_from_ema is true but init_from is null"),
        (["--init_from", old, "--model.pretrained", "true"], "the weights come from one place"),
    ):
        status, _, err = command(*new, *flags)
        assert (status, err.count("\n")) == (2, 1), err
        assert message in err
        assert not (tmp_path / "new").exists()


def cosine(step: int, total: int, peak: float) -> float:
    return peak * 0.5 * (1 + math.cos(math.pi * step / total))


def test_a_finished_run_goes_on_for_longer(command: Command, images: Path, tmp_path: Path) -> None:
    """Rate and budget are those of the longer run, from the first step on; an unfinished one keeps its length."""
    flags = [*flags_of(images), "--schedule.lr_warmup_epochs", "0", "--run_dir", tmp_path / "run"]
    flags += ["--schedule.anneal_start_epoch", "1", "--optimizer.sigma", "0.1"]
    assert command(*flags, "--epochs", "2")[0] == 0
    before = weights(tmp_path / "run")
    again = [*flags, "--resume", "auto"]
    status, out, err = command(*again, "--epochs", "3")
    assert (status, err) == (0, "")
    lines = {line["step"]: line for line in read_metrics(tmp_path / "run") if line["split"] == "train"}
    assert list(lines) == list(range(1, 3 * STEPS + 1))
    for step, line in lines.items():
        total = 2 * STEPS if step <= 2 * STEPS else 3 * STEPS
        assert line["lr"] == pytest.approx(cosine(step - 1, total, 0.1), abs=1e-12)
        annealed, last = step - 1 - STEPS, total - STEPS - 1
        assert line["sigma"] == pytest.approx(cosine(max(0, annealed), last, 0.1), abs=1e-12)
    step = 2 * STEPS + 1
    told = f"from 2 to 3 epochs: it goes on with lr {lines[step]['lr']:.4g}, sigma {lines[step]['sigma']:.4g}, as"
    assert told in out
    assert same(before, weights(tmp_path / "run")) != before.keys()
    assert (tmp_path / "run" / "config.2_epochs.yaml").exists()
    assert parse(["--config", str(tmp_path / "run" / "config.yaml")]).epochs == 3
    status, out, err = command("--config", tmp_path / "run" / "config.yaml", "--resume", "auto")
    assert (status, err) == (0, ""), "the longer run is the run now"
    status, _, err = command(*again, "--epochs", "2")
    assert status == 2
    assert "epochs: 3 then, 2 now" in err


def test_what_longer_means(images: Path) -> None:
    def config(*more: str) -> tuple[str, ...]:
        return (*flags_of(images), *more)

    saved = flatten(parse(config("--epochs", "4", "--schedule.lr_warmup_epochs", "1")))
    longer = parse(config("--epochs", "8", "--schedule.lr_warmup_epochs", "2"))
    assert is_longer(longer, saved, 4)
    assert not is_longer(longer, saved, 3), "it has not finished"
    assert not is_longer(parse(config("--epochs", "4")), saved, 4)
    require_longer(longer, saved, "then")
    with pytest.raises(UserError, match=r"schedule.lr_warmup_epochs is 6, and the run has made 4 without"):
        require_longer(parse(config("--epochs", "8", "--schedule.lr_warmup_epochs", "6")), saved, "then")
    with pytest.raises(
        UserError, match=r"more than the number of epochs differs:\n  optimizer.lr: 0.1 then, 0.3 now\n"
    ):
        require_longer(parse(config("--epochs", "8", "--optimizer.lr", "0.3")), saved, "then")
