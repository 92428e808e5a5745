"""Domains on disk: what is found, chosen and held out; batches of several domains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lesam_dist.data import Loader, Transform
from lesam_dist.data.cycles import Cycles
from lesam_dist.data.domains import choose, hold_out, joined, scan_domains
from lesam_dist.errors import UserError

SIZES = {"art": (5, 4), "photo": (7, 3), "sketch": (2, 9)}  # images of each class


def write(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three domains with two classes; each image is of one colour, which tells domain, class and number."""
    for d, (domain, counts) in enumerate(SIZES.items()):
        for c, count in enumerate(counts):
            folder = tmp_path / "data" / domain / f"class_{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (20 * d, 20 * c, 20 * i)).save(folder / f"{i}.png")
    return tmp_path / "data"


def test_what_is_found(root: Path) -> None:
    write(root, ".hidden/class_0/1.png", "README")
    domains = scan_domains(root)
    assert list(domains) == ["art", "photo", "sketch"]
    for name, folder in domains.items():
        assert folder.classes == ("class_0", "class_1")
        assert np.bincount(folder.labels).tolist() == list(SIZES[name])
    all_images = joined(domains, marked=True)
    for path, label in zip(all_images.paths, all_images.labels.tolist(), strict=True):
        domain, name = Path(path).relative_to(root).parts[:2]
        assert divmod(label, 2) == (list(SIZES).index(domain), int(name[-1]))
    assert joined(domains).labels.max() == 1
    skipped = scan_domains(root, {"photo/class_0/3.png"})
    assert [len(each) for each in skipped.values()] == [9, 9, 11]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("a/x/1.png", "a/y/1.png", "b/x/1.png"), r"/a' has the class 'y', which '.*/b' has not"),
        (("a/x/1.png", "b/x/1.png", "b/w/1.png"), r"/b' has the class 'w', which '.*/a' has not"),
        (("a/x/1.png", "a/y/1.txt", "b/x/1.png"), r"/a/y' holds no images \(but 1 .txt files\)"),
        (("a/x/1.png", "a/y/1.png"), "holds fewer than two domains .found: a/."),
        (("train/x/1.png", "val/x/1.png"), "holds train/ and val/, and not one folder a domain"),
        (("a/x/1.png", "b/x/1.png"), "has a single class, 'x'"),
        (("a/1.png", "b/x/1.png"), "/a' has no class folders"),
    ],
)
def test_refused(tmp_path: Path, files: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        scan_domains(write(tmp_path, *files))


def test_refused_without_a_folder_or_a_class(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere' does not exist"):
        scan_domains(tmp_path / "nowhere")
    write(tmp_path, "a/x/1.png", "a/y/1.png", "b/x/1.png", "b/y/1.png")
    with pytest.raises(UserError, match=r"data.skip_list leaves out all images of the class 'y' in '.*/b'"):
        scan_domains(tmp_path, {"b/y/1.png"})


def test_choice() -> None:
    names = ("art", "photo", "sketch")
    assert choose(names, ["photo"], None) == (("photo",), ("art", "sketch"))
    assert choose(names, ["photo", "art"], ["sketch"]) == (("photo", "art"), ("sketch",))
    for source, target, said in (
        (["phto"], None, "unknown domain in domains.source 'phto': did you mean 'photo'?"),
        (["art"], ["sketches"], "unknown domain in domains.target 'sketches': did you mean 'sketch'?"),
        (["art"], ["art", "photo"], "'art' is in domains.source and in domains.target"),
        (["art", "art"], None, "domains.source has 'art' twice"),
        ([], None, "domains.source is empty: name one of art, photo, sketch"),
        (["art"], [], "domains.target is empty"),
        (list(names), None, r"domains.source names all domains \(art, photo, sketch\)"),
    ):
        with pytest.raises(UserError, match=said):
            choose(names, source, target)


def test_held_out(root: Path, seed: int) -> None:
    """DomainBed's: a share of the whole domain, rounded down; the same for one seed, and another for each domain."""
    photo = scan_domains(root)["photo"]
    train, held_out = hold_out(photo, 0.25, seed=seed, number=1)
    assert (len(train), len(held_out)) == (8, 2)
    assert sorted([*train.paths, *held_out.paths]) == list(photo.paths)
    for part in (train, held_out):
        assert all(Path(path).parent.name == f"class_{k}" for path, k in zip(part.paths, part.labels, strict=True))
    assert hold_out(photo, 0.25, seed=seed, number=1)[1].paths == held_out.paths
    others = {hold_out(photo, 0.25, seed=seed, number=number)[1].paths for number in range(40)}
    assert len(others) > 10
    assert len(hold_out(photo, 0.0, seed=seed, number=1)[0]) == 10


def test_cycles(seed: int) -> None:
    """Each domain's images come in permutations, one after the other, whatever the epochs are cut into."""
    sizes, share, steps = (7, 20, 3), 4, 5
    cycles = Cycles(sizes, steps)
    epochs = [cycles.order(3 * share, seed=seed, epoch=epoch) for epoch in range(6)]
    assert {len(each) for each in epochs} == {steps * 3 * share}
    read = np.concatenate(epochs).reshape(-1, 3)
    begin = 0
    for domain, size in enumerate(sizes):
        own = read[:, domain] - begin
        whole = own[: len(own) // size * size].reshape(-1, size)
        assert (np.sort(whole, axis=1) == np.arange(size)).all()
        assert len({tuple(row) for row in whole.tolist()}) > 1
        begin += size
    again = np.concatenate([Cycles(sizes, 3).order(3 * share, seed=seed, epoch=epoch) for epoch in range(10)])
    assert np.array_equal(again, read.ravel())


@pytest.mark.parametrize("world", [1, 2])
def test_batches_hold_as_many_images_of_each_domain(
    root: Path, load: Callable[..., Loader], backend: str, world: int
) -> None:
    """On every process; from any step on; and each image with its own label."""
    domains = scan_domains(root)
    options: dict[str, Any] = {
        "transform": Transform(image_size=8, mean=(0, 0, 0), std=(1 / 255,) * 3, horizontal_flip=False),
        "batch_size": 12,
        "cycles": Cycles(tuple(len(each) for each in domains.values()), 7),
    }
    folder = joined(domains)
    loaders = [load(folder, backend, **options, rank=rank, world_size=world) for rank in range(world)]
    assert [len(loader) for loader in loaders] == [7] * world
    whole = [list(loader.epoch(3)) for loader in loaders]
    for images, labels in (batch for rank in whole for batch in rank):
        color = (images.mean(dim=(2, 3)) / 20).round().long()
        assert torch.bincount(color[:, 0], minlength=3).tolist() == [4 // world] * 3
        assert torch.equal(color[:, 1], labels)
    for loader, batches in zip(loaders, whole, strict=True):
        rest = list(loader.epoch(3, 5))
        assert len(rest) == 2
        assert all(torch.equal(a, b[0]) for (a, _), b in zip(rest, batches[5:], strict=True))


def test_a_checkpoint_of_other_steps_is_refused(root: Path, load: Callable[..., Loader], seed: int) -> None:
    folder = joined(scan_domains(root))
    one, other = (load(folder, "torchvision", batch_size=12, cycles=Cycles((9, 10, 11), steps)) for steps in (5, 6))
    one.load_state_dict(one.state_dict())
    with pytest.raises(UserError, match=r"of steps in an epoch was \[9, 10, 11, 5\] in the checkpoint and is"):
        other.load_state_dict(one.state_dict())
