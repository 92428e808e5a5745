"""`lesam-dist predict`: which images, and where what is said of them goes."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO

from lesam_dist.config.flags import divide
from lesam_dist.config.parser import Parser, examples
from lesam_dist.data.folder import EXTENSIONS
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import process_group
from lesam_dist.train.predict import Prediction, predict
from lesam_dist.train.source import add_source, read_source

_TEXT = """
Name the classes of images, most probable first, with their probabilities (softmax). Images are seen as in the run's
evaluation. One that cannot be read is named and left out, and the status is then 1. Other flags are those of
`lesam-dist train`, over the run's own config: --data.eval_batch_size N, --parallel.device cpu.
"""


def predict_command(argv: Sequence[str]) -> int:
    """The command; 1 where an image could not be read, else 0.

    Raises:
        UserError: for anything wrong in ``argv``, the checkpoint, or the names of the classes.
    """
    parser = Parser("predict", _TEXT, examples("predict runs/digits images/ --output predictions.csv"))
    add_source(parser)
    parser.add_argument("images", nargs="+", type=Path, help="image files, and folders of them at any depth")
    parser.add_argument("--output", type=Path, help="file to write, .csv or .jsonl (default: CSV on the terminal)")
    parser.add_argument("--top", type=int, default=5, help="classes of each image (default: 5)")
    own, flags = divide(argv)
    arguments = parser.parse_args(own)
    if arguments.top < 1:
        raise UserError(f"--top is {arguments.top}: it must be at least 1.")
    if arguments.output is not None and arguments.output.suffix not in (".csv", ".jsonl"):
        raise UserError(f"--output is '{arguments.output}': name a file that ends in .csv or .jsonl.")
    paths = images_in(arguments.images)
    source = read_source(arguments.checkpoint, arguments.config, flags, averaged=arguments.ema)
    parallel = source.config.parallel
    with process_group(parallel.device, parallel.timeout_s) as world:
        if world.world_size > 1:
            raise UserError(f"predict works in one process, and there are {world.world_size}: start one.")
        broken: list[str] = []
        predictions = predict(source, paths, world, broken, top=arguments.top)
        first = next(predictions, None)  # what is wrong shows before the file is written
        with _writing(arguments.output) as file:
            found = chain([] if first is None else [first], predictions)
            if arguments.output and arguments.output.suffix == ".jsonl":
                count = _as_jsonl(file, found)
            else:
                count = _as_csv(file, found, len(first.classes) if first else arguments.top)
    for reason in broken:
        print(f"cannot read {reason}", file=sys.stderr)
    if arguments.output:
        print(f"{arguments.output}: {count} images, {len(broken)} left out", file=sys.stderr)
    return 1 if broken else 0


def images_in(places: Sequence[Path]) -> list[str]:
    """The files, and those of the folders that end as images do, sorted in each; hidden ones are left out.

    Raises:
        UserError: a place is not there, or a folder has no images.
    """
    found: list[str] = []
    for place in places:
        if place.is_dir():
            inside = sorted(
                path
                for path in place.rglob("*")
                if path.name.lower().endswith(EXTENSIONS)
                and not any(part.startswith(".") for part in path.relative_to(place).parts)
                and path.is_file()
            )
            if not inside:
                raise UserError(f"'{place}' has no images, which end in {', '.join(EXTENSIONS)}: look at its name.")
            found += map(str, inside)
        elif place.exists():
            found.append(str(place))
        else:
            raise UserError(f"'{place}' does not exist: give image files, or folders of them.")
    return found


@contextmanager
def _writing(output: Path | None) -> Iterator[IO[str]]:
    """The terminal, or a file that appears when it is complete."""
    if output is None:
        yield sys.stdout
        return
    aside = output.with_name(f".{output.name}.partial")
    try:
        with aside.open("w", encoding="utf-8", newline="") as file:
            yield file
        aside.replace(output)
    except OSError as error:
        raise UserError(f"'{output}' cannot be written: {error.strerror or error}.") from error
    finally:
        aside.unlink(missing_ok=True)


def _as_csv(file: IO[str], found: Iterable[Prediction], places: int) -> int:
    """A line for each image: path, then class and probability of each place. Returns the number of images."""
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["path", *(f"{name}_{place}" for place in range(1, places + 1) for name in ("class", "probability"))])
    count = 0
    for each in found:
        pairs = zip(each.classes, each.probabilities, strict=True)
        rows.writerow([each.path, *(text for name, p in pairs for text in (name, f"{p:.6g}"))])
        count += 1
    return count


def _as_jsonl(file: IO[str], found: Iterable[Prediction]) -> int:
    count = 0
    for each in found:
        file.write(json.dumps(each._asdict()) + "\n")
        count += 1
    return count
