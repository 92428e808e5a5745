"""`lesam-dist analyze lpf`, `sharpness` and `robustness` of a file of weights, from the arguments to the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lesam_dist.analysis.command import analyze
from lesam_dist.analysis.engine.subject import load
from lesam_dist.analysis.measures.sharpness_plan import SharpnessPlan
from lesam_dist.errors import UserError
from lesam_dist.models import build_model
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.source import read_source


@pytest.fixture
def weights(images: Path, tmp_path: Path) -> tuple[str, ...]:
    """Of an untrained network; with flags for the fixture's 60 training images."""
    torch.save(build_model("cifar_resnet8", 3, image_size=16).state_dict(), tmp_path / "net.pt")
    return (
        *(str(tmp_path / "net.pt"), "--config", "digits", "--data.root", str(images), "--data.builtin", "null"),
        *("--data.image_size", "16", "--data.val_resize", "16", "--parallel.device", "cpu"),
        *("--samples", "24", "--output", str(tmp_path / "out")),
    )


def document(tmp_path: Path, name: str) -> dict[str, Any]:
    for kind in ("png", "svg"):
        assert (tmp_path / "out" / f"{name}-net.{kind}").stat().st_size > 1000
    found: dict[str, Any] = json.loads((tmp_path / "out" / f"{name}-net.json").read_text())
    return found


def test_lpf(seed: int, weights: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    analyze(["lpf", *weights, "--draws", "2", "--sigma", "0.02"])
    told = capsys.readouterr().out
    assert "2 draws, and the loss without noise: about 3 forward and 0 backward passes over 24 images" in told
    results = document(tmp_path, "lpf")["results"]
    assert results["passes"] == {"forward": 3, "backward": 0}
    assert results["difference"] == pytest.approx(sum(results["losses"]) / 2 - results["loss"])
    assert f"{results['lpf']['mean']:.6g} ± " in told
    analyze(["lpf", *weights, "--draws", "2", "--sigma", "0.02"])
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"has other settings: sigma 0.02 there, 0.01 now"):
        analyze(["lpf", *weights, "--draws", "2"])
    with pytest.raises(UserError, match=r"^draws is 0: it must be at least 1\.$"):
        analyze(["lpf", *weights, "--draws", "0"])


