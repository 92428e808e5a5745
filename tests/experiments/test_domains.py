"""`lesam-dist domains`: the tables from what runs have logged, and the command from its flags to its files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lesam_dist.experiments.domain_results import as_outcome, by_source, outcome_on_targets, over_sources, pairs
from tests.conftest import Command

Lines = list[dict[str, Any]]


def logged(run_dir: Path, lines: Lines) -> Path:
    run_dir.mkdir(parents=True)
    text = "".join(
        json.dumps({"split": "val", "step": i, "epoch": i + 1, **line}) + "\n" for i, line in enumerate(lines)
    )
    (run_dir / "metrics.jsonl").write_text(text)
    return run_dir


def evaluation(acc1: float, prefix: str = "", **targets: float) -> dict[str, float]:
    own = {f"acc1_{name}": value for name, value in targets.items()}
    own |= {
        "acc1": acc1,
        "target_acc1": sum(targets.values()) / len(targets),
        "target_acc1_micro": min(targets.values()),
    }
    return {prefix + name: value for name, value in own.items()}


def test_the_epoch_is_chosen_on_the_source(tmp_path: Path) -> None:
    """By the averaged weights where there are some; the first of equals; the last where nothing was held out."""
    lines = [evaluation(acc1, art=art, photo=art + 10) for acc1, art in ((50, 30), (90, 20), (90, 40), (70, 60))]
    run = outcome_on_targets(logged(tmp_path / "plain", lines))
    assert (run.epoch, run.accuracy, run.macro, run.micro, run.last) == (2, {"art": 20, "photo": 30}, 25, 20, 65)
    averaged = [
        line | evaluation(acc1, "ema_", art=5, photo=acc1) for line, acc1 in zip(lines, (9, 8, 7, 1), strict=True)
    ]
    run = outcome_on_targets(logged(tmp_path / "averaged", averaged))
    assert (run.epoch, run.accuracy, run.last) == (1, {"art": 5, "photo": 9}, 3)
    whole = [{name: value for name, value in line.items() if name != "acc1"} for line in lines]
    assert outcome_on_targets(logged(tmp_path / "whole", whole)).epoch == 4


def test_tables(tmp_path: Path) -> None:
    """A column is a source domain; the mean over columns by seed; what diverged is said."""
    values = {"a": {"b": (10, 20), "c": (30, 60)}, "b": {"a": (40, 40), "c": (80, 60)}}
    runs = {
        (source, "sam"): [
            outcome_on_targets(
                logged(tmp_path / source / str(seed), [evaluation(1, **{t: v[seed] for t, v in targets.items()})])
            )
            for seed in (0, 1)
        ]
        for source, targets in values.items()
    }
    assert over_sources(runs, "sam") == [40, 45]
    assert over_sources(runs, "sam", "micro") == [25, 30]
    header, rows = by_source(runs, [as_outcome("sam", [40, 45], 2.0)])
    assert header[:4] == ("method", "a", "b", "mean")
    assert rows == [("sam", "30.00 ± 14.14", "55.00 ± 7.07", "42.50 ± 3.54", "27.50 ± 3.54", "42.50 ± 3.54", "2.00")]
    header, rows = pairs(runs)
    assert header == ("source", "method", "on a", "on b", "on c", "best epochs")
    assert rows[0] == ("a", "sam", "", "15.00 ± 7.07", "45.00 ± 21.21", "1, 1")
    broken = {**runs, ("b", "sam"): [None, runs["b", "sam"][1]]}
    assert math.isnan(over_sources(broken, "sam")[0])
    assert pairs(broken)[1][1] == ("b", "sam", "diverged", "", "diverged", "-, 1")
    assert "diverged" in by_source(broken, [as_outcome("sam", [math.nan, 45], 2.0)])[1][0][2]


@pytest.fixture
def root(tmp_path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for domain in ("a", "b", "c"):
        for label in ("0", "1"):
            folder = tmp_path / "data" / domain / label
            folder.mkdir(parents=True)
            for i in range(10):
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "data"


def test_command(root: Path, tmp_path: Path, call: Command) -> None:
    """Two source domains; started again, nothing is trained twice; what is wrong is said before anything is."""
    out_dir = tmp_path / "out"
    flags = ("--config", "digit_domains_resnet8_erm", "--methods", "sgd,sam", "--data.builtin", "null", "--seeds", "1")
    flags += (
        "--epochs",
        "2",
        "--domains.steps_per_epoch",
        "1",
        "--data.batch_size",
        "4",
        "--logging.tensorboard",
        "false",
    )
    flags += ("--run_dir", str(out_dir))
    status, _, err = call("domains", *flags, "--data.root", root, "--sources", "a,d")
    assert status == 2
    assert "unknown domain in --sources 'd'" in err
    status, _, err = call("domains", *flags, "--data.root", root / "none")
    assert status == 2
    assert "none', which does not exist: give the folder that holds DOMAIN/CLASS/IMAGE" in err
    status, _, err = call("domains", *flags, "--data.root", root, "--domains.source", "[a]")
    assert status == 2
    assert "lesam-dist domains sets --domains.source for each run: leave it out" in err
    status, _, err = call("domains", "--config", "digits_resnet8", "--methods", "sgd", "--run_dir", out_dir)
    assert status == 2
    assert "domains.source is ['any'] but task is classification: choose --task domains" in err
    assert not out_dir.exists()
    for again in (False, True):
        status, out, err = call("domains", *flags, "--data.root", root, "--sources", "a,c")
        assert (status, err) == (0, "")
        assert out.count("finished before") == 4 * again
    document = json.loads((out_dir / "domains.json").read_text())
    assert list(document["runs"]) == ["a/sgd", "a/sam", "c/sgd", "c/sam"]
    assert list(document["runs"]["c/sam"][0]["accuracy"]) == ["a", "b"]
    text = (out_dir / "domains.md").read_text()
    assert text.startswith("| method | a ")
    assert "| source | method | on a " in text
    assert (out_dir / "domains.png").stat().st_size > 1000
    assert (out_dir / "a" / "sam" / "seed_0" / "checkpoints").is_dir()
