"""The scripts from end to end at toy sizes: what they print and what they write."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint
import cifar_data
import predict
import pytest
import step
import torch
from lib.problem import make_problem
from lib.report import percentiles
from lib.summary import summary
from lib.timing import Call, CpuClock, Deadline
from lib.traffic import BASES

import kernels  # noqa: TID251 (the script benchmarks/kernels.py)

ROOT = Path(__file__).parents[2]
SCRIPTS = [path.stem for path in (ROOT / "benchmarks").glob("*.py")]
ENVIRONMENT = {"device", "torch", "triton", "python", "commit", "command", "date"}


class PretendGpu(CpuClock):
    """The interface of a GPU's clock, so that its tables can be looked at."""

    def host_seconds(self, call: Call) -> tuple[float, float]:
        seconds = self.device_seconds(call)
        return seconds, 2 * seconds

    def copy_bandwidth(self) -> float:
        return 3e12


def check_files(tmp_path: Path, stdout: str) -> dict[str, Any]:
    """The JSON that was written; the Markdown must be what was printed, and its tables well formed."""
    text = (tmp_path / "out.md").read_text()
    assert text.split() == stdout.split()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows
    for before, row in itertools.pairwise(rows):
        if row.startswith("| ---"):
            assert before.count("|") == row.count("|")
    document: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    assert document["environment"].keys() >= ENVIRONMENT
    return document


