"""`lesam-dist plan` from its command line: what it says is consistent, and what it refuses takes one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lesam_dist.config.schema import OptimizerConfig
from lesam_dist.errors import UserError
from lesam_dist.planning.command import plan
from lesam_dist.planning.method import observe

SMALL = ["--config", "digits_resnet8_lesam", "--data.batch_size", "64"]
LARGE = ["--data.batch_size", "262144", "--images", "10000000"]  # so that kernels take longer than their launch


def run(words: list[str], folder: Path) -> dict[str, Any]:
    plan([*SMALL, *words, "--json", str(folder / "plan.json")])
    document: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return document


def test_the_numbers_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *LARGE,
        "--gpus",
        "1,2,16,524288",
        "--hourly",
        "2.5",
        "--decode_rate",
        "300",
        "--plot",
        str(tmp_path / "plan.png"),
    ]
    document = run(words, tmp_path)
    found = document["gpus"]
    assert found["524288"] is None, "more GPUs than images in a batch"
    parts = ("compute", "exposed", "scalars", "optimizer", "waiting")
    for count in ("1", "2", "16"):
        p = found[count]
        assert p["step"] == pytest.approx(sum(p[part] for part in parts))
        assert p["images_per_second"] == pytest.approx(262144 / int(count) / p["step"])
        assert p["price"] == pytest.approx(2.5 * int(count) * p["run"] / 3600)
        assert p["total_memory"] == pytest.approx(sum(p["memory"].values()))
        assert (
            p["memory"]["parameters"]
            == p["memory"]["gradients"]
            == p["memory"]["copies"]
            == found["1"]["memory"]["state"]
        )
        assert 0 <= p["exposed"] <= p["communication"] * (1 + 1e-9)
    assert found["1"]["communication"] == found["1"]["calls"] == 0
    assert found["2"]["sent"] < found["16"]["sent"] < 2 * found["2"]["sent"]
    assert found["16"]["compute"] < found["2"]["compute"] < found["1"]["compute"]
    instead = document["instead"]
    assert instead["optimizer.scope local"]["16"]["sent"] == pytest.approx(found["16"]["sent"] / 2, rel=1e-3)
    assert instead["parallel.strategy fsdp"]["16"]["memory"]["state"] < found["16"]["memory"]["state"] / 8
    looksam = instead["optimizer.name looksam"]["16"]  # six passes in five steps, and g_v beside the momentum
    assert looksam["compute"] == pytest.approx(6 / 10 * found["16"]["compute"])
    assert looksam["memory"]["state"] == 2 * found["16"]["memory"]["state"]
    assert instead["data.batch_size x 4"]["524288"] is not None
    out = capsys.readouterr().out
    assert "This is a prediction" in out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_batch_that_grows_with_the_gpus(tmp_path: Path) -> None:
    """The same step for each, but for communication, and a shorter epoch."""
    document = run(["--gpus", "2,4,8", "--batch_per_gpu", "16"], tmp_path)
    found, instead = document["gpus"], document["instead"]
    assert {p["compute"] for p in instead["optimizer.scope local"].values()} == {found["2"]["compute"]}
    assert [p["batch"] for p in instead["data.batch_size x 4"].values()] == [128, 256, 512]
    assert [p["batch"] for p in found.values()] == [32, 64, 128]
    assert len({p["compute"] for p in found.values()}) == 1
    assert found["2"]["epoch"] > found["4"]["epoch"] > found["8"]["epoch"]


def test_assumptions_move_the_result(tmp_path: Path) -> None:
    """A slower network exposes communication, fewer cores make a GPU wait, and a run in part plain is shorter."""
    usual = run([*LARGE, "--gpus", "16"], tmp_path)["gpus"]["16"]
    slow = run([*LARGE, "--gpus", "16", "--interconnect", "1mbit/node"], tmp_path)["gpus"]["16"]
    assert slow["exposed"] > 10 * usual["exposed"]
    starved = run([*LARGE, "--gpus", "16", "--decode_rate", "10", "--cores_per_gpu", "1"], tmp_path)["gpus"]["16"]
    assert starved["images_per_second"] == pytest.approx(10)
    late = run([*LARGE, "--gpus", "16", "--optimizer.start_epoch", "1"], tmp_path)["gpus"]["16"]
    assert late["step"] == usual["step"]
    assert late["run"] < usual["run"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "8", "--gpu", "h10"], "unknown --gpu 'h10': did you mean 'h100'"),
        (["--gpus", "8", "--interconnect", "fast"], "--interconnect is 'fast'"),
        (["--gpus", "6"], "--gpus 6 does not divide data.batch_size 64"),
        (["--gpus", "8,six"], "--gpus is '8,six'"),
        (["--gpus", "0"], "--gpus is '0'"),
        (["--gpus", "9" * 5000], "--gpus is '999"),
        (["--gpus", "8", "--images", "9" * 5000], "--images is '999"),
        (["--gpus", "128"], "--gpus 128 is more than data.batch_size 64"),
        (["--gpus", "32", "--data.micro_batches", "4"], "data.micro_batches 4 does not divide the 2 images"),
        (["--gpus", "8", "--hourly", "-1"], "--hourly is '-1'"),
        (["--gpus", "8", "--efficiency", "2"], "--efficiency is '2'"),
        (["--gpus", "8", "--batch_per_gpu", "1.5"], "--batch_per_gpu is '1.5'"),
        (["--gpus", "8", "--optimizer.sgima", "1"], "sgima"),
        (["--gpus", "8", "--data.batch_size", "2048"], "more than the 1438 training images"),
        ([], "the following arguments are required: --gpus"),
        (["--gpus", "8", "--parallel.strategy", "hsdp", "--parallel.shard_size", "3"], "do not fill --gpus 8"),
    ],
)
def test_refusals(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        plan([*SMALL, *words])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_recipe() -> None:
    with pytest.raises(UserError, match="imagenet_resnet50_lesam"):
        plan(["--config", "imagenet_resnet50_lesan", "--gpus", "8"])


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "plan"
    with pytest.raises(UserError, match="--json"):
        plan([*SMALL, "--gpus", "2", "--json", f"{missing}.json"])


def test_a_long_interval_is_observed_as_a_short_one() -> None:
    """What is done once in hundreds of steps is in one of them; no step is predicted twice, and none is waited for."""
    own = OptimizerConfig(name="looksam", args={"interval": 12})
    method = observe(own)
    assert [len(made) for made in method.steps] == [2, *[1] * 11]
    assert method.passes == pytest.approx(13 / 12)
    long = observe(replace(own, args={"interval": 10**6}))
    assert 1 < long.passes <= 1.001
    assert long.traffic < method.traffic < observe(replace(own, args={"interval": 2})).traffic
    plain = observe(OptimizerConfig(ascent_interval=30))
    assert [len(made) for made in plain.steps] == [2, *[1] * 29]
