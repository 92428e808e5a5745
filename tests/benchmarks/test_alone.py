"""A GPU's host may have no more than a checkout, torch and triton: everything else is hidden here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What torch itself imports. Not numpy, which it does without.
OF_TORCH = ("torch", "torchgen", "functorch", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2")
OF_TORCH += ("markupsafe", "fsspec", "filelock", "optree", "setuptools", "cuda", "nvidia", "sitecustomize")
OF_EXTRA = ("cifar_data", "checkpoint", "faults", "scaling", "input", "start_up")  # they need more, as their pages say
OF_EXTRA += ("input_peers", "photos", "rank_memory", "analysis", "hessian_probe", "flatness", "ranks")
HERE = [path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in OF_EXTRA]
LIBRARY = [
    f"lib.{path.stem}"
    for path in (ROOT / "benchmarks" / "lib").glob("*.py")
    if path.stem not in ("__init__", *OF_EXTRA)
]
OWN = ("lib", "lesam_dist", "lesam_kernels", *HERE)
NEED_TRITON = {"smoke", "ab", "lib.launches"}  # they are of the kernels alone
HIDE = """
import importlib, importlib.machinery, sys

class Only(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in sys.stdlib_module_names or top in ALLOWED or top.startswith("_")
        return super().find_spec(name, path, target) if known else None

sys.meta_path[:] = [f for f in sys.meta_path if f.__module__ == "_frozen_importlib"] + [Only]
sys.path.append("benchmarks")
sys.path[:0] = [".", "kernels"]
"""


def run(allowed: tuple[str, ...], code: str, interpret: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a process in which nothing but this and the standard library can be imported."""
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    text = f"ALLOWED = {(*OF_TORCH, *OWN, *allowed)!r}\n{HIDE}\n{code}"
    command = [sys.executable, "-c", text]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


def check(allowed: tuple[str, ...], code: str, interpret: str = "0") -> str:
    done = run(allowed, code, interpret)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_hidden_cannot_be_imported() -> None:
    for name in ("numpy", "triton", "pytest", "jsonargparse"):
        done = run((), f"import {name}", "0")
        assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr


def test_scripts_are_imported_with_torch_and_triton_alone() -> None:
    """All of them, as where there is a GPU."""
    check(("triton",), f"for name in {sorted((*HERE, *LIBRARY))!r}: importlib.import_module(name)")


def test_scripts_are_imported_and_run_with_torch_alone() -> None:
    """Those that are not of the kernels, as on a CPU."""
    names = {*HERE, *LIBRARY} - NEED_TRITON
    code = f"""
for name in {sorted(names)!r}: importlib.import_module(name)
import kernels, predict, step
kernels.main(["--device", "cpu", "--models", "tiny", "--repeats", "1"])
step.main("--device cpu --models vit_tiny --batch 2 --image-size 32 --repeats 1 --variants sgd,lesam".split())
predict.main(["--bandwidth", "3", "--models", "resnet50"])
"""
    stdout = check((), code)
    assert "| foreach |" in stdout
    assert "failed" not in stdout


def test_kernels_run_with_torch_and_triton_alone() -> None:
    """But for numpy, which Triton's interpreter needs, and a GPU does not."""
    code = "import smoke; smoke.main('--device cpu --launchers sum_sq,restore_adamw --dtypes float32'.split())"
    stdout = check(("triton", "numpy"), code, interpret="1")
    assert "4 of 4 are right" in stdout
