"""What a report says, against numbers that are computed here from the logs; and what is refused."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lesam_dist.report import paths, pictures, write_report
from lesam_dist.report.statistics import difference
from lesam_dist.train.run_lock import Holder
from lesam_dist.train.telemetry import METRICS
from tests.conftest import Command
from tests.report.page import Page
from tests.report.runs import BATCH, STEPS, Lines, documents, write_document, write_run


def values(lines: Lines, split: str, key: str) -> np.ndarray[Any, Any]:
    return np.array([line[key] for line in lines if line["split"] == split])


def mean_std(numbers: Sequence[float], digits: str = ".2f") -> str:
    return f"{np.mean(numbers):{digits}} ± {np.std(numbers, ddof=1):.2f}"


def report(tmp_path: Path, *runs: Path) -> Page:
    return Page(write_report(runs, tmp_path / "report.html"))


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and the browser's test looks at them."""
    monkeypatch.setattr(pictures, "svg", lambda chart: f"<svg>{chart.key}</svg>")


@pytest.fixture
def methods(seed: int, tmp_path: Path) -> dict[str, list[Lines]]:
    """Logs of three methods with three seeds, in the folders METHOD/seed_K."""
    draw = random.Random(seed)
    return {
        method: [
            write_run(tmp_path / method / f"seed_{k}", draw, method=method, seed=k, epochs=4, level=level)
            for k in range(3)
        ]
        for method, level in (("sgd", 70.0), ("sam", 80.0), ("lesam", 80.0))
    }


def test_seeds_are_one_group(methods: Mapping[str, list[Lines]], tmp_path: Path) -> None:
    page = report(tmp_path, *(path for name in methods for path in sorted((tmp_path / name).iterdir())))
    summary = page.table("method", "seeds")
    assert list(summary) == list(methods)
    last = {name: [values(log, "val", "acc1")[-1] for log in logs] for name, logs in methods.items()}
    for name, logs in methods.items():
        row = summary[name]
        assert row["seeds"] == "3"
        assert row["top-1, last epoch"] == mean_std(last[name]) + " %"
        assert row["best epoch"] == mean_std([values(log, "val", "acc1").max() for log in logs]) + " %"
        passes = 1 if name == "sgd" else 2
        assert (row["cost of a step"], row["of a run, in SGD steps"]) == (f"{passes}.00", str(passes * STEPS * 4))
        if name != "sam":
            paired = np.subtract(last[name], last["sam"])
            error = paired.std(ddof=1) / np.sqrt(3)
            assert row["difference to sam"] == f"{paired.mean():+.2f} ± {error:.2f}"
        speed = [np.median(values(log, "train", "images_per_s")) for log in logs]
        cost = page.table("method", "cost of a step", "steps")[name]
        assert cost["images/s"] == f"{np.mean(speed):.4g} ± {np.std(speed, ddof=1):.2g}"
        seconds = np.mean([4 * STEPS * BATCH / one for one in speed])
        assert cost["training time"] == f"{seconds:.4g} s"
        ends = page.table("method", "best epoch", "top-5")[name]
        losses = [values(log, "val", "loss")[-1] for log in logs]
        assert ends["loss"] == f"{np.mean(losses):.4g} ± {np.std(losses, ddof=1):.2g}"


def test_a_comparison(methods: Mapping[str, list[Lines]], tmp_path: Path) -> None:
    """By its own folder: all of its runs, and the command, in the folder."""
    described = {"config": "digits", "methods": {"lesam": {}, "sam": {}}, "seeds": 3, "flags": ["--epochs", "4"]}
    (tmp_path / "compare.json").write_text(json.dumps(described))
    target = write_report([tmp_path])
    assert target == tmp_path / "report.html"
    page = Page(target)
    assert {name: row["seeds"] for name, row in page.table("method", "seeds").items()} == dict.fromkeys(methods, "3")
    assert "lesam-dist compare --config digits --methods lesam,sam --seeds 3 --epochs 4" in page.paragraphs


def test_curves(methods: Mapping[str, list[Lines]], tmp_path: Path) -> None:
    page = report(tmp_path, *(path for name in methods for path in sorted((tmp_path / name).iterdir())))
    for title, split, key in (
        ("Validation accuracy", "val", "acc1"),
        ("Training loss", "train", "loss"),
        ("Calibration error", "val", "ece"),
        ("Learning rate", "train", "lr"),
    ):
        for name, logs in methods.items():
            lower, upper, curve = (t for t in page.charts[title]["data"] if t["legendgroup"] == name)
            known = np.array([values(log, split, key) for log in logs])
            mean, std = known.mean(axis=0), known.std(axis=0, ddof=1)
            assert curve["name"] == name
            np.testing.assert_allclose(curve["x"], values(logs[0], split, "epoch"))
            np.testing.assert_allclose(curve["y"], mean)
            np.testing.assert_allclose(lower["y"], mean - std)
            np.testing.assert_allclose(upper["y"], mean + std)


