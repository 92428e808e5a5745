"""`lesam-dist analyze` on what a run left: files, going on, and one clear line for what cannot be analysed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lesam_dist.analysis.command import ANALYSES
from lesam_dist.analysis.engine.subject import load
from lesam_dist.analysis.measures.hessian import hessian
from lesam_dist.config.command_line import parse
from lesam_dist.data import Transform, build_loader, scan_split
from lesam_dist.models import build_model
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.run import train
from lesam_dist.train.source import read_source
from tests.parallel import processes

Call = Callable[..., tuple[int, str, str]]
ALONE = Distributed(0, 0, 1, torch.device("cpu"))
CHEAP = ("--samples", 20, "--top", 1, "--trace_vectors", 2, "--density_vectors", 1, "--lanczos_steps", 2)
CHECKPOINT = "step_00000003"


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on three digits, with averaged weights."""
    run = tmp_path_factory.mktemp("runs") / "digits"
    flags = {
        "config": "digits_resnet8_lesam",
        "data.root": images,
        "data.builtin": "null",
        "data.batch_size": 20,
        "data.image_size": 16,
        "data.val_resize": 16,
        "data.backend": "dali",
        "data.workers": 1,
        "ema.decay": 0.5,
        "epochs": 1,
        "logging.tensorboard": "false",
        "run_dir": run,
    }
    train(parse([word for name, value in flags.items() for word in (f"--{name}", str(value))]))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run for a test alone."""
    return Path(shutil.copytree(trained, tmp_path / "digits"))


def numbers(file: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(file.read_text())["results"]
    return document


def test_files_and_what_the_terminal_shows(call: Call, run: Path) -> None:
    status, out, err = call("analyze", "hessian", run, *CHEAP)
    assert (status, err) == (0, "")
    assert "forward and" in out.splitlines()[0], "its cost comes first"
    assert "over 20 images" in out.splitlines()[0]
    analysis = run / "analysis"
    assert sorted(path.name for path in analysis.iterdir()) == [
        f"hessian-{CHECKPOINT}.{kind}" for kind in ("json", "png", "svg")
    ]
    document = json.loads((analysis / f"hessian-{CHECKPOINT}.json").read_text())
    assert (document["step"], document["run"], document["settings"]["samples"]) == (3, "digits", 20)
    assert f"{document['results']['eigenvalues'][0]:.4g}" in out
    before = (analysis / f"hessian-{CHECKPOINT}.json").read_bytes()

    status, again, err = call("analyze", "hessian", run, *CHEAP)
    assert (status, err) == (0, "")
    assert "finished before" in again
    status, _, err = call("analyze", "hessian", run, *CHEAP, "--top", 2)
    assert status == 2
    assert "has other settings: top 1 there, 2 now, and is not overwritten" in err
    assert (analysis / f"hessian-{CHECKPOINT}.json").read_bytes() == before
    assert call("analyze", "hessian", run, *CHEAP, "--top", 0, "--force")[0] == 0
    assert numbers(analysis / f"hessian-{CHECKPOINT}.json")["eigenvalues"] == []


def test_images_are_those_of_the_split_without_augmentation(trained: Path, images: Path) -> None:
    """All of them, by a loader of evaluation and torch's own cross entropy; weights exported by the other command."""
    for split, count in (("train", 60), ("val", 21)):
        source = read_source(trained)
        subject = load(source, ALONE, samples=None, split=split)
        loader = build_loader(
            scan_split(images, split),
            backend="dali",
            train=False,
            transform=Transform(image_size=16, val_resize=16, mean=source.config.data.mean, std=source.config.data.std),
            batch_size=100,
            seed=0,
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
            workers=1,
        )
        ((x, y),) = loader.epoch(0)
        model = build_model("cifar_resnet8", 3).eval()
        model.load_state_dict(source.weights)
        objective = subject.objective()
        assert objective.samples == count
        expected = float(F.cross_entropy(model(x), y).detach())
        assert objective.loss() == pytest.approx(expected, rel=1e-5)


def test_a_choice_of_images_is_the_same_for_any_number_of_processes(trained: Path, seed: int) -> None:
    alone, both = (processes.run(chosen, count, trained, seed) for count in (1, 2))
    assert sorted(both[0] + both[1]) == sorted(alone[0])
    assert len(alone[0]) == 31
    assert sorted(processes.run(chosen, 1, trained, seed + 1)[0]) != sorted(alone[0])


def chosen(world: Distributed, run: Path, seed: int) -> list[float]:
    subject = load(read_source(run), world, samples=31, seed=seed)
    return [round(value, 4) for x, _ in subject.batches for value in x.double().mean(dim=(1, 2, 3)).tolist()]


def test_averaged_weights_and_files_of_weights(call: Call, run: Path, tmp_path: Path) -> None:
    assert call("export", run, tmp_path / "model.safetensors", "--ema")[0] == 0
    assert call("analyze", "hessian", run, *CHEAP, "--ema")[0] == 0
    found = numbers(run / "analysis" / f"hessian-{CHECKPOINT}-ema.json")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "plain.pt")
    for name in ("model.safetensors", "plain.pt"):
        file = tmp_path / name
        assert call("analyze", "hessian", file, *CHEAP, "--config", run / "config.yaml")[0] == 0
        assert numbers(tmp_path / "analysis" / f"hessian-{file.stem}.json") == found
    assert call("analyze", "hessian", run, *CHEAP)[0] == 0
    assert numbers(run / "analysis" / f"hessian-{CHECKPOINT}.json") != found


