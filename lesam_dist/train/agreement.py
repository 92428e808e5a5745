"""Before the first step all processes agree: on versions and config, on the images, and on the folder they write to.

Each of them could differ on another node and train something wrong without an error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lesam_dist.config.schema import Config
from lesam_dist.config.values import flatten
from lesam_dist.errors import SharedError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.report import name_of

_FREE = (
    "data.root",
    "data.skip_list",
    "data.label_noise.file",
    "data.workers",
    "run_dir",
    "init_from",
)  # paths and cores are a node's own; what they hold is compared
_PACKAGES = ("triton", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
_LOOKS, _PAUSE = 4, 0.5  # how often, and after how many seconds, a process looks for a file on a slow file system


def agree_on_setup(config: Config, world: Distributed) -> None:
    """Compare versions, code and config.

    Raises:
        SharedError: naming the first difference, with the rank, its host and both values.
    """
    if world.world_size > 1:
        settings = {name: value for name, value in flatten(config).items() if name not in _FREE}
        _compare({**_versions(), **settings}, world, "Start the same command, with the same files, on all nodes")


def agree_on_data(splits: Mapping[str, Any], world: Distributed) -> None:
    """Compare the images of each split, which has a length and a ``digest``.

    Raises:
        SharedError: as `agree_on_setup`.
    """
    if world.world_size > 1:
        facts = {f"{name} data": f"{len(split)} images ({split.digest})" for name, split in splits.items()}
        _compare(facts, world, "Copy the same images to all nodes")


def agree_on_weights(digest: str, world: Distributed) -> None:
    """Compare the weights that a run starts from, by their digest.

    Raises:
        SharedError: as `agree_on_setup`.
    """
    if world.world_size > 1:
        _compare({"the weights of init_from": digest}, world, "Copy the same file to all nodes")


def agree_on_run_dir(run_dir: Path, world: Distributed) -> None:
    """Refuse a folder that is not the same one for all: each process writes its part of a checkpoint there.

    Raises:
        SharedError: naming the first process that does not see what rank 0 wrote.
    """
    if world.world_size == 1:
        return
    token = run_dir / f".shared_{secrets.token_hex(8)}"  # a new name, which no file system can remember as missing
    if world.is_main:
        token.touch()
    seen = run_dir / world.share(token.name)
    found = _gather(_sees(seen), world)
    if world.is_main:
        with suppress(OSError):
            token.unlink()
    for rank, (host, sees) in enumerate(found):
        if not sees:
            raise SharedError(
                f"run_dir '{run_dir}' is not one folder: {_name(rank, host)} does not see what "
                f"{_name(0, found[0][0])} wrote there. Choose a --run_dir on a file system that all nodes share."
            )


def _sees(path: Path) -> bool:
    for _ in range(_LOOKS):
        if path.exists():
            return True
        time.sleep(_PAUSE)
    return False


def _compare(facts: dict[str, Any], world: Distributed, remedy: str) -> None:
    found = _gather(facts, world)
    host, first = found[0]
    for rank, (other_host, others) in enumerate(found):
        for name in first | others:
            if first.get(name) != others.get(name):
                raise SharedError(
                    f"the processes differ in {name}: {_name(rank, other_host)} has {others.get(name)}, "
                    f"{_name(0, host)} has {first.get(name)}. {remedy}."
                )


def _gather(value: Any, world: Distributed) -> list[Any]:
    """Every rank's host and value."""
    return world.gather((socket.gethostname(), value))


def _name(rank: int, host: str) -> str:
    return name_of(rank, host, several_hosts=True)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "the version of python": platform.python_version(),
        "the version of torch": torch.__version__,
        "the version of CUDA": torch.version.cuda,
    }
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[f"the version of {package}"] = metadata.version(package)
    return versions | {f"the code of {package}": _digest_of(package) for package in ("lesam_dist", "lesam_kernels")}


def _digest_of(package: str) -> str | None:
    """Of a package's source files: a version number does not tell two checkouts apart."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
