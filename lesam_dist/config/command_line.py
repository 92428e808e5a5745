"""From a command line to a `Config`: recipes by name, every field as a flag, one clear error."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    set_parsing_settings,
)

from lesam_dist.config.checks import checked
from lesam_dist.config.explain import explain, sections, unknown_key
from lesam_dist.config.flags import Flag, both_given, read_flags, require_values, values_of, words_of
from lesam_dist.config.help import methods_help
from lesam_dist.config.help_screens import first_screen, is_help, screen
from lesam_dist.config.launcher import accelerate_flags
from lesam_dist.config.methods import as_typed, canonical, known_method, paths_of_some, paths_read, shown
from lesam_dist.config.recipes import Tree, bases, compose, describe, recipes, split
from lesam_dist.config.schema import Config
from lesam_dist.config.sources import Combined, combine, leaves
from lesam_dist.config.strict_yaml import read_value, read_yaml, read_yaml_file
from lesam_dist.config.values import flatten
from lesam_dist.errors import UserError

_PROG = "lesam-dist train"
_USAGE = """lesam-dist train [--config NAME_OR_FILE] [--SECTION.FIELD VALUE ...]
       torchrun --nproc-per-node N -m lesam_dist.train [the same]"""
_DESCRIPTION = "Train an image classifier with LE-SAM. Recipes for --config: {recipes} Flags behind it win."
_ARGS = "optimizer.args"


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's, which leaves the lines of the list of methods as they are."""


@cache
def build_parser() -> ArgumentParser:
    """The parser of `lesam-dist train`; its fields, types and help come from `Config`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=_PROG,
        usage=_USAGE,
        description=textwrap.fill(_DESCRIPTION.format(recipes=describe()), 78),
        epilog=methods_help(),
        formatter_class=_Formatter,
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
    flags = read_flags(sys.argv[1:] if argv is None else argv)
    if asked := [path for path, _ in flags if is_help(path)]:
        show_help(asked[0])
    parser = build_parser()
    require_values(flags)
    names = [str(text) for path, text in flags if path == "config"]
    flags = [*read_flags(accelerate_flags(os.environ)), *(flag for flag in flags if flag[0] != "config")]
    values = values_of(flags)
    for name, first in sections().items():
        if name in values:
            raise UserError(f"--{name} is a section: set its fields, e.g. --{name}.{first} {shown(values[name])}.")
    sources = [_source(name) for name in names]
    given = [*map(leaves, sources), values]
    chosen = [known_method(tree.get("optimizer.name")) for tree in given]  # imports those that are given by a path
    if wrong := unknown_key([*(path for tree in given[:-1] for path in tree), *(path for path, _ in flags)], chosen):
        raise UserError(wrong)
    combined = combine(sources, values)
    config = _instantiate(parser, combined, flags)
    if ("print_config", None) in flags:
        print(dump(config), end="")
        sys.exit(0)
    own = [source for name, source in zip(names, sources, strict=True) if not split(name)]
    set_by_user = {canonical(path) for source in own for path in leaves(source)}
    return CommandLine(config, combined.notes, frozenset(set_by_user | values.keys()))


def show_help(path: str) -> NoReturn:
    """Print what ``--help`` or ``--help.SECTION`` asks for, and exit.

    Raises:
        UserError: for a section that there is not.
    """
    name = path.removeprefix("help").removeprefix(".")
    print(screen(name, build_parser().format_help()) if name else first_screen())
    sys.exit(0)


def dump(config: Config) -> str:
    """The config as YAML that `--config` reads back, without fields that its method does not read."""
    tree: dict[str, Any] = {}
    unread = paths_of_some() - paths_read(config.optimizer.name, config.optimizer.base)
    for path, value in flatten(config).items():
        if path in unread:
            continue
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return str(yaml.safe_dump(tree, sort_keys=False))


def _instantiate(parser: ArgumentParser, combined: Combined, flags: Sequence[Flag]) -> Config:
    """The config of the sources with the flags over them; jsonargparse sees all but the method's arguments."""
    given = values_of(flags)
    args = combined.args | _args_of(combined.method, given)
    others = [flag for flag in flags if flag[1] is not None and not canonical(flag[0]).startswith(_ARGS)]
    text = json.dumps(combined.tree, default=str, indent=1)  # jsonargparse takes a text like a file
    try:
        words = [*(["--config", text] if combined.tree else []), *words_of(others)]
        values = parser.instantiate(parser.parse_args(words))
    except ArgumentError as error:
        raise UserError(explain(str(error), leaves(combined.tree) | given)) from error
    config = Config(**{name: values[name] for name in Config.__dataclass_fields__})
    config.optimizer.args = args
    return checked(config)


def _args_of(name: str, flags: Mapping[str, str]) -> dict[str, Any]:
    """The method's arguments among the flags, as YAML reads them."""
    args: dict[str, Any] = {}
    if _ARGS in flags:
        args = read_value(flags[_ARGS]) or {}
        if not isinstance(args, dict):
            raise UserError(f"{_ARGS} is {shown(flags[_ARGS])}: it must be arguments in braces, e.g. {{rho: 0.1}}.")
        args = {str(key): value for key, value in args.items()}
    method = known_method(name)
    for path, text in flags.items():
        if path.startswith(f"{_ARGS}."):
            key, value = path.removeprefix(f"{_ARGS}."), read_value(text)
            if key in args and args[key] != value:
                raise both_given(f"--{_ARGS} {flags[_ARGS]}", f"--{path} {text}")
            args[key] = as_typed(method.arguments[key], value, text) if method and key in method.arguments else value
    return args


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


def _filled(tree: Tree, name: str, prefix: str = "") -> Tree:
    """The tree without sections that have no fields."""
    filled: Tree = {}
    for key, value in tree.items():
        section = f"{prefix}{key}"
        if section not in sections():
            filled[key] = value
        elif isinstance(value, dict):
            filled[key] = _filled(value, name, f"{section}.")
        elif value is not None:
            raise UserError(f"{name} has {section}: {shown(value)}, but {section} is a section of fields.")
    return filled
