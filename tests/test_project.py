"""The repository keeps the shape that packaging relies on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed() -> None:
    listed = set(
        re.findall(r'^  "((?:lesam_dist|lesam_kernels)[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.M)
    )
    found = {path.parent.relative_to(ROOT) for path in (ROOT / "lesam_dist").rglob("__init__.py")}
    assert listed == {".".join(folder.parts) for folder in found} | {"lesam_kernels"}
    assert not (ROOT / "kernels" / "__init__.py").exists(), "PyPI has another package of the name `kernels`"


def test_import_is_light() -> None:
    """The library must not drag in what only the trainer or a GPU needs."""
    heavy = ("triton", "nvidia.dali", "torchvision", "rich", "accelerate")
    code = f"import sys, lesam_dist; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
