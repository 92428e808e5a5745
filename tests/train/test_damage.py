"""Whatever somebody or a disk has put into a checkpoint is named, and never becomes weights."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lesam_dist import LESAM
from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.checkpoint import Checkpointer, manifest, payload
from lesam_dist.train.checkpoint.manifest import DamagedError

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
DATA, INDEX, MANIFEST = "rank_00000.safetensors", "index.json", manifest.NAME
STEPS = (1, 2)


def make() -> tuple[nn.Module, LESAM]:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return net, LESAM(net.parameters(), torch.optim.AdamW, lr=0.1)


def load(folder: Path) -> tuple[int, list[str], dict[str, torch.Tensor]]:
    net, optimizer = make()
    loaded = Checkpointer(folder, ALONE, CheckpointConfig()).load_latest(net, optimizer)
    return (loaded.progress or {})["step"], loaded.damaged, net.state_dict()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """Two checkpoints, and the weights in each."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    net, optimizer = make()
    checkpointer = Checkpointer(folder, ALONE, CheckpointConfig(asynchronous="never"))
    states = []
    for step in STEPS:
        for p in net.parameters():
            nn.init.normal_(p)
        checkpointer.save(step, net, optimizer, {"epoch": step}, own={"count": torch.tensor(step)})
        states.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    return folder, states


Saved = tuple[Path, list[dict[str, torch.Tensor]]]


def test_any_flipped_bytes_are_named(seed: int, saved: Saved, tmp_path: Path) -> None:
    """100 times one to three bytes somewhere: the checkpoint before is used, and has its weights."""
    folder, states = saved
    draw = random.Random(seed)
    shutil.copytree(folder, tmp_path / "checkpoints")
    for _ in range(100):
        victim = tmp_path / "checkpoints" / "step_00000002" / draw.choice((DATA, INDEX, MANIFEST))
        whole = victim.read_bytes()
        content = bytearray(whole)
        for place in draw.sample(range(len(content)), draw.randint(1, 3)):
            content[place] ^= draw.randint(1, 255)
        victim.write_bytes(content)
        step, damaged, weights = load(tmp_path / "checkpoints")
        if victim.name == MANIFEST and says_the_same(content, whole):
            assert (step, damaged) == (2, []), "another kind of space between the words is no damage"
            victim.write_bytes(whole)
            continue
        assert (step, len(damaged)) == (1, 1), f"{victim.name} is not missed"
        assert str(victim) in damaged[0]
        torch.testing.assert_close(weights, states[0], rtol=0, atol=0)
        victim.write_bytes(whole)
    assert load(tmp_path / "checkpoints")[:2] == (2, []), "and now it is whole again"


def says_the_same(text: bytes | bytearray, other: bytes) -> bool:
    with suppress(ValueError):
        return bool(json.loads(bytes(text)) == json.loads(other))
    return False


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("name", [DATA, INDEX, MANIFEST])
@pytest.mark.parametrize("damage", [zeros, Path.unlink, lambda path: path.write_bytes(b"")])
def test_zeros_and_absence(saved: Saved, tmp_path: Path, name: str, damage: Callable[[Path], object]) -> None:
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    victim = tmp_path / "checkpoints" / "step_00000002" / name
    damage(victim)
    step, damaged, _ = load(tmp_path / "checkpoints")
    assert step == 1
    assert [str(victim) in line for line in damaged] == [True]


def test_a_file_that_nobody_wrote(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / "step_00000002"
    (folder / f".{MANIFEST}.partial").write_bytes(b"of a process that was killed")
    assert load(tmp_path / "checkpoints")[0] == 2
    (folder / "rank_00001.safetensors").write_bytes(b"")
    step, damaged, _ = load(tmp_path / "checkpoints")
    assert step == 1
    assert "rank_00001.safetensors does not belong to the checkpoint" in damaged[0]


def entry(content: Any) -> Any:
    return content["tensors"]["model.0.weight"]


def chunk(content: Any) -> Any:
    return entry(content)["chunks"][0]


def put(get: Callable[[Any], Any], key: str, value: Any) -> Callable[[Any], Any]:
    def craft(content: Any) -> Any:
        get(content)[key] = value
        return content

    return craft


def without(get: Callable[[Any], Any], key: str) -> Callable[[Any], Any]:
    def craft(content: Any) -> Any:
        del get(content)[key]
        return content

    return craft


def twice(content: Any) -> Any:
    entry(content)["chunks"] *= 2
    return content


def top(content: Any) -> Any:
    return content


# By somebody who has made the checksums anew.
INDICES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a list": (lambda content: [content], "not the index"),
    "a number": (lambda content: 7, "not the index"),
    "null": (lambda content: None, "not the index"),
    "no tensors": (without(top, "tensors"), "not the index"),
    "tensors in a list": (put(top, "tensors", []), "not the index"),
    "own by name": (put(top, "own", {"a": 1}), "not the index"),
    "a name for an entry": (put(lambda content: content["tensors"], "model.0.weight", "x"), "not the index"),
    "no dtype": (without(entry, "dtype"), "not the index"),
    "unknown dtype": (put(entry, "dtype", "F31"), "F31"),
    "dtype in a list": (put(entry, "dtype", ["F32"]), "not the index"),
    "another dtype": (put(entry, "dtype", "I32"), r"its 'model\.0\.weight' is \('F32'"),
    "negative size": (put(entry, "size", [-4, -3]), r"is \[-4, -3\]"),
    "true as a size": (put(entry, "size", [True, 3]), "size of"),
    "a huge size": (put(entry, "size", [2**62, 2**62]), "do not fill it"),
    "a larger number than any": (put(entry, "size", [2**70, 3]), "size of"),
    "a float as a size": (put(entry, "size", [4.0, 3]), "size of"),
    "no parts": (put(entry, "chunks", []), "do not fill it"),
    "a part twice": (twice, "do not fill it"),
    "beyond the end": (put(chunk, "offsets", [1, 0]), "outside of it"),
    "other dimensions": (put(chunk, "offsets", [0]), "other dimensions"),
    "a smaller part": (put(chunk, "sizes", [4, 2]), "do not fill it"),
    "a file outside": (put(chunk, "file", "../step_00000001/rank_00000.safetensors"), "no file of the checkpoint"),
    "a file of the system": (put(chunk, "file", "/etc/passwd"), "no file of the checkpoint"),
    "a file in a list": (put(chunk, "file", [DATA]), "not the index"),
    "the index as a file": (put(chunk, "file", INDEX), r"'model\.0\.weight' is"),
    "another key": (put(chunk, "key", "model.0.bias"), "the same place"),
    "a key that is not there": (put(chunk, "key", "other"), "its 'model.0.weight' is"),
    "a number as a key": (put(chunk, "key", 3), "no file of the checkpoint"),
}


