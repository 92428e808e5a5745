"""What is wrong with a key, a value or a flag, in one line that says what to write instead."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lesam_dist.config.methods import argument_paths, canonical, in_words, shown
from lesam_dist.config.recipes import ALIASES, bases, recipes
from lesam_dist.config.schema import Config
from lesam_dist.config.values import default_values
from lesam_dist.errors import one_line
from lesam_dist.optim.engine.registry import Method, methods

SCREENS = RUN, METHODS, ALL = "run", "methods", "all"
"""What --help.NAME shows beside the sections: fields that are in none, the methods' arguments, everything."""

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def explain(message: str, values: Mapping[str, Any]) -> str:
    """jsonargparse's message as one line.

    Args:
        message: of its error.
        values: what was given, by dotted path.
    """
    found = re.search(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL)
    if found is None:
        return _one_line(message)
    key, reason = found.groups()
    if (text := expected(key)) is None:
        return f"{key}: {_one_line(reason)}"
    given = shown(values[key]) if key in values else "something else"
    return f"{key} is {given}: it must be {text}.{_nearest_choice(key, values.get(key))}"


def expected(path: str) -> str | None:
    """What a field holds, in words; None where there is no such field."""
    if (kind := _kinds().get(path)) is not None:
        return _in_words(kind, path)
    name = canonical(path).removeprefix("optimizer.args.")
    texts = {in_words(own.arguments[name]) for own in methods().values() if name in own.arguments}
    return " or ".join(sorted(texts)) if canonical(path) == f"optimizer.args.{name}" and texts else None


def unknown_key(paths: Iterable[str], also: Iterable[Method | None] = ()) -> str | None:
    """What to say of the first of these that the config does not have; None where it has all.

    Args:
        paths: of a file or of flags.
        also: methods whose arguments are known beside those of the registry.
    """
    known = {
        *_kinds(),
        *argument_paths(also),
        "help",
        "print_config",
        *(f"help.{name}" for name in (*SCREENS, *sections())),
    }
    unknown = (path for path in paths if path.removesuffix("+") not in known and not path.startswith("task_args."))
    return next((nearest_key(path, also) for path in unknown), None)


def is_optional(path: str) -> bool:
    """Whether null is a value of the field."""
    return type(None) in get_args(_kinds()[path])


@cache
def sections() -> dict[str, str]:
    """The config's groups of fields by dotted path, each with its first field."""
    return dict(_sections(Config, ""))


def _sections(kind: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for name, inner in get_type_hints(kind).items():
        if is_dataclass(inner):
            yield prefix + name, fields(inner)[0].name
            yield from _sections(inner, f"{prefix}{name}.")


def nearest_key(key: str, also: Iterable[Method | None] = ()) -> str:
    """What to say of a key that the config does not have."""
    keys = [*_kinds(), *argument_paths(also), "config", "help", "print_config"]
    if key.split(".")[-1] == "help":
        section = key.rpartition(".")[0].lstrip("-")
        shows = f"--help.{section} shows its fields" if section in sections() else "--help.all shows every field"
        return f"{shows} with their meaning; --print_config the values of a recipe."
    near = difflib.get_close_matches(key.replace("-", "_"), keys, n=1, cutoff=0.5)
    if not near:  # a field named without its section
        leaves = {k.split(".")[-1]: k for k in keys}
        leaf = key.split(".")[-1].replace("-", "_")
        near = [leaves[leaf] for leaf in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.5)]
    hint = f"did you mean '{near[0]}'?" if near else "see --help.all for all of them."
    return f"unknown key '{one_line(key)}': {hint}"


def stray_word(text: str) -> str:
    """What to say of a word of the command line that is no flag, and behind none."""
    word = text.split()[0] if text.split() else text
    if word.startswith("-") and not word[1:2].isdigit():
        return nearest_key(word.lstrip("-"))
    known = {name.lower(): name for name in (*ALIASES, *bases(), *recipes())}
    if word.lower() in known or word.endswith((".yaml", ".yml")):
        return f"'{word}' has no flag before it: did you mean --config {known.get(word.lower(), word)}?"
    return f"'{shown(word)}' has no flag before it: every value follows its own --SECTION.FIELD, see --help."


def _nearest_choice(key: str, value: Any) -> str:
    choices = [str(choice) for choice in _choices(_kinds()[key])]
    near = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


@cache
def _kinds() -> dict[str, Any]:
    """Each leaf's type by its dotted path."""
    return dict(_leaves(Config, ""))


def _leaves(kind: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, inner in get_type_hints(kind).items():
        if is_dataclass(inner):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, inner


def _choices(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(choice for part in get_args(kind) for choice in _choices(part))


def _in_words(kind: Any, path: str) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = " or ".join(_in_words(part, path) for part in parts if part is not type(None))
        return f"{inner}, or null" if type(None) in parts else inner
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else str(parts[0])
    if origin is tuple:
        default = default_values()[path]
        example = range(1, len(parts) + 1) if default is None else default
        return f"{len(parts)} numbers in brackets, e.g. [{','.join(f'{value:g}' for value in example)}]"
    if origin is list and get_origin(parts[0]) is tuple:
        return "pairs in brackets, e.g. [[0,128],[30,224]]"
    if origin is list:
        return "names in brackets, e.g. [A,B]"
    if origin is dict:
        return "arguments in braces, e.g. {rho: 0.1}"
    return _NAMES.get(kind, str(kind))


def _one_line(text: str) -> str:
    return " ".join(text.replace("typing.", "").split())