def test_sharpness(seed: int, weights: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--batch_size", "12", "--rho", "0.1", "--adaptive_rho", "--steps", "2", "--draws", "1", "--directions"]
    flags += ["1", "--m_sizes", "6", "--sigma", "0.1", "--max_radius", "1e-6", "--linf_rho", "--adaptive_linf_rho"]
    analyze(["sharpness", *weights, *flags])
    told = capsys.readouterr().out
    found = document(tmp_path, "sharpness")
    plan = SharpnessPlan(
        batch_size=12,
        rho=(0.1,),
        adaptive_rho=(),
        linf_rho=(),
        adaptive_linf_rho=(),
        steps=2,
        draws=1,
        directions=1,
        m_sizes=(6,),
        sigma=(0.1,),
        max_radius=1e-6,
    )
    for name, value in vars(plan).items():
        assert found["settings"][name] == (list(value) if isinstance(value, tuple) else value), name
    forward, backward = plan.passes()
    assert f"radius: about {forward} forward and {backward} backward passes over 24 images" in told
    measures = found["results"]["measures"]
    named = {(m["part"], m.get("kind"), m.get("adaptive"), m.get("rho")): m for m in measures}
    worst, step = named["auto_pgd", None, False, 0.1], named["one_step", None, False, 0.1]
    assert worst["mean"] >= step["mean"] * (1 - 1e-4) - 1e-6, "up to rounding in float32"
    assert named["m_sharpness", None, None, 0.1]["batches"] == 4
    along = named["radius", "gradient", None, None]
    assert along["mean"] is None
    assert along["missing"] == 2, "the radius of 0.1 is above 1e-6 in both batches, and the figure has no point there"
    assert "| radius, along g, by sigma " in told
    assert "0.1: none (2 missing)" in told


def test_sharpness_refuses_batches_that_are_not_there(weights: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^batch_size is 128, but there are 24 images"):
        analyze(["sharpness", *weights])
    with pytest.raises(UserError, match=r"^rho is 0: it must be above 0\.$"):
        analyze(["sharpness", *weights, "--rho", "0"])
    assert not list(tmp_path.glob("out/*.json"))


def test_robustness(seed: int, weights: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--steps", "2", "--linf", "0", "8/255", "--l2", "0.5"]
    analyze(["robustness", *weights, *flags])
    told = capsys.readouterr().out
    assert "3 attacks of 2 steps, and the images as they are: about 10 forward and 6 backward passes over 21 " in told
    found = document(tmp_path, "robustness")
    assert found["settings"]["split"] == "val", "of which there are 21, unless one says otherwise"
    results = found["results"]
    assert results["passes"] == {"forward": 10, "backward": 6}
    still, box, ball = results["attacked"]
    assert [(each["norm"], each["eps"]) for each in (still, box, ball)] == [("linf", 0), ("linf", 8 / 255), ("l2", 0.5)]
    assert {name: still[name] for name in results["clean"]} == results["clean"]
    alone = Distributed(0, 0, 1, torch.device("cpu"))
    subject = load(read_source(Path(weights[0]), "digits", weights[3:-4]), alone, samples=None, split="val")
    loss, error = subject.objective().loss_and_error()
    assert results["calibration"]["nll"] == pytest.approx(loss, rel=1e-5)
    assert results["clean"]["accuracy"] == pytest.approx(100 - error)
    assert f"{box['accuracy']:.2f} ± {box['standard_error']:.2f} %" in told
    for wrong, message in (
        (
            ("--linf", "8"),
            r"^linf is 8: it must be from 0 to 1, for pixels from 0 to 1; eight grey levels are 8/255\.$",
        ),
        (("--l2", "-1"), r"^l2 is -1: it must be finite and at least 0"),
        (("--severities", "3"), r"^--severities are of corruptions, and there are none: give --corruptions all, or"),
        (("--steps", "0"), r"^steps is 0: it must be at least 1\.$"),
        (("--linf", "1/0"), r"^argument --linf: invalid radius, as 8/255 or 0\.03, value: '1/0'"),
        (("--split", "train", *flags), r"has other settings: samples 21 there, 24 now, split 'val' there, 'train' now"),
    ):
        with pytest.raises(UserError, match=message):
            analyze(["robustness", *weights, *wrong])


def test_corruptions(seed: int, weights: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--linf", "--l2", "--corruptions", "fog", "contrast", "--severities", "5", "1"]
    with pytest.raises(
        UserError, match=r"^images have 16 x 16 pixels, .*--data\.image_size 32 --data\.val_resize 32\.$"
    ):
        analyze(["robustness", *weights, *flags])
    assert not (tmp_path / "out").exists()
    flags += ["--data.image_size", "32", "--data.val_resize", "32"]
    capsys.readouterr()
    analyze(["robustness", *weights, *flags])
    told = capsys.readouterr().out
    assert "4 sets of corrupted images, and the images as they are: about 5 forward and 0 backward passes" in told
    found = document(tmp_path, "robustness")
    assert found["results"]["passes"] == {"forward": 5, "backward": 0}
    corrupted = found["results"]["corrupted"]
    cells = [(cell["kind"], cell["severity"]) for cell in corrupted["cells"]]
    assert cells == [("fog", 1), ("fog", 5), ("contrast", 1), ("contrast", 5)]
    assert corrupted["normalised_by_alexnet"] is False
    assert f"| {corrupted['mean_error']:.2f} %, " in told
    analyze(["robustness", *weights, *flags])
    assert "finished before" in capsys.readouterr().out


def test_no_flag_is_the_beginning_of_one_of_torchruns() -> None:
    """torchrun takes such a flag for its own, or calls it ambiguous, though it stands behind the module's name."""
    from torch.distributed.run import get_args_parser

    from lesam_dist.analysis.command import ANALYSES, AnalysisParser, import_module

    theirs = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    for name in ANALYSES:
        module = import_module(f"lesam_dist.analysis.commands.{name}")
        if name == "radius":  # which reads a log, in one process
            continue
        analysis = module.ANALYSIS
        parser = AnalysisParser(name, analysis.text)
        analysis.add_arguments(parser)
        ours = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        assert len(ours) > 5
        wrong = [(flag, other) for flag in ours for other in theirs if other.startswith(flag) and other != "--help"]
        assert not wrong
