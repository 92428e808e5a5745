"""Open a packed data set: what its index says, and whether the shards are there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from lesam_dist.data.folder import ImageFolder
from lesam_dist.data.listing import Listing, Paths, read_listing
from lesam_dist.data.packed.layout import INDEX, KIND, SPLITS, Shard
from lesam_dist.data.reading import file_system
from lesam_dist.data.shards import Shards
from lesam_dist.data.urls import Url
from lesam_dist.errors import UserError

_AT_ONCE = 32  # questions to a file system that may be far away
_T = TypeVar("_T")


def holds_shards(root: Path) -> bool:
    """Whether a folder is a packed data set."""
    return (root / INDEX).is_file()


def open_packed(root: Path | Url, *, verify: bool = True) -> tuple[ImageFolder, ImageFolder]:
    """Training and validation images of a packed data set; each sample's place in the shards is read when it is needed.

    Args:
        root: the folder, or its address.
        verify: read the whole index, see that each shard is there and as long as it should be, and keep the index of an
            address on this node. One process of a node does so before the others open it.

    Raises:
        UserError: there is no index, or it is damaged, or a shard is missing or cut off; or the address cannot be read.
    """
    file = root / INDEX
    listing = _read(_downloaded(file, verify) if isinstance(file, Url) else file, file)
    damaged = UserError(f"'{file}' is damaged: copy it again, or pack the images again with `lesam-dist pack`.")
    if listing.facts.get("kind") != KIND or (verify and not listing.is_whole()):
        raise damaged
    try:
        if verify:
            _require_shards(root, shards_of(listing))
        train, val = (_split(root, name, listing) for name in SPLITS)
    except (KeyError, TypeError) as error:  # written by another program
        raise damaged from error
    return train, val


def shards_of(listing: Listing) -> list[Shard]:
    """Of both splits."""
    return [Shard(*shard) for name in SPLITS for shard in listing.facts[name]["shards"]]


def _read(file: Path, name: Path | Url) -> Listing:
    try:
        return read_listing(file)
    except OSError as error:
        raise UserError(f"'{name}' cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise UserError(f"'{name}': {error}. Copy it again, or pack again with `lesam-dist pack`.") from error


def _split(root: Path | Url, name: str, listing: Listing) -> ImageFolder:
    facts, arrays = listing.facts, listing.arrays
    names, ends, labels, shard, start, size = (
        arrays[f"{name}.{part}"] for part in ("names", "ends", "labels", "shard", "start", "size")
    )
    files = [str(root / each[0]) for each in facts[name]["shards"]]
    paths = Paths(str(root / name / "_")[:-1], facts["classes"], labels, names, ends)
    return ImageFolder(
        root,
        tuple(facts["classes"]),
        paths,
        labels,
        facts[name]["passed_over"],
        known_digest=facts[name]["digest"],
        shards=Shards(files, shard, start, size),
    )


def _require_shards(root: Path | Url, shards: list[Shard]) -> None:
    size_of: Callable[[str], int | None] = _remote_size if isinstance(root, Url) else _local_size
    files = [str(root / shard.name) for shard in shards]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        sizes = list(pool.map(size_of, files))
    missing = [file for file, size in zip(files, sizes, strict=True) if size is None]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"'{missing[0]}' is missing{more}: copy it from where it was packed, or pack again.")
    for file, size, shard in zip(files, sizes, shards, strict=True):
        if size != shard.size:
            raise UserError(
                f"'{file}' has {size} bytes, but the index says {shard.size}: it is cut off, or of another data set. "
                "Copy it again; `lesam-dist pack --verify` checks all of them."
            )


def _local_size(file: str) -> int | None:
    try:
        return os.stat(file).st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"'{file}' cannot be read ({error.strerror}): make it readable.") from error


def _remote_size(url: str) -> int | None:
    return _asked(url, _size)


def _size(files: Any, path: str) -> int | None:
    try:
        return int(files.size(path))
    except FileNotFoundError:
        return None


def _downloaded(url: Url, verify: bool) -> Path:
    """The copy of an index on this node."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lesam_dist"
    file = cache / f"packed-{hashlib.blake2b(url.encode(), digest_size=12).hexdigest()}.safetensors"
    if verify:
        data = _asked(url, lambda files, path: files.cat_file(path))
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            cache.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(data)
            aside.replace(file)
        except OSError as error:
            raise UserError(
                f"the index of '{url}' cannot be kept in '{cache}' ({error.strerror}): make room there, or set "
                "XDG_CACHE_HOME to a folder that can be written."
            ) from error
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
    return file


def _asked(url: str, question: Callable[[Any, str], _T]) -> _T:
    """What a store answers.

    Raises:
        UserError: it cannot be asked.
    """
    scheme = url.partition("://")[0]
    try:
        return question(*file_system(url))
    except FileNotFoundError as error:
        raise UserError(f"'{url}' is not there: data.root must be the address of packed shards.") from error
    except ValueError as error:
        raise UserError(
            f"data.root '{url}': the scheme '{scheme}' is not known, or what follows it is wrong ({_words(error)}): "
            "write an address as s3://BUCKET/FOLDER or https://HOST/FOLDER."
        ) from error
    except ImportError as error:
        raise UserError(
            f"data.root '{url}' needs a package for '{scheme}' that is not installed: {_words(error)}."
        ) from error
    except Exception as error:  # each store's client has its own, for credentials above all
        raise UserError(
            f"'{url}' cannot be read ({type(error).__name__}: {_words(error)}): see that the address is right, and "
            "that this node has credentials for it and a network."
        ) from error


def _words(error: Exception) -> str:
    """In one line, as some clients say more."""
    return " ".join(str(error).split())
