"""What a config file may hold, and what ends with status 2 and one line that says where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from lesam_dist.config.command_line import dump, parse
from tests.conftest import Command


def test_wrong_key_in_a_file(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optimizer:\n  sigmaa: 0.3\n")
    status, _, err = command("--config", path)
    assert status == 2
    assert "unknown key 'optimizer.sigmaa': did you mean 'optimizer.sigma'?" in err


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(9 * ['*' + old])}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: give it at least one field"),
        (b"# nothing\n", "is empty"),
        (b"[1, 2]\n", "holds no fields but '[1, 2]'"),
        (b"hello\n", "holds no fields but 'hello'"),
        (b"optimizer: [\n", "is not YAML: line 2,"),
        (b"a: 1\n---\nb: 2\n", "is not YAML: line 2, but found another document"),
        (bytes(range(256)), "is not a text in UTF-8 (byte 128)"),
        (b"\x00\x01", "is not YAML"),
        (b"epochs: null\n", "epochs is null: it must be a whole number."),
        (b"data: {mean: null}\n", "data.mean is null: it must be 3 numbers in brackets"),
        (b"optimizer: 3\n", "has optimizer: 3, but optimizer is a section"),
        (b"epochs: {a: 1}\n", "unknown key 'epochs.a'"),
        (b"epochs: 3\nseed: 1\nepochs: 5\n", "has the key 'epochs' twice, in lines 1 and 3: keep one."),
        (b"optimizer: {lr: 1, lr: 2}\n", "has the key 'lr' twice"),
        (b"optimizer.lr: 1\noptimizer: {lr: 2}\n", "has the key 'optimizer.lr' twice"),
        (BOMB.encode(), "expands to more than 10000 values"),
        (b"a: &a [*a]\n", "is nested too deeply"),
        (b"a: " + b"[" * 5000, "is nested too deeply"),
        (b"epochs: 2001-99-99\n", "has a value that cannot be read"),
        (b"epochs: " + b"9" * 5000, "has a value that cannot be read"),
        (b"x" * 1_000_001, "has more than 1000000 bytes"),
        (b"run_dir: !!python/object:os.system ls\n", "is not YAML"),
        (b"epochs: !!binary aGk=\n", "epochs is b'hi': it must be a whole number."),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else "",
)
def test_files_that_are_no_config(command: Command, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    status, _, err = command("--config", path)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_what_a_file_may_hold(tmp_path: Path) -> None:
    """Anchors, dotted keys, empty sections and numbers that YAML 1.1 takes for texts."""
    path = tmp_path / "mine.yaml"
    path.write_text("optimizer.lr: &x 1e-3\nema:\noptimizer: {name: sgd, weight_decay: *x}\nrun_dir: '1e3'\n")
    config = parse(["--config", str(path)])
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.name) == (1e-3, 1e-3, "sgd")
    assert config.run_dir == "1e3"


def test_sizes_by_epoch(tmp_path: Path) -> None:
    """As a flag and in a file, and what is printed is read back; with other epochs they keep their share of the run."""
    sizes = [(0, 128), (30, 176), (60, 224)]
    config = parse(["--schedule.image_size", "[[0,128],[30,176],[60,224]]"])
    assert config.schedule.image_size == sizes
    path = tmp_path / "mine.yaml"
    path.write_text(dump(config))
    assert parse(["--config", str(path)]) == config
    for epochs, expected in ((180, [(0, 128), (60, 176), (120, 224)]), (2, [(0, 176), (1, 224)]), (1, [(0, 224)])):
        stretched = parse(["--config", str(path), "--epochs", str(epochs)])
        assert stretched.schedule.image_size == expected
