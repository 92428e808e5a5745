"""RUN_DIR/classes.json: the names of a run's classes, in the order of its network's outputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lesam_dist.errors import UserError

CLASSES = "classes.json"


def write_classes(run_dir: Path, classes: Sequence[str]) -> None:
    """Write them, unless they are there: a run keeps its data.

    Args:
        run_dir: of the run.
        classes: in label order.
    """
    target = run_dir / CLASSES
    if not target.exists():
        aside = run_dir / f".{CLASSES}.partial"
        aside.write_text(json.dumps(list(classes), indent=1, ensure_ascii=True) + "\n", encoding="ascii")
        aside.replace(target)


def read_classes(run_dir: Path) -> tuple[str, ...] | None:
    """The names; None where a run of an earlier version has not written them.

    Raises:
        UserError: the file is something else.
    """
    file = run_dir / CLASSES
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"'{file}' cannot be read as the names of classes: {error}.") from error
    if not (isinstance(found, list) and found and all(isinstance(name, str) for name in found)):
        raise UserError(f"'{file}' holds no list of names: it was changed. Remove it to take them from the data.")
    return tuple(found)
