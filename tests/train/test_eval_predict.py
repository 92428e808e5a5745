"""`lesam-dist eval` gives the numbers of the run's own log; `lesam-dist predict` what its evaluation saw, by name."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lesam_dist.config.command_line import parse
from lesam_dist.config.flags import divide
from lesam_dist.data.folder import scan_split
from lesam_dist.data.in_memory import in_memory
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.images.data import build_evaluation_loader
from lesam_dist.train.predict import read_images
from lesam_dist.train.run import train
from lesam_dist.train.telemetry import read_metrics
from tests.conftest import CLASSES, VAL, Command
from tests.parallel.terminal import launch, torchrun_like

ALONE = Distributed(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one epoch, with an average, in bfloat16 and channels last: what evaluation must not do otherwise."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--config", "digits", "--data.root", str(images), "--data.builtin", "null", "--data.batch_size", "20"]
    flags += ["--data.image_size", "16", "--data.val_resize", "18", "--epochs", "1", "--logging.every_steps", "2"]
    flags += ["--ema.decay", "0.5", "--precision.compute", "bf16", "--precision.channels_last", "true"]
    train(parse([*flags, "--run_dir", str(run_dir), "--parallel.device", "cpu", "--logging.tensorboard", "false"]))
    return run_dir


def logged(run: Path) -> dict[str, Any]:
    return next(line for line in read_metrics(run) if line["split"] == "val")


def test_the_numbers_of_the_log(call: Command, run: Path) -> None:
    """All of them, to the last bit; of the averaged weights too, and of an export."""
    line = logged(run)
    names = [name for name in line if f"ema_{name}" in line]
    assert {"acc1", "loss", "ece"} <= set(names)
    status, out, _ = call("eval", run, "--json")
    found = json.loads(out)
    assert status == 0
    assert {name: found[name] for name in names} == {name: line[name] for name in names}
    assert (found["samples"], found["step"], found["split"]) == (VAL * len(CLASSES), line["step"], "val")
    averaged = json.loads(call("eval", run / "checkpoints" / found["checkpoint"], "--ema", "--json")[1])
    assert {name: averaged[name] for name in names} == {name: line[f"ema_{name}"] for name in names}
    file = run / "exported.safetensors"
    assert call("export", run, file)[0] == 0
    exported = json.loads(call("eval", file, "--config", run / "config.yaml", "--json")[1])
    assert {name: exported[name] for name in names} == {name: line[name] for name in names}


def evaluates(rank: int) -> None:
    from lesam_dist import cli

    cli._eval(Path("words").read_text().split("\n"))


def test_on_two_processes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words").write_text("\n".join([str(run), "--json", "--data.workers", "1"]))
    statuses, out = launch(evaluates, tmp_path, torchrun_like)
    assert statuses == [0, 0], out
    (found,) = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    line = logged(run)
    assert (found["acc1"], found["samples"]) == (line["acc1"], line["samples"])
    assert found["loss"] == pytest.approx(line["loss"], rel=1e-6)


def test_other_data(call: Command, run: Path, images: Path, tmp_path: Path) -> None:
    """Training images, and those of another folder, of which half are named wrongly."""
    status, out, _ = call("eval", run, "--split", "train")
    assert status == 0
    assert "train:" in out
    shutil.copytree(images, tmp_path / "data")
    val = tmp_path / "data" / "val"
    (val / "0").rename(val / "x")
    (val / "1").rename(val / "0")
    (val / "x").rename(val / "1")
    found = json.loads(call("eval", run, "--data.root", tmp_path / "data", "--json")[1])
    assert found["samples"] == VAL * len(CLASSES)
    assert found["loss"] != logged(run)["loss"]


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.open()))


def test_predictions_are_those_of_the_evaluation(call: Command, run: Path, images: Path, tmp_path: Path) -> None:
    """Their accuracy is the log's, and they depend on no batch."""
    found: list[list[dict[str, str]]] = []
    for size in (1, 64):
        target = tmp_path / f"{size}.csv"
        words = ("predict", run, images / "val", "--top", 3, "--output", target, "--data.eval_batch_size", size)
        status, out, err = call(*words)
        assert (status, out, err) == (0, "", f"{target}: {VAL * len(CLASSES)} images, 0 left out\n")
        found.append(rows_of(target))
    right = sum(Path(row["path"]).parent.name == row["class_1"] for row in found[0])
    assert 100 * right / len(found[0]) == logged(run)["acc1"]
    assert [row["path"] for row in found[0]] == [row["path"] for row in found[1]]
    for one, other in zip(*found, strict=True):
        values = [float(one[f"probability_{place}"]) for place in (1, 2, 3)]
        assert sum(values) == pytest.approx(1, abs=1e-5), "all three classes"
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx([float(other[f"probability_{place}"]) for place in (1, 2, 3)], abs=0.02), "bf16"