def outputs(tmp_path: Path) -> list[str]:
    return ["--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]


def test_kernels_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--models", "tiny", "--dtype", "float32,bfloat16", "--repeats", "3"]
    kernels.main([*options, *outputs(tmp_path)])
    stdout = capsys.readouterr().out
    document = check_files(tmp_path, stdout)
    assert len(document["results"]) == 2 * 2 * len(kernels.PROVIDERS)
    ours = document["results"][0]
    assert (ours["provider"], ours["status"], ours["repeats"]) == ("lesam_dist", "ok", 3)
    assert ours["traffic"]["phase"]["bytes_per_element"] == 44
    assert ours["of_ours"]["device"]["phase"] == 1.0
    assert "skipped: CUDA only" in stdout
    assert " ms" not in stdout, "a CPU's absolute times are nobody's business"


def test_kernels_stop_when_their_time_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernels.main(["--device", "cpu", "--models", "tiny", "--seconds", "1e-9", *outputs(tmp_path)])
    assert capsys.readouterr().out.count("not run") == 2


@pytest.mark.parametrize(
    ("main", "flag", "given", "message"),
    [
        (kernels.main, "--models", "resnet51", "unknown: resnet51; choose from resnet50"),
        (kernels.main, "--providers", "eager,eagr", "unknown: eagr; choose from lesam_dist"),
        (step.main, "--variants", ",", "no name given; choose from sgd"),
        (step.main, "--batch", "8,many", "invalid list of integers value: '8,many'"),
    ],
)
def test_unknown_names_are_refused(
    main: Any, flag: str, given: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([flag, given])
    assert f"argument {flag}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_how_and_what_by_default(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        importlib.import_module(script).main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert f"python benchmarks/{script}.py" in text
    options = text.split("options:")[1]
    for entry in re.split(r"\n  (?=-)", options)[1:]:
        assert len(entry.split(maxsplit=2)) == 3, f"without a word of explanation: {entry}"


def test_the_table_of_a_gpu(seed: int) -> None:
    problem = make_problem([(33, 5), (7,)], torch.float32, torch.device("cpu"), seed)
    names = ["lesam_dist", "eager", "compile"]
    results = kernels.compare("random", "sgd", problem, names, PretendGpu(), 3, Deadline(None))
    ours = results[0]
    phase = ours["traffic"]["phase"]
    assert phase["bytes_per_second"] == 44 * 172 / ours["seconds"]["device"]["phase"]["p50"]
    assert phase["of_copy"] == phase["bytes_per_second"] / 3e12
    text = kernels.report(results)
    header = next(line for line in text.splitlines() if line.startswith("| provider"))
    assert all(line.count("|") == header.count("|") for line in text.splitlines() if line.startswith("|"))
    assert "copy 3.00 TB/s" in text


def test_step_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a word about sizes it takes tiny ones, and says what it is at; no time or ratio can be quoted from it."""
    variants = ",".join(step.VARIANTS)
    step.main(["--device", "cpu", "--repeats", "2", "--variants", variants, *outputs(tmp_path)])
    stdout, stderr = capsys.readouterr()
    assert stderr.splitlines() == [
        f"{model}, batch 4: {variant}" for model in ("resnet_tiny", "vit_tiny") for variant in step.VARIANTS
    ]
    document = check_files(tmp_path, stdout)
    results = {(r["model"], r["variant"]): r for r in document["results"]}
    assert len(results) == 2 * len(step.VARIANTS)
    for model in ("resnet_tiny", "vit_tiny"):
        assert results[model, "lesam_graph"]["status"] == "skipped: CUDA only"
        # The same weights and batch: after a few steps both have the same loss, but for roundings to bf16.
        eager, ours = (results[model, name]["loss"] for name in ("eager_lesam", "lesam"))
        assert ours == pytest.approx(eager, rel=0.02)
        assert results[model, "lesam_early"]["loss"] == pytest.approx(ours, rel=0.02)
    assert all(r.keys() <= {"model", "batch", "variant", "status", "loss"} for r in document["results"])
    assert " ms" not in stdout


def test_variants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """There and back, so that a clock that falls meets all alike; one that fails is named and the others go on."""
    made: list[str] = []

    def of(name: str) -> step.Step:
        def run() -> torch.Tensor:
            made.append(name)
            if name == "b" and made.count("b") == 4:
                raise torch.OutOfMemoryError("no room")
            return torch.ones(())

        return run

    results = [{"variant": name, "batch": 1, "status": "ok"} for name in "abc"]
    args = argparse.Namespace(device="cpu", repeats=8)
    step.measure(results, {name: of(name) for name in "abc"}, args, Deadline(None))
    assert "".join(made) == "aabbccccbbaaaaccccaaac"
    assert [r["status"] for r in results] == ["ok", "failed: OutOfMemoryError: no room", "ok"]


def test_step_reports_what_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def out_of_memory(*_: object) -> step.Step:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    def cannot_capture(*_: object) -> step.Step:
        raise step.CaptureError("capture failed: TypeError: no static_grads")

    monkeypatch.setitem(step.VARIANTS, "sam", out_of_memory)
    monkeypatch.setitem(step.VARIANTS, "lesam_graph", cannot_capture)
    options = ["--device", "cpu", "--batch", "2", "--image-size", "32", "--models", "vit_tiny", "--repeats", "1"]
    step.main([*options, "--variants", "sgd,sam,lesam_graph"])
    stdout = capsys.readouterr().out
    assert "| sam | failed: OutOfMemoryError: CUDA out of memory. | - |" in stdout
    assert "| lesam_graph | capture failed: TypeError: no static_grads | - |" in stdout


def test_the_step_table_of_a_gpu() -> None:
    ok = {"model": "m", "batch": 8, "status": "ok", "images_per_second": 800.0, "peak_bytes": 2**31}
    results = [
        {**ok, "variant": "sgd", "seconds": percentiles([0.01])},
        {**ok, "variant": "eager_sam", "seconds": percentiles([0.021])},
        {**ok, "variant": "lesam", "seconds": percentiles([0.02])},
        {"model": "m", "batch": 8, "variant": "lesam_graph", "status": "capture failed: x"},
    ]
    step.add_ratios(results)
    text = step.report(results, on_cuda=True)
    assert "| lesam | 2.000 | 0.952 | 20.00 (20.00-20.00) | 800 | 2.00 |" in text
    assert "| lesam_graph | capture failed: x | - | - | - | - |" in text


def test_host(tmp_path: Path) -> None:
    """In a process of its own, on a stub of CUDA's driver; without numpy, as on a machine that has none."""
    command = [sys.executable, "benchmarks/host.py", "--tensors", "3,161", "--repeats", "5", *outputs(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    document = check_files(tmp_path, done.stdout)
    assert [(r["tensors"], r["base"], r["layout"]) for r in document["results"]] == [
        *((tensors, base, "plain") for base in BASES for tensors in (3, 161)),
        *((161, base, "fsdp2") for base in BASES),
    ]
    assert all(r["launches"] == 4 and r["seconds"]["p50"] > 0 for r in document["results"])
    assert "<= 300" in done.stdout


def test_summary_takes_the_worst_of_each_target(tmp_path: Path) -> None:
    def phase(model: str, provider: str, milliseconds: float, share: float | None = None) -> dict[str, Any]:
        seconds = {"device": {"phase": {"p50": 1e-3 * milliseconds}}, "host": {"phase": {"p50": 2e-4}}}
        result = {"model": model, "provider": provider, "base": "sgd", "status": "ok", "seconds": seconds}
        return {**result, "traffic": {"phase": {"of_copy": share}}}

    each = [
        {"kernel": name, "bytes": 2.7e9, "seconds": {"p50": 1e-3 * milliseconds}}
        for name, milliseconds in (("perturb", 0.99), ("sum_sq g", 1.25))
    ]
    results = [
        {**phase("resnet50", "lesam_dist", 1.0, 0.93), "copy_bytes_per_second": 3e12, "kernels": each},
        phase("resnet50", "lesam_unchecked", 0.9, 0.93),
        phase("vit_l_16", "lesam_dist", 8.0, 0.88),
        phase("small1000", "lesam_dist", 1.0, 0.10),
        phase("small1000", "foreach", 0.5),
        phase("resnet50", "foreach", 1.19),
        phase("vit_l_16", "foreach", 12.0),
        {"model": "large", "provider": "foreach", "base": "sgd", "status": "wrong weights"},
    ]
    (tmp_path / "kernels.json").write_text(json.dumps({"results": results}))
    lesam = {"model": "resnet50", "batch": 128, "variant": "lesam", "of_sgd": 1.99, "of_eager_sam": 0.98}
    (tmp_path / "step.json").write_text(json.dumps({"results": [lesam, {**lesam, "batch": 32, "of_sgd": 3.0}]}))
    found = [(161, "plain", 250.0), (161, "fsdp2", 700.0), (400, "plain", 600.0)]  # the first has a target
    keys = ("tensors", "layout")
    host = [{**dict(zip(keys, r, strict=False)), "base": "sgd", "seconds": {"p50": 1e-6 * r[2]}} for r in found]
    (tmp_path / "host.json").write_text(json.dumps({"results": host}))
    rows = summary(tmp_path).splitlines()
    assert "| each kernel, sgd: of copy bandwidth | >= 90 % | 72 % (resnet50 sum_sq g) | **no** |" in rows
    assert "| phase, sgd: of copy bandwidth | >= 90 % | 88 % (vit_l_16) | **no** |" in rows
    assert "| phase, sgd: foreach over ours | >= 1.3x | 1.19x (resnet50) | **no** |" in rows
    assert "| phase, sgd: foreach over ours, unchecked | >= 1.3x | 1.322x (resnet50) | yes |" in rows
    assert "| phase, sgd: eager over ours | >= 5x | not measured | - |" in rows
    assert "| phase, adamw: of copy bandwidth | >= 90 % | not measured | - |" in rows
    assert "| phase, resnet50: host time | <= 0.3 ms | 0.2 ms (sgd) | yes |" in rows
    assert "| step, batch 128: lesam over SGD | <= 2x | 1.99x (resnet50) | yes |" in rows
    assert "| step, batch 128: lesam over eager SAM | <= 0.97x | 0.98x (resnet50) | **no** |" in rows
    assert "| host down to the driver, 161 tensors, new addresses | <= 300 us | 250 us (sgd) | yes |" in rows
    (tmp_path / "host.json").unlink()
    rows = summary(tmp_path).splitlines()
    assert "| host down to the driver, 161 tensors, new addresses | <= 300 us | not measured | - |" in rows
    alone = summary(tmp_path, ["step", "smoke"]).splitlines()
    assert [row for row in alone if row not in rows] == []
    assert len(alone) == 2 + 4, "what was not to run has no row"
    assert summary(tmp_path, ["smoke"]) == "No part with a target was run.\n"


def test_prediction_is_bytes_over_bandwidth(capsys: pytest.CaptureFixture[str]) -> None:
    predict.main(["--bandwidth", "2.9", "--models", "resnet50"])
    stdout = capsys.readouterr().out
    assert "Predicted, not measured" in stdout
    seconds = [passes * 25_557_032 * 4 / 2.9e12 for passes in (11, 13)]
    assert f"| resnet50 | 25.6 | {seconds[0] * 1e3:.3f} | {seconds[1] * 1e3:.3f} |" in stdout
    assert "| foreach | 13 | 15 | 1.18 | 1.15 |" in stdout
    predict.main(["--bandwidth", "2.9", "--models", "resnet50", "--dtype", "bfloat16"])
    assert f"| resnet50 | 25.6 | {seconds[0] * 1e3 / 2:.3f} | {seconds[1] * 1e3 / 2:.3f} |" in capsys.readouterr().out


def test_cifar_data(tmp_path: Path) -> None:
    """In a process of its own, since worker processes are forked."""
    sizes = ["--workers", "0,1", "--images", "300", "--batch", "64", "--repeats", "2", "--device", "cpu"]
    command = [sys.executable, "benchmarks/cifar_data.py", *sizes, *outputs(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    document = check_files(tmp_path, done.stdout)
    ours, alone, worker = document["results"]
    assert [r["cores"] for r in (ours, alone, worker)] == [1, 1, 1]
    assert (ours["provider"], ours["ours_is"]) == ("lesam_dist", 1.0)
    for other in (alone, worker):
        assert other["images_per_second_per_core"] == pytest.approx(4 * 64 / other["seconds"]["p50"])
        assert other["ours_is"] == pytest.approx(
            ours["images_per_second_per_core"] / other["images_per_second_per_core"]
        )
    assert "| torchvision, 1 workers | 1 |" in done.stdout
    assert done.stdout.count(">= 10x") == 2


def test_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--model", "tiny", "--repeats", "2", "--folder", str(tmp_path)]
    checkpoint.main([*options, *outputs(tmp_path)])
    results = check_files(tmp_path, capsys.readouterr().out)["results"]
    theirs, ours, beside = results
    assert ours["bytes"] == pytest.approx(beside["bytes"], rel=0.01)
    assert ours["bytes"] < theirs["bytes"]
    assert theirs["of_torch"] == {"save": 1.0, "blocked": 1.0, "load": 1.0}
    assert all(r["seconds"]["blocked"]["p50"] <= r["seconds"]["save"]["p50"] for r in results)
    assert ", s |" not in checkpoint.report(results, on_cuda=False)
    assert "| blocked, s |" in checkpoint.report(results, on_cuda=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.md"], "nothing is left on the disk"


def test_the_cifar_table_of_a_gpu() -> None:
    ours = {"provider": "lesam_dist", "cores": 1, "images_per_second_per_core": 2e5, "ours_is": 1.0}
    theirs = {"provider": "torchvision", "workers": 4, "cores": 4, "images_per_second_per_core": 2.5e4, "ours_is": 8.0}
    text = cifar_data.report([ours, theirs], on_cuda=True)
    assert "| torchvision, 4 workers | 4 | 8.0x | >= 10x | **no** | 25000 | 200000 |" in text
