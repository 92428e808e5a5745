"""A disk that takes a part of a line: nothing is lost, nothing torn."""

from __future__ import annotations

import random
import resource
from pathlib import Path

import pytest

from lesam_dist.train.lines import Lines


def test_lines_survive_a_full_disk(seed: int, tmp_path: Path) -> None:
    """A limit on the size of files is what can be had without a disk to fill: writes are cut, then refused."""
    draw = random.Random(seed)
    lines = [f"{i} " + "x" * draw.randrange(60) for i in range(40)]
    text = "".join(f"{line}\n" for line in lines)
    file, told = Lines(tmp_path / "lines"), []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = 0
    try:
        for line in lines:
            if draw.random() < 0.4:
                room += draw.randrange(120)
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            told.append(file.append(line))
            assert text.startswith((tmp_path / "lines").read_text()), "in order, with no hole"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told.append(file.append("last"))
    file.close()
    assert (tmp_path / "lines").read_text().splitlines() == [*lines, "last"]
    said = [text for text in told if text]
    assert len(said) % 2 == 0, "each failure has its end"
    for begin, end in zip(said[::2], said[1::2], strict=True):
        assert "cannot be written (File too large): the run goes on" in begin
        assert end == f"{tmp_path / 'lines'} is written again, with all lines."


def test_other_errors_are_errors(tmp_path: Path) -> None:
    file = Lines(tmp_path / "lines")
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.append("x")
