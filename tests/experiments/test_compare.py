"""Comparisons and sweeps on a few real images: their tables against the runs' own logs, and what is run again."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lesam_dist import cli
from lesam_dist.cli import run
from lesam_dist.config.command_line import parse
from lesam_dist.experiments.compare import compared
from lesam_dist.experiments.cost import sgd_steps
from lesam_dist.experiments.report import markdown
from lesam_dist.experiments.runs import Outcome, paired_difference
from lesam_dist.tasks.classification.task import ACC1
from lesam_dist.train import trainer
from lesam_dist.train.telemetry import read_metrics
from tests.conftest import Command
from tests.parallel.terminal import launch, torchrun_like
from tests.train.test_trainer import timeless

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def experiment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``experiment("compare", "--flag", "value")`` runs that command here; returns exit status, stdout and stderr."""

    def call(name: str, *argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lesam-dist", *map(str, argv)])
        with pytest.raises(SystemExit) as stopped:
            run(name)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


@pytest.fixture
def tiny(images: Path) -> tuple[str, ...]:
    """Flags of runs of 1 epoch of 3 steps on `images`."""
    data = ("--data.root", str(images), "--data.builtin", "null", "--data.batch_size", "20")
    data += ("--data.image_size", "8", "--data.val_resize", "8")
    reader = ("--data.backend", "torchvision", "--data.workers", "1")
    return (*data, *reader, "--epochs", "1", "--logging.tensorboard", "false")


def acc1(run_dir: Path) -> float:
    return float([line for line in read_metrics(run_dir) if line["split"] == "val"][-1]["acc1"])


def read(run_dir: Path, name: str) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((run_dir / name).read_text())
    return numbers


def test_a_run_that_diverges_leaves_the_others_their_results(
    experiment: Run, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir = tmp_path / "sweep"
    flags = ("--config", "digits_noisy", "--field", "optimizer.lr", "--values", "1e10,0.1", "--seeds", "1")
    status, out, err = experiment("sweep", *flags, "--run_dir", run_dir, *tiny)
    assert (status, err) == (0, "")
    assert f"{run_dir}/optimizer.lr=1e10/seed_0: the run has diverged: " in out
    found = acc1(run_dir / "optimizer.lr=0.1" / "seed_0")
    diverged, good = read(run_dir, "sweep.json")["values"]
    assert (diverged["acc1"], diverged["mean"], good["acc1"]) == ([None], None, [found])
    assert re.search(r"^\| 1e10 +\| diverged ", (run_dir / "sweep.md").read_text(), re.MULTILINE)
    again = experiment("sweep", *flags, "--run_dir", run_dir, *tiny)[1]
    assert again.count("finished before") == 1
    assert again.count("has diverged") == 1, "from its last checkpoint, with what it counted"


def test_compare(
    experiment: Run, command: Command, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in its third run of four and started again: the table is what the runs' logs say."""
    run_dir = tmp_path / "compare"
    flags = ("--config", "digits_noisy", "--methods", "lesam,sam", "--seeds", "2", "--run_dir", run_dir, *tiny)
    with monkeypatch.context() as patch:
        original = trainer.Trainer._step

        def cut(self: trainer.Trainer, *args: Any) -> Any:
            if self.config.seed == 1 and self.step == 1:
                raise KeyboardInterrupt
            return original(self, *args)

        patch.setattr(trainer.Trainer, "_step", cut)
        status, _, err = experiment("compare", *flags)
    assert (status, err.splitlines()[0]) == (130, "lesam-dist: interrupted")
    told = err.splitlines()[1].removeprefix("lesam-dist: go on with: ")
    assert shlex.split(told) == ["lesam-dist", "compare", *map(str, flags)]
    assert not (run_dir / "compare.md").exists()
    finished = sorted((run_dir / "lesam" / "seed_0").rglob("*")) + sorted((run_dir / "sam" / "seed_0").rglob("*"))
    before = [path.stat().st_mtime_ns for path in finished]
    assert before

    status, out, err = experiment("compare", *flags)
    assert (status, err) == (0, "")
    assert [path.stat().st_mtime_ns for path in finished] == before, "finished runs are not touched"
    assert out.count(": finished before") == 2
    assert f"results: {run_dir}" in out.splitlines()[-1]

    values = {m: [acc1(run_dir / m / f"seed_{seed}") for seed in range(2)] for m in ("lesam", "sam")}
    numbers = read(run_dir, "compare.json")
    assert (numbers["reference"], numbers["epochs"], numbers["seeds"]) == ("sam", 1, 2)
    differences = np.subtract(values["lesam"], values["sam"])
    for method, found in values.items():
        entry = numbers["methods"][method]
        assert entry["acc1"] == entry["best_epoch"]["acc1"] == found, "of one epoch"
        assert entry["mean"] == pytest.approx(np.mean(found))
        assert entry["std"] == pytest.approx(np.std(found, ddof=1))
        assert entry["cost"] == pytest.approx(2)
    difference = numbers["methods"]["lesam"]["difference"]
    assert difference["mean"] == pytest.approx(differences.mean())
    assert difference["standard_error"] == pytest.approx(differences.std(ddof=1) / np.sqrt(2))
    row = f"| lesam  | {np.mean(values['lesam']):.2f} ± {np.std(values['lesam'], ddof=1):.2f}"
    assert row in out
    assert row in (run_dir / "compare.md").read_text()
    assert (run_dir / "compare.png").read_bytes().startswith(b"\x89PNG")

    # A run of a comparison is the run that `lesam-dist train` makes.
    alone = ("--config", "digits_noisy_resnet8_lesam", *tiny, "--seed", "1", "--run_dir", tmp_path / "alone")
    assert command(*alone)[0] == 0
    assert timeless(tmp_path / "alone") == timeless(run_dir / "lesam" / "seed_1")

    status, _, err = experiment("compare", *flags, "--optimizer.lr", "0.2")
    assert status == 2
    assert f"{run_dir / 'lesam' / 'seed_0'}: cannot resume" in err
    assert "optimizer.lr: 0.1 then, 0.2 now" in err


def test_compare_from_a_file(experiment: Run, tiny: tuple[str, ...], tmp_path: Path) -> None:
    """The file's own method keeps its values; another one has its usual ones, not what the file says for its own."""
    run_dir, file = tmp_path / "compare", tmp_path / "mine.yaml"
    file.write_text("model: {name: cifar_resnet8}\ndata: {image_size: 32, val_resize: 32}\n")
    file.write_text(file.read_text() + "optimizer: {name: sam, rho: 0.03, lr: 0.07}\n")
    flags = ("--config", file, "--seeds", "1", "--run_dir", run_dir, *tiny)
    status, out, err = experiment("compare", *flags, "--methods", "sgd,sam,asam,lesam", "--optimizer.sigma", "0.25")
    assert (status, err) == (0, "")
    configs = {
        m: parse(["--config", str(run_dir / m / "seed_0" / "config.yaml")]).optimizer for m in ("sam", "asam", "lesam")
    }
    radii = {m: c.args.get("sigma", c.args.get("rho")) for m, c in configs.items()}
    assert radii == {"sam": 0.03, "asam": 0.5, "lesam": 0.25}
    assert all((c.name, c.lr) == (m, 0.07) for m, c in configs.items())
    entry = read(run_dir, "compare.json")["methods"]["lesam"]
    assert entry["std"] is None
    assert entry["difference"]["standard_error"] is None
    status, out, _ = experiment("compare", *flags, "--methods", "sgd,lesam", "--optimizer.sigma=0.25")
    assert status == 0
    assert out.count(": finished before") == 2
    assert "difference to sgd" in out
    assert "(sam is not among the methods, so the first one takes its place.)" in out


def test_sweep(experiment: Run, tiny: tuple[str, ...], tmp_path: Path) -> None:
    run_dir = tmp_path / "sweep"
    flags = ("--config", "digits_noisy_resnet8_lesam", *tiny, "--run_dir", run_dir, "--seeds", "2")
    status, out, err = experiment("sweep", *flags, "--field", "optimizer.sigma", "--values", "0.2,0.05")
    assert (status, err) == (0, "")
    numbers = read(run_dir, "sweep.json")
    assert (numbers["field"], [entry["value"] for entry in numbers["values"]]) == ("optimizer.sigma", [0.2, 0.05])
    for entry in numbers["values"]:
        folders = [run_dir / f"optimizer.sigma={entry['value']}" / f"seed_{seed}" for seed in range(2)]
        assert entry["acc1"] == [acc1(folder) for folder in folders]
        assert entry["std"] == pytest.approx(np.std(entry["acc1"], ddof=1))
        assert f"| {entry['value']}" in out
        configs = [parse(["--config", str(folder / "config.yaml")]) for folder in folders]
        assert [(c.optimizer.args["sigma"], c.seed) for c in configs] == [(entry["value"], 0), (entry["value"], 1)]
    assert (run_dir / "sweep.png").read_bytes().startswith(b"\x89PNG")
    status, out, _ = experiment(
        "sweep", *flags, "--field", "data.horizontal_flip", "--values", "true,false", "--seeds", "1"
    )
    assert status == 0
    assert "| false " in out


def test_paired_difference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(80, 1, 6), rng.normal(79, 1, 6)
    mean, error = paired_difference(first.tolist(), second.tolist())
    assert mean == pytest.approx(np.mean(first - second))
    assert error == pytest.approx(np.std(first - second, ddof=1) / np.sqrt(6))
    assert paired_difference([3.0, 5.0, 7.0], [1.0, 1.0, 1.0]) == pytest.approx((4.0, 2 / np.sqrt(3)))


def test_table() -> None:
    outcomes = [
        Outcome("sgd", [80.0, 82.0], [81.0, 84.0], 1.0),
        Outcome("sam", [83.0, 84.0], [83.0, 84.0], 2.0),
        Outcome("esam", [84.0, 85.5], [84.0, 87.0], 1.8333),
    ]
    rows, numbers = compared(outcomes, "sam", ACC1)
    assert rows == [
        ("sgd", "81.00 ± 1.41", "82.50 ± 2.12", "-2.50 ± 0.50", "1.00"),
        ("sam", "83.50 ± 0.71", "83.50 ± 0.71", "-", "2.00"),
        ("esam", "84.75 ± 1.06", "85.50 ± 2.12", "+1.25 ± 0.25", "1.83"),
    ]
    assert numbers["esam"]["best_epoch"]["acc1"] == [84.0, 87.0]
    assert numbers["esam"]["difference"] == {"mean": 1.25, "standard_error": pytest.approx(0.25)}
    assert compared([Outcome("sam", [83.0], [83.5], 2.0)], "sam", ACC1)[0] == [("sam", "83.00", "83.50", "-", "2.00")]
    assert markdown(["a", "bc"], [["long", "1"]]) == "| a    | bc |\n|------|----|\n| long | 1  |\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--optimizer.name", "sgd"), 1),
        (("--optimizer.name", "adamw"), 1),
        (("--optimizer.name", "sam"), 2),
        (("--optimizer.name", "msam"), 1),
        (("--optimizer.name", "s2sam"), 1),
        (("--optimizer.name", "esam"), 1 + 1 / 3 + 0.5),
        (("--optimizer.name", "esam", "--optimizer.gamma", "1"), 2),
        (("--optimizer.name", "looksam", "--optimizer.interval", "4"), 5 / 4),
        (("--optimizer.name", "eigensam"), 2 + 15 / 100),
        (("--optimizer.name", "eigensam", "--parallel.strategy", "fsdp"), 2 + 10 / 100),
        (("--optimizer.name", "eigensam", "--optimizer.interval", "7", "--optimizer.power_steps", "2"), 2 + 6 / 7),
        (("--optimizer.name", "eigensam", "--optimizer.products", "difference"), 2 + 10 / 100),
        (("--optimizer.ascent_fraction", "0.25"), 1.25),
        (("--optimizer.ascent_interval", "3"), 4 / 3),
        (("--epochs", "200", "--optimizer.start_epoch", "160"), 1.2),
        (("--epochs", "10", "--optimizer.start_epoch", "2", "--optimizer.stop_epoch", "7"), 1.5),
        (("--optimizer.scope", "local", "--optimizer.backend", "triton"), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_cost_is_what_each_method_documents(flags: tuple[str, ...], expected: float) -> None:
    assert sgd_steps(parse(flags)) == pytest.approx(expected)


COMPARE = ("--config", "digits_noisy_resnet8", "--methods", "sgd,sam")
SWEEP = ("--config", "digits", "--field", "optimizer.sigma", "--values", "0.1,0.2")


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("compare", (*COMPARE, "--methods", "sgd,lesm"), "unknown method 'lesm': did you mean 'lesam'?"),
        ("compare", (*COMPARE, "--methods", "sam,sam"), "each method can be there once"),
        ("compare", (*COMPARE, "--methods", ","), "--methods is empty"),
        ("compare", (*COMPARE, "--seeds", "0"), "--seeds is 0: it must be at least 1"),
        (
            "compare",
            (*COMPARE, "--seeds", "x"),
            "argument --seeds: invalid int value: 'x' (lesam-dist compare --help)",
        ),
        ("compare", (*COMPARE, "--seed", "3"), "lesam-dist compare sets --seed for each run: leave it out"),
        ("compare", (*COMPARE, "--optimizer.name=sam"), "sets --optimizer.name for each run"),
        ("compare", (*COMPARE, "--epoch", "3"), "unknown key 'epoch': did you mean 'epochs'?"),
        ("compare", (*COMPARE, "--config", "digits_noisy_resnet9"), "did you mean 'digits_noisy_resnet8'?"),
        ("compare", COMPARE[:2], "the following arguments are required: --methods"),
        ("compare", (*COMPARE, "--optimizer.rho", "-1"), "optimizer.args.rho is -1: it must be a finite number >= 0."),
        ("sweep", (*SWEEP, "--field", "optimizer.sigm"), "did you mean 'optimizer.sigma'?"),
        ("sweep", (*SWEEP, "--values", "0.1,0.10"), "--values has 0.1 twice for optimizer.sigma"),
        ("sweep", (*SWEEP, "--values", "0.1,,0.2"), "a value is empty"),
        ("sweep", (*SWEEP, "--values", "a/b"), "cannot have a '/' in them"),
        ("sweep", (*SWEEP, "--values", "much"), "optimizer.args.sigma is much: it must be a finite number >= 0."),
        ("sweep", (*SWEEP, "--optimizer.sigma", "1"), "lesam-dist sweep sets --optimizer.sigma for each run"),
        ("sweep", (*SWEEP, "--field", "optimizer.rho"), "optimizer.args.rho is 0.1 but lesam has no rho"),
        ("compare", (*COMPARE, "--optimizer.lam", "0.5"), "optimizer.args.lam is 0.5 but sgd has no lam"),
        ("sweep", (*SWEEP, "--field", "seed"), "lesam-dist sweep sets --seed for each run"),
    ],
)
def test_wrong_inputs(experiment: Run, tmp_path: Path, name: str, flags: tuple[str, ...], message: str) -> None:
    status, _, err = experiment(name, *flags, "--run_dir", tmp_path / "runs")
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists(), "nothing was begun"


