"""Each check of `lesam-dist doctor` on readings of machines that are not this one."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from lesam_dist.data.packed.layout import INDEX
from lesam_dist.doctor.devices import Cuda, Gpu, check_cuda
from lesam_dist.doctor.finding import Finding, gib, guarded
from lesam_dist.doctor.host import (
    Cpus,
    Disk,
    check_cpus,
    check_disk,
    check_shared_memory,
    read_cpus,
    read_disk,
)
from lesam_dist.doctor.images import Decoder, check_decoder, check_folder, read_folder
from lesam_dist.doctor.kernels import Kernels, check_kernels, read_kernels
from lesam_dist.doctor.launcher import check_launcher
from lesam_dist.doctor.versions import check_packages, check_versions

GIB = 2**30
H100 = Gpu("H100", (9, 0), 80 * GIB, 79 * GIB)


def statuses(findings: Iterable[Finding]) -> dict[str, str]:
    return {each.name: each.status for each in findings}


def the_one(findings: Iterable[Finding]) -> Finding:
    """The one that is not ok; it says what to do."""
    (found,) = (each for each in findings if each.status != "ok")
    assert found.remedy
    return found


def test_versions() -> None:
    new = {
        "torch": "2.10.0+cu128",
        "triton": "3.5.1",
        "torchvision": "0.25.0",
        "accelerate": "1.12",
        "nvidia-dali-x": None,
    }
    bounds = {"torch": "2.9", "triton": "3.5"}
    assert set(statuses(check_versions(new, bounds)).values()) == {"ok"}, "2.10 is newer than 2.9"
    old = the_one(check_versions({**new, "torch": "2.8.1"}, bounds))
    assert (old.status, old.remedy) == ("problem", 'pip install --upgrade "torch>=2.9"')
    assert the_one(check_versions({**new, "torch": None}, bounds)).status == "problem"
    assert the_one(check_versions({**new, "triton": None}, bounds)).status == "warning"
    assert the_one(check_packages(["numpy", "rich"])).text == "not installed: numpy, rich"
    assert statuses(check_packages([])) == {"trainer": "ok"}


@pytest.mark.parametrize(
    ("cuda", "name", "status", "says"),
    [
        (Cuda("13.0", "", None, [], ""), "CUDA", "warning", "runs train on the CPU"),
        (Cuda(None, "580.1", (13, 0), [], ""), "CUDA", "problem", "built for CPUs alone"),
        (Cuda("13.0", "550.1", (12, 4), [], ""), "CUDA", "problem", "runs CUDA up to 12.4"),
        (Cuda("13.0", "580.1", (13, 0), [], ""), "CUDA", "problem", "torch sees no GPU"),
        (Cuda("13.0", "580.1", (13, 0), [Gpu("V100", (7, 0), GIB, GIB)], "2.27"), "GPU 0", "warning", "older than"),
        (Cuda("13.0", "580.1", (13, 0), [H100, Gpu("A", (9, 0), 80 * GIB, GIB)], "2"), "GPU 1", "warning", "1 GiB are"),
        (Cuda("13.0", "580.1", (13, 0), [H100, H100], ""), "NCCL", "problem", "to work together"),
    ],
)
def test_gpus(cuda: Cuda, name: str, status: str, says: str) -> None:
    found = the_one(check_cuda(cuda))
    assert (found.name, found.status) == (name, status)
    assert says in found.text


def test_gpus_that_are_well() -> None:
    found = list(check_cuda(Cuda("13.0", "580.1", (13, 0), [H100, H100], "2.27.3")))
    assert {each.status for each in found} == {"ok"}
    assert [each.name for each in found] == ["CUDA", "GPU 0", "GPU 1", "NCCL"]
    assert "H100, 80 GiB, compute capability 9.0" in found[1].text


@pytest.mark.parametrize(
    ("kernels", "status"),
    [
        (Kernels("cuda", "triton", True, 1e-7), "ok"),
        (Kernels("cuda", "triton", True, 0.1), "problem"),
        (Kernels("cuda", "triton", True, float("nan")), "problem"),
        (Kernels("cuda", "triton", True, None, "no compiler"), "problem"),
        (Kernels("cuda", "reference", False, None), "warning"),
        (Kernels("cpu", "reference", False, None), "ok"),
        (Kernels("cpu", "reference", True, None, "numpy"), "warning"),
    ],
)
def test_kernels(kernels: Kernels, status: str) -> None:
    first, backend = check_kernels(kernels)
    assert first.status == status
    assert f"auto takes {kernels.auto}" in backend.text


def test_kernels_of_this_machine() -> None:
    read = read_kernels()
    assert read.difference is not None
    assert 0 <= read.difference < 1e-5
    assert read.auto == ("triton" if read.device == "cuda" else "reference")


def test_decoders() -> None:
    assert statuses(check_decoder(Decoder(False), 0)) == {"decoding": "ok"}
    assert the_one(check_decoder(Decoder(False), 2)).status == "warning"
    assert the_one(check_decoder(Decoder(True, "", "no nvJPEG"), 1)).status == "problem"
    (found,) = check_decoder(Decoder(True, "", ""), 1)
    assert (found.status, "on the GPU" in found.text) == ("ok", True)


def test_folders(tmp_path: Path) -> None:
    """From nothing to a data set, a step at a time."""
    assert "no classes in train/ and val/" in the_one(check_folder(read_folder(tmp_path))).text
    for path in ("train/a", "train/b", "val/a"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "0.png").touch()
    assert "'b' is in train/ but not in val/" in the_one(check_folder(read_folder(tmp_path))).text
    (tmp_path / "val" / "b").mkdir()
    assert "the first is val/b" in the_one(check_folder(read_folder(tmp_path))).text
    (tmp_path / "val" / "b" / "0.png").touch()
    (found,) = check_folder(read_folder(tmp_path))
    assert (found.status, found.text.split(";")[0]) == ("ok", "2 classes")
    (tmp_path / INDEX).touch()
    (found,) = check_folder(read_folder(tmp_path))
    assert found.text.startswith(f"{tmp_path} is packed")


def test_host(tmp_path: Path, seed: int) -> None:
    limit = random.Random(seed).randint(1, 40) / 8
    (tmp_path / "cpu.max").write_text(f"{int(limit * 100_000)} 100000\n")
    assert read_cpus(tmp_path).limit == pytest.approx(limit)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert read_cpus(tmp_path).limit is None
    assert the_one(check_cpus(Cpus(64, 64, 6.0), gpus=2)).text.startswith("6 of the machine's 64, by the container's")
    assert statuses(check_cpus(Cpus(64, 16, None), gpus=4)) == {"CPUs": "ok"}
    assert "--shm-size" in the_one(check_shared_memory(64 << 20)).remedy
    assert statuses(check_shared_memory(8 << 30)) == statuses(check_shared_memory(None)) == {"/dev/shm": "ok"}
    disk = read_disk(tmp_path / "not" / "there")
    assert (disk.path, disk.error) == (tmp_path, "")
    assert not (tmp_path / "not").exists()
    assert [the_one(check_disk(Disk(tmp_path, free))).status for free in (5, 5 * GIB)] == ["problem", "warning"]
    assert the_one(check_disk(Disk(tmp_path, 90 * GIB, "Read-only file system"))).status == "problem"
    assert gib(1.5 * GIB) == "1.5 GiB"


@pytest.mark.parametrize(
    ("environ", "gpus", "name"),
    [
        ({"RANK": "0"}, 1, "launcher"),
        ({"RANK": "0", "WORLD_SIZE": "1", "TRITON_INTERPRET": "1"}, 1, "environment"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, 1, "accelerate"),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, "environment"),
        (
            {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            2,
            "processes",
        ),
    ],
)
def test_environments(environ: dict[str, str], gpus: int, name: str) -> None:
    assert the_one(check_launcher(environ, gpus)).name == name


def test_an_environment_that_is_well() -> None:
    assert statuses(check_launcher({}, 0)) == {"launcher": "ok"}
    (found, asked) = check_launcher({"ACCELERATE_MIXED_PRECISION": "bf16"}, 8)
    assert found.remedy.startswith("torchrun --nproc-per-node 8")
    assert asked.text == "asks for --precision.compute bf16"


def test_a_check_that_fails_is_a_finding() -> None:
    def check() -> Iterable[Finding]:
        yield Finding("a", "ok", "well")
        raise OSError("broken\nlibrary")

    first, second = guarded("b", check)
    assert first.status == "ok"
    assert (second.name, second.status) == ("b", "problem")
    assert second.text == "could not be checked: OSError: broken library"
