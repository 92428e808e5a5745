"""What several processes of a node have to say is said once, in order, and rather twice than never."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lesam_dist.errors import PreemptedError
from lesam_dist.parallel import report
from lesam_dist.parallel.place import Place

RANKS = [Place(rank=rank, local_rank=rank, world_size=2, local_world_size=2) for rank in range(2)]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow: Python ignores the signal, and writing fails as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_folder", lambda: tmp_path / "said")


def test_once_for_all_processes_of_a_start(capsys: pytest.CaptureFixture[str]) -> None:
    for place in (*RANKS, RANKS[0]):  # the last one by another start, which a shell may have made
        report.report_once(place, "the disk is slow")
    assert capsys.readouterr().err == 2 * "lesam-dist: the disk is slow\n"


def test_a_full_disk_silences_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk():
        for place in RANKS:
            report.report_once(place, "no space left")
    assert capsys.readouterr().err == 2 * "lesam-dist: no space left\n"


def test_why_all_stop_stands_before_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    error = PreemptedError("stopped by SIGTERM")
    error.go_on = "go on with: lesam-dist train"  # type: ignore[attr-defined]
    for place in reversed(RANKS):  # rank 1 is there first
        report.report_stop(place, str(error), error)
    assert capsys.readouterr().err == "lesam-dist: stopped by SIGTERM\nlesam-dist: go on with: lesam-dist train\n"
    error.__cause__ = RuntimeError("connection closed")  # rank 0 has been killed
    report.report_stop(RANKS[1], str(error), error)
    assert capsys.readouterr().err == ""
    error.go_on = "go on with: lesam-dist train --config digits"  # type: ignore[attr-defined]
    report.report_stop(RANKS[1], str(error), error)
    assert capsys.readouterr().err == "lesam-dist: go on with: lesam-dist train --config digits\n"
