"""The command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lesam_dist.cli import run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``command("--flag", "value")`` runs `lesam-dist train` here; returns exit status, stdout and stderr."""

    def call(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lesam-dist", *map(str, argv)])
        with pytest.raises(SystemExit) as stopped:
            run("train")
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


@pytest.fixture
def small(images: Path) -> tuple[str, ...]:
    """Flags of a run of 3 epochs of 3 steps on `images`."""
    return (
        *(
            "--config",
            "digits",
            "--data.root",
            str(images),
            "--data.batch_size",
            "20",
            "--data.builtin",
            "null",
        ),
        *("--epochs", "3", "--schedule.lr_warmup_epochs", "1", "--logging.every_steps", "1"),
    )
