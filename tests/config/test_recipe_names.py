"""A recipe's name: how it is taken apart, what help and the README say of it, and what is said of one that is none."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from lesam_dist.config.methods import PLAIN
from lesam_dist.config.recipes import ALIASES, bases, compose, compose_parts, merge, methods, recipes, split
from tests.conftest import Command


def test_names() -> None:
    assert split("digits_noisy_resnet8_lesam_plus") == ("digits_noisy_resnet8", "lesam_plus")
    for short, full in ALIASES.items():
        assert split(short) == split(full)
        assert full in recipes()
    assert split("cifar100_resnet18") is None
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": None}, "d": 3}) == {"a": {"b": None, "c": 2}, "d": 3}
    assert compose("digits")["run_dir"] == "runs/digits"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar100_resnet18_lesan", "did you mean 'cifar100_resnet18_lesam'?"),
        ("cifar100_resnet8_sam", "unknown recipe 'cifar100_resnet8_sam': did you mean"),
        ("cifar100_resnet18", "names no method: add one of _asam,"),
        (
            "xyz",
            "a recipe is DATA_MODEL_METHOD, e.g. cifar100_resnet18_lesam. DATA and MODEL: cifar10 or cifar100 with",
        ),
    ],
)
def test_unknown_names(command: Command, name: str, message: str) -> None:
    status, _, err = command("--config", name)
    assert status == 2
    assert message in err


def test_another_plain_optimizer_with_a_recipe() -> None:
    """`compare --methods adamw` with a recipe on SGD; `sgd` alone stands for the recipe's own."""
    assert compose_parts("cifar10_resnet18", "adamw")["optimizer"]["name"] == "adamw"
    assert compose_parts("imagenet_vit_b16", "sgd")["optimizer"]["name"] == "adamw"
    assert split("imagenet_vit_b16_adamw") == ("imagenet_vit_b16", "adamw")
    assert split("imagenet_resnet50_adamw") is None


def test_the_readme_names_recipes_that_exist() -> None:
    """By their ends, `_sam`, and their beginnings, `cifar10_`."""
    text = files("lesam_dist.recipes").joinpath("README.md").read_text()
    ends, beginnings = (set(re.findall(pattern, text)) for pattern in ("`_([a-z0-9_]+)`", "`([a-z0-9]+)_`"))
    assert {"sam", "lesam_plus", "lars"} < ends <= {*methods(), *PLAIN}
    assert {"cifar10", "imagenet"} < beginnings <= {base.split("_")[0] for base in bases()}


def test_help_lists_recipes_by_parts(command: Command) -> None:
    status, out, _ = command("--help.all")
    text = " ".join(out.split())
    assert status == 0
    models = "resnet18, wrn28_10, pyramidnet110, preactresnet18, preactresnet18_at, vit_b16_finetune"
    assert f"cifar10 or cifar100 with {models};" in text
    assert "cifar10_resnet18_sam" not in text
