"""The module and the console script answer alike, and without torch where nothing is trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_module_and_console_script_agree(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    module = [sys.executable, "-m", "lesam_dist.train"]
    script = [sys.executable, "-c", "from lesam_dist.cli import main; main()", "train"]
    for start in (module, script):
        result = subprocess.run(
            [*start, "--config", "digit"], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120
        )
        assert result.returncode == 2
        assert result.stderr.strip() == "lesam-dist: error: unknown recipe 'digit': did you mean 'digits'?"


# What is answered without torch, whose import takes seconds: every help, and whatever is wrong on the command line.
LIGHT = [
    (0, "--version"),
    (0, "--help"),
    (0, "recipes"),
    (0, "recipes cifar100_resnet18_lesam"),
    (0, "methods lesam"),
    (0, "completion --help"),
    (0, "doctor --help"),
    (0, "train --help"),
    (0, "train --help.optimizer"),
    (0, "compare --help"),
    (0, "sweep --help"),
    (0, "plan --help"),
    (0, "train --config imagenet_resnet50_lesam --print_config"),
    (2, "trian"),
    (2, "train --epoch 3"),
    (2, "train --config digit"),
    (2, "train --epochs many"),
    (2, "train --optimizer.sigma -1"),
    (2, "train --optimizer.ascent_interval 0"),
    (2, "compare --config digits_noisy --methods sgd,lesm"),
    (2, "sweep --config digits --field optimizer.sigm --values 1,2"),
    (2, "plan --config digits --gpus 8 --gpu h10"),
    (2, "plan --config digits --gpus 7"),
]


def test_torch_is_imported_only_to_train(tmp_path: Path) -> None:
    code = f"""
import contextlib, io, sys
for expected, line in {LIGHT}:
    sys.argv = ["lesam-dist", *line.split()]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from lesam_dist.cli import main
            main()
    except SystemExit as stopped:
        assert stopped.code == expected, (line, stopped.code)
    found = {{"torch", "torchvision", "matplotlib", "rich", "numpy"}} & sys.modules.keys()
    assert not found, (line, found)
from lesam_dist import optim
assert all(getattr(optim, name).__name__ == name for name in optim.__all__)
assert "torch" in sys.modules
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120
    )
    assert result.returncode == 0, result.stderr
