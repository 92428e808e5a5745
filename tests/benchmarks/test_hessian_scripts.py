"""The scripts about the Hessian, at toy sizes, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(tmp_path: Path, script: str, *options: str) -> tuple[list[dict[str, Any]], str]:
    files = "--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")
    command = [sys.executable, f"benchmarks/{script}.py", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.md").read_text().split() == done.stdout.split()
    results: list[dict[str, Any]] = json.loads((tmp_path / "out.json").read_text())["results"]
    return results, done.stdout


def test_analysis(tmp_path: Path) -> None:
    sizes = "--model", "cifar_resnet8", "--images", "3", "--top", "1", "--points", "3"
    results, out = run(tmp_path, "analysis", *sizes)
    assert [(r["analysis"], r["ranks"]) for r in results] == [
        ("hessian", 1),
        ("landscape", 1),
        ("hessian", 2),
        ("landscape", 2),
    ]
    assert results[0]["passes"] == results[2]["passes"] > 1, "the same, whatever the number of processes"
    assert (results[1]["passes"], results[3]["passes"]) == (3, 2)
    assert all(r["analysis_s"] > 0 and r["pass_s"] > 0 for r in results)
    assert "| landscape | 2 |" in out


def test_hessian_probe(tmp_path: Path) -> None:
    sizes = "--model", "cifar_resnet8", "--epochs", "0", "--batch", "16", "--image_size", "8", "--probes", "0.1", "0.01"
    results, out = run(tmp_path, "hessian_probe", *sizes)
    assert [(r["epoch"], r["probe"]) for r in results] == [(0, 0.1), (0, 0.01)]
    for r in results:
        assert 0 <= r["cosine"] <= 1 + 1e-5
        assert r["exact_cosine"] == pytest.approx(results[0]["exact_cosine"])
        assert all(r[name] > 0 for name in ("eigenvector", "gradient", "noise"))
    assert "### After 0 epochs" in out
