"""The commands of docs/start.md do what they say, in their order; with one epoch and one seed, to save time."""

from __future__ import annotations

from pathlib import Path

import pytest

from lesam_dist import cli
from tests.docs.pages import ROOT
from tests.docs.test_commands import commands

SHORT = {"train": ["--epochs", "1"], "compare": ["--epochs", "1", "--seeds", "1"]}
PAGE = ROOT / "docs" / "start.md"


def test_the_commands_of_the_first_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = []
    for word, *words in commands(PAGE):
        if word != "lesam-dist" or any(text.startswith("/data") for text in words):
            continue  # pip, torchrun, and images that are not here
        command, *arguments = words
        cli._COMMANDS[command][0]([*arguments, *SHORT.get(command, [])])
        made.append(command)
        if command == "train":
            folder = Path(arguments[arguments.index("--run_dir") + 1])
            named = {"config.yaml", "metrics.jsonl", "curves.png", "checkpoints"}
            assert named <= {path.name for path in folder.iterdir()}
    assert made == ["train", "train", "compare", "report"]
    shown = capsys.readouterr().out
    assert "top-1" in shown
    (report,) = Path("runs/noisy").glob("*.html")
    page = report.read_text()
    assert all(method in page for method in ("sgd", "sam", "lesam"))
