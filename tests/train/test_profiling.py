"""`--profile`: a trace of each process and a summary whose numbers are those of the trace."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from lesam_dist.config.command_line import parse
from lesam_dist.config.schema import Config
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.phases import COMMUNICATION, DATA, OPTIMIZER, PASS_1, PASS_2
from lesam_dist.train.profile_summary import Operation, Profiled, lever, summarize
from lesam_dist.train.telemetry import read_metrics
from tests.conftest import Command

CPU, GPU = Distributed(0, 0, 1, torch.device("cpu")), Distributed(0, 0, 2, torch.device("cuda", 0))


def test_a_run_writes_a_trace_of_the_steps_that_were_asked_for(
    command: Command, small: tuple[str, ...], tmp_path: Path
) -> None:
    """Each phase is a region of the trace, once a step; the run goes on and is what it is without."""
    flags = (*small, "--data.replay", "true", "--data.backend", "dali", "--logging.tensorboard", "false")
    status, out, err = command(*flags, "--run_dir", tmp_path, "--profile", "2")
    assert (status, err) == (0, "")
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps_4_to_5_rank_0.json.gz"
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    regions = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    for phase, times in ((DATA, 2), (PASS_1, 2), (PASS_2, 2), (OPTIMIZER, 4)):
        assert regions.count(phase) == times, phase
    convolutions = sum(e["name"] == "aten::convolution_backward" for e in events)
    shown = re.search(r"aten::convolution_backward +([\d.]+) ", out)
    assert shown, out
    assert float(shown[1]) == convolutions / 2, "calls a step"
    assert "profile of 2 steps of" in out
    assert "the biggest lever: " in out
    assert "data.replay: every step trains on one and the same batch" in out
    assert re.search(r"data.replay: [\d.e+]+ images/s without reading any", out)
    assert len([line for line in read_metrics(tmp_path) if line["split"] == "train"]) == 9


def test_a_run_that_is_too_short_is_refused(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    status, _, err = command(*small, "--data.backend", "dali", "--run_dir", tmp_path, "--profile", "7")
    assert status == 2
    assert "profile is 7 but the run has 9 steps left, of which the first 3 are left out: profile at most 6" in err


def test_the_summary_adds_up() -> None:
    seconds = {DATA: 0.02, PASS_1: 0.2, PASS_2: 0.18, OPTIMIZER: 0.1}
    operations = [Operation(f"kernel_{i}" + "x" * 90 * (i == 0), 4 * i + 4, 0.1 / (i + 1)) for i in range(30)]
    config = parse(["--config", "digits", "--data.batch_size", "10"])
    text = summarize(Profiled(2, seconds, operations, "runs/profile/*"), config, CPU)
    assert "profile of 2 steps of 250.0 ms (40 images/s while traced)" in text
    assert re.search(r"pass_1 +100.00 ms a step +40.0%", text)
    assert re.search(r"kernel_1 +4 +25.000", text)
    assert "kernel_10" not in text
    assert len(text.splitlines()) <= 24, "one screen"
    assert max(map(len, text.splitlines()[:-2])) <= 100


@pytest.mark.parametrize(
    ("shares", "flags", "expected"),
    [
        ({DATA: 0.4, OPTIMIZER: 0.2}, [], "the input, 40% of the time"),
        ({COMMUNICATION: 0.3, DATA: 0.2}, [], "optimizer.scope local reduces one gradient a step"),
        ({COMMUNICATION: 0.3}, ["--optimizer.name", "sgd"], "30% of the time: a larger data.batch_size"),
        ({OPTIMIZER: 0.3}, [], "the optimizer, 30% of the time"),
        ({PASS_1: 0.5, PASS_2: 0.4}, [], "the passes, 90% of the time. Try precision.compute bf16; "),
        (
            {PASS_1: 1.0},
            [
                *("--optimizer.name", "sgd", "--precision.compute", "bf16", "--precision.channels_last", "true"),
                *("--precision.cudnn_benchmark", "true", "--model.compile", "true"),
            ],
            "They have every setting that makes them faster.",
        ),
    ],
)
def test_the_biggest_lever(shares: dict[str, float], flags: list[str], expected: str) -> None:
    config: Config = parse(["--config", "digits", *flags])
    assert expected in lever(shares, config, GPU)
