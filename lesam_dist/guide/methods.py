"""`lesam-dist methods`: all methods in a table, and of one its formula, cost and arguments."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from lesam_dist.config.help import argument_in_full, bounded
from lesam_dist.config.methods import OF_BASE, OPTIONS, PLAIN, method_of
from lesam_dist.config.parser import Parser, examples
from lesam_dist.config.schema import OptimizerConfig
from lesam_dist.config.values import flatten
from lesam_dist.optim.engine.registry import Method, methods

_TEXT = """List the methods: what each perturbs along, its passes a step, its hyper-parameters with their defaults.
The NAME of one prints its formula and source, what is exact, what it costs and keeps, and every argument with range
and default. package.module:Class takes one of your own."""
_WIDTH = 78
_PLAIN = {
    "sgd": "torch's SGD",
    "adamw": "torch's AdamW",
    "lars": "SGD with a length of the step for each layer",
    "lamb": "Adam with a length of the step for each layer",
}


def methods_command(argv: Sequence[str]) -> None:
    """Print the methods, or one.

    Raises:
        UserError: for a name that no method has, with the nearest one.
    """
    name = parser().parse_args(list(argv)).name
    if name is None:
        print("\n".join(_table()))
        return
    method = method_of(name)
    print("\n".join(_one(method) if method else _plain(name)))


def parser() -> Parser:
    """Its arguments."""
    found = Parser("methods", _TEXT, examples("methods", "methods lesam", "methods my_package.my_module:MyMethod"))
    found.add_argument("name", metavar="NAME", nargs="?", help="of a method, or one of its other names")
    return found


def _table() -> Iterator[str]:
    for method in methods().values():
        known = method.registration
        keeps = f"; keeps {known.keeps}" if known.keeps else ""
        yield bounded(method.name, f"along {known.along}; passes: {known.passes}{keeps}", 13)
        arguments = ", ".join(f"{own.name} {_default(own.default)}" for own in method.arguments.values())
        yield bounded("", f"[{arguments}]" if arguments else "[no arguments]", 13)
    yield ""
    for name, text in _PLAIN.items():
        yield bounded(name, f"{text}; passes: 1", 13)
    yield ""
    yield "In brackets the arguments, --optimizer.NAME VALUE, and their defaults."
    yield "Formula, source, cost and ranges of one: lesam-dist methods lesam"


def _one(method: Method) -> Iterator[str]:
    known = method.registration
    names = sorted(set(method.names) - {method.name})
    yield from _document(method)
    yield ""
    yield bounded("passes a step", known.passes, 16)
    yield bounded("perturbs along", known.along.replace("`", ""), 16)
    yield bounded("keeps", known.keeps or "nothing beside the copy of the weights", 16)
    yield from [bounded("also called", ", ".join(names), 16)] if names else []
    yield bounded("in Python", f"from {method.module} import {method.class_name}", 16)
    yield ""
    yield f"arguments: lesam-dist train --optimizer.name {method.name} --optimizer.NAME VALUE"
    yield from map(argument_in_full, method.arguments.values())
    yield ""
    options = [name for name in OPTIONS if name not in known.without]
    yield textwrap.fill(
        f"options (lesam-dist train --help.optimizer): {', '.join(options)}", _WIDTH, subsequent_indent="  "
    )


def _plain(name: str) -> Iterator[str]:
    defaults = flatten(OptimizerConfig())
    yield f"{name}: {_PLAIN[name]}, without a perturbation."
    yield "Passes a step: 1."
    yield f"Inside a method it is --optimizer.base {name}."
    yield ""
    yield f"fields: lesam-dist train --optimizer.name {name} --optimizer.NAME VALUE"
    for field in ("lr", "weight_decay", *OF_BASE[name]):
        yield f"    {field:20s}default: {_default(defaults[field])}"
    yield ""
    yield f"others: {', '.join(other for other in PLAIN if other != name)}; lesam-dist methods lists the methods"


def _default(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return "needed" if isinstance(value, type) else str(value)


def _document(method: Method) -> Iterator[str]:
    """What the method's file says at its top, for a terminal; nothing is imported for it but the method's package."""
    spec = find_spec(method.module)
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) if spec and spec.origin else None
    for number, paragraph in enumerate((text or method.name).split("\n\n")):
        yield from [""] if number else []
        if not paragraph.startswith("    "):
            yield textwrap.fill(paragraph.replace("`", ""), _WIDTH)
            continue
        for line in paragraph.split("\n"):
            yield from _formula(line)


def _formula(line: str) -> Iterator[str]:
    """A line with what is said beside it; below it where there is no room."""
    found = re.fullmatch(r"(\s*\S.{12,}\S)\s{3,}(\S.*)", line)
    if len(line) <= _WIDTH or found is None:
        yield line
        return
    yield found[1]
    yield textwrap.fill(found[2], _WIDTH, initial_indent=" " * 12, subsequent_indent=" " * 12)