def test_an_interrupted_analysis_goes_on(call: Call, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("analyze", "hessian", run, *CHEAP, "--output", run / "whole")[0] == 0
    expected = numbers(run / "whole" / f"hessian-{CHECKPOINT}.json")

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        def stop(made: int) -> None:
            if len(kwargs["journal"]) == 2:  # the eigenvalues, and a vector of the trace
                raise KeyboardInterrupt

        return hessian(*args, **{**kwargs, "on_product": stop})

    with monkeypatch.context() as patch:
        patch.setattr("lesam_dist.analysis.measures.hessian.hessian", interrupted)
        assert call("analyze", "hessian", run, *CHEAP)[0] == 130
    assert [path.name for path in (run / "analysis").iterdir()] == [f".hessian-{CHECKPOINT}.partial.jsonl"]
    assert call("analyze", "hessian", run, *CHEAP)[0] == 0
    found = numbers(run / "analysis" / f"hessian-{CHECKPOINT}.json")
    assert found.pop("products") == 1 + 2, "what was left: a vector of the trace, and the density"
    assert expected.pop("products") > 10
    assert found.pop("passes") != expected.pop("passes")
    assert found == expected
    assert not list((run / "analysis").glob(".*"))


def other_model(run: Path) -> tuple[object, ...]:
    return run, "--model.name", "cifar_resnet20"


def other_classes(run: Path) -> tuple[object, ...]:
    return run, "--model.num_classes", 7


def no_run(run: Path) -> tuple[object, ...]:
    shutil.rmtree(run / "checkpoints")
    return (run,)


def half_a_checkpoint(run: Path) -> tuple[object, ...]:
    (run / "checkpoints" / CHECKPOINT / "rank_00000.safetensors").write_bytes(b"half")
    return (run,)


def no_data(run: Path) -> tuple[object, ...]:
    return run, "--data.root", run / "gone"


def no_config(run: Path) -> tuple[object, ...]:
    save_file({"w": torch.zeros(1)}, run / "w.safetensors")
    return (run / "w.safetensors",)


def no_weights(run: Path) -> tuple[object, ...]:
    (run / "w.pt").write_bytes(b"no weights")
    return run / "w.pt", "--config", run / "config.yaml"


WRONG = [
    (other_model, "is not of model.name cifar_resnet20 with 3 classes"),
    (other_classes, "has the shape (3, 64) instead of (7, 64)"),
    (no_run, "and no run that has one: look at its name"),
    (half_a_checkpoint, "is truncated: 4 of"),
    (no_data, "does not exist"),
    (no_config, "say which model and images it is of, with --config"),
    (no_weights, "cannot be read as a model's state_dict"),
    (lambda run: (run, "--samples", 0), "number of images, which is at least 1 or all, value: '0'"),
    (lambda run: (run, "--top", 10**9), "but the model has"),
    (lambda run: (run, "--seed", -1), "--seed is -1"),
    (lambda run: (run, "--config", "digits"), "leave it out, as a checkpoint has its own"),
    (lambda run: (run, "--optimizer.lrr", 1), "optimizer.lrr"),
    (lambda run: (run, "--tpo", 1), "unknown option --tpo: did you mean --top?"),
    (lambda run: (run, "--data.rot", "x"), "did you mean 'data.root'?"),
    (lambda run: (run.parent / "gone", "--lanczos_step", 1), "unknown option --lanczos_step: did you mean --lanczos"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[text.split(":")[0][:40] for _, text in WRONG])
def test_what_cannot_be_analysed_is_one_line(
    call: Call, run: Path, spoil: Callable[[Path], tuple[object, ...]], message: str
) -> None:
    status, _, err = call("analyze", "hessian", *spoil(run))
    assert status == 2, err
    (line,) = err.splitlines()
    assert message in line
    assert not list(run.glob("analysis/[!.]*"))


def test_names_and_help(call: Call) -> None:
    assert "hessian" in call("analyze", "--help")[1]
    status, out, _ = call("analyze")
    assert (status, out.splitlines()[0]) == (2, "usage: lesam-dist analyze NAME ...")
    status, _, err = call("analyze", "hesian", "runs/a")
    assert (status, err) == (2, "lesam-dist: error: unknown analysis 'hesian': did you mean 'hessian'?\n")
    assert "--trace_vectors" in call("analyze", "hessian", "--help")[1]


def test_more_processes_than_images_are_refused(trained: Path) -> None:
    texts = processes.run(too_many, 2, trained)
    assert texts == ["samples is 1: each of 2 processes needs an image."] * 2


def too_many(world: Distributed, run: Path) -> str:
    from lesam_dist.errors import UserError

    with pytest.raises(UserError) as raised:
        load(read_source(run), world, samples=1)
    return str(raised.value)


def test_functions_for_notebooks(trained: Path) -> None:
    """Each name is what its command is of, and importing the package alone imports no torch."""
    from lesam_dist import analysis

    for name in analysis.__all__:
        assert getattr(analysis, name).__name__ == name
    found = analysis.hessian(analysis.load_run(trained, samples=20).objective(), top=1, trace_vectors=0)
    subject = analysis.load(analysis.read_source(trained), ALONE, samples=20)
    again = hessian(subject.objective(), top=1, trace_vectors=0)
    assert found.eigenvalues == pytest.approx(again.eigenvalues, rel=1e-4)
    code = "import sys, lesam_dist.analysis; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", [*ANALYSES, ""])
def test_a_help_imports_no_torch(name: str) -> None:
    code = (
        "import sys; from lesam_dist.analysis.command import analyze\n"
        f"try: analyze({[name, '--help'] if name else ['--help']})\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
