"""`lesam-dist completion`: bash takes the script, and completes by it without a start of Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lesam_dist import cli
from lesam_dist.config.recipes import recipes
from lesam_dist.config.values import default_values
from lesam_dist.guide import completion
from lesam_dist.guide.completion import flags_of
from tests.conftest import Command

BASH = shutil.which("bash")
COMPLETE = """
source "$1"; shift
PATH=  # whatever it would start is not found
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_shtab_lesam_dist lesam-dist "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli._COMMANDS["completion"][0](["bash"])
    path = tmp_path_factory.mktemp("completion") / "lesam-dist.bash"
    path.write_text(out.getvalue())
    return path


def completed(script: Path, *words: str) -> list[str]:
    assert BASH
    done = subprocess.run([BASH, "-c", COMPLETE, "bash", script, *words], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_bash(script: Path) -> None:
    assert BASH
    assert subprocess.run([BASH, "-n", script], check=False).returncode == 0
    assert completed(script, "lesam-dist", "tr") == ["train"]
    assert sorted(completed(script, "lesam-dist", "")) == sorted(cli._COMMANDS)
    assert completed(script, "lesam-dist", "train", "--optimizer.si") == ["--optimizer.sigma"]
    assert completed(script, "lesam-dist", "train", "--parallel.strategy", "f") == ["fsdp"]
    assert completed(script, "lesam-dist", "compare", "--met") == ["--methods"]
    assert completed(script, "lesam-dist", "pack", "--re") == ["--resize"]
    assert completed(script, "lesam-dist", "analyze", "hess") == ["hessian"]
    assert completed(script, "lesam-dist", "methods", "asa") == ["asam"]
    wanted = [name for name in recipes() if name.startswith("cifar10_wrn28_10_l")]
    assert sorted(completed(script, "lesam-dist", "train", "--config", "cifar10_wrn28_10_l")) == sorted(wanted)


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_every_field_and_files(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {f"--{path}" for path in default_values() if not path.startswith("optimizer.args.")}
    assert fields <= set(completed(script, "lesam-dist", "train", "--"))
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "mine.png"):
        (tmp_path / name).touch()
    assert completed(script, "lesam-dist", "train", "--config", "mine") == ["mine.yaml"]


def test_zsh(call: Command) -> None:
    """It has no zsh to try it in: that it is one of its scripts, with the same words."""
    status, out, _ = call("completion", "zsh")
    assert status == 0
    assert out.startswith("#compdef lesam-dist")
    assert '"--optimizer.sigma[' in out
    assert "recipes:recipe:(digits digits_noisy" in out


def test_flags_of_a_help() -> None:
    text = "usage: x [--seeds N]\n  --a.b {one,two}\n        as --c does\n  -h, --help  well--known {no,choice}\n"
    assert flags_of(text) == {"--seeds": (), "--a.b": ("one", "two"), "--c": (), "--help": ()}


def test_what_is_refused(call: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "invalid choice: 'fish'" in call("completion", "fish")[2]
    monkeypatch.setattr(completion, "find_spec", lambda _: None)
    status, _, err = call("completion", "bash")
    assert status == 2
    assert 'pip install "lesam-dist[completion]"' in err
