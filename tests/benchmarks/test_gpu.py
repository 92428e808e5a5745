"""The run of everything on a GPU, rehearsed: its plan, what it does with parts that fail, and what it leaves behind."""

from __future__ import annotations

import importlib
import tarfile
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from gpu import REHEARSAL, SETS, Part
from lib.arguments import Parser

ROOT = Path(__file__).parents[2]
PARTS = [part for parts in SETS.values() for part in parts]
REHEARSED = [part for parts in REHEARSAL.values() for part in parts]


def says(text: str) -> tuple[str, str]:
    return "-c", f"print({text!r}, flush=True)"


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that take no time, of every fate."""
    parts = (
        Part("fine", ("-c", "print('one'); print('== 3 passed ==')"), 60),
        Part("fails", ("-c", "print('begun'); raise SystemExit(7)"), 60),
        Part("hangs", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), 1),
        Part("lacks", says("never"), 60, needs=("no_such_module", "json")),
        Part("many", says("never"), 60, gpus=1000),
        Part("tool", says("never"), 60, under=("no-such-tool",)),
        Part("checked", says("ok\n==== ERROR SUMMARY: 0 errors\nend"), 60, under=("env", "SOME=thing")),
        Part("refused", ("host.py", "--no-such-option"), 60),
    )
    monkeypatch.setattr(gpu, "REHEARSAL", {"first": parts, "second": (Part("last", says("late"), 60),)})
    monkeypatch.setattr(gpu, "SETS", {**SETS, "first": parts, "second": (Part("last", says("late"), 60),)})


@pytest.mark.usefixtures("plan")
def test_a_part_that_fails_is_named_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--commit", "abc123"]) == 1
    summary = (tmp_path / "summary.md").read_text()
    outcomes = {line.split(" | ")[0][2:]: line.split(" | ")[1] for line in summary.splitlines() if line[:2] == "| "}
    assert outcomes == {
        "part": "outcome",
        "---": "---:",
        "fine": "3 passed",
        "fails": "failed with status 7: begun",
        "hangs": "stopped after 1 s, see hangs.log",
        "lacks": "not run: it needs no_such_module",
        "many": f"not run: it takes 1000 GPUs, and there are {torch.cuda.device_count()}",
        "tool": "not run: there is no no-such-tool",
        "checked": "ERROR SUMMARY: 0 errors",
        "refused": outcomes["refused"],
        "last": "late",
    }
    assert outcomes["refused"].startswith("failed with status 2: host.py: error: unrecognized arguments")
    assert "commit abc123" in summary
    assert gpu._REHEARSED in summary
    assert summary.count("begun\n```") == 2, "the end of every failure's log"
    stdout = capsys.readouterr().out
    assert stdout.rstrip().endswith("summary.md and results.tar.gz")
    assert "fails: failed with status 7: begun (" in stdout


@pytest.mark.usefixtures("plan")
def test_two_files_come_back_however_many_parts_there_are(tmp_path: Path) -> None:
    gpu.main(["--device", "cpu", "--out", str(tmp_path / "run"), "--only", "second"])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["results.tar.gz", "summary.md"]
    with tarfile.open(tmp_path / "run" / "results.tar.gz") as archive:
        assert archive.getnames() == ["run/last.log"]
        member = archive.extractfile("run/last.log")
        assert member is not None
        assert member.read() == b"late\n"


@pytest.mark.usefixtures("plan")
def test_what_was_done_is_there_when_the_run_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu.run

    def killed(part: Part, out: Path, limit: float) -> str:
        if part.name == "fails":
            raise KeyboardInterrupt
        return real(part, out, limit)

    monkeypatch.setattr(gpu, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cpu", "--out", str(tmp_path)])
    assert "| fine | 3 passed |" in (tmp_path / "summary.md").read_text()
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert len(archive.getnames()) == 1


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_the_plan_fits_its_limits() -> None:
    """Each set is one command, which may be stopped after ten minutes."""
    for parts in SETS.values():
        assert sum(part.limit for part in parts) <= gpu.SET_SECONDS
    for parts in (PARTS, REHEARSED):
        assert len({part.name for part in parts}) == len(parts)
    assert not {part.name for part in PARTS} & SETS.keys()
    assert {part.name for part in REHEARSED} < {part.name for part in PARTS}
    assert [part.name for part in gpu.chosen(["second", "smoke"], SETS)] == ["smoke", *(p.name for p in SETS["second"])]


@pytest.mark.parametrize("part", [*PARTS, *REHEARSED], ids=lambda part: part.name)
def test_every_part_can_be_asked_for(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script takes the options, and its tests exist: nothing else would show that before there is a GPU."""

    class ParsedError(Exception):
        pass

    def parse(self: Parser, argv: Any) -> None:
        self.parse_args(argv)
        raise ParsedError

    if not part.is_script:
        assert part.command[:2] == ("-m", "pytest")
        paths = [word for word in part.command if word.startswith("tests/")]
        assert paths
        assert all((ROOT / path).exists() for path in paths)
        return
    script = importlib.import_module(Path(part.command[0]).stem)
    monkeypatch.setattr(Parser, "parse", parse)
    timed = ["--seconds", "1"] if part.command[0] in gpu._TIMED else []
    with pytest.raises(ParsedError):
        script.main([*part.command[1:], *timed, "--json", "x", "--markdown", "y"])


@pytest.mark.full
def test_the_rehearsal_runs_through(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 0, (tmp_path / "summary.md").read_text()
    summary = (tmp_path / "summary.md").read_text()
    assert not [line for line in summary.splitlines() if "not measured" in line or "**" in line]
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert names >= {f"{part.name}.log" for part in REHEARSED}
