"""What `make dist` has built, as a user gets it. That target runs this file, after the build."""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lesam_dist
from tests.packaging.environments import Environment

ROOT = Path(__file__).parents[2]
NAME = f"lesam_dist-{lesam_dist.__version__}"
WHEEL, SDIST = ROOT / "dist" / f"{NAME}-py3-none-any.whl", ROOT / "dist" / f"{NAME}.tar.gz"
SCRIPT = str(Path(__file__).with_name("library.py"))


def tracked(*paths: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z", *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.split("\0") if name}


# The files.


def test_wheel_is_the_two_packages() -> None:
    with zipfile.ZipFile(WHEEL) as wheel:
        names = {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}
    assert names == tracked("lesam_dist") | {name.removeprefix("kernels/") for name in tracked("kernels/lesam_kernels")}
    assert {"lesam_dist/py.typed", "lesam_kernels/py.typed"} <= names


def test_sdist_is_the_repository() -> None:
    """With the tests and the launch files: who packages it further wants them."""
    with tarfile.open(SDIST) as sdist:
        names = {member.name.removeprefix(f"{NAME}/") for member in sdist.getmembers() if member.isfile()}
    made = {name for name in names if name.startswith("lesam_dist.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    of_the_host = tracked(".github", ".gitignore", ".pre-commit-config.yaml")
    assert names - made == tracked() - of_the_host


def test_metadata() -> None:
    with zipfile.ZipFile(WHEEL) as wheel:
        metadata = email.message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))
        scripts = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"]) == ("lesam-dist", lesam_dist.__version__)
    assert "lesam-dist = lesam_dist.cli:main" in scripts
    extras = {
        "train",
        "dali",
        "dali-cuda120",
        "timm",
        "report",
        "corruptions",
        "mnist",
        "wandb",
        "mlflow",
        "completion",
        "docs",
        "dev",
    }
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]

    def required(system: str, extra: str = "") -> set[str]:
        where = {"platform_system": system, "extra": extra}
        return {r.name for r in requirements if r.marker is None or r.marker.evaluate(where)}

    assert required("Linux") == {"torch", "triton"}
    assert required("Darwin") == {"torch"}
    for extra in extras - {"train"}:
        assert "lesam-dist" in required("Linux", extra), "brings the extra `train`"


# The wheel installed with what it requires, and with the extra `train`.


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=sys.prefix, prefix="check-dist-") as name:  # hard links stay in a file system
        yield Path(name)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Environment:
    return Environment(folder / "plain", WHEEL)


@pytest.fixture(scope="module")
def train(folder: Path) -> Environment:
    return Environment(folder / "train", WHEEL, "train")


def test_library_needs_torch_alone(plain: Environment) -> None:
    where = "import lesam_dist, lesam_kernels; print(lesam_dist.__version__, lesam_dist.__file__)"
    assert plain.run("python", "-c", where)[0].startswith(f"{lesam_dist.__version__} {plain.folder}")
    for absent in ("numpy", "yaml", "torchvision"):
        assert "ModuleNotFoundError" in plain.run("python", "-c", f"import {absent}", status=1)[1]
    assert "methods" in plain.run("python", SCRIPT)[0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_library_in_two_processes(plain: Environment, strategy: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert "methods" in plain.run("python", *launcher, SCRIPT, strategy)[0]


def test_help_without_the_extra_names_it(plain: Environment) -> None:
    out, _ = plain.run("lesam-dist", "--help")
    assert "train a network" in out
    assert 'pip install "lesam-dist[train]"' in out


@pytest.mark.parametrize(
    "command",
    [
        ["lesam-dist", "train", "--help"],
        ["lesam-dist", "train", "--config", "digits"],
        ["lesam-dist", "compare", "--help"],
        ["lesam-dist", "sweep"],
        ["python", "-m", "lesam_dist", "train"],
        ["python", "-m", "lesam_dist.train", "--config", "digits"],
    ],
    ids=" ".join,
)
def test_command_without_the_extra_names_it(plain: Environment, command: list[str]) -> None:
    out, error = plain.run(*command, status=2)
    assert out == ""
    (line,) = error.splitlines()
    assert line.endswith(
        "torchvision, jsonargparse, docstring-parser, pyyaml, rich, safetensors, simplejpeg, tensorboard, "
        'scikit-learn, scipy, matplotlib): pip install "lesam-dist[train]"'
    )


def test_commands_with_the_extra(train: Environment) -> None:
    assert "pip install" not in train.run("lesam-dist", "--help")[0]
    for command in ("train", "compare", "sweep"):
        assert train.run("lesam-dist", command, "--help")[0].startswith(f"usage: lesam-dist {command}")
    out, _ = train.run("lesam-dist", "train", "--config", "digits", "--dry_run")  # the recipe comes with the wheel
    assert "loss" in out


def test_dali_without_its_extra_names_it(train: Environment) -> None:
    flags = ["--data.backend", "dali", "--run_dir", str(train.folder / "run")]
    _, error = train.run("lesam-dist", "train", "--config", "digits", *flags, status=2)
    assert 'pip install "lesam-dist[dali]"' in error
