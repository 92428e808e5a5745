"""`lesam-dist scan`: decode every image of a data set before a run does, and list what is broken."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lesam_dist.config.parser import Parser, wrapped
from lesam_dist.data.commands import class_folders
from lesam_dist.data.folder import below_root, remarks, scan_split
from lesam_dist.data.scan_file import Verdict, has_dali
from lesam_dist.data.scan_pool import examine_all
from lesam_dist.data.skip_list import Skipped, write_skip_list
from lesam_dist.errors import UserError
from lesam_dist.parallel.place import usable_cores

_SHOWN = 20  # broken files, and pairs, that are printed; the rest is in the list
_FORMAT = 1  # of the journal


def scan(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status, 1 if an image is broken.

    Raises:
        UserError: for bad arguments, and for a folder that is no data set.
    """
    arguments = _parser().parse_args(list(argv))
    if not 1 <= arguments.workers <= 1024:
        raise UserError(f"--workers is {arguments.workers}: it must be at least 1, and at most 1024.")
    root, out = class_folders(arguments.root), Path(arguments.out).expanduser()
    if out.is_dir():
        raise UserError(f"--out is '{out}', a folder: give a file.")
    train = scan_split(root, "train")
    val = scan_split(root, "val", train.classes)
    for remark in remarks(train, val):
        print(f"warning: {remark}")
    paths = [below_root(root, path) for path in (*train.paths, *val.paths)]
    begin = time.monotonic()
    try:
        verdicts, decoded = _verdicts(root, paths, out.with_name(out.name + ".journal"), arguments.workers)
        skipped = [Skipped(path, verdicts[path].reason, verdicts[path].size) for path in paths if verdicts[path].reason]
        leaks, copies = _duplicates(verdicts, paths)
        write_skip_list(out, skipped, leaks)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error.strerror}): choose another --out.") from error
    _report(root, verdicts, skipped, leaks, copies)
    print(f"decoded {decoded} of {len(paths)} images in {time.monotonic() - begin:.1f} s; wrote {out}")
    if skipped:
        print(f"leave them out with --data.skip_list {out}, or mend them and scan again (only what changed is decoded)")
    return 1 if skipped else 0


def _parser() -> Parser:
    parser = Parser(
        "scan",
        "Decode every image of ROOT/train and ROOT/val as training does: with Pillow and, where it is "
        "installed, with NVIDIA DALI on the CPU. An image that either refuses is broken.",
        wrapped(
            "exit status: 0 no image is broken, 1 some are, 2 bad input. Ctrl-C and the same command again goes on: "
            "what was decoded is in OUT.journal, and is decoded again if its size or time has changed.",
        ),
    )
    parser.add_argument("root", metavar="ROOT", help="folder that holds train/CLASS/IMAGE and val/CLASS/IMAGE")
    parser.add_argument("--out", default="skip_list.json", help="the list for data.skip_list (default: skip_list.json)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: one per core)")
    return parser


def _verdicts(root: Path, paths: list[str], file: Path, workers: int) -> tuple[dict[str, Verdict], int]:
    """By path, from the journal where it still holds; and how many were decoded now."""
    known = _read_journal(file)
    fresh = {path: known[path] for path in paths if path in known and _holds(root / path, known[path])}
    todo = [path for path in paths if path not in fresh]
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        _open_journal(file, bool(known)) as journal,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        broken = sum(bool(verdict.reason) for verdict in fresh.values())
        task = progress.add_task(f"{broken} broken", total=len(paths), completed=len(fresh))
        full = {str(root / path): path for path in todo}
        for name, verdict in examine_all(full, min(workers, len(full))) if full else ():
            path = full[name]
            if verdict.size is None and verdict.mtime == 0:  # not read, or the decoder crashed
                verdict = verdict._replace(size=_stat(root / path)[0], mtime=_stat(root / path)[1])
            fresh[path] = verdict
            journal.write(json.dumps([path, *verdict]) + "\n")
            broken += bool(verdict.reason)
            progress.update(task, advance=1, description=f"{broken} broken")
    return fresh, len(todo)


def _stat(path: Path) -> tuple[int | None, int]:
    try:
        facts = path.stat()
    except OSError:
        return None, 0
    return facts.st_size, facts.st_mtime_ns


def _holds(path: Path, verdict: Verdict) -> bool:
    """What could not be read is tried again."""
    return verdict[:2] == _stat(path) and not verdict.reason.startswith("cannot be read")


def _header() -> list[object]:
    """With DALI other files may be broken than without."""
    return ["lesam-dist scan", _FORMAT, has_dali()]


def _read_journal(file: Path) -> dict[str, Verdict]:
    """Of a scan with the same decoders; a line that was cut off is passed over."""
    found: dict[str, Verdict] = {}
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return found
    entries = [_parsed(line) for line in lines]
    if not entries or entries[0] != _header():
        return found
    for entry in entries[1:]:
        with suppress(ValueError, TypeError):
            path, size, mtime, reason, digest, odd = entry
            found[path] = Verdict(size, mtime, reason, digest, tuple(odd))
    return found


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _open_journal(file: Path, goes_on: bool) -> IO[str]:
    journal = file.open("a" if goes_on else "w", encoding="utf-8", buffering=1)
    journal.write("\n" if goes_on else json.dumps(_header()) + "\n")  # behind a line that was cut off
    return journal


def _duplicates(verdicts: dict[str, Verdict], paths: list[str]) -> tuple[list[list[str]], Counter[str]]:
    """Images of equal content that are in both splits, and how many copies each split has of its own."""
    same = defaultdict[str, list[str]](list)
    for path in paths:
        if not verdicts[path].reason:
            same[verdicts[path].digest].append(path)
    copies = Counter[str]()
    leaks = []
    for group in same.values():
        splits = Counter(path.split("/", 1)[0] for path in group)
        copies.update({split: count - 1 for split, count in splits.items()})
        if len(splits) > 1:
            leaks.append(group)
    return leaks, +copies


def _report(
    root: Path,
    verdicts: dict[str, Verdict],
    skipped: list[Skipped],
    leaks: list[list[str]],
    copies: Counter[str],
) -> None:
    for each in skipped[:_SHOWN]:
        print(f"broken: {each.path} ({each.reason})")
    if len(skipped) > _SHOWN:
        print(f"... and {len(skipped) - _SHOWN} more, which the list names")
    for group in leaks[:_SHOWN]:
        print(f"warning: the same image in both splits: {' = '.join(group)}")
    if len(leaks) > _SHOWN:
        print(f"... and {len(leaks) - _SHOWN} more, which the list names")
    odd = Counter(name for verdict in verdicts.values() for name in verdict.odd)
    notes = [f"{count} {name}" for name, count in sorted(odd.items())]
    notes += [f"{count} copies of another in {split}" for split, count in sorted(copies.items())]
    if notes:
        print(f"odd but usable: {', '.join(notes)}")
    print(f"{len(skipped)} of {len(verdicts)} images in '{root}' are broken")