def made_anew(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    before, files = manifest.read(folder)
    manifest.write(folder, {**before, "files": manifest.checksums(folder, files)})


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_cannot_be_true(saved: Saved, tmp_path: Path, case: str) -> None:
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / "step_00000002"
    craft, message = INDICES[case]
    made_anew(folder, INDEX, json.dumps(craft(json.loads((folder / INDEX).read_text()))).encode())
    step, damaged, weights = load(tmp_path / "checkpoints")
    assert step == 1
    assert re.search(message, damaged[0]), damaged[0]
    torch.testing.assert_close(weights, saved[1][0], rtol=0, atol=0)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"tensors": 1e999}'])
def test_an_index_that_is_no_json(saved: Saved, tmp_path: Path, text: bytes) -> None:
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    made_anew(tmp_path / "checkpoints" / "step_00000002", INDEX, text)
    step, damaged, _ = load(tmp_path / "checkpoints")
    assert step == 1
    assert "index.json is not the index of a checkpoint" in damaged[0]


def test_data_of_other_tensors(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / "step_00000002"
    tensors = load_file(folder / DATA)
    for wrong in (
        {"x": torch.zeros(3)},
        {**tensors, "more": torch.zeros(1)},
        {**tensors, "model.0.bias": torch.ones(1)},
    ):
        save_file(wrong, folder / DATA)
        made_anew(folder, DATA, (folder / DATA).read_bytes())
        step, damaged, _ = load(tmp_path / "checkpoints")
        assert step == 1
        assert "by the index" in damaged[0]
    made_anew(folder, DATA, (10**15).to_bytes(8, "little") + b"{}")
    assert "is no safetensors file" in load(tmp_path / "checkpoints")[1][0]


@pytest.mark.parametrize("values", [[], 3, None, {"optimizer.param_groups.0.lr": {}}, {}])
def test_values_that_are_none(saved: Saved, tmp_path: Path, values: Any) -> None:
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / "step_00000002"
    content, files = manifest.read(folder)
    manifest.write(folder, {**content, "values": values, "files": files})
    if isinstance(values, dict):  # of another optimizer, as far as anybody can see
        with pytest.raises(UserError, match=r"step_00000002 cannot be loaded into this run: it has no 'optimizer\."):
            load(tmp_path / "checkpoints")
    else:
        step, damaged, _ = load(tmp_path / "checkpoints")
        assert step == 1
        assert "holds no values by name" in damaged[0]


def random_tensors(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    found = {}
    for dtype in payload.NAMES:
        for shape in ((), (0, 3), (5,), (3, 2, 7)):
            found[f"{dtype} {shape} ö"] = torch.randint(0, 2, shape).to(dtype)
            if dtype.is_floating_point:
                turned = list(range(len(shape)))[::-1]
                found[f"{dtype} {shape} turned"] = torch.randn(shape[::-1]).to(dtype).permute(turned)
    return found


def test_every_dtype_and_shape_is_what_the_library_reads(seed: int, tmp_path: Path) -> None:
    tensors = random_tensors(seed)
    written = payload.write(tmp_path / "file", tensors)
    assert {"file": written} == manifest.checksums(tmp_path, ["file"])
    torch.testing.assert_close(load_file(tmp_path / "file"), tensors, rtol=0, atol=0)
    payload.check_header(tmp_path / "file", {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    with pytest.raises(DamagedError):
        payload.check_header(tmp_path / "file", {})
