"""Before anything imports triton: without a GPU the kernels run in Triton's interpreter (read once, at decoration)."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.interpreter import language_patched_once
from tests.seeds import seed_of

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "OMP_NUM_THREADS" not in os.environ:
    # Files of tests run at one time, and threads that wait for a core spin: with two, an epoch took five times the CPU.
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)
# A shell starts what runs in the background with Ctrl-C ignored, and all that tests start would inherit it.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

Command = Callable[..., tuple[int, str, str]]

CLASSES = ("0", "1", "2")
TRAIN, VAL = 20, 7  # images per class of the fixture `images`


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The test's seed (`tests.seeds`), printed so that a failure can be repeated with SEED=n."""
    value = seed_of(request.node.nodeid)
    torch.manual_seed(value)
    print(f"SEED={value}")
    return value


@pytest.fixture(autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Interpreted kernels run in half the time; the same in the processes of `tests.parallel.processes`."""
    with language_patched_once():
        yield


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/train and ROOT/val with 3 classes of scanned digits."""
    from lesam_dist.data.digits import prepare_digits

    full, root = tmp_path_factory.mktemp("digits"), tmp_path_factory.mktemp("images")
    prepare_digits(full)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for path in sorted((full / split / name).iterdir())[:count]:
                shutil.copy(path, root / split / name)
    return root


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``call("export", "runs/a", ...)`` runs a command of `lesam-dist` here; returns exit status, stdout and stderr."""

    from lesam_dist.cli import run

    def call(name: str, *argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lesam-dist", *map(str, argv)])
        capsys.readouterr()  # what was printed before is not the command's
        with pytest.raises(SystemExit) as stopped:
            run(name)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


@pytest.fixture
def command(call: Command) -> Command:
    """``command("--flag", "value")`` runs `lesam-dist train`."""
    return partial(call, "train")


@pytest.fixture
def small(images: Path) -> tuple[str, ...]:
    """Flags of a run of 3 epochs of 3 steps on `images`."""
    return (
        *("--config", "digits", "--data.root", str(images), "--data.batch_size", "20", "--data.builtin", "null"),
        *("--data.image_size", "16", "--data.val_resize", "16"),
        *("--epochs", "3", "--schedule.lr_warmup_epochs", "1", "--logging.every_steps", "1"),
    )
