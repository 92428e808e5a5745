"""The command lines that pages show are read as they stand, by launchers and by what these start, up to its work.

That they work too is shown by test_runs.py, by tests of the scripts, and by `.ci/run`, which is made of `make`.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from lesam_dist.config.command_line import read_command_line
from lesam_dist.experiments.compare import compare
from lesam_dist.experiments.domains import domains
from lesam_dist.experiments.sweep import sweep
from lesam_dist.planning.command import plan
from tests.docs.command_lines import commands, shown
from tests.docs.pages import PAGES, ROOT

EXPERIMENTS = {"compare": compare, "sweep": sweep, "domains": domains, "plan": plan}


class StartedError(Exception):
    """In place of the first run of an experiment."""


def check_trainer(command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if command == "train":
        helps = any(word.startswith("--help") for word in arguments)
        with pytest.raises(SystemExit) as end:
            read_command_line([*arguments, *([] if helps else ["--print_config"])])
        assert end.value.code == 0
        return

    if command not in EXPERIMENTS:  # their own arguments hold no others, and test_runs.py gives them as they are
        return

    def start(*_: object) -> None:
        raise StartedError

    first = "planning.command.predict_and_report" if command == "plan" else f"experiments.{command}.run_all"
    monkeypatch.setattr(f"lesam_dist.{first}", start)
    monkeypatch.setattr("lesam_dist.experiments.domains._folders", lambda _: ["photo", "LabelMe", "SUN09"])
    with pytest.raises(StartedError):
        EXPERIMENTS[command](arguments)


def check_module(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's modules with their arguments; that other modules and scripts exist."""
    if words[0].endswith(".py"):
        assert (ROOT / words[0]).is_file()
    elif words[0] == "lesam_dist":
        check_trainer(words[1], words[2:], monkeypatch)
    elif words[0] == "lesam_dist.train":
        check_trainer("train", words[1:], monkeypatch)
    else:
        assert importlib.util.find_spec(words[0])


def check_torchrun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    read = get_args_parser().parse_args(words)
    check_module([read.training_script, *read.training_script_args], monkeypatch)


def check_accelerate(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    read = launch_command_parser().parse_args(words[1:])
    assert (ROOT / read.config_file).is_file()
    if read.training_script != "FILE":
        check_module([read.training_script, *read.training_script_args], monkeypatch)


def check_srun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    start = words.index("lesam-dist")
    check_trainer(words[start + 1], words[start + 2 :], monkeypatch)


def check_make(words: list[str], _: pytest.MonkeyPatch) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    variables = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.M)
    for word in words:
        assert word.split("=")[0] in variables if "=" in word else word in targets


def check_pip(words: list[str], _: pytest.MonkeyPatch) -> None:
    assert words[0] == "install"
    project = (ROOT / "pyproject.toml").read_text()
    section = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", project, re.DOTALL)
    assert section
    extras = re.findall(r"^([\w-]+) = ", section[1], re.M)
    for before, word in pairwise(words):
        if before == "-c":
            assert (ROOT / word).is_file()
            continue
        found = re.fullmatch(r"(?:lesam-dist|\.)(?:\[([\w,-]+)\])?", word)
        assert found or word in ("-c", "-e", "pytorch_optimizer")
        assert not found or not found[1] or set(found[1].split(",")) <= set(extras), f"no such extra: {word}"


COMMANDS = {
    "lesam-dist": lambda words, patch: check_trainer(words[0], words[1:], patch),
    "launch/torchrun.sh": lambda words, patch: check_trainer("train", words, patch),
    "python": lambda words, patch: check_module(words[1:] if words[0] == "-m" else words, patch),
    "torchrun": check_torchrun,
    "accelerate": check_accelerate,
    "srun": check_srun,
    "make": check_make,
    "pip": check_pip,
}


@pytest.mark.parametrize("line", [pytest.param(line, id=f"{line} ({pages})") for line, pages in shown().items()])
def test_commands_parse(
    line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path / word) if word.startswith("runs/") else word for word in shlex.split(line)]
    COMMANDS[words[0]](words[1:], monkeypatch)


def test_commands_are_found() -> None:
    """The parser above sees what a reader sees: some of the lines that the pages are known to have."""
    found = [command for page in PAGES for command in commands(page)]
    assert {words[0] for words in found} == COMMANDS.keys()
    assert ["lesam-dist", "train", "--config", "digits", "--epochs", "5", "--optimizer.sigma", "0.2"] in found
    assert len(found) >= 12
