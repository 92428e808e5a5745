"""The commands of `lesam-dist` that pages show do their work: page by page, in their order, on a few small images.

A reader gives them to machines that are not here: each gets options that make it short, and is started in this process.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path

import pytest

from lesam_dist import cli
from lesam_dist.planning.hardware import device_of
from tests.analysis.corrupted_files import write_files
from tests.docs.command_lines import ours_by_page
from tests.docs.pages import ROOT, name

SHOWN = ours_by_page()
# Of an option that is given twice the last one holds.
NET = ["--model.name", "cifar_resnet8", "--data.image_size", "16"]
QUICK = ["--epochs", "1", "--logging.every_steps", "1", "--logging.tensorboard", "false"]
SHORT = [*NET, *QUICK, "--data.batch_size", "16", "--schedule.lr_warmup_epochs", "0"]
AVERAGED = ["--ema.decay", "0.5"]
FOLDER = ["--data.builtin", "null", "--data.root"]
NOT_HERE = ("cifar", "mnist5k_lt100")  # the first would be downloaded, the second is read for seconds
EXPERIMENTS = ("compare", "sweep", "domains")
ANALYSES = {
    "hessian": "--samples 16 --top 1 --trace_vectors 2 --density_vectors 1 --lanczos_steps 2",
    "sharpness": "--samples 16 --batch_size 16 --m_sizes 4 --directions 1 --draws 1 --steps 1",
    "lpf": "--samples 16 --draws 2",
    "landscape": "--samples 16 --points 3",
    "connect": "--samples 16 --points 3",
    "robustness": "--samples 4 --steps 1",
}
CORRUPTED = "--data.image_size 32 --data.val_resize 32 --corruptions fog --severities 1"
LISTS = {"--methods": 2, "--values": 2, "--sources": 1, "--gpus": 2}  # how many of what an option lists are kept
OUTPUTS = ("--out", "--output", "--plot")


def option(arguments: list[str], wanted: str) -> str:
    return next((value for given, value in pairwise(arguments) if given == wanted), "")


def few(arguments: list[str]) -> list[str]:
    """Without the last ones of what an option lists."""
    return [
        ",".join(value.split(",")[: LISTS[given]]) if given in LISTS else value
        for given, value in pairwise(["", *arguments])
    ]


def data(command: str, arguments: list[str]) -> list[str]:
    """Images that are here, for a command that names no folder of them."""
    domains = "--domains.source" in arguments or command == "domains"
    folder = [] if "--data.root" in arguments else [*FOLDER, "data/PACS" if domains else "data/mine"]
    return [*folder, *(["--model.pretrained", "false", "--domains.steps_per_epoch", "2"] if domains else [])]


def short_training(arguments: list[str]) -> list[str]:
    if any(word.startswith("--help") for word in arguments):
        return []
    is_not_here = option(arguments, "--config").startswith(NOT_HERE) or option(arguments, "--task") == "long_tail"
    if is_not_here or "--logging." in " ".join(arguments):  # which would ask for a server
        return [*NET, "--dry_run", "true"]
    if "--task" in arguments:  # of no images
        return QUICK
    resumed = ["--epochs", "2", *AVERAGED] if "--resume" in arguments else []
    profiled = ["--epochs", "5"] if "--profile" in arguments else []
    return [*data("train", arguments), *SHORT, *resumed, *profiled]


def short_analysis(name: str, *arguments: str) -> list[str]:
    if name == "radius":
        return []
    larger = "--corruptions" in arguments or "--corruptions_root" in arguments
    return [*ANALYSES[name].split(), "--force", *(CORRUPTED.split() if larger else [])]


def shortened(command: str, arguments: list[str]) -> list[str]:
    """The same, so that it takes a second."""
    further: list[str] = []
    if command == "train":
        further = short_training(arguments)
    elif command in EXPERIMENTS:
        further = [*data(command, arguments), *SHORT, "--seeds", "1"]
        further += ["--methods", "lesam"] if command == "domains" else []  # with a run for each domain
    elif command == "plan":
        further = [*NET, "--decode_rate", "300"]
    elif command == "analyze":
        further = short_analysis(*arguments)
    return [*few(arguments), *further]


@pytest.fixture(scope="module")
def made(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader would be: images, and a run in `made`."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for place in ("data/mine", "data/imagenet", "other/images"):
            shutil.copytree(images, place)
        for domain in ("PACS/photo", "PACS/sketch", "VLCS/LabelMe", "VLCS/SUN09"):
            shutil.copytree(images / "train", Path("data") / domain)
        write_files(Path("data/CIFAR-10-C"), ["fog"], 4, seed=0, classes=3)
        Path("photos").mkdir()
        for file, image in zip(("a.png", "b.png"), sorted((images / "val" / "0").iterdir()), strict=False):
            shutil.copy(image, f"photos/{file}")
        cli._COMMANDS["train"][0](["--config", "digits", "--run_dir", "made", *FOLDER, "data/mine", *SHORT, *AVERAGED])
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that for one page, where what is not tried here is replaced."""
    folder = Path(shutil.copytree(made, tmp_path / "place"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr("lesam_dist.train.run.require_boards", lambda _: None)  # it asks W&B who is logged in
    monkeypatch.setattr("lesam_dist.planning.calibrate.calibrate", lambda: device_of("cpu"))  # takes 12 s
    return folder


def here(arguments: list[str], place: Path) -> list[str]:
    """Absolute paths are of this place, and a checkpoint's name is that of the run that is here."""
    (checkpoint,) = (place / "made" / "checkpoints").glob("step_*")
    return [re.sub(r"step_\d+", checkpoint.name, re.sub(r"^/", "", word)) for word in arguments]


def runs(arguments: list[str]) -> Iterator[Path]:
    """Of the runs that a command names, those that it reads."""
    for before, word in pairwise(["", *arguments]):
        found = re.match(r"runs/\w+(?:/\w+/seed_\d)?", word)
        if found and (before not in ("--run_dir", "--output") or "--resume" in arguments):
            yield Path(found[0])


def check_what_is_there(command: str, arguments: list[str]) -> None:
    """The files that the reader was promised."""
    for given, value in pairwise(arguments):
        assert given not in OUTPUTS or Path(value).is_file()
    if command in EXPERIMENTS:
        assert list(Path("runs").glob(f"*/{command}.md"))
    elif command == "train" and not re.search("--(?:dry_run|help)", " ".join(arguments)):
        (config,) = Path(option(arguments, "--run_dir") or "runs").rglob("config.yaml")
        assert {"metrics.jsonl", "curves.png", "checkpoints"} <= {path.name for path in config.parent.iterdir()}
    elif command in ("export", "pack"):
        assert Path(arguments[1]).exists()


@pytest.mark.parametrize("page", SHOWN, ids=name)
def test_the_commands_of_a_page(page: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, *given in SHOWN[page]:
        arguments = shortened(command, here(given, place))
        for run in runs(arguments):  # which the reader has, from another page
            if not run.exists():
                shutil.copytree("made", run)
        if command in ("train", *EXPERIMENTS) and "--resume" not in arguments:  # pages also show one run several times
            shutil.rmtree(option(arguments, "--run_dir") or "runs", ignore_errors=True)
        with suppress(SystemExit) if "--help" in " ".join(arguments) else nullcontext():
            cli._COMMANDS[command][0](arguments)
        shown = capsys.readouterr()
        assert shown.out or shown.err
        check_what_is_there(command, arguments)
