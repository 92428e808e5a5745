"""Which training images cannot be decoded: known from before, met now, and how many are too many."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lesam_dist.data.errors import Failure, unreadable_image
from lesam_dist.data.folder import below_root
from lesam_dist.data.urls import Url
from lesam_dist.errors import UserError

_SHOWN = 3  # files that an error names
_AT_ONCE = 4  # so many unreadable files, and more than half of their batch, are no accident


class BadFiles:
    """Training images that cannot be decoded, so far in this run, by all processes as far as this one knows.

    Each process appends those that it meets to a file of its own, ``FOLDER/rank_N.jsonl``, and reads those of all at
    the beginning of an epoch. What is known does not change what is trained on, since a replacement is a function of
    the sample's place alone (`lesam_dist.data.plan`); it only saves opening a file in vain, also after a restart.

    Args:
        folder: where the files are, RUN_DIR/bad_files. It is made when the first image is met.
        root: the data set's folder; paths below it are written, so that the data may move.
        rank: of this process.
        world_size: number of processes.
        limit: data.max_bad_files.
        say: prints a line for each image that is met.
    """

    def __init__(
        self,
        folder: Path,
        root: Path | Url,
        *,
        rank: int,
        world_size: int,
        limit: int,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self._folder, self._root = folder, root
        self._rank, self._world_size, self._limit, self._say = rank, world_size, limit, say
        self._known: dict[str, str] = {}  # path as the loaders have it -> reason
        self._read: dict[str, int] = {}  # journal -> bytes read
        self.own = 0
        """Images that this process was the first to meet. The sum over all processes is the number of all, in which
        one that two processes have met in the same epoch counts twice."""

    @property
    def count(self) -> int:
        """How many this process knows of."""
        return len(self._known)

    def __contains__(self, path: str) -> bool:
        return path in self._known

    def refresh(self) -> None:
        """Read what all processes have written.

        Raises:
            UserError: there are more than the limit.
        """
        for journal, rank in self._journals():
            mine = rank == self._rank or (self._rank == 0 and rank >= self._world_size)
            for entry in self._new_lines(journal):
                path = str(self._root / entry["path"])
                if path not in self._known:
                    self._known[path] = entry["reason"]
                    self.own += mine
        self._require_few()

    def meet(self, failures: Sequence[Failure], batch_size: int) -> None:
        """Name and keep the images of a batch that could not be had.

        Args:
            failures: at least one.
            batch_size: images of the batch on this process.

        Raises:
            UserError: there are more than the limit now; or so many files of one batch cannot be read that it must be
                the file system, and then none of them is kept.
        """
        unreadable = [failure for failure in failures if failure.size is None]
        if len(unreadable) >= _AT_ONCE and 2 * len(unreadable) > batch_size:
            raise UserError(
                f"{len(unreadable)} of the {batch_size} images of a batch cannot be read, e.g. '{unreadable[0].path}' "
                f"({unreadable[0].reason}): it is hardly the files. Look whether the file system of data.root "
                f"'{self._root}' is still mounted and answers, then go on with --resume auto."
            )
        for failure in failures:
            if self._limit == 0:
                raise unreadable_image(failure)
            if failure.path not in self._known:
                self._add(failure)
        self._require_few()

    def _add(self, failure: Failure) -> None:
        self._known[failure.path] = failure.reason
        self.own += 1
        self._say(f"warning: rank {self._rank} {failure.what}: another sample is read in its place from now on")
        path = below_root(self._root, failure.path)
        line = json.dumps({"path": path, "reason": failure.reason, "size": failure.size})
        try:
            self._append(line.encode() + b"\n")
        except OSError as error:
            self._say(f"warning: '{self._folder}' cannot be written ({error.strerror}): a restart will meet it again")

    def _append(self, line: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / f"rank_{self._rank}.jsonl", "a+b") as file:
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a line that a crash cut off
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _journals(self) -> list[tuple[Path, int]]:
        found = []
        with suppress(FileNotFoundError):
            for path in self._folder.iterdir():
                rank = path.name.removeprefix("rank_").removesuffix(".jsonl")
                if rank.isdecimal() and path.name == f"rank_{rank}.jsonl":
                    found.append((path, int(rank)))
        return sorted(found, key=lambda each: each[1])

    def _new_lines(self, journal: Path) -> Iterator[dict[str, Any]]:
        """The whole lines that are not read yet; what a crash has left of one is passed over."""
        with open(journal, "rb") as file:
            file.seek(self._read.get(journal.name, 0))
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read[journal.name] = self._read.get(journal.name, 0) + len(whole)
        for line in whole.splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("path", "reason")):
                    yield entry

    def _require_few(self) -> None:
        if self.count > self._limit:
            shown = ", ".join(f"'{path}' ({reason})" for path, reason in list(self._known.items())[-_SHOWN:])
            raise UserError(
                f"{self.count} training images cannot be decoded, more than data.max_bad_files {self._limit}: {shown}"
                f"{' and others' * (self.count > _SHOWN)}. Find them all with `lesam-dist scan {self._root}`, mend or "
                "remove them, or leave them out of a new run with data.skip_list. To go on with this run as it is, "
                "raise data.max_bad_files."
            )
