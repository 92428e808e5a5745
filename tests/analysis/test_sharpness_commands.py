"""`lesam-dist analyze lpf` and `sharpness` of a file of weights, from the arguments to the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lesam_dist.analysis.command import analyze
from lesam_dist.analysis.measures.sharpness_plan import SharpnessPlan
from lesam_dist.errors import UserError
from lesam_dist.models import build_model


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


def test_no_flag_is_the_beginning_of_one_of_torchruns() -> None:
    """torchrun takes such a flag for its own, or calls it ambiguous, though it stands behind the module's name."""
    from torch.distributed.run import get_args_parser

    from lesam_dist.analysis.command import ANALYSES, Parser, import_module

    theirs = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    for name in ANALYSES:
        module = import_module(f"lesam_dist.analysis.commands.{name}")
        if name == "radius":  # which reads a log, in one process
            continue
        analysis = module.ANALYSIS
        parser = Parser(name, analysis.text)
        analysis.add_arguments(parser)
        ours = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        assert len(ours) > 5
        wrong = [(flag, other) for flag in ours for other in theirs if other.startswith(flag) and other != "--help"]
        assert not wrong
