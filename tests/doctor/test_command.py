"""`lesam-dist doctor`: the table, JSON, and its status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lesam_dist import cli
from lesam_dist.doctor import command
from lesam_dist.doctor.finding import Finding
from tests.conftest import Command


def test_this_machine(call: Command, images: Path, tmp_path: Path) -> None:
    flags = ("--run_dir", tmp_path, "--data", images, "--json")
    status, out, _ = call("doctor", *flags)
    read = json.loads(out)
    found = {each["name"]: each for each in read["findings"]}
    assert {
        "lesam_dist",
        "Python",
        "torch",
        "CUDA",
        "kernels",
        "backend",
        "decoding",
        "disk",
        "launcher",
    } <= found.keys()
    assert found["data"]["text"].startswith("3 classes")
    assert status == int(read["worst"] == "problem")
    assert set(found["torch"]) == {"name", "status", "text", "remedy"}


@pytest.mark.parametrize(
    ("worst", "status", "last"),
    [
        ("ok", 0, "no problems, no warnings."),
        ("warning", 0, "no problems, 1 warning."),
        ("problem", 1, "1 problem, no"),
    ],
)
def test_the_table(call: Command, monkeypatch: pytest.MonkeyPatch, worst: str, status: int, last: str) -> None:
    findings = [Finding("CPUs", "ok", "8"), Finding("disk", worst, "word " * 40, "do " * 40)]  # type: ignore[arg-type]
    monkeypatch.setattr(command, "examine", lambda *_: findings)
    got, out, _ = call("doctor")
    assert got == status
    assert out.splitlines()[-1].startswith(last)
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "\x1b" not in out


def test_without_the_trainers_packages(call: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_missing_packages", lambda: ["numpy", "rich"])
    monkeypatch.setattr(command, "read_kernels", lambda: 1 / 0)
    monkeypatch.setenv("RANK", "0")  # and a launcher that has set one variable alone
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    status, out, err = call("doctor")
    assert (status, err) == (1, "")
    text = " ".join(out.split())
    assert "not installed: numpy, rich -> pip install" in text
    assert "could not be checked: ZeroDivisionError" in text
    assert "RANK is 0 but WORLD_SIZE is not set" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data", "/nowhere"), "--data: folder '/nowhere' does not exist."),
        (("--data", "x" * 5000), "does not exist."),
        (("--data", "s3://a/b"), "an address"),
        (("--run", "x"), "unrecognized arguments: --run x (lesam-dist doctor --help)"),
    ],
)
def test_bad_input(call: Command, flags: tuple[str, ...], message: str) -> None:
    status, _, err = call("doctor", *flags)
    assert status == 2
    assert message in err
