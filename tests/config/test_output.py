"""What a command prints: errors are one line; nobody who reads it, or a full disk, gives no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lesam_dist.config.explain import expected
from lesam_dist.errors import UserError
from lesam_dist.parallel.place import Place
from lesam_dist.parallel.report import report_failure

CLOSED = 141


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """The smallest data set that `pack --verify` has something to say of: it needs no torch."""
    from PIL import Image

    from lesam_dist.data.packed.command import pack

    for split in ("train", "val"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "data" / split / "a" / "0.png")
    pack([str(tmp_path / "data"), str(tmp_path / "packed"), "--workers", "1"])
    return tmp_path / "packed"


def ended(words: list[str], stdout: int, unbuffered: str) -> tuple[int, str]:
    environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "lesam_dist", *words]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environ, check=False)
    return done.returncode, done.stderr


# Unbuffered, print itself fails; else what ends the process does.
@pytest.mark.parametrize(("what", "unbuffered"), [("usage", "1"), ("verify", "")])
def test_a_pipe_that_nobody_reads(packed: Path, what: str, unbuffered: str) -> None:
    """As `| head` leaves it."""
    read, write = os.pipe()
    os.close(read)
    words = ["pack", "--verify", str(packed)] if what == "verify" else []
    try:
        assert ended(words, write, unbuffered) == (CLOSED, "")
    finally:
        os.close(write)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_an_output_on_a_full_disk(packed: Path) -> None:
    with open("/dev/full", "w") as full:
        status, said = ended(["pack", "--verify", str(packed)], full.fileno(), "")
    assert status == 2
    assert said.startswith("lesam-dist: error: ")
    assert said.count("\n") == 1
    assert "No space left on device" in said


def test_an_error_is_one_line_whatever_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    report_failure(Place(), UserError("the folder 'a\nb' does not exist"))
    assert capsys.readouterr().err == "lesam-dist: error: the folder 'a b' does not exist\n"


def test_what_a_field_of_numbers_expects_is_said_without_a_default() -> None:
    assert expected("data.dali_preallocate") == "2 numbers in brackets, e.g. [1,2], or null"
