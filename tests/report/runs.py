"""Runs of random numbers, in the files that the trainer writes, and documents as analyses write them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lesam_dist.config.command_line import dump, parse
from lesam_dist.train.run_dir import CONFIG
from lesam_dist.train.telemetry import METRICS

STEPS, BATCH = 4, 32  # of an epoch
Lines = list[dict[str, Any]]


def write_run(
    folder: Path,
    draw: random.Random,
    *,
    method: str = "lesam",
    seed: int = 0,
    epochs: int = 3,
    done: int | None = None,
    level: float | None = None,
    flags: tuple[str, ...] = (),
) -> Lines:
    """A run of so many epochs, of which ``done`` are made; its accuracies are at about ``level``. Returns its log."""
    folder.mkdir(parents=True)
    config = parse(["--config", f"digits_resnet8_{method}", "--epochs", str(epochs), "--seed", str(seed), *flags])
    (folder / CONFIG).write_text(dump(config))
    level = draw.uniform(50, 90) if level is None else level
    lines: Lines = []
    for step in range(1, STEPS * (epochs if done is None else done) + 1):
        lines.append(_train(draw, step, is_plain=method == "sgd"))
        if step % STEPS == 0:
            lines.append(_val(draw, step, level))
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def write_document(run: Path, stem: str, document: Mapping[str, Any]) -> None:
    """What an analysis leaves behind."""
    (run / "analysis").mkdir(exist_ok=True)
    (run / "analysis" / f"{stem}.json").write_text(json.dumps(document))


def documents(draw: random.Random, run: str) -> dict[str, dict[str, Any]]:
    """One of each analysis, by the stem of its file."""
    draws = [draw.uniform(1, 2) for _ in range(5)]
    estimate = {"mean": sum(draws) / 5, "standard_error": 0.1, "draws": 5}
    nodes, weights = sorted(draw.uniform(0, 50) for _ in range(4)), [0.7, 0.1, 0.1, 0.1]
    hessian = {
        "eigenvalues": sorted((draw.uniform(1, 99) for _ in range(5)), reverse=True),
        "first_over_fifth": 3.0,
        "trace": estimate,
        "density": [{"nodes": nodes, "weights": weights}],
        "loss": draws[0],
        "grad_norm": draws[1],
    }
    lpf = {"lpf": estimate, "loss": draws[0], "losses": draws, "sigma": 0.01, "difference": 0.1}
    places = [-1.0, 0.0, 1.0]
    plane = [[draw.uniform(1, 99) for _ in places] for _ in places]
    plane[0][2] = None  # type: ignore[call-overload]  # not finite
    accuracy = {"accuracy": draw.uniform(10, 90), "standard_error": 1.0}
    bins = [{"low": 0.0, "high": 1.0, "images": 9, "confidence": 0.5, "accuracy": 0.4}]
    cells = [{"kind": k, "severity": s, "error": draw.uniform(0, 99)} for k in ("fog", "snow") for s in (5, 1)]
    kinds = [{"kind": kind, "mean_error": 40.0} for kind in ("fog", "snow")]
    corrupted = {"cells": cells, "kinds": kinds, "mean_error": 40.0, "mean_nll": 1.0, "mean_ece": 0.1}
    curve = {"values": draws, "ends": draws[:2]}
    measure = {"missing": 0, "mean": draws[2], "standard_error": 0.1, "part": "average", "adaptive": False}
    one = {"settings": {"weights": f"digest of {run}", "samples": 9}, "run": run, "checkpoint": "step_00000012"}
    one["versions"] = {"lesam_dist": "0.1.0", "torch": "2.9", "python": "3.12"}
    two = {**one, "checkpoints": [one, one], "settings": {"weights": [f"digest of {run}"] * 2, "samples": 9}}
    del two["checkpoint"]
    surface = {"loss": 1.0, "nonfinite": 1, "losses": plane}
    line = {"loss": 1.0, "nonfinite": 0, "losses": plane[1]}
    results: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "hessian": (one, hessian),
        "lpf": (one, lpf),
        "landscape-2d": (two, {"coordinates": places, "surfaces": [surface] * 2}),
        "landscape-1d": (two, {"coordinates": places, "surfaces": [line] * 2}),
        "robustness": (
            one,
            {
                "clean": accuracy,
                "attacked": [{**accuracy, "norm": "linf", "eps": 4 / 255}],
                "calibration": {"ece": 0.1, "nll": 1.0, "bins": bins},
                "corrupted": corrupted,
            },
        ),
        "connect": (
            two,
            {
                "places": [0.0, 0.25, 0.5, 0.75, 1.0],
                "batchnorm": "estimate",
                "nonfinite": 0,
                **dict.fromkeys(("loss", "error"), curve),
                **{f"{name}_barrier": {"height": 0.0, "place": 0.5} for name in ("loss", "error")},
            },
        ),
        "sharpness": (one, {"measures": [{**measure, "rho": rho} for rho in (0.01, 0.1)]}),
    }
    return {
        stem: {"analysis": stem.partition("-")[0], **about, "results": found}
        for stem, (about, found) in results.items()
    }


def _train(draw: random.Random, step: int, *, is_plain: bool) -> dict[str, Any]:
    loss, norm = draw.uniform(0.5, 2), draw.uniform(0.5, 2)
    line = {"step": step, "epoch": round(step / STEPS, 4), "split": "train", "loss": loss, "grad_norm": norm}
    line |= {"skipped": 0.0, "lr": 0.1 * math.cos(step / 99), "images_per_s": draw.uniform(100, 300)}
    line |= {"data_wait": 0.1, "share_pass_1": 0.4, "share_optimizer": 0.1}
    if not is_plain:
        rho = min(0.1 / norm, 0.2)
        line |= {"rho": rho, "sigma": 0.1, "perturbed_loss": loss + rho * norm + draw.uniform(0, 0.02)}
        line |= {"share_pass_2": 0.35}
    return line


def _val(draw: random.Random, step: int, level: float) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step // STEPS,
        "split": "val",
        "acc1": level + draw.uniform(-1, 1),
        "acc5": 99.0,
        "loss": draw.uniform(0.2, 3),
        "ece": draw.uniform(0, 0.3),
        "samples": 359.0,
    }
