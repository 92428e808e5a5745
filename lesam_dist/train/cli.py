"""From a command line to a `Config`: recipes by name, every field as a flag, one clear error."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings  # type: ignore[attr-defined]

from lesam_dist.errors import UserError
from lesam_dist.train.config import Config, flatten
from lesam_dist.train.launcher import accelerate_flags
from lesam_dist.train.recipes import compose, describe, split

_PROG = "lesam-dist train"
_USAGE = """lesam-dist train [--config NAME_OR_FILE] [--SECTION.FIELD VALUE ...]
       torchrun --nproc-per-node N -m lesam_dist.train [the same]"""
_DESCRIPTION = "Train an image classifier with LE-SAM. Recipes for --config: {recipes} Flags behind it win."


def build_parser() -> ArgumentParser:
    """The parser of `lesam-dist train`; its fields, types and help come from `Config`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=_PROG,
        usage=_USAGE,
        description=_DESCRIPTION.format(recipes=describe()),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a recipe's name or a YAML file")
    parser.add_class_arguments(Config)
    return parser


def parse(argv: Sequence[str] | None = None) -> Config:
    """The config of a command line (default: this process's).

    Raises:
        UserError: for anything wrong in it, with the nearest valid name for an unknown key.
        SystemExit: after --help and --print_config.
    """
    parser = build_parser()
    argv = _with_launcher(_resolve(list(sys.argv[1:] if argv is None else argv)))
    try:
        namespace = parser.parse_args(argv)
        return _instantiate(parser, namespace)
    except ArgumentError as error:
        raise UserError(_explain(str(error))) from error


def dump(config: Config) -> str:
    """The config as YAML that `--config` reads back."""
    tree: dict[str, Any] = {}
    for path, value in flatten(config).items():
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return str(yaml.safe_dump(tree, sort_keys=False))


def _instantiate(parser: ArgumentParser, namespace: Any) -> Config:
    values = parser.instantiate(namespace)
    return Config(**{name: values[name] for name in Config.__dataclass_fields__})


def _resolve(argv: list[str]) -> list[str]:
    """Replace recipe names behind --config by their content, and let --dry_run stand alone."""
    resolved: list[str] = []
    previous = ""
    for arg in argv:
        if previous == "--config":
            arg = _config_source(arg)
        elif arg.startswith("--config="):
            arg = "--config=" + _config_source(arg.removeprefix("--config="))
        if previous == "--dry_run" and arg not in ("true", "false"):
            resolved[-1] = "--dry_run=true"  # a flag without a value
        resolved.append(arg)
        previous = arg
    if previous == "--dry_run":
        resolved[-1] = "--dry_run=true"
    return resolved


def _with_launcher(argv: list[str]) -> list[str]:
    """The launcher's settings between the config files, which they override, and the flags, which override them."""
    files: list[str] = []
    flags: list[str] = []
    previous = ""
    for arg in argv:
        is_file = arg == "--config" or previous == "--config" or arg.startswith("--config=")
        (files if is_file else flags).append(arg)
        previous = arg
    return [*files, *accelerate_flags(os.environ), *flags]


def _config_source(name: str) -> str:
    """A recipe as YAML text, which jsonargparse takes like a file; text and files as they are."""
    if split(name) is None:
        if "\n" in name or Path(name).is_file():
            return name
        if Path(name).suffix in (".yaml", ".yml"):
            raise UserError(f"config file '{name}' does not exist. Recipes by name are {describe()}")
    return str(yaml.safe_dump(compose(name), sort_keys=False))


_UNKNOWN = (
    r"[Uu]nrecognized arguments: --?([\w.]+)",
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<option>\w+)'",
    r"(?:Key|key) ['\"]([\w.]+)['\"] is not expected",
    r"Option '([\w.]+)' is not accepted",
)


def _explain(message: str) -> str:
    """jsonargparse's message as one line, with the nearest key where one is unknown."""
    for pattern in _UNKNOWN:
        if found := re.search(pattern, message):
            return nearest_key(".".join(found.groups()))
    if found := re.search(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL):
        key, reason = found.groups()
        return f"{key}: {' '.join(reason.replace('typing.', '').split())}"
    return " ".join(message.split())


def nearest_key(key: str) -> str:
    """What to say of a key that the config does not have."""
    keys = list(flatten(Config()))
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not near:  # a field named without its section
        leaves = {k.split(".")[-1]: k for k in keys}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(key.split(".")[-1], leaves, n=1, cutoff=0.5)]
    hint = f"did you mean '{near[0]}'?" if near else "see --help for all of them."
    return f"unknown key '{key}': {hint}"
