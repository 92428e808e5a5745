"""Packed shards behind an address: the same batches through HTTP, and what is said of an address that does not work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lesam_dist.data import Loader
from lesam_dist.data.opening import data_root, open_splits
from lesam_dist.data.packed import open_packed
from lesam_dist.data.packed.command import pack
from lesam_dist.data.urls import Url, is_url
from lesam_dist.errors import UserError
from tests.data.conftest import smooth_image

pytest.importorskip("aiohttp")  # of fsspec's HTTP


class Ranges(SimpleHTTPRequestHandler):
    """Files of a folder, whole or in part."""

    asked: list[tuple[str, str | None]]

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append((self.path, wanted))
        path = Path(self.translate_path(self.path))
        if not path.is_file() or wanted is None:
            super().do_GET()
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        data = path.read_bytes()[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def packed(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, count in (("train", 24), ("val", 5)):
        for i in range(count):
            folder = tmp_path / "data" / split / f"{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            smooth_image(rng, 40, 50).save(folder / f"{i:02}.JPEG")
    pack([str(tmp_path / "data"), str(tmp_path / "packed"), "--images_per_shard", "10", "--workers", "1"])
    return tmp_path / "packed"


@pytest.fixture
def url(packed: Path) -> Iterator[Url]:
    asked: list[tuple[str, str | None]] = []

    class Handler(Ranges):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(packed))

    Handler.asked = asked
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = asked  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    root = data_root(f"http://127.0.0.1:{server.server_address[1]}")
    assert isinstance(root, Url)
    yield root
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("window", [None, 7])
def test_the_batches_are_those_of_the_folder(
    packed: Path, url: Url, backend: str, load: Callable[..., Loader], window: int | None
) -> None:
    for split, (near, far) in enumerate(zip(open_packed(packed), open_splits(url, first=True), strict=True)):
        options = {"train": not split, "batch_size": 6 if not split else 2, "window": window}
        pairs = zip(load(near, backend, **options).epoch(1), load(far, backend, **options).epoch(1), strict=True)
        for (images, labels), (theirs, theirs_too) in pairs:
            assert torch.equal(images, theirs)
            assert torch.equal(labels, theirs_too)
    assert near.digest == far.digest


def test_the_first_process_of_a_node_fetches_the_index_for_all(url: Url, tmp_path: Path) -> None:
    open_splits(url, first=True)
    (cached,) = (tmp_path / "cache/lesam_dist").iterdir()
    modified = cached.stat().st_mtime_ns
    train, _ = open_splits(url, first=False)
    assert len(train) == 24
    assert cached.stat().st_mtime_ns == modified


def test_a_shard_that_is_missing_or_cut_off(packed: Path, url: Url) -> None:
    shard = packed / "train-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:5000])
    with pytest.raises(UserError, match=rf"'{url}/train-000001.tar' has 5000 bytes, but the index says {len(data)}"):
        open_splits(url, first=True)
    shard.unlink()
    with pytest.raises(UserError, match=rf"'{url}/train-000001.tar' is missing"):
        open_splits(url, first=True)
    (packed / "index.safetensors").unlink()
    with pytest.raises(UserError, match=rf"'{url}/index.safetensors' is not there: data.root must be the address"):
        open_splits(url, first=True)


def test_addresses_that_do_not_work(monkeypatch: pytest.MonkeyPatch, unused_port: int) -> None:
    with pytest.raises(
        UserError, match=r"data.root 'nfs4://server/x/index.safetensors': the scheme 'nfs4' is not known"
    ):
        open_splits(data_root("nfs4://server/x"), first=True)
    with pytest.raises(UserError, match=r"needs a package for 'gs' that is not installed: .*gcsfs"):
        open_splits(data_root("gs://bucket/x"), first=True)
    with pytest.raises(UserError, match=r"cannot be read \(ClientConnectorError: .*that this node has credentials"):
        open_splits(data_root(f"http://127.0.0.1:{unused_port}/x"), first=True)


@pytest.fixture
def unused_port() -> int:
    with ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        return int(server.server_address[1])


def test_what_is_an_address() -> None:
    assert [is_url(text) for text in ("s3://b/x", "hf://datasets/a/b", "/data", "./s3:/b", "~/x", "C:\\x")] == [
        *(True, True),
        *[False] * 4,
    ]
    assert Url("s3://b/x/") / "train" == "s3://b/x/train"
    assert str(Url("s3://b/x") / "_")[:-1] == "s3://b/x/"