def test_images_are_those_that_evaluation_reads(images: Path) -> None:
    """Class folders at any size, and what stays on the device at 32 x 32 pixels."""
    folder = scan_split(images, "val")
    for flags, split in (
        (
            [
                "--config",
                "digits",
                "--data.builtin",
                "null",
                "--data.val_resize",
                "40",
                "--data.backend",
                "torchvision",
            ],
            folder,
        ),
        (["--config", "mnist5k_lt100_resnet8_la_lesam"], in_memory(folder)),
    ):
        config = parse([*flags, "--data.root", str(images), "--data.workers", "1", "--data.eval_batch_size", "64"])
        loader = build_evaluation_loader(config, split, ALONE)
        ((wanted, _),) = list(loader.epoch(0))
        loader.close()
        read, found = read_images(config, list(folder.paths), ALONE.device, [])
        assert read == list(folder.paths)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_broken_images_are_named_and_left_out(call: Command, run: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(images / "val", folder)
    (folder / ".hidden").mkdir()
    shutil.copy(next((folder / "0").iterdir()), folder / ".hidden" / "a.jpg")
    (folder / "0" / "notes.txt").write_text("")
    bad = sorted((folder / "1").iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:40])
    target = tmp_path / "found.jsonl"
    status, _, err = call("predict", run, folder, "--output", target)
    assert status == 1
    assert err.splitlines()[0].startswith(f"cannot read '{bad}': ")
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(lines) == VAL * len(CLASSES) - 1
    assert all(set(line["classes"]) == set(CLASSES) for line in lines)
    status, out, _ = call("predict", run, bad)
    assert (status, out.count("\n")) == (1, 1), "a table without rows"


def test_names_of_classes(call: Command, run: Path, images: Path, tmp_path: Path) -> None:
    """A run writes them; of one that has not, they are the data's, which is said."""
    assert json.loads((run / "classes.json").read_text()) == list(CLASSES)
    older = tmp_path / "older"
    shutil.copytree(run, older)
    (older / "classes.json").unlink()
    image = next((images / "val" / "2").iterdir())
    _, wanted, _ = call("predict", run, image)
    status, out, err = call("predict", older, image)
    assert (status, out) == (0, wanted)
    assert err.startswith(f"'{older}' has no classes.json, which earlier versions did not write")
    status, _, err = call("predict", older, image, "--data.root", tmp_path / "nowhere")
    assert status == 2
    assert "nowhere" in err
    (older / "classes.json").write_text("{}")
    assert call("predict", older, image)[0] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "RUN", "--splat", "val"], "unrecognized arguments: --splat val (lesam-dist eval --help)"),
        (["eval", "RUN", "--data.rooot", "x"], "unknown key 'data.rooot': did you mean"),
        (["eval", "IMAGES"], "is no checkpoint"),
        (["eval", "RUN/exported"], "is no checkpoint"),
        (["predict", "RUN"], "the following arguments are required: images"),
        (["predict", "RUN", "nowhere"], "'nowhere' does not exist: give image files"),
        (["predict", "RUN", "RUN/checkpoints"], "has no images, which end in .jpg"),
        (["predict", "RUN", "IMAGES", "--top", "0"], "--top is 0: it must be at least 1."),
        (["predict", "RUN", "IMAGES", "--output", "a.txt"], "name a file that ends in .csv or .jsonl"),
        (["predict", "RUN", "IMAGES", "--output", "no/a.csv"], "'no/a.csv' cannot be written: No such file"),
        (["eval", "RUN", "--model.name", "resnet18"], "is not of model.name resnet18 with 3 classes"),
    ],
)
def test_refusals(call: Command, run: Path, images: Path, words: list[str], message: str) -> None:
    given = [word.replace("RUN", str(run)).replace("IMAGES", str(images / "val")) for word in words]
    status, _, err = call(*given)
    assert (status, err.count("\n")) == (2, 1), err
    assert message in err


def test_own_words_and_those_of_the_run() -> None:
    words = ["--data.root", "a", "run", "--json", "--data.workers=2", "b", "--model.compile"]
    assert divide(words) == (["run", "--json", "b"], ["--data.root", "a", "--data.workers=2", "--model.compile"])
