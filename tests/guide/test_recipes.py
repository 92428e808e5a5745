"""`lesam-dist recipes`: what it lists and finds, that what it prints is the recipe, and that about.yaml is true."""

from __future__ import annotations

import random
import re
from importlib.resources import files
from pathlib import Path

import pytest

from lesam_dist.config.command_line import parse
from lesam_dist.config.recipes import bases, data_and_model, methods_of, recipes, split
from lesam_dist.guide.about import about, all_about, passes
from lesam_dist.guide.recipes import one_recipe
from lesam_dist.optim.engine.registry import methods
from tests.conftest import Command


def listed(out: str) -> list[str]:
    return [line.split()[0] for line in out.split("\n\n")[0].splitlines()[1:]]


def test_all_are_listed(call: Command) -> None:
    status, out, _ = call("recipes")
    assert status == 0
    assert sorted(listed(out)) == sorted(bases())
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "digits = digits_resnet8_lesam" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["table", "2"], ["imagenet_resnet50", "imagenet_resnet101"]),
        (["Table7"], ["cifar100_lt100_resnet32x4_glmc", "cifar100_lt50_resnet32x4_glmc"]),
        (["section", "6.2"], ["pacs_resnet18_ermpp", "vlcs_resnet18_ermpp"]),
        (["cifar100", "wide_resnet28_10", "esam"], ["cifar100_wrn28_10"]),
        (["imagenet", "lamb"], ["imagenet_resnet50_a2", "imagenet_resnet50_b32k_lamb"]),
        (["mnist", "tail", "glmc"], ["mnist5k_lt100_resnet8_glmc"]),
    ],
    ids=" ".join,
)
def test_words_find_recipes(call: Command, words: list[str], expected: list[str]) -> None:
    status, out, _ = call("recipes", *words)
    assert status == 0
    if len(expected) == 1:  # its methods
        assert out.startswith(f"{expected[0]}: ")
    else:
        assert sorted(listed(out)) == sorted(expected)


def test_a_method_takes_its_own_tables(call: Command) -> None:
    out = call("recipes", "cifar100_resnet18", "lesam_plus")[1]
    assert re.search(r"^_lesam_plus +2 +Table 4$", out, re.M)
    assert "What one sets: lesam-dist recipes cifar100_resnet18_lesam_plus" in out


def test_what_is_printed_is_the_recipe(call: Command, tmp_path: Path, seed: int) -> None:
    for name in random.Random(seed).sample(recipes(), 4):
        status, out, _ = call("recipes", name)
        (tmp_path / "mine.yaml").write_text(out)
        assert status == 0
        assert parse(["--config", str(tmp_path / "mine.yaml")]) == parse(["--config", name])
        assert all(len(line) <= 80 for line in out.splitlines() if line.startswith("#") and "lesam-dist" not in line)


def test_what_it_costs_and_needs() -> None:
    text = one_recipe("mnist5k")
    assert '# Needs pip install "lesam-dist[mnist]".' in text
    assert "# Costs 8 epochs of 125 steps, a batch of 32, passes a step: 2." in text
    assert "# Of the paper: Table 1, Table 4, Table 6, Figure 6, Figure 7." in one_recipe("cifar100_resnet18_lesam")
    assert about("imagenet_resnet50").needs == ("--data.root DIR", "[dali]")
    assert "weights" in about("pacs_resnet18_erm").needs
    assert passes("sgd") == "1"
    assert passes("looksam") == methods()["looksam"].registration.passes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["cifar100_resnet18_lesan"],
            "unknown recipe 'cifar100_resnet18_lesan': did you mean 'cifar100_resnet18_lesam'?",
        ),
        (["imagnet"], "did you mean 'imagenet'?"),
        (["digits", "imagenet"], "no recipe has all of: digits, imagenet. Leave one of them out."),
        (["qqqqqq"], "no recipe has 'qqqqqq': `lesam-dist recipes` lists all."),
        (["--colour"], "unrecognized arguments: --colour (lesam-dist recipes --help)"),
    ],
)
def test_nothing_is_found(call: Command, words: list[str], message: str) -> None:
    status, _, err = call("recipes", *words)
    assert status == 2
    assert err.count("\n") == 1
    assert message in err


def test_tables_are_those_of_the_readme() -> None:
    """Each row of README.md's table is the same names in about.yaml, and its methods are there."""
    rows = re.findall(
        r"^\| ((?:Table|Section) [\d.]+)[^|]*\| (.*) \|$",
        files("lesam_dist.recipes").joinpath("README.md").read_text(),
        re.M,
    )
    assert len(rows) == 8
    for name, text in rows:
        data = set(re.findall(r"`(\w+)_`", text))
        found = {data_and_model(one.base)[0] for one in all_about() if name in one.tables}
        assert found == data, name
        ends = set(re.findall(r"`_(\w+)`", text))
        for one in all_about():
            if name in one.tables and ends:
                assert ends <= set(one.tables[name])
                assert set(one.tables[name]) <= set(methods_of(one.base))


def test_numbers_of_images_are_those_of_the_parts() -> None:
    """Where a part of the recipes says in its first lines how many there are."""
    said = {"digits": 1438, "mnist5k": 4000, "cifar100_lt100": 10847, "cifar100_lt50": 12608, "cifar10_lt100": 12406}
    for base in bases():
        data, _ = data_and_model(base)
        text = files("lesam_dist.recipes").joinpath("parts", "data", f"{data}.yaml").read_text()
        if data in said:
            assert f"{said[data]:,}" in text
            assert about(base).images == said[data]
        assert split(f"{base}_lesam") == (base, "lesam")
