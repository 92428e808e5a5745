"""Where torch alone is installed the library works, and every command says in one line what it needs."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lesam_dist
from lesam_dist import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()}
# What these bring must be missing too; modules, as they are imported.
MODULES = [*cli._TRAIN_EXTRA, "accelerate", "nvidia.dali", "scipy", "triton"]
WITHOUT = f"import runpy, sys; sys.modules.update(dict.fromkeys({MODULES})); "


def run(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_library_needs_torch_alone() -> None:
    result = run(f"{WITHOUT} runpy.run_path('tests/packaging/library.py', run_name='__main__')")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"\d+ methods\n", result.stdout)


def test_help_names_the_extra() -> None:
    result = run(f"{WITHOUT} runpy.run_module('lesam_dist', run_name='__main__')", "--help")
    assert result.returncode == 0
    assert 'pip install "lesam-dist[train]"' in result.stdout
    assert "pip install" not in run("from lesam_dist.cli import main; main()", "--help").stdout


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("lesam_dist", ["train", "--help"]),
        ("lesam_dist", ["compare", "--config", "digits"]),
        ("lesam_dist", ["sweep", "--help"]),
        ("lesam_dist.train", ["--config", "digits"]),
    ],
)
def test_command_names_what_is_missing(module: str, argv: list[str]) -> None:
    result = run(f"{WITHOUT} runpy.run_module({module!r}, run_name='__main__')", *argv)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert f"lesam-dist {argv[0] if module == 'lesam_dist' else 'train'} needs" in line
    assert "torchvision" in line
    assert line.endswith('pip install "lesam-dist[train]"')


def test_one_missing_package_is_named_alone() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from lesam_dist.cli import main; main()"
    assert "not installed (matplotlib): pip install" in run(code, "train", "--config", "digits").stderr


def test_commands_ask_for_what_the_extra_has() -> None:
    """accelerate is a launcher, which no command imports; docstring-parser comes with jsonargparse[signatures]."""
    in_extra = {requirement.name for requirement in EXTRAS["train"]}
    assert {*cli._TRAIN_EXTRA.values(), "accelerate"} == in_extra | {"docstring-parser"}


def test_dependencies_are_explained_and_have_bounds() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Dependencies")[2]
    for requirement in chain(map(Requirement, PROJECT["dependencies"]), *EXTRAS.values()):
        if requirement.name == PROJECT["name"]:
            continue
        assert requirement.specifier, f"{requirement} has no lower bound to test with"
        assert re.search(rf"^\|[^|]*\b{requirement.name}\b[^|]*\|", table, re.M), f"{requirement} has no reason"


def test_constraints_name_a_version_of_every_dependency_that_its_bound_admits() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+]+", line) for line in lines), "versions from an index, no files or links"
    other_cuda = {"nvidia-dali-cuda120"}
    for requirement in chain(map(Requirement, PROJECT["dependencies"]), *EXTRAS.values()):
        if requirement.name not in {PROJECT["name"], *other_cuda}:
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_version_needs_no_installation() -> None:
    """Only the folder on the path: no metadata, and no site-packages."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import lesam_dist; print(lesam_dist.__version__)"
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == lesam_dist.__version__
    assert "version" in PROJECT["dynamic"]


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys(), "what the format requires"
    assert citation["license"] == PROJECT["license"]
    assert citation["preferred-citation"]["title"].startswith("Fix the Loss, Not the Radius")
    assert "version" not in citation, "it has one place"
