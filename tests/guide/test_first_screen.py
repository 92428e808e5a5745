"""`lesam-dist` alone and `--help`: what to do first, as commands that work, and every command under a heading."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from lesam_dist import cli
from lesam_dist.config.command_line import parse
from lesam_dist.guide.recipes import parser as recipes_parser
from lesam_dist.guide.welcome import GROUPS, WELCOME, usage


def shown(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    out = io.StringIO()
    monkeypatch.setattr("sys.argv", ["lesam-dist", *words])
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0), out.getvalue()


def test_what_one_does_first_works(monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    status, text = shown(monkeypatch)
    assert status == 2, "no command was given"
    assert len(text.splitlines()) <= 24
    assert all(len(line) <= 80 for line in text.splitlines())
    lines = [line.split() for line in re.findall(r"^  lesam-dist (.*)$", text, re.M)]
    assert [words[0] for words in lines] == ["train", "recipes", "doctor", "train", "plan"]
    for command, *words in lines:
        assert command in cli._COMMANDS
        if command == "train":
            config = parse([str(images) if word == "DIR" else word for word in words])
            assert config.epochs in (5, 20)
        elif command == "recipes":
            recipes_parser().parse_args(words)
    (line,) = re.findall(r"^  python -c \"(.*)\"$", text, re.M)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(line, {})
    assert "sigma: loss budget" in out.getvalue()


def test_help_has_every_command_under_a_heading(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = shown(monkeypatch, "--help")
    assert status == 0
    assert all(len(line) <= 80 for line in text.splitlines())
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(cli._COMMANDS)
    assert re.findall(r"^  ([a-z]+) ", text, re.M) == grouped
    assert "train and compare:" in text


def test_a_command_of_no_group_is_listed_too() -> None:
    assert usage({"train": "a", "new": "b"}).split("more:")[1].split()[:2] == ["new", "b"]


def test_the_welcome_fills_in_the_version_alone() -> None:
    assert re.findall(r"{(.*?)}", WELCOME) == ["version"]
