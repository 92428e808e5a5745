"""A user's YAML, read strictly: what another reader would pass over or choke on is one error with its place.

Refused: a key that is there twice (YAML itself lets the last one win), aliases that expand without end, anything but
named fields at the top. ``a.b: 1`` is the same as ``a: {b: 1}``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lesam_dist.errors import UserError, one_line

Tree = dict[str, Any]

_MOST_BYTES = 1_000_000
_MOST_NODES = 10_000  # with every alias expanded; a config has about a hundred
_DEEPEST = 20
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's, which takes 1e-3 for a text, as YAML 1.2 has it: a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml_file(path: str) -> Tree:
    """The fields in a YAML file.

    Raises:
        UserError: where it cannot be read or is not a config.
    """
    name = f"config file '{path}'"
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {error}.") from error
    if len(data) > _MOST_BYTES:
        raise UserError(f"{name} has more than {_MOST_BYTES} bytes: it is no config.")
    try:
        return read_yaml(data.decode(), name)
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not a text in UTF-8 (byte {error.start}): it is no config.") from error


def read_yaml(text: str, name: str) -> Tree:
    """The fields in a YAML text; ``name`` is what errors call it.

    Raises:
        UserError: where it is not a config.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise UserError(f"{name} is empty: give it at least one field, e.g. 'epochs: 15'.")
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{name} holds no fields but {one_line(text)!r}: write them as 'epochs: 15'.")
        _check(node, name, 0, {}, [])
        return _tree(loader.construct_document(node), name)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {_first_problem(error)}.") from error
    except RecursionError as error:
        raise UserError(f"{name} is nested too deeply: it is no config.") from error
    except ValueError as error:  # a date that is none, an integer of thousands of digits
        raise UserError(f"{name} has a value that cannot be read: {error}.") from error


def read_value(text: str) -> Any:
    """What YAML reads in a text; the text itself where it is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _check(node: yaml.Node, name: str, depth: int, sizes: dict[int, int], above: list[int]) -> int:
    """Refuse repeated keys and endless aliases; the number of nodes with aliases expanded."""
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in above or depth > _DEEPEST:
        raise UserError(f"{name} is nested too deeply, from {_place(node)} on: it is no config.")
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise UserError(
                        f"{name} has the key '{one_line(key.value)}' twice, in lines {lines[key.value]} and {line}: "
                        "keep one."
                    )
                lines[key.value] = line
            children += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_check(child, name, depth + 1, sizes, [*above, id(node)]) for child in children)
    if size > _MOST_NODES:
        raise UserError(f"{name} expands to more than {_MOST_NODES} values, at {_place(node)}: it is no config.")
    sizes[id(node)] = size
    return size


def _tree(fields: dict[Any, Any], name: str) -> Tree:
    """Nested fields with texts for keys, and dotted ones put where they belong."""
    tree: Tree = {}
    for key, value in fields.items():
        *parents, leaf = str(key).split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{name} has '{parent}' as a field and as a section: keep one.")
        new = _tree(value, name) if isinstance(value, dict) else value
        if isinstance(new, dict) and isinstance(node.get(leaf), dict):
            shared = new.keys() & node[leaf].keys()
            if shared:
                raise UserError(f"{name} has the key '{key}.{min(shared)}' twice: keep one.")
            new = {**node[leaf], **new}
        elif leaf in node:
            raise UserError(f"{name} has the key '{one_line(str(key))}' twice: keep one.")
        node[leaf] = new
    return tree


def _place(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _first_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, {error.problem or error.context}"
    return " ".join(str(error).split())
