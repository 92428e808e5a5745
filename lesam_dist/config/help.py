"""The methods and their arguments for `--help`, in the shape that argparse gives its own."""

from __future__ import annotations

import re
import textwrap

from lesam_dist.config.methods import in_words, shown
from lesam_dist.optim.engine.arguments import Argument
from lesam_dist.optim.engine.registry import Method, methods

_WIDTH, _INDENT = 78, 24
_HEADING = "methods, and the --optimizer.args.NAME of each:"


def methods_help() -> str:
    """What each method perturbs along, its passes, and its arguments with meaning, range and default."""
    return "\n".join([_HEADING, *map(_method, methods().values())])


def _method(method: Method) -> str:
    known = method.registration
    names = sorted(set(method.names) - {method.name, method.class_name.lower()})
    also = f"; also called {', '.join(names)}" if names else ""
    lines = [_entry(f"  {method.name}", f"along {known.along}; passes a step: {known.passes}{also}")]
    return "\n".join([*lines, *map(_argument, method.arguments.values())])


def _argument(argument: Argument) -> str:
    meaning = re.split(r"\.\s", argument.text, maxsplit=1)[0]
    meaning = re.sub(r", (?:[<>]=? [\d.]+|in [\[(][^\])]*[\])])(?=[.;:]|$| \()", "", meaning)  # it is said behind
    limits = in_words(argument).replace("a finite number ", "")
    return _entry(f"    {argument.name}", f"{meaning} ({limits}; default: {shown(argument.default)})")


def _entry(name: str, text: str) -> str:
    """A name on the left, the text on the right; below it where the name is too long."""
    filled = textwrap.fill(text.replace("`", ""), _WIDTH, initial_indent=" " * _INDENT, subsequent_indent=" " * _INDENT)
    return name.ljust(_INDENT) + filled[_INDENT:] if len(name) < _INDENT - 1 else f"{name}\n{filled}"
