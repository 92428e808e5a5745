"""What is known of a recipe beside what it sets: its data, what it needs, its tables in the paper (about.yaml)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from lesam_dist.config.methods import known_method
from lesam_dist.config.recipes import Tree, bases, compose_parts, data_and_model, method_part

_DIR, _FETCHED = "--data.root DIR", "170 MB downloaded"


@dataclass(frozen=True)
class About:
    """A DATA_MODEL in words.

    Attributes:
        base: its name, e.g. "cifar100_resnet18".
        data: what is trained on.
        images: how many; None: it depends on flags.
        network: the model's name in the config.
        steps_with: the plain optimizer that its methods step with.
        epochs, batch: of the run.
        needs: what must be there first, or is fetched.
        tables: of the paper, each with the methods in it.
    """

    base: str
    data: str
    images: int | None
    network: str
    steps_with: str
    epochs: int
    batch: int
    needs: tuple[str, ...]
    tables: Mapping[str, tuple[str, ...]]

    @property
    def steps(self) -> int | None:
        """Optimizer steps of an epoch, the last part of a batch left out."""
        return None if self.images is None else self.images // self.batch

    @property
    def text(self) -> str:
        """All of it in lower case, to search in."""
        tables = " ".join(self.tables) or "beyond the paper"
        return f"{self.base} {self.data} {self.network} {self.steps_with} {' '.join(self.needs)} {tables}".lower()


@cache
def about(base: str) -> About:
    """What is known of a DATA_MODEL."""
    data, model = data_and_model(base)
    known, tree = _read()["data"][data], compose_parts(base, "sam")
    tables = {
        name: tuple(table["methods"])
        for name, table in _read()["paper"].items()
        if data in table["data"] and model in table["models"]
    }
    section = tree["data"]
    return About(
        base,
        known["is"],
        known.get("images"),
        tree["model"]["name"],
        tree["optimizer"].get("base", "sgd"),
        tree["epochs"],
        section["batch_size"],
        tuple(_needs(tree, known.get("needs", ""))),
        tables,
    )


def all_about() -> list[About]:
    """Every DATA_MODEL, the smallest first: those that need nothing, those that are fetched, those of one's own."""
    found = [about(base) for base in bases()]
    return sorted(
        found, key=lambda one: (_DIR in one.needs, bool({_FETCHED, "weights"} & {*one.needs}), bool(one.needs))
    )


def passes(method: str) -> str:
    """Forward and backward passes of a step of a method that a recipe is named after, in words."""
    found = known_method(method_part(method)["optimizer"]["name"])
    if found is None:  # a plain optimizer
        return "1"
    return found.registration.passes


def _needs(tree: Tree, of_data: str) -> Iterator[str]:
    if of_data:
        yield of_data
    if tree["data"].get("backend") == "dali":
        yield "[dali]"
    if tree["model"].get("pretrained"):
        yield "weights"


@cache
def _read() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(files("lesam_dist.recipes").joinpath("about.yaml").read_text())
    return read
