"""`lesam-dist methods`: every method with the defaults that its class has, as the command reads them."""

from __future__ import annotations

import inspect
import re

import pytest

from lesam_dist.config.methods import PLAIN, shown
from lesam_dist.optim.engine.registry import methods
from tests.conftest import Command

BUILT_IN = [name for name, method in methods().items() if method.module.startswith("lesam_dist.")]


def test_all_with_their_defaults(call: Command) -> None:
    status, out, _ = call("methods")
    assert status == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    assert {*BUILT_IN, *PLAIN} <= set(re.findall(r"^(\w+)  ", out, re.M))
    assert "[sigma 0.3, rho_max 0.2, eps 1e-12," in out


@pytest.mark.parametrize("name", BUILT_IN)
def test_one_has_the_defaults_of_its_class(call: Command, name: str) -> None:
    """Here from the signature of the imported class; the command reads the file's text."""
    method = methods()[name]
    status, out, _ = call("methods", name)
    assert status == 0
    words = " ".join(out.split())
    for key, parameter in inspect.signature(method.load().__init__).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert re.search(rf"    {key} +\S", out), key
            assert f"default: {shown(parameter.default)})" in words
    top = inspect.getdoc(inspect.getmodule(method.load())) or ""
    assert " ".join(out.split()).startswith(" ".join(top.split("\n\n")[0].split()))
    assert all(len(line) <= 110 for line in out.splitlines())


@pytest.mark.parametrize("name", ["LE-SAM", "lesam", "LESAM"])
def test_other_names(call: Command, name: str) -> None:
    assert call("methods", name)[1].startswith("LE-SAM, Loss-Equated")


def test_plain_ones_and_ones_own(call: Command) -> None:
    assert "trust_coefficient   default: 0.001" in call("methods", "lars")[1]
    assert "part                " in call("methods", "tests.halves:Halved")[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [("lesm", "unknown optimizer 'lesm': did you mean 'lesam'?"), ("a.b:C", "optimizer 'a.b:C' cannot be imported")],
)
def test_wrong_names(call: Command, name: str, message: str) -> None:
    status, _, err = call("methods", name)
    assert status == 2
    assert message in err