def test_radius(methods: Mapping[str, list[Lines]], tmp_path: Path) -> None:
    page = report(tmp_path, tmp_path / "lesam" / "seed_0", tmp_path / "lesam" / "seed_1", tmp_path / "sgd" / "seed_0")
    for title, of in (
        ("Radius", lambda log: values(log, "train", "rho")),
        (
            "Rise beyond the budget",
            lambda log: values(log, "train", "perturbed_loss") - values(log, "train", "loss") - 0.1,
        ),
    ):
        curve = next(trace for trace in page.charts[title]["data"] if trace.get("name") == "lesam")
        by_epoch = [of(log).reshape(4, STEPS).mean(axis=1) for log in methods["lesam"][:2]]
        np.testing.assert_allclose(curve["y"], np.mean(by_epoch, axis=0), atol=1e-12)
        assert not [trace for trace in page.charts[title]["data"] if "sgd" in trace.get("name", "")]


def test_claims_what_the_seeds_show(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    for k in range(4):
        write_run(tmp_path / "far" / "lesam" / f"seed_{k}", draw, method="lesam", seed=k, epochs=1, level=90)
        write_run(tmp_path / "far" / "sgd" / f"seed_{k}", draw, method="sgd", seed=k, epochs=1, level=50)
    assert "lesam comes out ahead" in report(tmp_path, tmp_path / "far").text
    for k in range(4):
        write_run(tmp_path / "near" / "lesam" / f"seed_{k}", draw, method="lesam", seed=k, epochs=1, level=80 + 3 * k)
        write_run(tmp_path / "near" / "sgd" / f"seed_{k}", draw, method="sgd", seed=k, epochs=1, level=90 - 3 * k)
    text = Page(write_report([tmp_path / "near"])).text
    assert "The seeds show no difference" in text
    assert "ahead" not in text
    text = report_of_one_seed(tmp_path)
    assert "One seed does not tell which is best" in text
    assert "ahead" not in text


def report_of_one_seed(tmp_path: Path) -> str:
    runs = [tmp_path / "far" / method / "seed_0" for method in ("lesam", "sgd")]
    return Page(write_report(runs, tmp_path / "one.html")).text


@pytest.mark.parametrize("paired", [True, False])
def test_intervals(seed: int, paired: bool) -> None:
    """Against the textbook's formulas: Student's t of the differences, and Welch's."""
    draw = np.random.default_rng(seed)
    a, b, pairs = draw.normal(0, 1, 5), draw.normal(0, 2, 5), int(draw.integers(1, 7))
    found = difference(dict(enumerate(a)), dict(enumerate(b, start=0 if paired else 9)), pairs)
    assert found.paired is paired
    if paired:
        error, freedom = (a - b).std(ddof=1) / np.sqrt(5), 4.0
    else:
        u, v = a.var(ddof=1) / 5, b.var(ddof=1) / 5
        error, freedom = np.sqrt(u + v), (u + v) ** 2 / (u**2 / 4 + v**2 / 4)
    reach = stats.t.ppf(1 - 0.05 / pairs / 2, freedom) * error
    assert (found.mean, found.error) == pytest.approx((a.mean() - b.mean(), error))
    assert (found.low, found.high) == pytest.approx((found.mean - reach, found.mean + reach))
    assert found.is_shown is bool(abs(found.mean) > reach)


def test_equal_differences_show_nothing() -> None:
    """Of whole numbers of images: seeds may agree by chance."""
    assert not difference({0: 91.0, 1: 93.0}, {0: 90.0, 1: 92.0}, 1).is_shown


def test_groups(seed: int, tmp_path: Path) -> None:
    """The seed alone makes no other group, nor do logging and places; another value and a repeated seed do."""
    draw = random.Random(seed)
    same = ("--logging.every_steps", "7", "--data.root", "elsewhere")
    for name, k, flags in (
        ("a", 0, ()),
        ("b", 1, same),
        ("c", 0, ()),
        ("d", 0, ("--optimizer.sigma", "0.4")),
    ):
        write_run(tmp_path / name, draw, seed=k, flags=flags)
    page = report(tmp_path, *(tmp_path / name for name in "abcd"))
    groups = page.table("method", "seeds")
    assert [row["seeds"] for row in groups.values()] == ["2", "1", "1"]
    assert [name for name in groups if "sigma 0.4" in name] == [list(groups)[2]]
    assert page.table("field")["optimizer.args.sigma"][list(groups)[2]] == "0.4"


def test_the_state_of_each_run(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    write_run(tmp_path / "finished", draw, seed=0)
    write_run(tmp_path / "half", draw, seed=1, done=2)
    write_run(tmp_path / "busy", draw, seed=2, done=1)
    holder = Holder.me()
    parent = {**holder.__dict__, "pid": os.getppid(), "started": _started(os.getppid())}
    (tmp_path / "busy" / ".lock").write_text(json.dumps(parent))
    torn = tmp_path / "torn" / METRICS
    logged = write_run(tmp_path / "torn", draw, seed=3)
    torn.write_text(torn.read_text()[:-20])
    lost = write_run(tmp_path / "diverged", draw, seed=4)
    (tmp_path / "diverged" / METRICS).write_text(
        "".join(json.dumps({**line, "loss": None}) + "\n" for line in lost[:5])
    )
    page = report(tmp_path, *(tmp_path / name for name in ("finished", "half", "busy", "torn", "diverged")))
    state = {name: row["state"] for name, row in page.table("run", "method", "seed").items()}
    assert state["finished"] == "finished, 3 epochs"
    assert state["half"].startswith("not finished, 2 of 3 epochs")
    assert state["busy"] == "still in progress, 1 of 3 epochs"
    assert state["torn"].startswith("not finished, 3 of 3 epochs"), "its last evaluation is what was torn"
    assert state["diverged"].startswith("diverged")
    assert f"torn: left out 1 line of {METRICS} that could not be read" in page.text
    assert page.table("method", "seeds")["lesam"]["seeds"] == "1 of 5"
    assert page.table("run", "method", "seed")["torn"]["top-1, last"] == f"{values(logged, 'val', 'acc1')[-2]:.2f} %"


def _started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def test_analyses(seed: int, tmp_path: Path) -> None:
    """Each analysis that lies in a run's folder has its table and its charts; what is no analysis is named."""
    draw = random.Random(seed)
    write_run(tmp_path / "a", draw, method="sgd")
    write_run(tmp_path / "b", draw, method="lesam")
    found = documents(draw, "a")
    for stem, document in found.items():
        write_document(tmp_path / "a", stem, document)
    write_document(tmp_path / "b", "hessian", {**documents(draw, "b")["hessian"], "settings": {"samples": 5}})
    write_document(tmp_path / "b", "lpf", {"analysis": "lpf", "results": {"loss": "1"}})
    words = {**documents(draw, "b")["connect"]}
    words["results"] = {**words["results"], "places": ["left", "right", None, 1, 2]}
    write_document(tmp_path / "b", "connect", words)
    (tmp_path / "b" / "analysis" / "torn.json").write_text('{"analysis": "hess')
    page = report(tmp_path, tmp_path / "a", tmp_path / "b")
    assert "analysis/torn.json is not of an analysis, or not whole: left out" in page.text
    assert page.text.count("is not of this version, and is left out") == 2
    assert "Not made with the same settings, so not to be compared: samples" in page.text
    eigenvalues = found["hessian"]["results"]["eigenvalues"]
    drawn = {trace["name"]: trace["y"] for trace in page.charts["Largest eigenvalues"]["data"]}
    assert drawn["sgd"] == eigenvalues
    assert drawn.keys() == {"sgd", "lesam"}
    assert page.table("", "sgd", "lesam")["trace"]["sgd"].endswith("± 0.1")
    surface = found["landscape-2d"]["results"]["surfaces"][0]["losses"]
    (contour, _) = page.charts["sgd"]["data"]
    assert np.array(contour["customdata"]).T.tolist() == surface, "the first direction is the horizontal one"
    cells = found["robustness"]["results"]["corrupted"]["cells"]
    (curve,) = page.charts["Errors under corruptions"]["data"]
    means = [np.mean([cell["error"] for cell in cells if cell["severity"] == severity]) for severity in (1, 5)]
    assert (curve["x"], curve["y"]) == ([1, 5], pytest.approx(means))
    names = {
        "Spectral density",
        "Loss on a line",
        "Loss in between",
        "Average under noise",
        "Accuracy under PGD in l_inf",
    }
    assert names < page.charts.keys()


NASTY = "<img src=x onerror=document.title=1>{{ 7*7 }}</script><script>document.title=1<\x01"


def nasty_run(folder: Path, draw: random.Random) -> Path:
    """A run whose name and documents try to be more than text."""
    run = folder / NASTY.replace("/", "\\")
    write_run(run, draw, seed=0)
    for stem, document in documents(draw, NASTY).items():
        write_document(run, stem, {**document, "device": NASTY, "checkpoint": NASTY, "versions": {"torch": NASTY}})
    return run


def test_what_files_say_is_text(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    write_run(tmp_path / "plain", draw)
    for stem, document in documents(draw, "plain").items():
        write_document(tmp_path / "plain", stem, document)
    page = report(tmp_path, nasty_run(tmp_path, draw))
    assert page.tags == Page(write_report([tmp_path / "plain"])).tags, "no element more"
    assert "49" not in page.paragraphs[1]
    assert NASTY[:20] in page.paragraphs[1]


def test_what_is_refused(seed: int, tmp_path: Path, call: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    run = tmp_path / "run"
    write_run(run, draw)
    (tmp_path / "empty").mkdir()
    begun = tmp_path / "begun"
    write_run(begun, draw)
    (begun / METRICS).write_text('{"step": 1, "ep')
    silent = tmp_path / "silent"
    write_run(silent, draw)
    (silent / METRICS).unlink()
    other = tmp_path / "other"
    write_run(other, draw)
    (other / "config.yaml").write_text("optimizer: {name: lesam, speed: 3}")
    (tmp_path / "there.html").write_text("mine")
    new = tmp_path / "new.html"
    for argv, message in (
        ([], "required: run"),
        ([tmp_path / "none"], "does not exist"),
        ([tmp_path / "there.html"], "is not a folder"),
        ([tmp_path / "empty"], "has no config.yaml"),
        ([begun, "--output", new], "has no line of a step or an evaluation"),
        ([silent, "--output", new], "has no metrics.jsonl"),
        ([other, "--output", new], "is not a config of this version: "),
        ([run, tmp_path / "empty" / ".." / "run", "--output", new], "is there twice"),
        ([run, "--output", tmp_path / "there.html"], "exists, and is not overwritten"),
        ([run, "--output", tmp_path / "no" / "a.html"], "the folder of"),
        ([run, "--output", tmp_path], "a folder: name a file"),
    ):
        status, out, err = call("report", *argv)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert message in err
    assert not new.exists()
    assert (tmp_path / "there.html").read_text() == "mine"
    monkeypatch.setattr(paths, "find_spec", lambda name: None if name == "plotly" else name)
    status, _, err = call("report", run)
    assert (status, err.count("\n")) == (2, 1)
    assert 'packages that are not installed (plotly): pip install "lesam-dist[report]"' in err


def test_where_it_goes(seed: int, tmp_path: Path, call: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    for name in "ab":
        write_run(tmp_path / name, draw, seed=ord(name))
    monkeypatch.chdir(tmp_path)
    assert call("report", "a") == (0, f"{Path('a') / 'report.html'}\n", "")
    assert call("report", "a", "b") == (0, "report.html\n", "")
    assert call("report", "a")[0] == 2
    (tmp_path / "a" / "report.html").write_text("")
    assert call("report", "a", "--force")[0] == 0
    assert Page(tmp_path / "a" / "report.html").table("run", "method")["a"]["seed"] == str(ord("a"))


def test_a_real_run(command: Command, call: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    """The files are those of the trainer and of `analyze`."""
    run = tmp_path / "real"
    assert command(*small, "--run_dir", run, "--logging.tensorboard", "false")[0] == 0
    assert call("analyze", "lpf", run, "--draws", "2", "--samples", "10")[0] == 0
    assert call("report", run)[0] == 0
    page = Page(run / "report.html")
    lines = [json.loads(text) for text in (run / METRICS).read_text().splitlines()]
    row = page.table("run", "method")["real"]
    assert row["state"] == "finished, 3 epochs"
    assert row["latest checkpoint"] == "step_00000009"
    assert row["top-1, last"] == f"{lines[-1]['acc1']:.2f} %"
    assert re.match(r"\d+\.\d+", page.table("run", "torch")["real"]["torch"])
    assert page.table("run", "torch")["real"]["processes"] == "1"
    assert "batch_size" in "".join(page.table("field"))
    assert "Loss without noise, and its mean under noise" in page.charts
    assert not [text for text in page.paragraphs if "left out" in text]
