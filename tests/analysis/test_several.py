"""`lesam-dist analyze landscape` and `connect`, from the command line to the files: what of several checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lesam_dist.analysis.command import analyze
from lesam_dist.analysis.commands.connect import ANALYSIS as CONNECT
from lesam_dist.analysis.commands.landscape import ANALYSIS as LANDSCAPE
from lesam_dist.analysis.engine import several
from lesam_dist.analysis.engine.subject import load
from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError
from lesam_dist.models import build_model
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.source import Source, read_source

FLAGS = ("--config", "digits", "--data.builtin", "null", "--data.workers", "1")
SIZES = ("--data.image_size", "16", "--data.val_resize", "16", "--parallel.device", "cpu", "--samples", "12")
Analyze = Callable[..., None]


@pytest.fixture
def weights(tmp_path: Path, seed: int) -> list[Path]:
    """Three files of weights of one model, of which the last has other classes."""
    paths = [tmp_path / name for name in ("a.pt", "b.pt", "ten.pt")]
    for path, classes in zip(paths, (3, 3, 10), strict=True):
        torch.save(build_model("cifar_resnet8", classes, image_size=16).state_dict(), path)
    return paths


@pytest.fixture
def on_images(images: Path) -> Analyze:
    """``on_images("landscape", path, ...)`` runs the command on a dozen images."""

    def call(*argv: object) -> None:
        analyze([*map(str, argv), *FLAGS, "--data.root", str(images), *SIZES])

    return call


def written(folder: Path, kind: str = "json") -> list[Path]:
    return sorted((folder / "analysis").glob(f"*.{kind}"))


def test_landscapes_lie_side_by_side(
    weights: list[Path], on_images: Analyze, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, _ = weights
    on_images("landscape", a, b, "--points", "3")
    assert "9 points for each of 2 checkpoints: about 20 forward and 0 backward" in capsys.readouterr().out
    on_images("landscape", a, b, "--points", "3", "--dims", "1")
    on_images("landscape", b, a, "--points", "3", "--dims", "1")
    on_images("landscape", a, "--points", "4", "--dims", "1")
    names = [path.name for path in written(tmp_path)]
    assert len(names) == 4
    assert "landscape-1d-a.json" in names
    assert sum(name.startswith("landscape-2d-a-b-") for name in names) == 1
    assert sum(name.startswith("landscape-1d-b-a-") for name in names) == 1
    for kind in ("png", "svg"):
        assert [path.stem for path in written(tmp_path, kind)] == [path.stem for path in written(tmp_path)]
    assert not list((tmp_path / "analysis").glob(".*")), "nothing half-done is left"
    plane, line = (
        json.loads(next((tmp_path / "analysis").glob(f"{name}-a-b-*.json")).read_text())
        for name in ("landscape-2d", "landscape-1d")
    )
    assert [each["checkpoint"] for each in plane["checkpoints"]] == ["a", "b"]
    results = plane["results"]
    assert (results["coordinates"], results["normalisation"], results["seed"]) == ([-1, 0, 1], "filter", 0)
    assert results["passes"] == {"forward": 20, "backward": 0}
    for on_plane, on_line in zip(results["surfaces"], line["results"]["surfaces"], strict=True):
        assert on_plane["losses"][1][1] == on_plane["loss"]
        assert [row[1] for row in on_plane["losses"]] == on_line["losses"], "the first direction is the same"
    capsys.readouterr()
    on_images("landscape", a, b, "--points", "3")
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(UserError, match="points 3 there, 5 now"):
        on_images("landscape", a, b, "--points", "5")


def test_connect_finds_the_ends(
    weights: list[Path], on_images: Analyze, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, _ = weights
    on_images("connect", a, b, "--points", "3")
    assert "about 8 forward and 0 backward" in capsys.readouterr().out
    (path,) = written(tmp_path)
    document = json.loads(path.read_text())
    results = document["results"]
    assert document["settings"]["batchnorm"] == results["batchnorm"] == "estimate"
    assert results["passes"] == {"forward": 8, "backward": 0}
    assert len(results["loss"]["values"]) == 3
    on_images("landscape", a, "--points", "3", "--dims", "1")
    line = json.loads((tmp_path / "analysis" / "landscape-1d-a.json").read_text())
    assert results["loss"]["ends"][0] == pytest.approx(line["results"]["surfaces"][0]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("landscape", 0, "--points", "1"), "points is 1"),
        (("landscape", 0, "--range", "0"), "range is 0"),
        (("landscape", 0, "--dims", "3"), "argument --dims: invalid choice: 3"),
        (("connect", 0, 1, "--points", "1"), "points is 1"),
        (("connect", 0), "an analysis of 2 checkpoints, and there are 1"),
        (("connect", 0, 1, 2), "an analysis of 2 checkpoints, and there are 3"),
        (("hessian", 0, 1), "an analysis of 1 checkpoint, and there are 2"),
        (("connect", 0, 2), "ten in .* is not of model.name cifar_resnet8 with 3 classes"),
        (("landscape", 2, 0), "ten in .* is not of model.name cifar_resnet8 with 3 classes"),
    ],
)
def test_what_cannot_be_used_is_refused(
    weights: list[Path], on_images: Analyze, tmp_path: Path, argv: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        on_images(*(weights[word] if isinstance(word, int) else word for word in argv))
    assert not (tmp_path / "analysis").exists()


def test_no_checkpoint_is_refused() -> None:
    with pytest.raises(UserError, match="required: checkpoint"):
        analyze(["landscape", "--points", "5"])


@pytest.mark.parametrize("name", ["landscape", "connect"])
def test_a_data_root_that_is_gone_is_refused(weights: list[Path], tmp_path: Path, name: str) -> None:
    paths = map(str, weights[:2])
    with pytest.raises(UserError, match="gone"):
        analyze([name, *paths, *FLAGS, "--data.root", str(tmp_path / "gone"), *SIZES])
    assert not (tmp_path / "analysis").exists()


def test_checkpoints_of_other_models_or_images_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = Config()
    other_model = replace(config, model=replace(config.model, name="cifar_resnet20"))
    other_images = replace(config, data=replace(config.data, mean=(0.1, 0.2, 0.3)))
    configs = {"a": config, "model": other_model, "images": other_images}
    monkeypatch.setattr(several, "read_source", lambda path, *_, **__: Source(path.name, path, {}, configs[path.name]))
    assert len(several.read_sources([tmp_path / "a"] * 2)) == 2
    with pytest.raises(UserError, match=r"model.name is .* and 'cifar_resnet20' in '.*model': give checkpoints of one"):
        several.read_sources([tmp_path / "a", tmp_path / "model"])
    with pytest.raises(UserError, match=r"data.mean is .* say which are meant for all with --data.mean"):
        several.read_sources([tmp_path / "a", tmp_path / "images"])


def test_names_of_files_tell_selections_apart(tmp_path: Path) -> None:
    def source(run: str, name: str, value: float) -> Source:
        return Source(name, tmp_path / run, {"w": torch.tensor([value])}, Config())

    first, later, other = source("sgd", "step_1", 1), source("sgd", "step_2", 2), source("lesam", "step_1", 3)
    assert several.stem_of([first]) == "step_1"
    assert several.stem_of([first, later]).startswith("step_1-step_2-")
    assert several.stem_of([first, other]).startswith("sgd_step_1-lesam_step_1-")
    same_name = source("sgd", "step_1", 4)
    stems = {several.stem_of(each) for each in ([first, later], [later, first], [first, same_name], [first] * 40)}
    assert len(stems) == 4
    assert max(map(len, stems)) < 150


class Pretended(Distributed):
    """One of two processes, of which the other is not needed."""

    def barrier(self) -> None:
        pass


def test_each_process_has_all_images_where_it_needs_them(weights: list[Path], images: Path) -> None:
    source = read_source(weights[0], "digits", [*FLAGS[2:], "--data.root", str(images), *SIZES[:-2]])
    worlds = [Pretended(rank, rank, 2, torch.device("cpu")) for rank in (0, 1)]
    first, second = (load(source, world, samples=5, whole=True) for world in worlds)
    shares = [load(source, world, samples=5) for world in worlds]
    assert first.samples == second.samples == shares[0].samples == 5
    for here, there in zip(first.batches, second.batches, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0)
    assert first.objective().loss() == second.objective().loss()
    every = torch.cat([x for x, _ in first.batches])
    parts = [x for share in shares for x, _ in share.batches]
    assert len(every) == 5
    assert sorted(map(len, parts)) == [2, 3]
    torch.testing.assert_close(_in_order(torch.cat(parts)), _in_order(every), rtol=0, atol=0)


def _in_order(images: torch.Tensor) -> torch.Tensor:
    """Sorted by their sums, as shares need not be in the order of the whole."""
    return images[images.sum(dim=(1, 2, 3)).argsort()]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    "values", [[[1.0, None], [2.0, 400.0]], [[None, None], [None, None]], [[0.0, 0.0], [0.0, 0.0]]]
)
def test_figures_of_what_is_not_finite_or_flat(count: int, values: list[Any], tmp_path: Path) -> None:
    nonfinite = sum(value is None for row in values for value in row)
    surface = {"loss": values[0][0], "losses": values, "nonfinite": nonfinite}
    line = {"loss": values[0][0], "losses": values[0], "nonfinite": 1}
    each = [{"run": f"run_{i}$", "checkpoint": "step_1"} for i in range(count)]
    for found in (surface, line):
        results = {"coordinates": [-1.0, 1.0], "surfaces": [found] * count}
        document = {"checkpoints": each, "results": results}
        LANDSCAPE.draw(document).savefig(tmp_path / "figure.png", dpi=20)
        shown = dict(LANDSCAPE.rows(document))
        assert any(name.startswith("points not finite") for name in shown) == (found["nonfinite"] > 0)


def test_a_path_that_is_not_finite_is_shown(tmp_path: Path) -> None:
    curve = {"values": [1.0, None], "ends": [1.0, None]}
    results = {"places": [0.0, 1.0], "loss": curve, "error": curve, "batchnorm": "estimate", "nonfinite": 1}
    results |= {"loss_barrier": None, "error_barrier": {"height": math.pi, "place": 0.5}}
    document = {"checkpoints": [{"run": "x", "checkpoint": name} for name in "ab"], "results": results}
    CONNECT.draw(document).savefig(tmp_path / "figure.png", dpi=20)
    rows = dict(CONNECT.rows(document))
    assert rows["barrier, loss"] == "unknown, as a loss is not finite"
    assert rows["barrier, error rate, %"] == "3.142 at 0.5"
    assert rows["loss at the ends"] == "1, not finite"
