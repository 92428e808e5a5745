"""How a run ended, read from its files, and how that differs from the end of the run that nothing disturbed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lesam_dist.train.meter import TIMED
from lib.faults.damage import checkpoints
from lib.faults.images import TRAIN
from lib.faults.scenarios import BATCH, STEPS


class WrongError(Exception):
    """An end that is wrong whatever it is compared with."""


@dataclass(frozen=True)
class End:
    """What is left of a run.

    Attributes:
        tensors: digest of each tensor of the last checkpoint, by name.
        metrics: the lines of metrics.jsonl, without what a clock says.
        history: the images of each step of the surviving history, in the order of ranks.
    """

    tensors: dict[str, str] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    history: list[list[int]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> End:
        return cls(**json.loads(path.read_text()))


def end_of(run_dir: Path, consumed: Path, left_out: int | None = None) -> End:
    """Read it.

    Args:
        run_dir: of the run.
        consumed: a line for each batch that a rank has trained on.
        left_out: a step whose batch nobody trains on.

    Raises:
        WrongError: no checkpoint of the last step; a torn line or a step twice in metrics.jsonl; a step of which a rank
            has no images.
    """
    newest = next(iter(checkpoints(run_dir)), None)
    if newest is None or int(newest.name.removeprefix("step_")) != STEPS:
        raise WrongError(f"its last checkpoint is {newest and newest.name}, not that of step {STEPS}")
    metrics = _metrics(run_dir / "metrics.jsonl")
    if left_out is not None and any(line["step"] == left_out + 1 and line["split"] == "train" for line in metrics):
        raise WrongError(f"step {left_out} was not left out")
    return End(_tensors(newest), metrics, _history(consumed, left_out))


def differences(found: End, expected: End, *, resized: bool = False) -> list[str]:
    """What differs, in a few words each.

    Args:
        resized: the number of processes has changed. Sums over them then round otherwise, and BatchNorm's statistics
            are of other parts of the batch: only what was read and logged when must be equal.
    """
    said = []
    if resized:
        found, expected = _without_bits(found), _without_bits(expected)
    names = found.tensors.keys() ^ expected.tensors.keys()
    if names:
        said.append(f"checkpoints hold other tensors: {sorted(names)[:3]}")
    other = [name for name in found.tensors if found.tensors[name] != expected.tensors.get(name, "")]
    if other and not names:
        said.append(f"{len(other)} of {len(found.tensors)} tensors differ, as {other[0]}")
    if _known_bad(found) != _known_bad(expected):
        said.append(f"{_known_bad(found)} bad files are counted at the end, not {_known_bad(expected)}")
    for a, b in zip(map(_of_the_step, found.metrics), map(_of_the_step, expected.metrics), strict=False):
        if a != b:
            keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
            said.append(f"metrics differ from {a.get('split')} step {a.get('step')} on: {', '.join(keys[:4])}")
            break
    if len(found.metrics) != len(expected.metrics):
        said.append(f"metrics.jsonl has {len(found.metrics)} lines, not {len(expected.metrics)}")
    for step, (mine, theirs) in enumerate(zip(found.history, expected.history, strict=True)):
        if mine != theirs:
            said.append(f"step {step} consumed images {mine}, not {theirs}")
            break
    return said


def _of_the_step(line: dict[str, Any]) -> dict[str, Any]:
    """Without the number of bad files: a run that starts again knows them from its first step on."""
    return {key: value for key, value in line.items() if key != "bad_files"}


def _known_bad(end: End) -> float:
    return max((line.get("bad_files", 0.0) for line in end.metrics), default=0.0)


def first_steps(consumed: Path) -> dict[int, tuple[int, int]]:
    """The first and the last step of each start that made any."""
    steps: dict[int, list[int]] = {}
    for text in consumed.read_text().splitlines() if consumed.exists() else ():
        line = json.loads(text)
        steps.setdefault(line["start"], []).append(line["step"])
    return {start: (min(made), max(made)) for start, made in steps.items()}


def _without_bits(end: End) -> End:
    """Whole tensors are shared out over the ranks, so their files differ too."""
    keys = ("step", "split", "epoch", "lr", "samples")
    metrics = [{key: line[key] for key in keys if key in line} for line in end.metrics]
    return End({}, metrics, end.history)


def counted_wrongly(history: list[list[int]], bad: int | None = None, left_out: int | None = None) -> list[str]:
    """Images that an epoch did not consume exactly once.

    Args:
        history: of a run.
        bad: an image that cannot be decoded: it must never be consumed, and another takes its place.
        left_out: a step whose batch nobody trains on.
    """
    said = []
    per_epoch = TRAIN // BATCH
    for epoch in range(len(history) // per_epoch):
        counts = Counter(number for step in history[epoch * per_epoch :][:per_epoch] for number in step)
        lacking = [n for n in range(TRAIN) if counts[n] == 0 and n != bad]
        extra = counts - Counter(range(TRAIN))
        if left_out is not None and left_out // per_epoch == epoch:
            lacking = lacking if len(lacking) != BATCH else []
        if lacking or sum(extra.values()) != (bad is not None) or (bad is not None and counts[bad]):
            said.append(f"epoch {epoch} left out images {lacking} and consumed {dict(extra)} too often")
    return said


def _tensors(checkpoint: Path) -> dict[str, str]:
    """Of every rank's file: parameters, buffers, momenta, averages, and what a rank keeps for itself."""
    digests = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            digests |= {f"{file.name}/{name}": _digest(content.get_tensor(name)) for name in content.keys()}  # noqa: SIM118
    return digests


def _digest(value: Tensor) -> str:
    content = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {tuple(value.shape)} {hashlib.blake2b(content, digest_size=8).hexdigest()}"


def _metrics(log: Path) -> list[dict[str, Any]]:
    text = log.read_bytes()
    if not text.endswith(b"\n"):
        raise WrongError("the last line of metrics.jsonl is torn")
    lines = [_metric(line, number) for number, line in enumerate(text.splitlines(), 1)]
    twice = [key for key, count in Counter((line["split"], line["step"]) for line in lines).items() if count > 1]
    if twice:
        raise WrongError(f"metrics.jsonl has {twice[0][0]} step {twice[0][1]} twice")
    return lines


def _metric(line: bytes, number: int) -> dict[str, Any]:
    try:
        return {key: value for key, value in json.loads(line).items() if key not in TIMED}
    except (ValueError, AttributeError):
        raise WrongError(f"line {number} of metrics.jsonl is torn: {line[:60]!r}") from None


def _history(consumed: Path, left_out: int | None) -> list[list[int]]:
    """The last start in which any rank made a step is the one whose step counts; all ranks must have made it then."""
    starts: dict[int, int] = {}
    sizes: dict[int, int] = {}
    images: dict[tuple[int, int, int], list[int]] = {}
    for text in consumed.read_text().splitlines():
        line = json.loads(text)
        start, step = line["start"], line["step"]
        starts[step], sizes[start] = max(start, starts.get(step, 0)), line["of"]
        images[start, step, line["rank"]] = line["images"]  # a start may go back, and make a step again
    history = []
    for step in range(STEPS):
        if step == left_out:
            history.append([])
            continue
        if step not in starts:
            raise WrongError(f"nobody made step {step}")
        parts = [images.get((starts[step], step, rank)) for rank in range(sizes[starts[step]])]
        for rank, part in enumerate(parts):
            if part is None:
                raise WrongError(f"rank {rank} did not make step {step} when the others last did")
        history.append([number for part in parts if part for number in part])
    return history
