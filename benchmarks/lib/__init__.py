"""What the benchmarks share. Importing it puts this checkout on the path, so that it is measured and nothing installed.

Needs torch and triton alone, as the scripts do.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for _folder in (ROOT / "kernels", ROOT):
    if str(_folder) not in sys.path:
        sys.path.insert(1, str(_folder))
