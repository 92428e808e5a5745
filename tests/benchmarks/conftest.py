"""benchmarks/ is a folder of scripts that import each other by their bare names, as when they are run."""

from __future__ import annotations

import sys
from pathlib import Path

# Last, so that nothing else is shadowed; for the folder kernels/, which is no package, a module kernels.py still wins.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
