"""`--help` of the trainer: one screen, the fields of each section, and everything, each field once."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from lesam_dist.config.explain import sections, unknown_key
from lesam_dist.config.help_screens import FLAGS
from lesam_dist.config.schema import Config
from lesam_dist.config.values import default_values
from lesam_dist.optim.engine.registry import methods
from tests.conftest import Command

OUTER = [name for name in sections() if "." not in name]


def fields_in(text: str) -> list[str]:
    return re.findall(r"^  --([\w.]+)(?= |,|$)", text.split("methods, and the")[0], re.M)


def test_one_screen_first(command: Command) -> None:
    status, out, _ = command("--help")
    assert status == 0
    assert len(out.splitlines()) < 45
    assert all(len(line) <= 80 for line in out.splitlines())
    named = [flag.split()[0].removeprefix("--") for flag in FLAGS]
    assert unknown_key([name for name in named if name != "config"]) is None
    assert set(named) <= set(fields_in(out))
    assert {f"help.{name}" for name in ("run", *OUTER, "methods", "all")} <= set(fields_in(out))
    assert command("-h") == (0, out, "")


def test_everything_has_every_field_once(command: Command) -> None:
    status, out, _ = command("--help.all")
    assert status == 0
    found = fields_in(out)
    assert len(found) == len(set(found))
    assert set(found) == {*default_values(), "optimizer.args", "task_args", "config", "print_config"} - {
        path for path in default_values() if path.startswith("optimizer.args.")
    }
    assert "Path to a configuration file" not in out


def test_each_field_is_in_its_section(command: Command) -> None:
    """And a section has all fields of its class, those of the sections in it too."""
    seen: list[str] = []
    for section in OUTER:
        status, out, _ = command(f"--help.{section}")
        assert status == 0
        found = fields_in(out)
        assert all(path.startswith(f"{section}.") for path in found)
        kind = type(getattr(Config(), section))
        inner = [name for name in sections() if name.startswith(f"{section}.")]
        plain = {f"{section}.{item.name}" for item in fields(kind)} - {*inner}
        assert plain == {path for path in found if path.count(".") == 1}
        seen += found
    run = fields_in(command("--help.run")[1])
    everything = fields_in(command("--help.all")[1])
    assert sorted([*seen, *run, "config", "print_config"]) == sorted(everything)


def test_defaults_of_methods_are_those_of_their_classes(command: Command) -> None:
    out = command("--help.methods")[1]
    assert out.strip() in command("--help.optimizer")[1]
    assert "loss budget, in units of the loss (>= 0; default: 0.3)" in out
    assert "None" not in out
    for name in methods():
        assert re.search(rf"^  {re.escape(name)} ", out, re.M)


@pytest.mark.parametrize("name", ["compare", "sweep"])
def test_of_experiments(call: Command, name: str) -> None:
    """They have their own, and the sections of what runs are made of."""
    assert f"lesam-dist {name} --help.optimizer" in call(name, "--help")[1]
    assert call(name, "--help.ema") == call("train", "--help.ema")
    assert "unknown section 'emma': did you mean 'ema'?" in call(name, "--help.emma")[2]


def test_of_a_nested_section(command: Command) -> None:
    assert {path.rpartition(".")[0] for path in fields_in(command("--help.data.label_noise")[1])} == {
        "data.label_noise"
    }
