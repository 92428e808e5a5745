"""A run's folder: claimed by one run at a time, nothing of another's or of a person's is overwritten."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
import yaml

from lesam_dist.config.command_line import dump, parse
from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError
from lesam_dist.experiments.runs import ExperimentParser
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.checkpoint import manifest
from lesam_dist.train.run_dir import claim
from tests.conftest import Command

ALONE = Distributed(0, 0, 1, torch.device("cpu"))


def config(run_dir: Path | str, *flags: str) -> Config:
    return parse(["--config", "digits", "--run_dir", str(run_dir), *flags])


def test_config_by_hand_in_the_folder_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    text = "optimizer:\n  lr: 0.2  # mine\n"
    file.write_text(text)
    flags = ["--config", str(file), "--run_dir", str(tmp_path)]
    with pytest.raises(UserError, match=r"not overwritten:\n  optimizer\.lr: 0\.2 there, 0\.1 now\nUse"):
        claim(parse([*flags, "--optimizer.lr", "0.1", "--data.workers", "1"]), ALONE)
    claim(parse([*flags, "--data.workers", "1"]), ALONE).release()
    assert file.read_text() == text


@pytest.mark.parametrize("content", [b"\xff\x00\xfe", b"optimizer: [", b"optimizer:\n  lrr: 1\n", b"[1]"])
def test_a_file_that_is_no_config_is_in_the_way(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml' is in the way: .*Choose another --run_dir"):
        claim(config(tmp_path), ALONE)
    assert (tmp_path / "config.yaml").read_bytes() == content


def test_resume_before_the_first_checkpoint_leaves_the_config(tmp_path: Path) -> None:
    first = config(tmp_path / "run")
    claim(first, ALONE).release()
    with pytest.raises(UserError, match=r"seed: 0 there, 3 now"):
        claim(config(tmp_path / "run", "--resume", "auto", "--seed", "3"), ALONE)
    assert (tmp_path / "run" / "config.yaml").read_text() == dump(first)
    claim(config(tmp_path / "run", "--resume", "auto", "--logging.every_steps", "3"), ALONE).release()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 0


# A run of version 0.1, which wrote the arguments of all methods beside the other fields.
OLD_ARGS = {"sigma": 0.1, "rho_max": 0.2, "eps": 1e-12, "alpha": None, "plus_form": "paper", "adaptive": False}
OLD_ARGS_OF_OTHERS = dict.fromkeys(("rho", "eta", "beta", "gamma", "lam", "interval", "power_steps", "rho_min"))


def test_a_run_of_the_old_shape_goes_on(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    """Its config.yaml as the config of the new start, and its checkpoint, which has all fields."""
    run_dir = tmp_path / "run"
    assert command(*small, "--run_dir", run_dir)[0] == 0
    file = run_dir / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    del tree["optimizer"]["args"]
    tree["optimizer"] |= OLD_ARGS | {"eta": None}
    file.write_text(yaml.safe_dump(tree))
    for folder in (run_dir / "checkpoints").glob("step_*"):
        content, files = manifest.read(folder)
        saved = {path: value for path, value in content["config"].items() if ".args." not in path}
        saved |= {f"optimizer.{name}": value for name, value in (OLD_ARGS | OLD_ARGS_OF_OTHERS).items()}
        manifest.write(folder, {**content, "config": saved, "files": files})
    again = ("--config", file, "--resume", "auto")
    status, out, err = command(*again)
    assert (status, err) == (0, "")
    assert "from epoch 3" in out
    for flag in ("--optimizer.sigma", "--optimizer.args.sigma"):
        status, _, err = command(*again, flag, "0.3")
        assert status == 2
        assert "optimizer.args.sigma: 0.1 then, 0.3 now" in err


def test_checkpoints_alone_are_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    with pytest.raises(UserError, match="already holds a run"):
        claim(config(tmp_path), ALONE)


def hold(run_dir: Path, claimed: Event) -> None:
    held = claim(config(run_dir), ALONE)
    claimed.set()
    signal.pause()
    held.release()


def test_one_run_at_a_time_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    claimed = context.Event()
    other = context.Process(target=hold, args=(tmp_path, claimed))
    other.start()
    try:
        assert claimed.wait(240)
        for flags in ([], ["--resume", "auto"]):
            with pytest.raises(UserError, match=rf"in use by another run \(process {other.pid} on .*wait for it"):
                claim(config(tmp_path, *flags), ALONE)
    finally:
        other.kill()
        other.join()
    claim(config(tmp_path), ALONE).release()


@pytest.mark.parametrize("name", ["", " ", "null", "~nobody-of-this-name/x", "l\udcc3\udca4uft", "a\nb"])
def test_names_that_nobody_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for field in ("run_dir", "data.root"):
        if (field, name) != ("data.root", "null"):  # which is the value null
            with pytest.raises(UserError, match=rf"{field} is {re.escape(ascii(name))}: "):
                config("runs", f"--{field}={name}")
    with pytest.raises(UserError, match=rf"--run_dir is {re.escape(ascii(name))}: "):
        ExperimentParser("compare", "", "", "", "").parse_known(["--config", "digits", f"--run_dir={name}"])
    assert os.listdir() == []


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = config("~/run", "--data.root=~/images")
    assert (found.run_dir, found.data.root) == (f"{tmp_path}/run", f"{tmp_path}/images")
    arguments, _ = ExperimentParser("compare", "", "", "", "").parse_known(["--config", "x", "--run_dir=~/run"])
    assert arguments.run_dir == tmp_path / "run"


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000 + "x", "file/run"])
def test_names_that_the_file_system_refuses(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    wanted = Config(run_dir=f"{tmp_path}/{name}")
    with pytest.raises(UserError, match=r"cannot be written: (File name too long|Not a directory)"):
        claim(wanted, ALONE)
