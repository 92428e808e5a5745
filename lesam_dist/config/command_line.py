"""From a command line to a `Config`: recipes by name, every field as a flag, one clear error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings  # type: ignore[attr-defined]

from lesam_dist.config.explain import explain, sections, shown, unknown_key
from lesam_dist.config.launcher import accelerate_flags
from lesam_dist.config.method_fields import fields_of_some, fields_read
from lesam_dist.config.recipes import Tree, bases, compose, describe, recipes, split
from lesam_dist.config.schema import Config, flatten
from lesam_dist.config.sources import combine, flag_values, leaves
from lesam_dist.config.strict_yaml import read_yaml, read_yaml_file
from lesam_dist.errors import UserError

_PROG = "lesam-dist train"
_USAGE = """lesam-dist train [--config NAME_OR_FILE] [--SECTION.FIELD VALUE ...]
       torchrun --nproc-per-node N -m lesam_dist.train [the same]"""
_DESCRIPTION = "Train an image classifier with LE-SAM. Recipes for --config: {recipes} Flags behind it win."


@cache
def build_parser() -> ArgumentParser:
    """The parser of `lesam-dist train`; its fields, types and help come from `Config`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=_PROG,
        usage=_USAGE,
        description=_DESCRIPTION.format(recipes=describe()),
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a recipe's name or a YAML file")
    help_print = "print all that the run would read, as a YAML file for --config, and end"
    parser.add_argument("--print_config", action="store_true", help=help_print)
    parser.add_class_arguments(Config)
    return parser


@dataclass(frozen=True)
class CommandLine:
    """A config, and how it came about.

    Attributes:
        config: the run.
        notes: a line for each thing that was adapted.
        given: dotted paths that the user set, in a flag, a file or the launcher, rather than a recipe.
    """

    config: Config
    notes: tuple[str, ...]
    given: frozenset[str]


def parse(argv: Sequence[str] | None = None) -> Config:
    """The config of a command line (default: this process's), see `read_command_line`."""
    return read_command_line(argv).config


def read_command_line(argv: Sequence[str] | None = None) -> CommandLine:
    """A command line, where flags win over the launcher's settings, and these over recipes and files.

    Raises:
        UserError: for anything wrong in it, with the nearest valid name for an unknown key.
        SystemExit: after --help and --print_config.
    """
    parser = build_parser()
    names, flags = _split(list(sys.argv[1:] if argv is None else argv))
    flags = [*accelerate_flags(os.environ), *flags]
    values = flag_values(flags)
    for name, first in sections().items():
        if name in values:
            raise UserError(f"--{name} is a section: set its fields, e.g. --{name}.{first} {shown(values[name])}.")
    sources = [_source(name) for name in names]
    combined = combine(sources, values)
    set_by_user = {
        path for name, source in zip(names, sources, strict=True) if not split(name) for path in leaves(source)
    }
    if wrong := unknown_key([*leaves(combined.tree), *values]):
        raise UserError(wrong)
    text = json.dumps(combined.tree, default=str, indent=1)  # jsonargparse takes a text like a file
    try:
        namespace = parser.parse_args([*(["--config", text] if combined.tree else []), *flags])
        config = _instantiate(parser, namespace)
    except ArgumentError as error:
        raise UserError(explain(str(error), leaves(combined.tree) | values)) from error
    if namespace.print_config:
        print(dump(config), end="")
        sys.exit(0)
    return CommandLine(config, combined.notes, frozenset(set_by_user | values.keys()))


def dump(config: Config) -> str:
    """The config as YAML that `--config` reads back, without fields that its method does not read."""
    tree: dict[str, Any] = {}
    unread = fields_of_some() - fields_read(config.optimizer.name, config.optimizer.base)
    for path, value in flatten(config).items():
        if path in unread:
            continue
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return str(yaml.safe_dump(tree, sort_keys=False))


def _instantiate(parser: ArgumentParser, namespace: Any) -> Config:
    values = parser.instantiate(namespace)
    return Config(**{name: values[name] for name in Config.__dataclass_fields__})


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands behind each --config, and the other flags, among which --dry_run may stand alone."""
    configs: list[str] = []
    flags: list[str] = []
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if arg == "--config":
            if not rest or rest[0].startswith("--"):
                raise UserError("--config has no value: give it a recipe's name or a YAML file.")
            configs.append(rest.pop(0))
        elif arg.startswith("--config="):
            configs.append(arg.removeprefix("--config="))
        elif arg == "--dry_run" and (not rest or rest[0].startswith("-")):
            flags.append("--dry_run=true")
        else:
            flags.append(arg)
    return configs, flags


def _source(name: str) -> Tree:
    """The fields of a recipe, a YAML file, or a YAML text."""
    if split(name) is not None:
        return compose(name)
    if "\n" in name:
        return _filled(read_yaml(name, "the config"), "the config")
    if _is_file(name):
        return _filled(read_yaml_file(name), f"config file '{name}'")
    if Path(name).suffix in (".yaml", ".yml"):
        raise UserError(f"config file '{name}' does not exist. Recipes by name are {describe()}")
    if os.path.isdir(name):
        raise UserError(
            f"--config is '{name}', a folder: give a recipe's name or a YAML file, e.g. the config.yaml in it."
        )
    if name.lower() != name and name.lower() in {*bases(), *recipes()}:
        raise UserError(f"unknown recipe '{name}': did you mean '{name.lower()}'?")
    return compose(name)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long, or with a null byte
        return False


def _filled(tree: Tree, name: str) -> Tree:
    """The tree without sections that have no fields."""
    for section in sections().keys() & tree.keys():
        if tree[section] is not None and not isinstance(tree[section], dict):
            raise UserError(f"{name} has {section}: {shown(tree[section])}, but {section} is a section of fields.")
    return {key: value for key, value in tree.items() if value is not None or key not in sections()}