def test_help(experiment: Run) -> None:
    for name, own in (("compare", ("--methods",)), ("sweep", ("--field", "--values"))):
        status, out, _ = experiment(name, "--help")
        assert status == 0
        for flag in ("--config", "--seeds", "--run_dir", *own, f"example:\n  lesam-dist {name} --config"):
            assert flag in out


def compares(rank: int) -> None:
    cli._compare(Path("flags").read_text().splitlines())


def test_compare_on_two_processes(tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several runs in one process group, and a second start that finds them finished."""
    monkeypatch.chdir(tmp_path)
    flags = [*COMPARE, "--seeds", "1", "--run_dir", "runs", *tiny, "--parallel.device", "cpu"]
    flags += ["--methods", "sgd,tests.halves:Halved"]  # the second has no recipe
    Path("flags").write_text("\n".join(flags))
    outputs = []
    for _ in range(2):
        statuses, output = launch(compares, tmp_path, torchrun_like)
        assert statuses == [0, 0], output
        outputs.append(output)
    assert "2 x cpu, ddp" in outputs[0]
    assert outputs[0].count("| sgd ") == outputs[1].count("| sgd ") == 1, "rank 0 alone prints"
    assert outputs[1].count(": finished before") == 2
    assert "| tests.halves:Halved " in outputs[1]
